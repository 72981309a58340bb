"""Image sets read as a stream, for sets larger than the disk: in an order that resumes exactly.

The shards (files) of a set are read by L *lanes*. Epoch after epoch, for ever, all shards are put
into an order drawn from (seed, epoch), and lane l reads every L-th of them, beginning with the
l-th. Rows [l G / L, (l + 1) G / L) of every global batch of G images come from lane l: so L, and
not the number of processes, decides what is drawn, and a process reads only its rows' lanes.

A lane takes its images in blocks, across shards, and shuffles each block by (seed, lane, block):
not by a shuffle buffer, which is lost when a run stops and then repeats images. Only encoded bytes
are kept (of images that are files of their own, only paths), and only what a batch needs is
decoded. To resume, each lane reads its block again.

A lane whose shards are shorter begins its next epoch earlier: no lane waits for another, and an
image of that lane is seen a little more often, by at most one shard's share. A set that is smaller
than the blocks is not seen evenly: decode it instead.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .access import explained_hub
from .config import TrainingConfig
from .data import Batch, augmentation_draws, shuffled
from .errors import InputError
from .pixels import crop_each
from .sources import (
    FETCHERS,
    check_label,
    fetch,
    fetch_all,
    find_label_column,
    is_remote,
    open_dataset,
    row_decoder,
)

if TYPE_CHECKING:
    import datasets

WINDOW = 8192
"""Images in the blocks of all lanes: how far a shuffle reaches, and what resuming rereads. Their
bytes are held, and at the end of a block those of the next.
"""

WINDOW_BYTES = 2**30
"""At most so many bytes in those blocks, as the first images weigh: of large photographs, fewer."""

SHARDS_PER_LANE = 8
"""At least, so that the lanes' epochs are of about the same length."""

MOST_SHARDS = 1024
"""Smaller shards (of image files, each its own) are read as fewer, each a few of them."""

PROBE = 64
"""Images that are looked at before a run, to know their kind."""

SHARD_STREAM, BLOCK_STREAM, ADDRESS_STREAM = 8, 9, 10
"""Random streams of one seed, beside those of data.py, run.py and outputs.py."""


class Example(NamedTuple):
    """An image as it is in its shard: the row's cells, the image not decoded."""

    shard: int
    row: int
    cells: dict[str, Any]


@dataclass
class StreamedImages:
    """What is known of an image set that is streamed; its number of images is not.

    Attributes:
        name: Of the set: a Hub id or a path.
        source: The images, encoded, and their classes.
        num_shards: Pieces of `source` that are read one by one.
        decoder: `pixels.decode_row`, with all but its row.
        size: (height, width) of a batch's images.
        channels: 1 or 3; deep: whether batches are float32. Decided by the first 64 images.
        skip: Whether images that cannot be decoded are passed over.
        num_classes, class_names: As in `images.ImageSet`.
        probe: Hash of the first 64 images.
        image_bytes: Mean size of these, encoded; 0 where each is a file of its own.
        num_threads: Threads that fetch and decode.
        corrupt: What could not be decoded so far, and why, by shard and row.
    """

    name: str
    source: datasets.IterableDataset
    num_shards: int
    decoder: partial
    size: tuple[int, int]
    channels: int
    deep: bool
    skip: bool
    num_classes: int | None
    class_names: list[str] | None
    probe: str
    image_bytes: int
    num_threads: int
    corrupt: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """What could not be decoded so far, as in `images.ImageSet`."""
        return list(self.corrupt.values())

    def describe(self) -> str:
        """Kind, size and shards of the images, one line."""
        (height, width), kind = self.size, "RGB" if self.channels == 3 else "grey"
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        return (
            f"{kind} images (as the first {PROBE} are), {height}x{width}{classes}, streamed from "
            f"{self.num_shards} shards"
        )

    def fingerprint(self) -> str:
        """A short hash: the columns, the number of shards, and the first 64 images."""
        facts = f"{self.source.features} {self.source.num_shards} {self.class_names} {self.probe}"
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def decode(self, block: list[Example], place: int) -> dict[str, Any]:
        """The image at a place of a block; for a corrupt one, if asked for, the next that is not.

        Raises:
            InputError: it cannot be fetched or decoded, or its class is out of range.
        """
        for shard, row, cells in block[place:] + block[:place]:
            with explained_hub(self.name, "read", repo_type="dataset"):
                fetched = fetch(cells, self.decoder.keywords["column"])
            decoded = self.decoder(fetched, f"{row} of shard {shard}")
            if decoded["fault"] is None:
                if self.num_classes:
                    check_label(decoded["label"], self.num_classes, f"row {row} of shard {shard}")
                return decoded
            if not self.skip:
                raise InputError(
                    f"an image cannot be decoded: {decoded['fault']}. Mend or remove it, or leave "
                    "such images out with --corrupt_images skip"
                )
            self.corrupt[shard, row] = decoded["fault"]
        raise InputError(f"none of {len(block)} images in a row can be decoded: {self.faults[-1]}")


def mixed_addresses(
    source: datasets.IterableDataset, columns: list[str]
) -> datasets.IterableDataset:
    """A set whose images are files of their own as a table of addresses, in a mixed order.

    `datasets` has them as one shard, by name, and so class after class.
    """
    import datasets

    rows = list(source)
    order = shuffled(np.arange(len(rows)), len(rows), (ADDRESS_STREAM,)).tolist()
    table = datasets.Dataset.from_dict(
        {name: [rows[i][name] for i in order] for name in columns}, features=source.features
    )
    return table.to_iterable_dataset(num_shards=min(MOST_SHARDS, len(rows)))


def load_stream(config: TrainingConfig) -> StreamedImages:
    """Open an image set as a stream, and look at its first images.

    Raises:
        InputError: the set cannot be loaded, or has no images or not the classes asked for.
    """
    import datasets

    source = open_dataset(config, streaming=True)
    features, label_column = source.features or datasets.Features(), None
    if config.class_conditional:
        label_column = find_label_column(features, config.label_column)
        if not isinstance(features[label_column], datasets.ClassLabel):
            raise InputError(
                f"streaming does not know how many classes there are: column {label_column!r} must "
                f"be a ClassLabel of `datasets`; it is {features[label_column]}"
            )
    decoder = row_decoder(features, config, label_column)
    column = decoder.keywords["column"]
    columns = [column, label_column] if label_column else [column]
    source = source.select_columns(columns).cast_column(column, datasets.Image(decode=False))
    name, num_threads = config.dataset_name or config.train_data_dir, config.dataloader_num_workers
    with explained_hub(name, "read", repo_type="dataset"):
        rows = list(source.take(PROBE))
        encoded = [len((cells[column] or {}).get("bytes") or b"") for cells in rows]
        if any(is_remote(cells[column]) for cells in rows):
            num_threads = max(FETCHERS, num_threads)
        if rows and not any(encoded):
            source = mixed_addresses(source, columns)
        rows = fetch_all(rows, column)
    decoded = [decoder(cells, row) for row, cells in enumerate(rows)]
    found = [row for row in decoded if row["fault"] is None]
    faults = [row["fault"] for row in decoded if row["fault"] is not None]
    if not found or (faults and config.corrupt_images == "raise"):
        raise InputError(
            f"{len(found)} of the first {len(decoded)} images of the stream can be decoded: "
            f"{'; '.join(faults[:5]) or 'it is empty'}. Mend or remove the others, or leave them "
            "out with --corrupt_images skip"
        )
    most = max(row["channels"] for row in found)
    return StreamedImages(
        name=name,
        source=source,
        num_shards=min(source.num_shards, MOST_SHARDS),
        decoder=decoder,
        size=config.image_size,
        channels={"auto": most, "L": 1, "RGB": 3}[config.image_mode],
        deep=any(row["deep"] for row in found),
        skip=config.corrupt_images == "skip",
        num_classes=features[label_column].num_classes if label_column else None,
        class_names=features[label_column].names if label_column else None,
        probe=hashlib.sha256(repr(found).encode()).hexdigest(),
        image_bytes=sum(encoded) // len(encoded),
        num_threads=max(1, num_threads),
    )


class Lane:
    """One endless reader of shards, in blocks of `size` images.

    Attributes:
        held: The block that is held, in the order of training; -1 before the first.
        starts: Where the reader stood before blocks held - 1, held and held + 1.
    """

    def __init__(
        self, images: StreamedImages, number: int, *, lanes: int, seed: int, size: int
    ) -> None:
        self.images, self.number, self.lanes, self.seed, self.size = (
            images, number, lanes, seed, size
        )  # fmt: skip
        self.block: list[Example] = []
        self.ahead: list[Example] = []
        self.go_to(dict(block=0, epoch=0, place=0, row=0, reader=None))

    def go_to(self, start: dict[str, Any]) -> None:
        """Stand before a block, as in one of `starts`."""
        self.held, self.starts, self.ahead = start["block"] - 1, {start["block"]: start}, []
        self._open(start["epoch"], start["place"], start["row"], start["reader"])

    def _open(self, epoch: int, place: int, row: int = 0, reader: dict | None = None) -> None:
        """Begin the place-th of this lane's shards in an epoch, or go on in it."""
        if self.number + place * self.lanes >= self.images.num_shards:
            epoch, place = epoch + 1, 0
        self.epoch, self.place, self.row = epoch, place, row
        key, which = (self.seed, SHARD_STREAM, epoch), np.array([self.number + place * self.lanes])
        self.shard = int(shuffled(which, self.images.num_shards, key)[0])
        self.reader = self.images.source.shard(self.images.num_shards, self.shard)
        if reader:
            self.reader.load_state_dict(reader)
        self.rows = iter(self.reader)

    def _read(self) -> Iterator[Example]:
        """The next images, across shards and epochs, without end."""
        while True:
            for cells in self.rows:
                self.row += 1
                yield Example(self.shard, self.row - 1, cells)
            self._open(self.epoch, self.place + 1)

    def read_ahead(self, part: float) -> None:
        """Read so much of the next block, so that no step waits for all of it.

        Raises:
            InputError: a Hub does not answer.
        """
        missing = round(part * self.size) - len(self.ahead)
        with explained_hub(self.images.name, "read", repo_type="dataset"):
            self.ahead += islice(self._read(), max(0, missing))

    def seek(self, number: int) -> list[Example]:
        """A block: the one that is held or a later one."""
        assert number >= self.held, (number, self.held)
        while self.held < number:
            self.read_ahead(1)
            self.held += 1
            key = (self.seed, BLOCK_STREAM, self.number, self.held)
            self.block = [self.ahead[i] for i in shuffled(np.arange(self.size), self.size, key)]
            self.ahead = []
            place = dict(epoch=self.epoch, place=self.place, row=self.row)
            after = self.held + 1
            self.starts[after] = dict(block=after, **place, reader=self.reader.state_dict())
            self.starts.pop(self.held - 2, None)
        return self.block


@dataclass
class LaneStream:
    """Global batches of a streamed set: what `data.ImageStream` is for a decoded one.

    Batches are drawn in the order of their steps. Where a run goes on at a step, `load_state` gets
    what `state` gave for that step.

    Attributes:
        lanes: Their number: the greatest that divides the global batch and leaves each enough
            shards.
        steps_per_block: Steps that are drawn from one block of every lane.
        opened: The lanes that this process reads.
    """

    images: StreamedImages
    seed: int
    global_batch_size: int
    flip: bool
    lanes: int = field(init=False)
    steps_per_block: int = field(init=False)
    opened: dict[int, Lane] = field(init=False, default_factory=dict, repr=False)
    _starts: dict[str, dict[str, Any]] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        most = max(1, self.images.num_shards // SHARDS_PER_LANE)
        self.lanes = max(n for n in range(1, most + 1) if self.global_batch_size % n == 0)
        window = min(WINDOW, WINDOW_BYTES // max(1, self.images.image_bytes))
        self.steps_per_block = max(1, window // self.global_batch_size)
        self._pool = ThreadPoolExecutor(self.images.num_threads)
        # datasets' open readers must end before Python does, or each says that it could not.
        weakref.finalize(self, self.opened.clear)

    @property
    def window(self) -> int:
        """Images in the blocks of all lanes."""
        return self.steps_per_block * self.global_batch_size

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Rows of the global batch of an optimiser step; blocks never go back.

        Raises:
            InputError: an image that cannot be decoded, or whose class is out of range.
        """
        size = self.global_batch_size
        numbers, places = np.divmod(np.arange(size)[rows], size // self.lanes)
        block, steps = divmod(step, self.steps_per_block)
        places += steps * (size // self.lanes)
        blocks = [self._lane(number).seek(block) for number in numbers.tolist()]
        decoded = list(self._pool.map(self.images.decode, blocks, places.tolist()))
        for number in np.unique(numbers).tolist():
            self._lane(number).read_ahead((steps + 1) / self.steps_per_block)
        images = crop_each(
            [
                np.frombuffer(row["pixels"], np.float32 if row["deep"] else np.uint8).reshape(
                    row["channels"], row["height"], row["width"]
                )
                for row in decoded
            ],
            augmentation_draws(self.seed, step, size)[rows],
            self.images.size,
            flip=self.flip,
            channels=self.images.channels,
            deep=self.images.deep,
        )
        labels = np.array([row["label"] for row in decoded]) if self.images.num_classes else None
        return Batch(images, np.arange(step * size, (step + 1) * size)[rows], labels)

    def _lane(self, number: int) -> Lane:
        """A lane, opened when it is first needed."""
        if number not in self.opened:
            size = self.steps_per_block * self.global_batch_size // self.lanes
            lane = Lane(self.images, number, lanes=self.lanes, seed=self.seed, size=size)
            if str(number) in self._starts:
                lane.go_to(self._starts[str(number)])
            self.opened[number] = lane
        return self.opened[number]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint must hold to go on at a step, as JSON: this process's part of it.

        All batches before the step must have been drawn, and at most a block after it. The parts
        of all processes are put together by `merge_states`.
        """
        block = step // self.steps_per_block
        starts = {n: start for n, start in self._starts.items() if start["block"] == block}
        starts |= {str(n): lane.starts[block] for n, lane in self.opened.items()}
        return dict(lanes=self.lanes, steps_per_block=self.steps_per_block, starts=starts)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of the whole run; the number of processes may be another."""
        self.lanes, self.steps_per_block = state["lanes"], state["steps_per_block"]
        self._starts = state["starts"]
        self.opened.clear()


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of a run from those of its processes, of `LaneStream` or of `ImageStream`."""
    merged = dict(states[0])
    if merged:
        merged["starts"] = {n: start for state in states for n, start in state["starts"].items()}
    return merged
