"""An image set of `datasets` -> batches of pixels, a function of (seed, step) and of nothing else.

Every image is decoded, composited and resized once, by `datasets`' own `map`, and kept as bytes in
its Arrow cache; a batch is gathered from views of that memory. What image i of batch k is, and how
it is cropped and flipped, is drawn from (seed, epoch) and (seed, step): any number of processes
draws the same, and resuming is starting at another step.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from .config import EMBEDDED, TrainingConfig
from .errors import InputError, did_you_mean

if TYPE_CHECKING:
    import datasets

DECODER_VERSION = 1
"""Part of the cache key: raise it when `decode_row` or what it calls changes its result."""

FASHION_MNIST = Path(__file__).parent / "fashion_mnist"

AUGMENTATION_STREAM, ORDER_STREAM = 1, 2
"""Random streams of one seed, kept apart."""


class Batch(NamedTuple):
    """Rows of one global batch.

    Attributes:
        images: (B, C, H, W), uint8 in [0, 255], or float32 in [-1, 1] where a source is deeper than
            8 bits.
        positions: (B,) int64, each image's place in the endless stream of training images.
    """

    images: Tensor
    positions: np.ndarray


def to_network(images: Tensor) -> Tensor:
    """Pixels as the network sees them: float32 in [-1, 1], (B, C, H, W). Ho et al., section 3.3."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


# One image


def flatten_transparency(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any Pillow image as L, RGB or a deep grey mode, composited on `background`."""
    has_key = "transparency" in image.info
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return image
    if image.mode in ("L", "RGB") and not has_key:
        return image
    if image.mode == "1":
        return image.convert("L")
    grey = image.mode in ("L", "LA", "La") and len(set(background)) == 1
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or has_key:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("L" if grey else "RGB")


def deep_to_unit(image: Image.Image) -> Image.Image:
    """A grey image deeper than 8 bits (16-bit integers, floats in [0, 1]) as float32 in [-1, 1].

    Raises:
        ValueError: integers beyond 65535, or floats that are not in [0, 1].
    """
    pixels = np.asarray(image).astype(np.float32)
    limit = 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= limit):
        raise ValueError(f"pixels of mode {image.mode} must be in [0, {limit:g}]")
    return Image.fromarray(pixels / limit * 2 - 1)


def resize_to_cover(image: Image.Image, size: tuple[int, int], centre: bool) -> Image.Image:
    """The image scaled to just cover (height, width), antialiased; cropped to it if `centre`."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if image.size != scaled:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    if centre:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return image


def decode_row(
    row: dict[str, Any],
    index: int,
    *,
    column: str,
    size: tuple[int, int],
    centre: bool,
    background: tuple[int, int, int],
    version: int,
) -> dict[str, Any]:
    """One row of the image set, decoded for good: bytes and shape, or what is wrong with it."""
    from datasets import Image as ImageFeature

    cell = row[column]
    try:
        if cell is None:
            raise ValueError("the cell is empty")
        image = flatten_transparency(ImageFeature().decode_example(cell), background)
        deep = image.mode not in ("L", "RGB")
        image = resize_to_cover(deep_to_unit(image) if deep else image, size, centre)
        pixels = np.asarray(image)
    # Pillow raises whatever its decoders do on broken bytes; the caller names the file and what was
    # raised.
    except Exception as error:  # noqa: BLE001
        name = (cell or {}).get("path") or f"row {index}"
        fault = f"{name} ({type(error).__name__}: {' '.join(str(error).split())})"
        return dict(pixels=b"", height=0, width=0, channels=0, deep=False, fault=fault)
    if deep:  # bicubic overshoots
        pixels = pixels.clip(-1, 1)
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    height, width = pixels.shape[:2]
    return dict(
        pixels=pixels.tobytes(), height=height, width=width, channels=channels, deep=deep, fault=""
    )


# A set of images


@dataclass
class ImageSet:
    """Decoded images, read as views of the Arrow cache.

    Attributes:
        table: Columns pixels (bytes), height, width, channels, deep, one row an image.
        rows: Rows of `table` in use, (N,).
        size: (height, width) of a batch's images.
        channels: 1 or 3.
        faults: What could not be decoded, and why.
    """

    table: datasets.Dataset
    rows: np.ndarray
    size: tuple[int, int]
    channels: int
    faults: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _shapes(self) -> np.ndarray:
        """(rows, 4) of height, width, channels, deep."""
        columns = ("height", "width", "channels", "deep")
        return np.stack([self.table.data.column(name).to_numpy() for name in columns], 1).astype(
            np.int64
        )

    @cached_property
    def _chunks(self) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """First row of each Arrow chunk, and each chunk's (offsets, bytes)."""
        chunks = self.table.data.column("pixels").chunks
        views = []
        for chunk in chunks:
            _, offsets, data = chunk.buffers()
            offsets = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            views.append((offsets, np.frombuffer(data, np.uint8)))
        return np.cumsum([0, *map(len, chunks)]), views

    def pixels(self, i: int) -> np.ndarray:
        """Image i as a read-only view, (height, width, channels), uint8 or float32 in [-1, 1]."""
        row = self.rows[i]
        starts, views = self._chunks
        chunk = int(np.searchsorted(starts, row, side="right")) - 1
        offsets, data = views[chunk]
        begin, end = offsets[row - starts[chunk]], offsets[row - starts[chunk] + 1]
        height, width, channels, deep = self._shapes[row]
        return (
            data[begin:end].view(np.float32 if deep else np.uint8).reshape(height, width, channels)
        )

    @cached_property
    def deep(self) -> bool:
        """Whether a source has more than 8 bits, so that batches are float32."""
        return bool(self._shapes[self.rows, 3].any())

    def gather(self, indices: np.ndarray, draws: np.ndarray, flip: bool) -> Tensor:
        """Images cropped to `size`, and flipped, by uniform draws.

        Args:
            indices: (B,) images.
            draws: (B, 3) in [0, 1): top, left, flip.
            flip: Flip where the third draw is below a half.

        Returns:
            (B, C, H, W), uint8, or float32 in [-1, 1] for a deep set.
        """
        height, width = self.size
        out = np.empty(
            (len(indices), self.channels, height, width), np.float32 if self.deep else np.uint8
        )
        for k, (i, (top, left, mirror)) in enumerate(zip(indices, draws, strict=True)):
            pixels = self.pixels(i)
            y, x = (
                int(top * (pixels.shape[0] - height + 1)),
                int(left * (pixels.shape[1] - width + 1)),
            )
            crop = pixels[y : y + height, x : x + width]
            if flip and mirror < 0.5:
                crop = crop[:, ::-1]
            if self.deep and crop.dtype == np.uint8:
                crop = crop / np.float32(127.5) - 1
            if crop.shape[2] > self.channels:
                crop = luma(crop)
            out[k] = crop.transpose(2, 0, 1)  # one channel broadcasts to three
        return torch.from_numpy(out)

    def fingerprint(self) -> str:
        """A short hash: all shapes, and the decoded pixels of 64 images spread over the set."""
        digest = hashlib.sha256(self._shapes[self.rows].tobytes())
        for i in np.linspace(0, len(self) - 1, 64).round().astype(int):
            digest.update(self.pixels(i).tobytes())
        return digest.hexdigest()[:16]


def luma(pixels: np.ndarray) -> np.ndarray:
    """RGB to grey by ITU-R 601, as Pillow does it: (..., 3) -> (..., 1), the same dtype."""
    grey = pixels.astype(np.float32) @ np.array([[0.299], [0.587], [0.114]], np.float32)
    return grey.round().astype(np.uint8) if pixels.dtype == np.uint8 else grey


def open_dataset(config: TrainingConfig) -> datasets.Dataset:
    """The image set as `datasets` loads it.

    Raises:
        InputError: no set is named, or `datasets` cannot load it; its reason is passed on in one
            line.
    """
    import datasets

    name, folder = config.dataset_name, None if config.dataset_name else config.train_data_dir
    if not (name or folder):
        raise InputError(
            "name the images to train on: --dataset_name (Hub id or path) or --train_data_dir "
            "(folder)"
        )
    if folder and not os.path.isdir(folder):
        raise InputError(f"train_data_dir must be a folder of images; got {folder!r}")
    options = dict(split=config.split, cache_dir=config.cache_dir)
    try:
        if folder:
            # `datasets` reads splits out of file names (test_1.png); here a folder is one set,
            # unless it has a sub-folder for the split.
            split = config.split.split("[")[0]
            files = {} if os.path.isdir(os.path.join(folder, split)) else {split: "**"}
            return datasets.load_dataset(
                "imagefolder", data_dir=folder, data_files=files or None, **options
            )
        if name == EMBEDDED:
            files = {split: str(FASHION_MNIST / f"{split}.parquet") for split in ("train", "test")}
            return datasets.load_dataset("parquet", data_files=files, **options)
        if name.endswith(".parquet"):
            return datasets.load_dataset(
                "parquet", data_files={config.split.split("[")[0]: name}, **options
            )
        if os.path.isfile(os.path.join(name, "dataset_info.json")) or os.path.isfile(
            os.path.join(name, "dataset_dict.json")
        ):
            return from_disk(name, config.split)
        return datasets.load_dataset(name, config.dataset_config_name, **options)
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
        raise InputError(f"cannot load the image set {folder or name!r}: {reason}") from error


def from_disk(folder: str, split: str) -> datasets.Dataset:
    """A set written by `save_to_disk`, the named split where it has several."""
    import datasets

    found = datasets.load_from_disk(folder)
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise ValueError(f"it has the splits {', '.join(found)}, not {split!r}")
    return found[split]


def find_image_column(features: datasets.Features, wanted: str | None) -> str:
    """The column of images, by its feature type; `wanted` where it is named.

    Raises:
        InputError: no such column, none with images, or several.
    """
    import datasets

    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
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


def load_images(config: TrainingConfig) -> ImageSet:
    """Load and decode an image set; the second time it comes from `datasets`' cache.

    Raises:
        InputError: the set cannot be loaded or has no images, or files are corrupt and
            `corrupt_images` is raise.
    """
    table = decode(open_dataset(config), config)
    faults = [fault for fault in table.data.column("fault").to_pylist() if fault]
    if faults and config.corrupt_images == "raise":
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        named = "; ".join(faults[:5])
        raise InputError(
            f"{len(faults)} of {len(table)} images cannot be decoded: {named}{more}. "
            "Mend or remove them, or leave them out with --corrupt_images skip"
        )
    rows = np.flatnonzero(table.data.column("height").to_numpy() > 0)
    if not len(rows):
        raise InputError(f"the image set has no images that can be decoded ({len(table)} rows)")
    most = int(table.data.column("channels").to_numpy()[rows].max())
    channels = {"auto": most, "L": 1, "RGB": 3}[config.image_mode]
    return ImageSet(table, rows, config.image_size, channels, faults)


def decode(source: datasets.Dataset, config: TrainingConfig) -> datasets.Dataset:
    """Every row through `decode_row`, once: cached by its arguments and the data."""
    import datasets

    try:
        background = ImageColor.getrgb(config.background)[:3]
    except ValueError as error:
        raise InputError(
            f"background must be a colour name or #rrggbb; got {config.background!r}"
        ) from error
    column = find_image_column(source.features, config.image_column)
    function = partial(
        decode_row,
        column=column,
        size=config.image_size,
        centre=config.center_crop,
        background=background,
        version=DECODER_VERSION,
    )
    kinds = dict(
        pixels="large_binary",
        height="int32",
        width="int32",
        channels="int8",
        deep="bool",
        fault="string",
    )
    encoded = source.select_columns(column).cast_column(column, datasets.Image(decode=False))
    return encoded.map(
        function,
        with_indices=True,
        remove_columns=column,
        features=datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()}),
        num_proc=config.dataloader_num_workers or None,
        desc=f"Decoding {len(source)} images",
    )


# The endless stream of training images


@dataclass
class ImageStream:
    """Global batch k of a run: images at positions [k G, (k + 1) G) of shuffled epochs.

    An epoch is a permutation drawn from (seed, epoch); batches run across the border between
    epochs, so that every image is seen equally often and no batch is smaller.
    """

    images: ImageSet
    seed: int
    global_batch_size: int
    flip: bool
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Rows of the global batch of an optimiser step."""
        size = self.global_batch_size
        positions = np.arange(step * size, (step + 1) * size)[rows]
        draws = np.random.default_rng([self.seed, AUGMENTATION_STREAM, step]).random((size, 3))[
            rows
        ]
        epochs, places = np.divmod(positions, len(self.images))
        indices = np.array([self._order(int(e))[p] for e, p in zip(epochs, places, strict=True)])
        return Batch(self.images.gather(indices, draws, self.flip), positions)

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch; the last two are kept."""
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            rng = np.random.default_rng([self.seed, ORDER_STREAM, epoch])
            self._orders[epoch] = rng.permutation(len(self.images))
        return self._orders[epoch]
