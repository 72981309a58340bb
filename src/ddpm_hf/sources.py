"""Where images come from: sets as `datasets` loads them, their splits and columns."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageColor

from .config import EMBEDDED, TrainingConfig, is_saved
from .errors import InputError, did_you_mean
from .pixels import DECODER_VERSION, decode_row

if TYPE_CHECKING:
    import datasets

FASHION_MNIST = Path(__file__).parent / "fashion_mnist"

ROWS_PER_SHARD = 1024
"""A saved set is streamed in pieces of so many rows."""

FETCHERS = 32
"""Threads at least where each image is a file of its own on a Hub: its answers are waited for."""

HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "dev")


def open_dataset(
    config: TrainingConfig, *, streaming: bool = False, every_split: bool = False
) -> Any:
    """The image set as `datasets` loads it.

    Returns:
        A Dataset, or an IterableDataset if `streaming`; a dictionary of all splits if `every_split`
        (a set saved without splits is itself).

    Raises:
        InputError: no set is named, or `datasets` cannot load it; its reason is passed on in one
            line.
    """
    import datasets

    name, folder = config.dataset_name, None if config.dataset_name else config.train_data_dir
    if name and config.dataset_config_name is None and is_image_folder(name):
        folder = name
    if not (name or folder):
        raise InputError(
            "name the images to train on: --dataset_name (Hub id or path) or --train_data_dir "
            "(folder)"
        )
    if folder and not os.path.isdir(folder):
        raise InputError(f"train_data_dir must be a folder of images; got {folder!r}")
    splits = split_names(config.split)
    split = None if every_split else "+".join(part.strip() for part in config.split.split("+"))
    options = dict(split=split, cache_dir=config.cache_dir, streaming=streaming)
    try:
        if folder:
            return _load_folder(folder, splits, every_split, options)
        return _load_named(config, splits, options)
    except InputError:
        raise
    # `datasets` has no common base class for what it raises about names, files, splits and
    # networks.
    except (
        ValueError,
        OSError,
        ImportError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        reason = " ".join(str(error).split())
        if folder and "corresponds to no data" in reason:
            reason = f"it has no file of an image that `datasets` knows; {_endings(folder)}"
        raise InputError(f"cannot load the image set {folder or name!r}: {reason}") from error


def _load_folder(folder: str, splits: list[str], every_split: bool, options: dict[str, Any]) -> Any:
    """A folder of image files: one set, unless it has sub-folders for splits.

    `datasets` reads splits out of file names too (test_1.png).
    """
    import datasets

    there = split_folders(folder, splits)
    if not every_split:
        check_splits(folder, splits, there)
    files = None if there else {"train": "**"}
    return datasets.load_dataset("imagefolder", data_dir=folder, data_files=files, **options)


def _load_named(config: TrainingConfig, splits: list[str], options: dict[str, Any]) -> Any:
    """The embedded set, a parquet file, a saved set, or what `datasets` finds by a name."""
    import datasets

    name, streaming = config.dataset_name, options["streaming"]
    if name == EMBEDDED:
        files = {split: str(FASHION_MNIST / f"{split}.parquet") for split in ("train", "test")}
        return datasets.load_dataset("parquet", data_files=files, **options)
    if name.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files={splits[0]: name}, **options)
    if is_saved(name):
        found = from_disk(name, options["split"])
        if not streaming or isinstance(found, dict):
            return found
        return found.to_iterable_dataset(num_shards=len(found) // ROWS_PER_SHARD + 1)
    if not streaming:
        return datasets.load_dataset(name, config.dataset_config_name, **options)
    builder = datasets.load_dataset_builder(
        name, config.dataset_config_name, cache_dir=config.cache_dir
    )
    # Of a repo of image files `datasets` would decode every one as it comes.
    builder.config.decode_num_threads = 0
    return builder.as_streaming_dataset(split=options["split"])


def _endings(folder: str) -> str:
    """How the files of a folder end, the commonest first."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    counts = Counter(path.suffix or path.name for path in files)
    found = ", ".join(f"{ending} ({count})" for ending, count in counts.most_common(5))
    return f"its files end in {found}" if found else "it is empty"


def check_splits(folder: str, asked: list[str], there: set[str]) -> None:
    """Raise InputError where a split that is asked for is none of a folder's, `there`."""
    import datasets

    words = datasets.data_files.SPLIT_KEYWORDS
    for split in set(asked) - ({"all"} if there else {"all", "train"}):
        if not there & set(words.get(split, [split])):
            others = f", but {', '.join(sorted(there))} are" if there else ""
            raise InputError(
                f"split {split!r} is no sub-folder of {folder}{others}; a folder without any is "
                "`train`"
            )


def split_folders(folder: str, asked: list[str]) -> set[str]:
    """The sub-folders of a folder that are splits: by `datasets`' words, or asked for by name.

    Raises:
        InputError: others stand beside them, which it would leave out without a word; or one is
            such a word but for its capitals.
    """
    import datasets

    words = {word for split in datasets.data_files.SPLIT_KEYWORDS.values() for word in split}
    there = {entry.name for entry in os.scandir(folder) if entry.is_dir()} - {"__MACOSX"}
    there = {name for name in there if not name.startswith(".")}
    splits, others = there & (words | set(asked)), there - words - set(asked)
    capitals = sorted(name for name in others if name.lower() in words)
    if capitals:
        raise InputError(
            f"{folder} has a sub-folder {capitals[0]!r}: write it in small letters if it is a "
            "split, and by another name if it is a class"
        )
    if splits and others:
        raise InputError(
            f"{folder} has a sub-folder {min(splits)!r}, which is the word for a split, and others "
            f"that are not, like {min(others)!r}: move those away, or rename {min(splits)!r} if "
            "they are classes"
        )
    return splits


def is_image_folder(name: str) -> bool:
    """Whether a data set's name is a folder of image files, and of nothing else to load.

    `datasets` would read splits out of the names of its files, as it does not for train_data_dir.
    """
    import datasets

    folder, endings = Path(name), datasets.packaged_modules._EXTENSION_TO_MODULE
    if not folder.is_dir() or (folder / "README.md").is_file():  # which may name files for splits
        return False
    files = (path for path in folder.rglob("*") if not path.name.startswith("metadata."))
    modules = {endings.get(path.suffix.lower(), ("",))[0] for path in files if path.is_file()}
    return "imagefolder" in modules and modules <= {"imagefolder", "text", ""}


def is_remote(cell: dict[str, Any] | None) -> bool:
    """Whether a cell, not decoded, is no more than the address of a file on another machine."""
    from datasets.utils.file_utils import is_local_path

    return bool(cell and cell["bytes"] is None and cell["path"] and not is_local_path(cell["path"]))


def fetch(cells: dict[str, Any], column: str) -> dict[str, Any]:
    """A row with the bytes of its image; `datasets` tries again for minutes where a Hub is away."""
    from datasets.utils.file_utils import xopen

    if not is_remote(cells[column]):
        return cells
    path = cells[column]["path"]
    with xopen(path, "rb") as file:
        return {**cells, column: {"path": path, "bytes": file.read()}}


def fetch_all(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """As `fetch`, many rows at once."""
    if not any(is_remote(cells[column]) for cells in rows):
        return rows
    with ThreadPoolExecutor(FETCHERS) as pool:
        return list(pool.map(partial(fetch, column=column), rows))


def split_names(split: str) -> list[str]:
    """The splits in an expression of `datasets`: train[:10%]+test -> train, test."""
    return [part.split("[")[0].strip() for part in split.split("+")]


def find_held_out_split(config: TrainingConfig) -> str | None:
    """The first of the set's splits that are for testing and not trained on."""
    trained_on = set(split_names(config.split))
    if "all" in trained_on:
        return None
    found = open_dataset(config, streaming=config.streaming, every_split=True)
    names = set(found if isinstance(found, dict) else ()) - trained_on
    return next((name for name in HELD_OUT_SPLITS if name in names), None)


def from_disk(folder: str, split: str | None) -> datasets.Dataset | datasets.DatasetDict:
    """A set written by `save_to_disk`, and of it what an expression of splits names.

    A set without splits is called `train`, as well as by the name that it may have.

    Raises:
        ValueError: no such split.
    """
    import datasets

    found = datasets.load_from_disk(folder)
    if split is None:
        return found
    if isinstance(found, datasets.Dataset):
        found = {"train": found, str(found.split or "train"): found}
    if split in found:
        return found[split]
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(
        {name: len(rows) for name, rows in found.items()}
    )
    return datasets.concatenate_datasets(
        [found[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def find_image_column(features: datasets.Features, wanted: str | None) -> str:
    """The column of images, by its feature type; `wanted` where it is named.

    Raises:
        InputError: no such column, none with images, or several.
    """
    import datasets

    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found or wanted in features:  # files as bytes, as other programs write them
        found += [name for name, feature in features.items() if _is_bytes(feature)]
    if wanted in found:
        return wanted
    if wanted is not None:
        raise InputError(
            f"image_column must be one of the image columns {found}; got "
            f"{wanted!r}.{did_you_mean(wanted, found)}"
        )
    if not found:
        raise InputError(f"the data set has no column of images; its columns are {dict(features)}")
    if len(found) > 1:
        raise InputError(
            f"the data set has several columns of images, {found}: choose one with --image_column"
        )
    return found[0]


def _is_bytes(feature: Any) -> bool:
    """Whether a column holds whole files, alone or with their paths."""
    import datasets

    if isinstance(feature, dict) and {"bytes"} <= feature.keys() <= {"bytes", "path"}:
        feature = feature["bytes"]
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def find_label_column(features: datasets.Features, wanted: str | None) -> str:
    """The column of classes: `wanted`, or the only ClassLabel, or integers called label(s).

    Raises:
        InputError: no such column, one of another type, none, or several.
    """
    import datasets

    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    integers = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Value) and "int" in feature.dtype
    ]
    found = named or [name for name in ("label", "labels") if name in integers]
    if wanted is not None and wanted not in features:
        raise InputError(
            f"label_column must be one of the columns {list(features)}; got {wanted!r}."
            f"{did_you_mean(wanted, features)}"
        )
    if wanted is not None and wanted not in named + integers:
        raise InputError(
            f"label_column {wanted!r} must hold classes as integers; it holds {features[wanted]}"
        )
    if wanted is not None:
        return wanted
    if not found:
        raise InputError(
            f"class_conditional needs a column of classes; the columns are {dict(features)}: name "
            "one with --label_column, or put the images of each class into a sub-folder"
        )
    if len(found) > 1:
        raise InputError(
            f"the data set has several columns of classes, {found}: choose one with --label_column"
        )
    return found[0]


def row_decoder(
    features: datasets.Features, config: TrainingConfig, label_column: str | None
) -> partial:
    """`decode_row` with all but its row.

    Raises:
        InputError: no column of images or several, or a background that is no colour.
    """
    try:
        background = ImageColor.getrgb(config.background)[:3]
    except ValueError as error:
        raise InputError(
            f"background must be a colour name or #rrggbb; got {config.background!r}"
        ) from error
    return partial(
        decode_row,
        column=find_image_column(features, config.image_column),
        label_column=label_column,
        size=config.image_size,
        centre=config.center_crop,
        background=background,
        version=DECODER_VERSION,
    )


def check_label(label: int | None, num_classes: int | None, name: str) -> None:
    """Raise InputError for an image, of some name, whose class is missing or out of range."""
    if label is None or label < 0 or (num_classes is not None and label >= num_classes):
        limit = "at least 0" if num_classes is None else f"0 to {num_classes - 1}"
        raise InputError(
            f"the class of every image must be {limit}; {name} has {label}: mend it, or name "
            "another column with --label_column"
        )
