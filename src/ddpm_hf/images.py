"""Decoded images in memory: views of an Arrow table, gathered into batches of pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from .errors import InputError
from .functional import moved
from .pixels import SHAPE, crop_each, crop_equal, crop_on_device, luma

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


def to_network(images: Tensor) -> Tensor:
    """Pixels as the network sees them: float32 in [-1, 1], (B, C, H, W). Ho et al., section 3.3."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


class Chunk(NamedTuple):
    """Views of one Arrow record batch of decoded images.

    Attributes:
        bounds: Where each image begins in `data`, and where the last ends, (rows + 1,).
        data: All pixels, bytes.
        shapes: The columns `SHAPE`, each (rows,).
        labels: Classes, (rows,), or None.
    """

    bounds: np.ndarray
    data: np.ndarray
    shapes: tuple[np.ndarray, ...]
    labels: np.ndarray | None

    def pixels(self, row: int) -> np.ndarray:
        """One image, (channels, height, width), uint8 or float32 in [-1, 1]."""
        *shape, deep = (int(values[row]) for values in self.shapes)
        flat = self.data[self.bounds[row] : self.bounds[row + 1]]
        return flat.view(np.float32 if deep else np.uint8).reshape(shape)


@dataclass
class ImageSet:
    """Decoded images, read as views of the Arrow cache.

    Attributes:
        table: Columns pixels (bytes), channels, height, width, deep, and label where classes are
            trained on; one row an image.
        size: (height, width) of a batch's images.
        channels: 1 or 3.
        left_out: Rows of `table` that are not in use, ascending.
        faults: What could not be decoded, and why.
        num_classes: How many classes there are, or None where none are trained on.
        class_names: Their names, where the data set has them.
        on_device: All images in a device's memory, (N, channels, height, width): see
            `place_images`.
    """

    table: datasets.Dataset
    size: tuple[int, int]
    channels: int
    left_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    faults: list[str] = field(default_factory=list)
    num_classes: int | None = None
    class_names: list[str] | None = None
    on_device: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.table) - len(self.left_out)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The row of the table of each image, (B,): the i-th of those that are in use."""
        return indices + np.searchsorted(self._gaps, indices, side="right")

    @cached_property
    def _gaps(self) -> np.ndarray:
        """How many images come before each row that is left out."""
        return self.left_out - np.arange(len(self.left_out))

    @cached_property
    def _chunks(self) -> tuple[np.ndarray, list[Chunk]]:
        """First row of each chunk, and the chunks."""
        batches = [batch for batch in self.table.data.to_batches() if len(batch)]
        chunks = []
        for batch in batches:
            pixels = batch.column("pixels")
            _, bounds, data = pixels.buffers()
            bounds = np.frombuffer(bounds, np.int64)[pixels.offset :][: len(pixels) + 1]
            data = np.frombuffer(data, np.uint8) if data.size else np.empty(0, np.uint8)
            shapes = tuple(view(batch.column(name)) for name in SHAPE)
            labels = view(batch.column("label")) if "label" in batch.schema.names else None
            chunks.append(Chunk(bounds, data, shapes, labels))
        return np.cumsum([0, *map(len, batches)])[:-1], chunks

    def _locate(self, indices: np.ndarray) -> Iterator[tuple[Chunk, int]]:
        """Each image's chunk and its row there."""
        starts, chunks = self._chunks
        rows = self.rows(indices)
        which = np.searchsorted(starts, rows, side="right") - 1
        for k, row in zip(which.tolist(), (rows - starts[which]).tolist(), strict=True):
            yield chunks[k], row

    def pixels(self, i: int) -> np.ndarray:
        """Image i as a read-only view, (channels, height, width), uint8 or float32 in [-1, 1]."""
        ((chunk, row),) = self._locate(np.array([i]))
        return chunk.pixels(row)

    def labels(self, indices: np.ndarray) -> np.ndarray | None:
        """Classes of images, (B,) int64, or None where none are trained on."""
        if self.num_classes is None:
            return None
        return np.array([chunk.labels[row] for chunk, row in self._locate(indices)])

    # Facts about all images

    def _span(self, name: str) -> tuple[int, int]:
        """Least and greatest value of a column."""
        span = pc.min_max(self.table.data.column(name)).as_py()
        return span["min"], span["max"]

    @cached_property
    def deep(self) -> bool:
        """Whether a source has more than 8 bits: batches are float32 then."""
        return bool(self._span("deep")[1])

    @cached_property
    def brightest(self) -> float:
        """The largest value of 64 images spread over the set, as a share of white."""
        spread = np.unique(np.linspace(0, len(self) - 1, 64).round().astype(int)).tolist()
        largest = max(float(self.pixels(i).max()) for i in spread)
        return (largest + 1) / 2 if self.deep else largest / 255

    @cached_property
    def shape(self) -> tuple[int, int, int] | None:
        """(channels, height, width) where it and the depth are those of all images, or None."""
        spans = [self._span(name) for name in SHAPE]
        if any(low != high for low, high in spans):
            return None
        return tuple(low for low, _ in spans[:3])

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all pixels as they are kept."""
        return sum(int(chunk.bounds[-1] - chunk.bounds[0]) for chunk in self._chunks[1])

    def describe(self) -> str:
        """Number, kind and size of the images, one line."""
        (height, width), kind = self.size, "RGB" if self.channels == 3 else "grey"
        heights, widths = self._span("height"), self._span("width")
        line = f"{len(self)} {kind} images, {height}x{width}, {self.nbytes / 1e6:.1f} MB decoded"
        if self.num_classes:
            line += f", {self.num_classes} classes"
        if heights[0] == heights[1] and widths[0] == widths[1]:
            larger = (heights[0], widths[0]) != self.size
            return line + f"; kept at {heights[0]}x{widths[0]} for random crops" * larger
        tallest, widest = f"{heights[1]}x{widths[0]}", f"{heights[0]}x{widths[1]}"
        return f"{line}; kept at their resized shapes for random crops ({tallest} to {widest})"

    def fingerprint(self) -> str:
        """A short hash: all shapes and classes, and the pixels of 64 images spread over the set."""
        digest = hashlib.sha256(self.left_out.tobytes())
        for name in [*SHAPE, *(["label"] if self.num_classes else [])]:
            for chunk in self.table.data.column(name).chunks:
                digest.update(view(chunk.drop_null()))
        for i in np.linspace(0, len(self) - 1, 64).round().astype(int):
            digest.update(self.pixels(i).tobytes())
        return digest.hexdigest()[:16]

    # Batches

    def gather(self, indices: np.ndarray, draws: np.ndarray, flip: bool) -> Tensor:
        """Images cropped to `size`, and flipped, by uniform draws.

        Args:
            indices: (B,) images.
            draws: (B, 3) in [0, 1): top, left, flip.
            flip: Flip where the third draw is below a half.

        Returns:
            (B, C, H, W), uint8, or float32 in [-1, 1] for a deep set; on the device where the set
            is.
        """
        if self.shape is None:
            kind = dict(channels=self.channels, deep=self.deep)
            views = [chunk.pixels(row) for chunk, row in self._locate(indices)]
            return crop_each(views, draws, self.size, flip=flip, **kind)
        if self.on_device is None:
            crops = crop_equal(self.stack(indices), draws, self.size, flip=flip)
        else:
            places = moved(torch.from_numpy(indices), self.on_device.device)
            whole = self.on_device[places]
            crops = crop_on_device(whole, draws, self.size, flip=flip)
        return crops.expand(-1, self.channels, -1, -1).contiguous()

    def centred(self, indices: np.ndarray) -> Tensor:
        """Images cropped at their centre, not flipped, as `gather` gives them."""
        return self.gather(indices, np.full((len(indices), 3), 0.5), False)

    def stack(self, indices: np.ndarray) -> np.ndarray:
        """Whole images of a set of one shape, (B, channels, height, width), grey as asked for."""
        assert self.shape is not None
        out = np.empty((len(indices), *self.shape), np.float32 if self.deep else np.uint8)
        as_bytes = out.reshape(len(indices), -1).view(np.uint8)
        for k, (chunk, row) in enumerate(self._locate(indices)):
            as_bytes[k] = chunk.data[chunk.bounds[row] : chunk.bounds[row + 1]]
        return luma(out) if out.shape[1] > self.channels else out


def view(column: pa.Array) -> np.ndarray:
    """An Arrow array of numbers as numpy sees it, without a copy; nulls are any number."""
    dtype = np.dtype(column.type.to_pandas_dtype())
    if not len(column):
        return np.empty(0, dtype)
    return np.frombuffer(column.buffers()[1], dtype, len(column), column.offset * dtype.itemsize)


def place_images(images: ImageSet, device: torch.device, wanted: str) -> ImageSet:
    """The images as they are, or with a copy of all of them in the device's memory.

    Args:
        images: The set.
        device: Where batches are needed.
        wanted: no; yes; or auto: on a GPU, where they take at most a fifth of its free memory.

    Raises:
        InputError: yes, for images of several shapes or depths.
    """
    if wanted == "auto":
        fits = images.shape is not None and device.type == "cuda"
        fits = fits and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 5
        wanted = "yes" if fits else "no"
    if wanted == "no":
        return images
    if images.shape is None:
        raise InputError(
            "data_on_device yes needs images of one shape and depth; these differ: add "
            "--center_crop, or choose --data_on_device auto"
        )
    first = images.stack(np.arange(1))
    whole = torch.empty(
        (len(images), *first.shape[1:]), dtype=torch.from_numpy(first).dtype, device=device
    )
    for indices in np.array_split(np.arange(len(images)), len(images) // 4096 + 1):
        whole[indices[0] : indices[-1] + 1] = torch.from_numpy(images.stack(indices))
    return replace(images, on_device=whole)
