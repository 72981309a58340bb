"""Streamed image sets: what is drawn, by whom, and that a stopped run goes on exactly."""

import json
import subprocess
import sys
from collections import Counter
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import streaming
from ddpm_hf.config import TrainingConfig
from ddpm_hf.data import ImageStream, load_images, split_held_out
from ddpm_hf.errors import InputError
from ddpm_hf.streaming import LaneStream, load_stream, merge_states

from .hub_server import run_client

UNEVEN = [3, 200, 50, 70, 1, 90, 20, 33, 5, 41, 17, 64, 9, 30, 12, 80]
"""Rows of the shards of `shards`; 725 in all."""


def grey(i):
    """An 8x8 image that says its number, up to 65,535, in its first two pixels."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0, :2] = divmod(i, 256)
    return Image.fromarray(pixels)


def write_shards(folder, rows, cell=grey):
    """Parquet files of so many rows; image i is of class i % 10."""
    folder.mkdir()
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    first = 0
    for k, count in enumerate(rows):
        numbers = range(first, first + count)
        columns = {"image": list(map(cell, numbers)), "label": [i % 10 for i in numbers]}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(str(folder / f"train-{k:05}.parquet"))
        first += count
    return folder


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", UNEVEN)


def settings(name, **more):
    return TrainingConfig(
        dataset_name=str(name), resolution="8", streaming=True, max_train_steps=1, **more
    )


def stream(name, batch_size=8, seed=0, flip=False, **more):
    return LaneStream(load_stream(settings(name, **more)), seed, batch_size, flip)


def numbers(batch):
    """Which images a batch holds."""
    return (batch.images[:, 0, 0, 0].int() * 256 + batch.images[:, 0, 0, 1].int()).tolist()


def drawn(found, steps, rows=slice(None)):
    return [number for step in steps for number in numbers(found.batch(step, rows))]


@pytest.fixture
def small_window(monkeypatch):
    """Blocks of 32 images in all, 4 steps of 8, so that tests see many."""
    monkeypatch.setattr(streaming, "WINDOW", 32)


# What is drawn


def test_batches_look_as_those_of_a_decoded_set(shards):
    found = stream(shards, class_conditional=True)
    batch = found.batch(3)
    assert (batch.images.shape, batch.images.dtype) == ((8, 1, 8, 8), torch.uint8)
    assert batch.positions.tolist() == list(range(24, 32))
    assert batch.labels.dtype == np.int64
    assert [number % 10 for number in numbers(batch)] == batch.labels.tolist()
    assert found.images.num_classes == 10
    assert found.images.class_names == [str(i) for i in range(10)]


def test_without_class_conditional_there_are_no_labels(shards):
    found = stream(shards)
    assert (found.batch(0).labels, found.images.num_classes) == (None, None)


def test_the_number_of_lanes_divides_the_batch_and_leaves_shards_for_each(shards):
    assert stream(shards, 8).lanes == 2  # 16 shards
    assert stream(shards, 7).lanes == 1


def test_a_lane_reads_every_image_of_its_shards_once_an_epoch(shards, small_window):
    found = stream(shards, batch_size=8)
    for lane in range(2):
        rows = slice(4 * lane, 4 * lane + 4)
        seen = drawn(found, range(100), rows)
        # The lane's shards of the first epoch, from the order itself.
        order = streaming.shuffled(np.arange(16), 16, (0, streaming.SHARD_STREAM, 0))[lane::2]
        starts = np.cumsum([0, *UNEVEN])
        mine = [i for k in order for i in range(starts[k], starts[k + 1])]
        # Blocks of 16 images of the lane: all that lie in its first epoch.
        whole = len(mine) // 16 * 16
        assert whole >= 16
        for k in range(0, min(whole, 400), 16):
            assert sorted(seen[k : k + 16]) == sorted(mine[k : k + 16])
            assert seen[k : k + 16] != mine[k : k + 16]


def test_equal_shards_are_seen_once_an_epoch(tmp_path, small_window):
    """Two lanes of 160 images, in blocks of 16."""
    found = stream(write_shards(tmp_path / "x", [20] * 16))
    for epoch in range(3):
        assert sorted(drawn(found, range(40 * epoch, 40 * epoch + 40))) == list(range(320))


def test_the_order_is_none_of_the_files_and_another_for_every_seed(shards):
    orders = [drawn(stream(shards, seed=seed), range(20)) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(order != sorted(order) for order in orders)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_draws_the_same(shards, small_window, processes):
    whole = stream(shards, flip=True)
    parts = [stream(shards, flip=True) for _ in range(processes)]
    size = 8 // processes
    for step in range(12):
        rows = [part.batch(step, slice(k * size, (k + 1) * size)) for k, part in enumerate(parts)]
        expected = whole.batch(step)
        assert torch.equal(torch.cat([part.images for part in rows]), expected.images)
        assert np.array_equal(np.concatenate([p.positions for p in rows]), expected.positions)


def test_a_process_reads_only_the_lanes_of_its_rows(shards):
    found = stream(shards)
    found.batch(0, slice(4, 6))
    assert list(found.opened) == [1]


def test_uneven_shards_go_on_for_ever(tmp_path, small_window):
    found = stream(write_shards(tmp_path / "x", [3, 200] + [1] * 14), batch_size=8)
    assert found.lanes == 2
    seen = Counter(drawn(found, range(200)))
    assert set(seen) == set(range(217))
    assert min(lane.epoch for lane in found.opened.values()) >= 3


def test_a_set_smaller_than_a_batch_wraps_around(tmp_path, small_window):
    found = stream(write_shards(tmp_path / "x", [3]), batch_size=8)
    seen = Counter(drawn(found, range(6)))
    assert set(seen) == {0, 1, 2}
    assert min(seen.values()) >= 15  # 48 of three in turn, in blocks of 32 and 16


def test_the_decoder_is_that_of_a_decoded_set(tiny_images):
    """Crops, flips and colours, on images of a folder."""
    config = TrainingConfig(train_data_dir=str(tiny_images), resolution="8")
    decoded = ImageStream(load_images(config), 4, 12, True)
    found = LaneStream(load_stream(config), 4, 12, True)
    assert found.images.channels == 3
    sums = [
        sorted((batch.images[:, 2].float().mean((1, 2)) / 20).round().int().tolist())
        for batch in (decoded.batch(0), found.batch(0))
    ]
    assert sums[0] == list(range(12))  # blue says which image it is
    assert set(sums[1]) <= set(range(12))
    assert found.images.deep is decoded.images.deep is False
    expected = {decoded.images.pixels(i).tobytes() for i in range(12)}  # whole, and in colour
    cells = found.images.source.take(12)
    assert {found.images.decoder(row, i)["pixels"] for i, row in enumerate(cells)} == expected


# Going on


@pytest.mark.parametrize("stop", [1, 4, 6, 31, 57])
def test_a_stopped_run_goes_on_exactly_twice_in_a_row(shards, small_window, stop):
    """Stops in the first block, at a block's end, in the middle, after an epoch's border."""
    expected = drawn(stream(shards, batch_size=24), range(2 * stop + 20))
    seen, state = [], None
    for first, end in ((0, stop), (stop, 2 * stop + 1), (2 * stop + 1, 2 * stop + 20)):
        found = stream(shards, batch_size=24)
        if state:
            found.load_state(json.loads(state))
        seen += drawn(found, range(first, end))
        state = json.dumps(found.state(end))
    assert seen == expected


@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_drawn_ahead_of_a_checkpoint_do_not_matter(shards, small_window, ahead):
    whole = stream(shards)
    expected = drawn(whole, range(12))
    for stop in range(1, 8):
        found = stream(shards)
        drawn(found, range(stop + ahead))
        again = stream(shards)
        again.load_state(found.state(stop))
        assert drawn(again, range(stop, 12)) == expected[8 * stop :]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
def test_another_number_of_processes_goes_on_with_the_same_images(
    shards, small_window, before, after
):
    expected = drawn(stream(shards), range(14))
    slices = {n: [slice(8 // n * k, 8 // n * (k + 1)) for k in range(n)] for n in (1, 2, 4)}
    parts = [stream(shards) for _ in range(before)]
    for part, rows in zip(parts, slices[before], strict=True):
        drawn(part, range(5), rows)
    state = merge_states([part.state(5) for part in parts])
    parts = [stream(shards) for _ in range(after)]
    seen = []
    for part in parts:
        part.load_state(state)
    for step in range(5, 14):
        for part, rows in zip(parts, slices[after], strict=True):
            seen += numbers(part.batch(step, rows))
    assert seen == expected[8 * 5 :]


def test_a_run_that_was_resumed_and_drew_nothing_keeps_its_state(shards, small_window):
    found = stream(shards)
    drawn(found, range(5))
    again = stream(shards)
    again.load_state(found.state(5))
    assert again.state(5) == found.state(5)


def test_a_resumed_run_keeps_its_lanes(shards, small_window, monkeypatch):
    found = stream(shards)
    expected = drawn(found, range(10))
    found = stream(shards)
    drawn(found, range(5))
    monkeypatch.setattr(streaming, "SHARDS_PER_LANE", 2)
    monkeypatch.setattr(streaming, "WINDOW", 64)
    again = stream(shards)
    assert again.lanes == 8
    again.load_state(found.state(5))
    assert again.lanes == 2
    assert drawn(again, range(5, 10)) == expected[40:]


def test_the_next_block_is_read_little_by_little(shards, small_window):
    found = stream(shards)
    ahead = []
    for step in range(8):
        found.batch(step)
        ahead.append(len(found.opened[0].ahead))
    assert ahead == [4, 8, 12, 16] * 2


def test_threads_decode_the_same(shards):
    one, four = stream(shards), stream(shards, dataloader_num_workers=4)
    assert four.images.num_threads == 4
    assert drawn(one, range(4)) == drawn(four, range(4))


def test_only_the_current_block_is_read_again(shards, small_window):
    """Its bytes only: 16 images of each lane, however long the run was."""
    found = stream(shards)
    drawn(found, range(41))
    again = stream(shards)
    again.load_state(found.state(41))
    decoded = []
    keep = again.images.decoder
    again.images.decoder = partial(lambda *a, **k: decoded.append(1) or keep(*a), **keep.keywords)
    again.batch(41)
    assert len(decoded) == 8
    before, after = (lane.starts for lane in (found.opened[0], again.opened[0]))
    assert after[11] == before[11]


def test_a_process_ends_quietly_in_the_middle_of_a_shard(shards):
    code = (
        "from ddpm_hf.config import TrainingConfig; from ddpm_hf.streaming import *\n"
        f"config = TrainingConfig(dataset_name={str(shards)!r}, resolution='8', streaming=True, "
        "max_train_steps=1)\n"
        "stream = LaneStream(load_stream(config), 0, 8, False); stream.batch(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exception ignored" not in done.stderr


def test_blocks_of_large_images_are_of_fewer(shards, small_window, monkeypatch):
    weight = load_stream(settings(shards)).image_bytes
    encoded = [row["image"]["bytes"] for row in load_stream(settings(shards)).source.take(64)]
    assert weight == sum(map(len, encoded)) // 64 > 0
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 17 * weight)
    assert stream(shards).window == 16
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 1)
    assert stream(shards).window == 8  # a global batch at least


def test_blocks_do_not_go_back(shards, small_window):
    found = stream(shards)
    last = numbers(found.batch(7))
    found.batch(4)
    assert numbers(found.batch(7)) == last
    with pytest.raises(AssertionError):
        found.batch(3)


def test_a_decoded_set_has_no_state():
    assert merge_states([{}, {}]) == {}


# Sets of every kind


def test_a_saved_set_is_streamed_in_pieces(tmp_path, monkeypatch, small_window):
    monkeypatch.setattr("ddpm_hf.sources.ROWS_PER_SHARD", 10)
    features = datasets.Features(image=datasets.Image())
    part = datasets.Dataset.from_dict({"image": [grey(i) for i in range(165)]}, features=features)
    datasets.DatasetDict(train=part).save_to_disk(tmp_path / "set")
    found = stream(tmp_path / "set", batch_size=8)
    assert (found.images.num_shards, found.lanes) == (17, 2)
    assert set(drawn(found, range(60))) == set(range(165))
    state = found.state(60)
    again = stream(tmp_path / "set", batch_size=8)
    again.load_state(state)
    assert drawn(again, range(60, 70)) == drawn(found, range(60, 70))


def test_the_embedded_set_is_one_lane():
    found = LaneStream(load_stream(settings("embedded", class_conditional=True)), 0, 32, False)
    assert found.lanes == 1
    # Ten classes: of 32 images at random some 9.7 are there.
    assert len(set(found.batch(0).labels)) >= 6


def test_one_parquet_file(shards):
    found = stream(shards / "train-00002.parquet")
    assert set(drawn(found, range(40))) <= set(range(203, 253))


def test_a_folder_of_many_files_has_fewer_shards(tiny_images, monkeypatch):
    config = TrainingConfig(train_data_dir=str(tiny_images), resolution="8")
    assert load_stream(config).describe().endswith("streamed from 12 shards")
    monkeypatch.setattr(streaming, "MOST_SHARDS", 4)
    assert load_stream(config).num_shards == 4


def test_image_files_are_not_read_class_after_class(tmp_path, small_window):
    """`datasets` has a folder as one shard, in the order of the names."""
    for number in range(160):
        folder = tmp_path / "x" / ("cat" if number < 80 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        grey(number).save(folder / f"{number:03}.png")
    config = TrainingConfig(
        train_data_dir=str(tmp_path / "x"), resolution="8", streaming=True, class_conditional=True,
        max_train_steps=1,
    )  # fmt: skip
    found = LaneStream(load_stream(config), 0, 8, False)
    assert found.lanes == 8
    batches = [found.batch(step) for step in range(40)]
    assert all(0 < sum(batch.labels) < 8 for batch in batches[:10])
    for batch in batches:
        assert [int(number >= 80) for number in numbers(batch)] == batch.labels.tolist()
    assert {number for batch in batches for number in numbers(batch)} == set(range(160))
    again = LaneStream(load_stream(config), 0, 8, False)
    again.load_state(json.loads(json.dumps(found.state(40))))
    assert numbers(again.batch(40)) == numbers(found.batch(40))


def test_what_is_streamed_is_announced(shards):
    images = load_stream(settings(shards, class_conditional=True))
    assert images.describe() == (
        "grey images (as the first 64 are), 8x8, 10 classes, streamed from 16 shards"
    )


def test_the_fingerprint_is_of_the_content(shards, tmp_path):
    other = write_shards(tmp_path / "other", UNEVEN, lambda i: grey(i + 1))
    prints = [load_stream(settings(name)).fingerprint() for name in (shards, shards, other)]
    assert prints[0] == prints[1] != prints[2]


def test_the_first_images_decide_about_colour_and_depth(tmp_path):
    """A colour image that comes later is trained in grey."""

    def cell(i):
        return Image.new("RGB", (8, 8), (255, 0, 0)) if i == 70 else Image.new("L", (8, 8), 9)

    found = stream(write_shards(tmp_path / "x", [71], cell), batch_size=71)
    values = {v for k in range(10) for v in found.batch(k).images[:, 0, 0, 0].tolist()}
    assert values == {9, 76}  # .299 * 255


# Bad input


def broken(i):
    return {"bytes": b"no image", "path": None} if i in (70, 72) else grey(i)


def test_a_corrupt_image_names_its_row_and_shard(tmp_path):
    found = stream(write_shards(tmp_path / "x", [80], broken), batch_size=80)
    with pytest.raises(InputError, match=r"cannot be decoded: row 7\d of shard 0 \(.*Unident") as e:
        drawn(found, range(5))
    assert "--corrupt_images skip" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_corrupt_image_is_replaced_by_the_next_and_counted(tmp_path):
    folder = write_shards(tmp_path / "x", [80], broken)
    found = stream(folder, batch_size=80, corrupt_images="skip")
    seen = drawn(found, range(5))
    assert len(seen) == 400
    assert set(seen) <= set(range(80)) - {70, 72}
    assert sorted(fault[:17] for fault in found.images.faults) == [
        "row 70 of shard 0", "row 72 of shard 0"
    ]  # fmt: skip


def test_corrupt_images_at_the_beginning_are_found_at_once(tmp_path, small_window):
    folder = write_shards(tmp_path / "x", [5], lambda i: broken(i + 70))
    with pytest.raises(InputError, match="3 of the first 5 images of the stream can be decoded"):
        stream(folder)
    assert stream(folder, corrupt_images="skip").batch(0).images.shape[0] == 8


def test_a_block_without_an_image_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", 1)
    folder = write_shards(tmp_path / "x", [80], lambda i: broken(70 if i >= 64 else i))
    found = stream(folder, batch_size=2, corrupt_images="skip")
    with pytest.raises(InputError, match="none of 2 images in a row can be decoded: row 6"):
        drawn(found, range(40))


def test_integers_are_no_classes_of_a_stream(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    table = datasets.Dataset.from_dict(
        {"image": [grey(0)], "label": [0]}, features=datasets.Features(features)
    )
    table.to_parquet(str(tmp_path / "x.parquet"))
    with pytest.raises(InputError, match="streaming does not know how many classes.*'label' must"):
        stream(tmp_path / "x.parquet", class_conditional=True)


def test_a_class_out_of_range_names_its_row(tmp_path, small_window):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)}
    table = datasets.Dataset.from_dict(
        {"image": [grey(0)] * 3, "label": [0, -1, 1]}, features=datasets.Features(features)
    )
    table.to_parquet(str(tmp_path / "x.parquet"))
    with pytest.raises(InputError, match="must be 0 to 1; row 1 of shard 0 has -1"):
        drawn(stream(tmp_path / "x.parquet", class_conditional=True), range(9))


def test_an_unknown_set_is_one_clear_line():
    with pytest.raises(InputError, match=r"cannot load the image set 'nowhere.parquet'"):
        stream("nowhere.parquet")


# Held-out images


def test_the_test_split_of_a_stream_is_held_out(monkeypatch):
    monkeypatch.setattr("ddpm_hf.data.HELD_OUT_MOST", 20)
    config = settings("embedded", held_out=0.01, class_conditional=True)
    images, held = split_held_out(config, load_stream(config))
    assert images.num_shards == 1
    assert (len(held), held.num_classes, held.size) == (20, 10, (8, 8))


def test_a_stream_without_a_test_split_holds_nothing_out(shards):
    config = settings(shards, held_out=0.01)
    with pytest.raises(InputError, match="held_out of a stream is its test or validation split"):
        split_held_out(config, load_stream(config))


def test_a_corrupt_image_at_the_end_of_a_block_is_replaced_by_its_first(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", 8)
    shards = write_shards(tmp_path / "x", [80], broken)
    found = stream(shards, batch_size=8, corrupt_images="skip")
    assert set(drawn(found, range(200))) <= set(range(80)) - {70, 72}


@pytest.mark.slow
def test_images_of_a_hub_stay_encoded_until_they_are_needed(hub_server, tiny_images, tmp_path):
    """`datasets` would decode every file as it comes, whole photographs, and fail at one fault."""
    files = {f"train/{path.name}": path.read_bytes() for path in tiny_images.iterdir()}
    code = """
import sys, datasets
datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
from ddpm_hf.config import TrainingConfig
from ddpm_hf.errors import InputError
from ddpm_hf.streaming import LaneStream, load_stream
try:
    images = load_stream(TrainingConfig(
        dataset_name="org/photos", resolution="20", streaming=True, max_train_steps=1,
        corrupt_images="skip",
    ))
    cell = next(iter(images.source))["image"]
    print(sorted(cell), cell["bytes"], images.num_threads, images.image_bytes)
    stream = LaneStream(images, 0, 12, False)
    drawn = {int(blue) // 20 for step in range(8) for blue in stream.batch(step).images[:, 2, 0, 0]}
    print(sorted(drawn), images.faults)
except InputError as error:
    print("error:", error)
"""

    def said(name, **changed):
        hub_server.add("org/photos", files | changed, kind="dataset", private=True)
        return run_client(hub_server, tmp_path / name, code)

    kept = "['bytes', 'path'] None 32 0\n"
    assert said("whole") == f"{kept}{list(range(12))} []\n"
    faulty, others = said("faulty", **{"train/03.png": b"nothing"}), [0, 1, 2, *range(4, 12)]
    assert faulty.startswith(f"{kept}{others} ['hf://datasets/org/photos@")
    assert "train/03.png (UnidentifiedImageError: " in faulty
    # A Hub that fails is no fault of an image, which would be skipped.
    hub_server.cut("GET", "resolve/.*03.png", after=0, times=None)
    expected = f"error: cannot read 'org/photos': no connection to {hub_server.endpoint}"
    assert said("away").startswith(expected)
