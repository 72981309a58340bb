"""An image set of `datasets` -> batches of pixels, a function of (seed, step) and of nothing else.

Every image is decoded, composited and resized once, by `datasets`' own `map`, and kept as bytes in
its Arrow cache; a batch is gathered from views of that memory. What image i of batch k is, and how
it is cropped and flipped, is drawn from (seed, epoch) and (seed, step): any number of processes
draws the same, and resuming is starting at another step. Nothing here grows with the number of
images: the order of an epoch is a keyed permutation, computed place by place.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from torch import Tensor

from .access import explained_hub
from .config import TrainingConfig, is_saved
from .errors import InputError
from .images import ImageSet
from .pixels import encoded_size
from .sources import (
    check_label,
    fetch_all,
    find_held_out_split,
    find_image_column,
    find_label_column,
    open_dataset,
    row_decoder,
)

if TYPE_CHECKING:
    import datasets

AUGMENTATION_STREAM, ORDER_STREAM = 1, 2
"""Random streams of one seed, kept apart."""

HELD_OUT_KEY = (0, 9)
"""What is held out is the same for every seed of a run."""

HELD_OUT_MOST = 2000
"""So many images of a test split are enough: the loss is measured every few hundred steps."""

MOST_UNNAMED = 1000
"""Classes without names that a smaller set may have, before their numbers are taken for ids."""

FEISTEL_ROUNDS = 8
"""Four are enough for a large domain (Luby & Rackoff 1988); small ones need more."""

CHUNK_BYTES, CHUNK_ROWS = 2**26, 10_000
"""At most so much is decoded between two writes: few, large chunks, and little memory."""


class Batch(NamedTuple):
    """Rows of one global batch.

    Attributes:
        images: (B, C, H, W), uint8 in [0, 255], or float32 in [-1, 1] where a source is deeper than
            8 bits.
        positions: (B,) int64, each image's place in the endless stream of training images.
        labels: (B,) int64, each image's class, or None where no classes are trained on.
    """

    images: Tensor
    positions: np.ndarray
    labels: np.ndarray | None = None


def check_batch(images: ImageSet, global_batch_size: int) -> None:
    """Raise InputError for a set that is smaller than one global batch."""
    if len(images) < global_batch_size:
        raise InputError(
            f"the image set has {len(images)} images, fewer than the global batch of "
            f"{global_batch_size}: choose a smaller --train_batch_size or --global_batch_size, or "
            "fewer --gradient_accumulation_steps"
        )


def load_images(config: TrainingConfig) -> ImageSet:
    """Load and decode an image set; the second time it comes from `datasets`' cache.

    Raises:
        InputError: the set cannot be loaded, has no images or not the classes that are asked for,
            or files are corrupt and `corrupt_images` is raise.
    """
    return decode_all(open_dataset(config), config)


def decode_all(source: datasets.Dataset, config: TrainingConfig) -> ImageSet:
    """Every row through `decode_row`, once: cached by its arguments and the data."""
    import datasets

    if not len(source):
        raise InputError("the image set has no images: its split is empty")
    label_column = None
    if config.class_conditional:
        label_column = find_label_column(source.features, config.label_column)
    function = row_decoder(source.features, config, label_column)
    column = function.keywords["column"]
    kinds = dict(
        pixels="large_binary", height="int32", width="int32", channels="int8", deep="int8",
        fault="string",
    )  # fmt: skip
    if label_column:
        kinds["label"] = "int64"
    height, width = config.image_size
    columns = [column, label_column] if label_column else [column]
    encoded = source.select_columns(columns).cast_column(column, datasets.Image(decode=False))
    try:
        table = encoded.map(
            function,
            with_indices=True,
            remove_columns=columns,
            features=datasets.Features(
                {name: datasets.Value(kind) for name, kind in kinds.items()}
            ),
            num_proc=config.dataloader_num_workers or None,
            writer_batch_size=min(CHUNK_ROWS, CHUNK_BYTES // (3 * height * width) + 1),
            desc=f"Decoding {len(source)} images",
            cache_file_name=decoded_file(encoded, function, config),
        )
    except OSError as error:
        raise InputError(
            f"cannot write the decoded images: {error}. Name a folder with room for them by "
            "--cache_dir"
        ) from error
    faults = find_faults(table, config)
    left_out = np.flatnonzero(table.data.column("height").is_null()) if faults else []
    most = pc.max(table.data.column("channels")).as_py()
    classes = count_classes(table, source.features[label_column]) if label_column else None
    return ImageSet(
        table,
        config.image_size,
        {"auto": most, "L": 1, "RGB": 3}[config.image_mode],
        left_out=np.array(left_out, np.int64),
        faults=faults,
        num_classes=classes,
        class_names=getattr(source.features.get(label_column), "names", None),
    )


def decoded_file(
    encoded: datasets.Dataset, function: partial, config: TrainingConfig
) -> str | None:
    """Where the decoded images of a set from `save_to_disk` are kept; None is `datasets`' choice.

    That is beside the set's own files: right in a cache, and not in a user's folder of data.
    """
    import datasets

    if not (is_saved(config.dataset_name) and encoded.cache_files):
        return None
    cache = Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm_hf"
    cache.mkdir(parents=True, exist_ok=True)
    key = datasets.fingerprint.Hasher.hash((encoded._fingerprint, function))
    return str(cache / f"decoded-{key}.arrow")


def check_sizes(source: datasets.Dataset, config: TrainingConfig) -> None:
    """Raise InputError for an image that `decode_row` would have to resize; reads headers only."""
    import datasets

    column = find_image_column(source.features, config.image_column)
    cells = source.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    for row, cell in enumerate(cells):
        size = encoded_size(cell[column])
        if size not in (None, config.image_size):
            (height, width), (wanted_height, wanted_width) = size, config.image_size
            raise InputError(
                f"row {row} of the images is {height}x{width}, and the network's are "
                f"{wanted_height}x{wanted_width}: choose another set, or resize and crop them with "
                "--fit"
            )


def find_faults(table: datasets.Dataset, config: TrainingConfig) -> list[str]:
    """What could not be decoded; InputError if nothing could, or if that is not to be skipped."""
    faults = table.data.column("fault").drop_null()
    if len(faults) and config.corrupt_images == "raise":
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        named = "; ".join(faults[:5].to_pylist())
        raise InputError(
            f"{len(faults)} of {len(table)} images cannot be decoded: {named}{more}. "
            "Mend or remove them, or leave them out with --corrupt_images skip"
        )
    if len(faults) == len(table):
        raise InputError(f"the image set has no images that can be decoded ({len(table)} rows)")
    return faults.to_pylist()


def count_classes(table: datasets.Dataset, feature: datasets.Features) -> int:
    """How many classes there are: as many as a ClassLabel names, or else 1 + the greatest.

    Raises:
        InputError: a row without a class, or with one out of range.
    """
    named, first = getattr(feature, "num_classes", None), 0
    column = table.data.column("label")
    for chunk in column.chunks:
        labels = chunk.to_numpy(zero_copy_only=False)  # a null is NaN, which is no class
        wrong = np.flatnonzero(~((labels >= 0) & (labels < (named or np.inf))))
        if len(wrong):
            check_label(chunk[wrong[0]].as_py(), named, f"row {first + wrong[0]}")
        first += len(chunk)
    classes = named or pc.max(column).as_py() + 1
    if not named and classes > max(len(table), MOST_UNNAMED):
        raise InputError(
            f"the numbers of the label column reach {classes - 1} in {len(table)} images: they are "
            "no classes 0, 1, 2, ...; name another column with --label_column"
        )
    return classes


def split_held_out(config: TrainingConfig, images: Any) -> tuple[Any, ImageSet | None]:
    """Images to train on, and images to measure the loss on.

    With `held_out` those are up to 2,000 of the set's test or validation split, or, where it has
    neither, that fraction of the images, taken out of training: the same ones for every seed.

    Args:
        config: The settings.
        images: The decoded or streamed images of `config.split`.

    Raises:
        InputError: nothing could be held out; a test split with other classes.
    """
    if not config.held_out:
        return images, None
    split = find_held_out_split(config)
    if split is not None:
        config = copy(config)  # a copy by its constructor would lose the recipe
        config.split = split
        return images, load_held_out(config, images)
    if config.streaming:
        raise InputError(
            "held_out of a stream is its test or validation split, and this set has neither: leave "
            "out --held_out, or --streaming"
        )
    assert images.on_device is None
    count = round(config.held_out * len(images))
    if not count:
        raise InputError(
            f"held_out must hold out at least one image; {config.held_out} of {len(images)} is none"
        )
    rows = images.rows(np.sort(shuffled(np.arange(count), len(images), HELD_OUT_KEY)))
    table = images.table.select(rows).flatten_indices()
    left_out = np.sort(np.concatenate([images.left_out, rows]))
    held = replace(images, table=table, left_out=np.empty(0, np.int64), faults=[])
    return replace(images, left_out=left_out), held


def load_held_out(config: TrainingConfig, images: Any) -> ImageSet:
    """Up to 2,000 images of `config.split`, spread over it (of a stream, the first)."""
    import datasets

    source = open_dataset(config, streaming=config.streaming)
    if config.streaming:
        column = find_image_column(source.features, config.image_column)
        first = source.cast_column(column, datasets.Image(decode=False)).take(HELD_OUT_MOST)
        with explained_hub(config.dataset_name or "", "read", repo_type="dataset"):
            rows = fetch_all(list(first), column)
        source = datasets.Dataset.from_list(rows, features=source.features)
    elif len(source) > HELD_OUT_MOST:
        source = source.select(np.linspace(0, len(source) - 1, HELD_OUT_MOST).round().astype(int))
    held = decode_all(source, config)
    fewer = (held.num_classes or 0) <= (images.num_classes or 0)
    if held.class_names != images.class_names or not fewer:
        raise InputError(
            f"held_out: the split {config.split!r} has the classes "
            f"{held.class_names or held.num_classes}, and training has "
            f"{images.class_names or images.num_classes}: make them the same, or leave out "
            "--held_out"
        )
    return replace(held, channels=images.channels, num_classes=images.num_classes)


# The endless stream of training images


def shuffled(places: np.ndarray, length: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a keyed permutation of range(length) sends each place, (B,) int64; O(1) memory.

    The generalised Feistel cipher of Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains":
    it permutes range(a b), just larger than range(length), and what it sends beyond is sent on
    until it falls inside. The round function is SplitMix64's (Steele, Lea & Flood 2014). A good
    shuffle, and no secret.
    """
    a = math.isqrt(length - 1) + 1
    b = -(-length // a)
    keys = np.random.SeedSequence([len(key), *key]).generate_state(FEISTEL_ROUNDS, np.uint64)
    out = np.array(places, np.uint64)
    outside = np.ones(out.shape, bool)
    while outside.any():
        left, right = np.divmod(out[outside], np.uint64(b))
        for left_key, right_key in keys.reshape(-1, 2):
            left = (left + mixed(right ^ left_key) % np.uint64(a)) % np.uint64(a)
            right = (right + mixed(left ^ right_key) % np.uint64(b)) % np.uint64(b)
        out[outside] = left * np.uint64(b) + right
        outside = out >= np.uint64(length)
    return out.astype(np.int64)


def mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing of 64-bit numbers: each bit depends on all."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def augmentation_draws(seed: int, step: int, global_batch_size: int) -> np.ndarray:
    """What crops and flips a global batch, (G, 3) in [0, 1): top, left, flip."""
    return np.random.default_rng([seed, AUGMENTATION_STREAM, step]).random((global_batch_size, 3))


@dataclass
class ImageStream:
    """Global batch k of a run: images at positions [k G, (k + 1) G) of shuffled epochs.

    An epoch is a permutation keyed by (seed, epoch); batches run across the border between
    epochs, so that every image is seen equally often and no batch is smaller.
    """

    images: ImageSet
    seed: int
    global_batch_size: int
    flip: bool

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Rows of the global batch of an optimiser step."""
        size = self.global_batch_size
        positions = np.arange(step * size, (step + 1) * size)[rows]
        draws = augmentation_draws(self.seed, step, size)[rows]
        epochs, places = np.divmod(positions, len(self.images))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            key = (self.seed, ORDER_STREAM, int(epoch))
            here = epochs == epoch
            indices[here] = shuffled(places[here], len(self.images), key)
        images = self.images.gather(indices, draws, self.flip)
        return Batch(images, positions, self.images.labels(indices))

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint must hold to go on at a step: nothing, a batch is its step's."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state: see `state`."""
        assert not state
