"""Image sets of every kind, decoded once; batches that are a function of (seed, step)."""

import io
import shutil
import tracemalloc
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ddpm_hf.config import TrainingConfig
from ddpm_hf.data import ImageStream, check_batch, load_images, shuffled, split_held_out
from ddpm_hf.errors import InputError
from ddpm_hf.images import ImageSet, place_images, to_network, view
from ddpm_hf.pixels import crop_each
from ddpm_hf.sources import is_image_folder, open_dataset


def load(path, **settings):
    """The set in a folder, with settings for the test."""
    settings = {"resolution": "8", **settings}
    return load_images(TrainingConfig(train_data_dir=str(path), **settings))


def save(folder, name, array):
    folder.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(folder / name)
    return folder


def parquet(path, features=None, **columns):
    table = datasets.Dataset.from_dict(columns, features=features and datasets.Features(features))
    table.to_parquet(str(path))
    return str(path)


# Where images come from


@pytest.mark.parametrize(("split", "count"), [("train", 6000), ("test", 1000)])
def test_the_embedded_set_is_balanced_and_real(split, count):
    config = TrainingConfig(dataset_name="embedded", split=split, resolution="28")
    images = load_images(config)
    assert (len(images), images.channels, images.size) == (count, 1, (28, 28))
    assert set(np.bincount(open_dataset(config)["label"])) == {count // 10}
    pixels = np.stack([images.pixels(i) for i in range(count)]) / 255
    # All 60,000 have mean .2860 and deviation .3530. The mean of one image varies by .14, that of
    # 1,000 by .0045; .015 is three of these.
    assert pixels.mean() == pytest.approx(0.2860, abs=0.015)
    assert pixels.std() == pytest.approx(0.3530, abs=0.015)


def test_the_embedded_set_is_cut_from_the_whole(shared):
    whole = datasets.load_dataset(
        "parquet", data_files=str(shared / "data/fashion_mnist_test.parquet"), split="train"
    )
    known = {np.asarray(image).tobytes() for image in whole["image"]}
    part = load_images(TrainingConfig(dataset_name="embedded", split="test", resolution="28"))
    assert {part.pixels(i).tobytes() for i in range(len(part))} <= known


def test_a_folder_of_images(tiny_images):
    images = load(tiny_images)
    assert (len(images), images.channels, images.size) == (12, 3, (8, 8))


def test_file_names_make_no_splits(tmp_path):
    """`datasets` alone would read test_2.png as a test split and lose the others."""
    for name in ("cat_001", "test_002", "dog"):
        save(tmp_path / "x", f"{name}.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "x" / "deeper").mkdir()
    save(tmp_path / "x" / "deeper", "a.png", np.zeros((8, 8), np.uint8))
    assert len(load(tmp_path / "x")) == 4


def test_sub_folders_are_splits_where_they_are_named_so(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / "x" / split).mkdir(parents=True)
        for i in range(count):
            save(tmp_path / "x" / split, f"{i}.png", np.zeros((8, 8), np.uint8))
    assert len(load(tmp_path / "x")) == 3
    assert len(load(tmp_path / "x", split="test")) == 2


def test_a_parquet_file_whose_column_has_another_name(tmp_path):
    picture = Image.fromarray(np.full((8, 8, 3), 7, np.uint8))
    features = {"img": datasets.Image(), "label": datasets.Value("int64")}
    path = parquet(tmp_path / "x.parquet", features, img=[picture] * 3, label=[0, 1, 2])
    images = load_images(TrainingConfig(dataset_name=path, resolution="8"))
    assert len(images) == 3
    assert (images.pixels(0) == 7).all()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_saved_dataset_folder(tmp_path, split):
    picture = Image.fromarray(np.zeros((8, 8), np.uint8))
    parts = {name: datasets.Dataset.from_dict({"image": [picture] * n},
             features=datasets.Features(image=datasets.Image()))
             for name, n in (("train", 2), ("validation", 5))}  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    config = TrainingConfig(dataset_name=str(tmp_path / "set"), split=split, resolution="8")
    assert len(load_images(config)) == {"train": 2, "validation": 5}[split]


def numbers_of(folder, **settings):
    """The grey values of a saved set, each image one value."""
    images = load_images(TrainingConfig(dataset_name=str(folder), resolution="8", **settings))
    return [int(images.pixels(i)[0, 0, 0]) for i in range(len(images))]


def saved_part(values, **options):
    pictures = [Image.fromarray(np.full((8, 8), i, np.uint8)) for i in values]
    features = datasets.Features(image=datasets.Image())
    return datasets.Dataset.from_dict({"image": pictures}, features=features, **options)


def test_splits_of_a_saved_set_without_splits(tmp_path):
    saved_part(range(8)).save_to_disk(tmp_path / "nameless")
    saved_part(range(8), split="test").save_to_disk(tmp_path / "named")
    assert numbers_of(tmp_path / "nameless") == list(range(8))
    assert numbers_of(tmp_path / "nameless", split="train[:3]") == [0, 1, 2]
    assert numbers_of(tmp_path / "named", split="test[50%:]+test[:1]") == [4, 5, 6, 7, 0]
    assert numbers_of(tmp_path / "named", split="train") == list(range(8))  # the default
    with pytest.raises(InputError, match="Unknown split .validation.. Should be one of"):
        numbers_of(tmp_path / "named", split="validation")


def test_slices_of_saved_splits(tmp_path):
    parts = {"train": saved_part(range(4)), "test": saved_part([8, 9])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert numbers_of(tmp_path / "set", split="train[1:3]+test") == [1, 2, 8, 9]
    with pytest.raises(InputError, match="Unknown split .dev.. Should be one of ..train., .test."):
        numbers_of(tmp_path / "set", split="dev")


def test_what_is_decoded_of_a_saved_set_is_not_put_beside_it(tmp_path, monkeypatch):
    saved_part(range(4)).save_to_disk(tmp_path / "set")
    before = sorted((tmp_path / "set").iterdir())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "common")
    for cache, given in (("mine", {"cache_dir": str(tmp_path / "mine")}), ("common", {})):
        for _ in range(2):
            assert numbers_of(tmp_path / "set", **given) == [0, 1, 2, 3]
        (file,) = (tmp_path / cache / "ddpm_hf").iterdir()  # the second time it is read
        assert numbers_of(tmp_path / "set", split="train[:2]", **given) == [0, 1]
        assert len(list((tmp_path / cache / "ddpm_hf").iterdir())) == 2
        assert file.is_file()
    assert sorted((tmp_path / "set").iterdir()) == before


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path):
    saved_part(range(4)).save_to_disk(tmp_path / "set")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write the decoded images: .*--cache_dir"):
        numbers_of(tmp_path / "set", cache_dir=str(tmp_path / "file"))


def test_an_indexed_dataset_on_disk(tmp_path):
    """A shuffled or filtered set saved to disk has an indices table; rows must follow it."""
    pictures = [Image.fromarray(np.full((8, 8), i, np.uint8)) for i in range(4)]
    whole = datasets.Dataset.from_dict(
        {"image": pictures}, features=datasets.Features(image=datasets.Image())
    )
    whole.select([3, 1]).save_to_disk(tmp_path / "set")
    images = load_images(TrainingConfig(dataset_name=str(tmp_path / "set"), resolution="8"))
    assert [int(images.pixels(i)[0, 0, 0]) for i in range(2)] == [3, 1]


# What happens to a pixel


def test_grey_in_a_colour_set_becomes_colour_and_a_grey_set_stays_grey(tmp_path):
    folder = save(tmp_path / "x", "a.png", np.full((8, 8), 100, np.uint8))
    assert load(folder).channels == 1
    save(folder, "b.png", np.full((8, 8, 3), 50, np.uint8))
    images = load(folder)
    assert images.channels == 3
    batch = images.gather(np.array([0, 1]), np.zeros((2, 3)), False)
    assert batch.shape == (2, 3, 8, 8)
    assert sorted(batch.float().mean((1, 2, 3)).tolist()) == [50, 100]


def test_colour_can_be_trained_in_grey(tmp_path):
    folder = save(tmp_path / "x", "a.png", np.full((8, 8, 3), [255, 0, 0], np.uint8))
    images = load(folder, image_mode="L")
    batch = images.gather(np.array([0]), np.zeros((1, 3)), False)
    assert batch.shape == (1, 1, 8, 8)
    assert batch.unique().tolist() == [76]  # .299 * 255, as Pillow's convert("L")


def test_sixteen_bits_stay_precise(tmp_path):
    """Stock's convert("RGB") leaves 256 levels or clips; here neighbours of 65,536 levels stay
    apart.
    """
    levels = (np.arange(64, dtype=np.uint16) + 30_000).reshape(8, 8)
    images = load(save(tmp_path / "x", "a.png", levels))
    batch = to_network(images.gather(np.array([0]), np.zeros((1, 3)), False))
    expected = levels.astype(np.float64) / 65535 * 2 - 1
    np.testing.assert_allclose(batch[0, 0].numpy(), expected, atol=1e-6)  # float32 in [-1, 1]
    assert len(batch.unique()) == 64


def test_a_deep_and_a_plain_image_share_one_scale(tmp_path):
    folder = save(tmp_path / "x", "a.png", np.full((8, 8), 65535, np.uint16))
    save(folder, "b.png", np.full((8, 8), 255, np.uint8))
    images = load(folder)
    assert to_network(images.gather(np.arange(2), np.zeros((2, 3)), False)).unique().tolist() == [
        1.0
    ]


def test_rectangular_training_images(tiny_images):
    images = load(tiny_images, resolution="8x12")
    assert images.gather(np.arange(3), np.full((3, 3), 0.99), True).shape == (3, 3, 8, 12)


def test_crops_reach_both_ends_and_centre_crop_does_not_move(tiny_images):
    images, centred = load(tiny_images), load(tiny_images, center_crop=True)
    low, high = (images.gather(np.array([0]), np.full((1, 3), d), False) for d in (0.0, 0.999))
    assert not torch.equal(low, high)
    full = images.pixels(0)
    assert torch.equal(low[0], torch.from_numpy(full[:, :8, :8].copy()))
    assert torch.equal(high[0], torch.from_numpy(full[:, -8:, -8:].copy()))
    one, two = (centred.gather(np.array([0]), np.full((1, 3), d), False) for d in (0.0, 0.999))
    assert torch.equal(one, two)


def test_flip_mirrors_left_and_right_below_a_half(tiny_images):
    images = load(tiny_images, center_crop=True)
    plain = images.gather(np.array([3]), np.array([[0, 0, 0.6]]), True)
    mirrored = images.gather(np.array([3]), np.array([[0, 0, 0.4]]), True)
    assert torch.equal(mirrored, plain.flip(3))
    assert torch.equal(images.gather(np.array([3]), np.array([[0, 0, 0.4]]), False), plain)


def test_exif_rotation_is_applied(tmp_path):
    (tmp_path / "x").mkdir()
    image = Image.fromarray(np.vstack([np.zeros((4, 8)), np.full((4, 8), 255)]).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # rotated by 180 degrees
    image.save(tmp_path / "x" / "a.png", exif=exif)
    pixels = load(tmp_path / "x").pixels(0)
    assert pixels[0, 0, 0] == 255
    assert pixels[0, -1, 0] == 0


def test_pixels_become_the_papers_range():
    values = to_network(torch.tensor([0, 255], dtype=torch.uint8))
    assert values.tolist() == [-1.0, 1.0]


# Bad input


def corrupt(tiny_images):
    (tiny_images / "05.png").write_bytes((tiny_images / "05.png").read_bytes()[:60])
    (tiny_images / "07.png").write_bytes(b"not an image at all")
    return tiny_images


def test_corrupt_files_are_named_and_fatal(tiny_images):
    with pytest.raises(InputError, match="2 of 12 images cannot be decoded: .*05.png.*07.png") as e:
        load(corrupt(tiny_images))
    assert "--corrupt_images skip" in str(e.value)
    assert "\n" not in str(e.value)


def test_corrupt_files_are_skipped_when_asked(tiny_images):
    images = load(corrupt(tiny_images), corrupt_images="skip")
    assert len(images) == 10
    assert len(images.faults) == 2
    assert images.gather(np.arange(10), np.zeros((10, 3)), False).shape == (10, 3, 8, 8)


def test_an_empty_cell_is_a_fault(tmp_path):
    picture = Image.fromarray(np.zeros((8, 8), np.uint8))
    path = parquet(tmp_path / "x.parquet", {"image": datasets.Image()}, image=[picture, None])
    with pytest.raises(
        InputError, match=r"1 of 2 images .* row 1 \(ValueError: the cell is empty\)"
    ):
        load_images(TrainingConfig(dataset_name=path, resolution="8"))


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="no images that can be decoded"):
        load(tmp_path / "x", corrupt_images="skip")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name the images to train on"),
        ({"train_data_dir": "nowhere"}, "train_data_dir must be a folder of images; got 'nowhere'"),
        ({"dataset_name": "nowhere.parquet"}, "cannot load the image set 'nowhere.parquet'"),
        ({"dataset_name": "embedded", "split": "tst"}, "cannot load the image set 'embedded'.*tst"),
        ({"dataset_name": "embedded", "background": "wite"}, "background must be a colour name"),
        (
            {"dataset_name": "embedded", "image_column": "img"},
            "image_column must be one of .*'image'",
        ),
    ],
)
def test_bad_image_sets_are_one_clear_line(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        load_images(TrainingConfig(resolution="8", **settings))
    assert "\n" not in str(caught.value)


def test_an_unknown_hub_set_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load the image set 'no/such-set'"):
        load_images(TrainingConfig(dataset_name="no/such-set"))


def test_no_image_column(tmp_path):
    path = parquet(tmp_path / "x.parquet", a=[1, 2])
    with pytest.raises(InputError, match="no column of images; its columns are .*'a'"):
        load_images(TrainingConfig(dataset_name=path))


def test_several_image_columns(tmp_path):
    picture = Image.fromarray(np.zeros((8, 8), np.uint8))
    features = {"a": datasets.Image(), "b": datasets.Image()}
    path = parquet(tmp_path / "x.parquet", features, a=[picture], b=[picture])
    with pytest.raises(InputError, match="several columns of images.*--image_column"):
        load_images(TrainingConfig(dataset_name=path, resolution="8"))
    chosen = TrainingConfig(dataset_name=path, resolution="8", image_column="b")
    assert len(load_images(chosen)) == 1


# The stream


@pytest.fixture
def numbered(tmp_path):
    """Ten images, image i of the grey value i."""
    for i in range(10):
        save(tmp_path / "n", f"{i}.png", np.full((8, 8), i, np.uint8))
    return load(tmp_path / "n")


def seen(batch):
    return batch.images[:, 0, 0, 0].tolist()


def test_every_epoch_sees_every_image_once_in_another_order(numbered):
    stream = ImageStream(numbered, seed=0, global_batch_size=5, flip=False)
    epochs = [seen(stream.batch(2 * e)) + seen(stream.batch(2 * e + 1)) for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("batch_size", [3, 7, 25])
def test_batches_run_across_epochs(numbered, batch_size):
    stream = ImageStream(numbered, seed=1, global_batch_size=batch_size, flip=False)
    values = [value for step in range(10) for value in seen(stream.batch(step))]
    for epoch in range(len(values) // 10):
        assert sorted(values[10 * epoch : 10 * epoch + 10]) == list(range(10))


@pytest.mark.parametrize("parts", [2, 4])
def test_any_split_of_a_batch_draws_the_same_images_crops_and_flips(tiny_images, parts):
    images = load(tiny_images)
    whole = ImageStream(images, seed=5, global_batch_size=8, flip=True).batch(3)
    stream = ImageStream(images, seed=5, global_batch_size=8, flip=True)
    size = 8 // parts
    rows = [stream.batch(3, slice(k * size, (k + 1) * size)) for k in range(parts)]
    assert torch.equal(torch.cat([part.images for part in rows]), whole.images)
    assert np.concatenate([part.positions for part in rows]).tolist() == list(range(24, 32))


def test_a_batch_does_not_depend_on_what_was_drawn_before(numbered):
    fresh = ImageStream(numbered, seed=2, global_batch_size=4, flip=False)
    used = ImageStream(numbered, seed=2, global_batch_size=4, flip=False)
    for step in range(9):
        used.batch(step)
    assert seen(fresh.batch(9)) == seen(used.batch(9))
    other = ImageStream(numbered, seed=3, global_batch_size=4, flip=False)
    assert [seen(other.batch(k)) for k in range(3)] != [seen(fresh.batch(k)) for k in range(3)]


def test_the_fingerprint_is_of_the_content(tmp_path):
    one = load(save(tmp_path / "a", "x.png", np.zeros((8, 8), np.uint8)))
    same = load(save(tmp_path / "b", "y.png", np.zeros((8, 8), np.uint8)))
    other = load(save(tmp_path / "c", "x.png", np.ones((8, 8), np.uint8)))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_decoding_is_cached_and_the_cache_is_left_when_settings_change(tiny_images, tmp_path):
    caches = [load(tiny_images, cache_dir=str(tmp_path / "c")).table.cache_files for _ in range(2)]
    assert caches[0] == caches[1] != []
    other = load(tiny_images, cache_dir=str(tmp_path / "c"), resolution="12").table.cache_files
    assert other != caches[0]


def test_jpeg_and_webp_files(tmp_path):
    for ending in ("jpg", "webp"):
        save(tmp_path / "x", f"a.{ending}", np.full((8, 8, 3), 90, np.uint8))
    images = load(tmp_path / "x")
    values = images.gather(np.arange(2), np.zeros((2, 3)), False).float()
    assert (values - 90).abs().max() <= 3  # lossy


def test_bytes_in_memory_as_on_the_hub(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 3, np.uint8)).save(buffer, "PNG")
    path = parquet(tmp_path / "x.parquet", {"image": datasets.Image()},
                   image=[{"bytes": buffer.getvalue(), "path": None}])  # fmt: skip
    images = load_images(TrainingConfig(dataset_name=path, resolution="8"))
    assert (images.pixels(0) == 3).all()


def test_a_step_costs_the_same_memory_for_any_number_of_images(numbered):
    """No array of the size of the set: 10 million rows that share one buffer."""
    pixels = pa.array([bytes(range(64))] * 10_000, pa.large_binary())
    columns = {"pixels": pixels} | {
        name: pa.array([value] * 10_000, kind)
        for name, value, kind in (
            ("channels", 1, pa.int8()), ("height", 8, pa.int32()),
            ("width", 8, pa.int32()), ("deep", 0, pa.int8()), ("fault", None, pa.string()),
        )
    }  # fmt: skip
    table = pa.concat_tables([pa.table(columns)] * 1000)
    images = ImageSet(datasets.Dataset(table), (8, 8), 1)
    stream = ImageStream(images, seed=0, global_batch_size=128, flip=True)
    stream.batch(0)  # finds the chunks
    tracemalloc.start()
    stream.batch(1)
    images.fingerprint()
    images.describe()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == 10_000_000
    assert most < 5e6  # a byte an image would be 10e6; what there is grows with the chunks


# The order of an epoch


@pytest.mark.parametrize("length", [*range(1, 201), 1023, 1024, 1025, 4097, 99_991])
def test_shuffled_is_a_permutation_of_any_length(length):
    assert sorted(shuffled(np.arange(length), length, (0, 0))) == list(range(length))


def test_a_place_is_shuffled_alone_as_in_any_company():
    whole = shuffled(np.arange(1000), 1000, (3, 1))
    assert [int(shuffled(np.array([i]), 1000, (3, 1))[0]) for i in (0, 17, 999)] == [
        *whole[[0, 17, 999]]
    ]


def test_shuffled_reaches_the_end_of_a_huge_set():
    drawn = shuffled(np.arange(10_000), 10**12, (0, 0))
    assert len(set(drawn)) == 10_000
    # The mean of 10,000 uniform numbers has a deviation of .0029; 5 of these.
    assert np.mean(drawn / 1e12) == pytest.approx(0.5, abs=0.0145)


@pytest.mark.parametrize("length", [2, 7, 10, 64])
def test_every_image_lands_everywhere_equally_often(length):
    """Where images 0 and the last land, and both together, over 1,500 keys."""
    ends = np.array([0, length - 1])
    landed = np.array([shuffled(ends, length, (seed, 2, 0)) for seed in range(1500)])
    for counts in (
        np.bincount(landed[:, 0], minlength=length),
        np.bincount(landed[:, 1], minlength=length),
        np.bincount((landed[:, 1] - landed[:, 0]) % length, minlength=length)[1:],
    ):
        expected = counts.sum() / len(counts)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        # Chi-square with n degrees has mean n and variance 2 n: 6 deviations above.
        assert chi_square <= len(counts) + 6 * (2 * len(counts)) ** 0.5


# Gathering all at once


def flat(table_like, **settings):
    """A batch by the loop over images."""
    images, indices, draws = table_like
    views = [images.pixels(i) for i in indices]
    kind = dict(channels=images.channels, deep=images.deep)
    return crop_each(views, draws, images.size, **kind, **settings)


def same_shape_sets(tmp_path):
    """Sets of one shape each: as large as the batch's images, larger, colour in grey, deep."""
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 256, (9, 16, 12, 3), np.uint8)
    for i, pixels in enumerate(plain):
        save(tmp_path / "rgb", f"{i}.png", pixels)
        save(tmp_path / "grey", f"{i}.png", pixels[..., 0])
        save(tmp_path / "deep", f"{i}.png", pixels[..., 0].astype(np.uint16) * 256)
    return [
        load(tmp_path / "rgb", resolution="16x12"),
        load(tmp_path / "rgb", resolution="16x8"),
        load(tmp_path / "rgb", resolution="8x8"),
        load(tmp_path / "rgb", resolution="8x8", image_mode="L"),
        load(tmp_path / "grey", resolution="8x8", image_mode="RGB"),
        load(tmp_path / "deep", resolution="8x8"),
    ]


def test_all_at_once_on_the_host_and_on_the_device_equal_the_loop(tmp_path):
    rng = np.random.default_rng(1)
    for images in same_shape_sets(tmp_path):
        assert images.shape is not None
        indices, draws = rng.integers(0, 9, 32), rng.random((32, 3))
        placed = place_images(images, torch.device("cpu"), "yes")
        assert placed.on_device is not None
        for flip in (False, True):
            expected = flat((images, indices, draws), flip=flip)
            for found in (images.gather(indices, draws, flip), placed.gather(indices, draws, flip)):
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected)
        again = images.gather(indices, draws, True)
        assert torch.equal(again, flat((images, indices, draws), flip=True)), "the cache changed"


def test_skipped_files_leave_no_hole_where_all_have_one_shape(tiny_images):
    clean = load(tiny_images, center_crop=True)
    images = load(corrupt(tiny_images), center_crop=True, corrupt_images="skip")
    assert images.shape is not None
    draws = np.zeros((10, 3))
    kept = [i for i in range(12) if i not in (5, 7)]
    assert torch.equal(images.gather(np.arange(10), draws, False),
                       clean.gather(np.array(kept), draws, False))  # fmt: skip


def test_images_of_several_shapes_do_not_go_to_the_device(tmp_path):
    save(tmp_path / "x", "a.png", np.zeros((8, 12), np.uint8))
    images = load(save(tmp_path / "x", "b.png", np.zeros((12, 8), np.uint8)))
    assert place_images(images, torch.device("cpu"), "auto") is images
    with pytest.raises(InputError, match="data_on_device yes needs images of one shape.*center"):
        place_images(images, torch.device("cpu"), "yes")


@pytest.mark.parametrize("wanted", ["auto", "no"])
def test_images_stay_in_the_hosts_memory(numbered, wanted):
    assert place_images(numbered, torch.device("cpu"), wanted) is numbered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_small_set_goes_to_the_gpu_by_itself(tiny_images):
    images = load(tiny_images)
    placed = place_images(images, torch.device("cuda"), "auto")
    batches = [ImageStream(s, 0, 8, True).batch(1).images for s in (images, placed)]
    assert batches[1].device.type == "cuda"
    assert torch.equal(batches[0], batches[1].cpu())


# What is said of a set


def test_the_size_is_announced(tmp_path, tiny_images):
    embedded = load_images(TrainingConfig(dataset_name="embedded", resolution="28"))
    assert embedded.describe() == "6000 grey images, 28x28, 4.7 MB decoded"
    assert embedded.nbytes == 6000 * 28 * 28
    assert load(tiny_images, center_crop=True).describe() == ("12 RGB images, 8x8, 0.0 MB decoded")
    assert load(tiny_images).describe().endswith("decoded; kept at 8x10 for random crops")


def test_images_of_several_shapes_are_said_to_be_kept_so(tmp_path):
    for i, shape in enumerate(((8, 11), (10, 8), (8, 9))):
        save(tmp_path / "x", f"{i}.png", np.zeros(shape, np.uint8))
    assert load(tmp_path / "x").describe() == (
        "3 grey images, 8x8, 0.0 MB decoded; kept at their resized shapes for random crops "
        "(10x8 to 8x11)"
    )


def test_a_view_of_nothing():
    assert len(view(pa.array([], pa.int8()))) == 0


def test_a_set_smaller_than_a_batch_is_refused(numbered):
    check_batch(numbered, 10)
    with pytest.raises(InputError, match="10 images, fewer than the global batch of 11: choose"):
        check_batch(numbered, 11)


# Classes


def classes(path, **settings):
    settings = {"resolution": "8", "class_conditional": True, **settings}
    return load_images(TrainingConfig(dataset_name=str(path), **settings))


def labelled(path, labels, feature, **more):
    """A parquet file of images; image i has the grey value i and labels[i]."""
    pictures = [Image.fromarray(np.full((8, 8), i, np.uint8)) for i in range(len(labels))]
    features = {"image": datasets.Image(), "label": feature, **dict.fromkeys(more, feature)}
    return parquet(path, features, image=pictures, label=labels, **more)


def test_classes_come_with_their_images(tmp_path):
    names = ["cat", "dog", "owl"]
    path = labelled(tmp_path / "x.parquet", [2, 0, 1, 0], datasets.ClassLabel(names=names))
    images = classes(path)
    assert (images.num_classes, images.class_names) == (3, names)
    assert images.labels(np.array([3, 0, 2])).tolist() == [0, 2, 1]
    assert images.describe().endswith(", 3 classes")
    batch = ImageStream(images, seed=0, global_batch_size=4, flip=False).batch(0)
    assert batch.labels.dtype == np.int64
    assert [[2, 0, 1, 0][grey] for grey in seen(batch)] == batch.labels.tolist()


def test_without_class_conditional_there_are_no_classes(tmp_path):
    path = labelled(tmp_path / "x.parquet", [0, 1], datasets.ClassLabel(num_classes=2))
    images = classes(path, class_conditional=False)
    assert (images.num_classes, images.class_names) == (None, None)
    assert ImageStream(images, 0, 2, False).batch(0).labels is None


def test_integers_called_label_are_classes_without_names(tmp_path):
    images = classes(labelled(tmp_path / "x.parquet", [4, 0], datasets.Value("int32")))
    assert (images.num_classes, images.class_names) == (5, None)


def test_sub_folders_are_classes(tmp_path):
    """Also where file names look like splits."""
    for name in ("owl", "cat"):
        (tmp_path / "x" / name).mkdir(parents=True)
        for i in range(2):
            save(tmp_path / "x" / name, f"test_{i}.png", np.full((8, 8), len(name), np.uint8))
    images = load(tmp_path / "x", class_conditional=True)
    assert images.class_names == ["cat", "owl"]
    assert sorted(images.labels(np.arange(4))) == [0, 0, 1, 1]


def test_the_fingerprint_knows_the_classes(tmp_path):
    kind = datasets.ClassLabel(num_classes=2)
    paths = [labelled(tmp_path / f"{i}.parquet", [0, i], kind) for i in range(2)]
    conditional = [classes(path).fingerprint() for path in paths]
    assert conditional[0] != conditional[1]
    plain = [classes(path, class_conditional=False).fingerprint() for path in paths]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("labels", [[0, 3, 1], [0, -1, 1], [0, None, 1]])
def test_a_class_out_of_range_names_its_row(tmp_path, labels):
    # ClassLabel refuses 3 when it writes; others do not.
    kind = datasets.Value("int64")
    path = labelled(tmp_path / "plain.parquet", labels, kind)
    table = datasets.load_dataset("parquet", data_files=path, split="train")
    features = table.features | {"label": datasets.ClassLabel(num_classes=3)}
    info = datasets.DatasetInfo(features=datasets.Features(features))
    datasets.Dataset(table.data.table, info=info).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=rf"must be 0 to 2; row 1 has {labels[1]}: mend it"):
        classes(tmp_path / "set")


@pytest.mark.parametrize("label", [-2, None])
def test_integers_that_are_no_classes(tmp_path, label):
    path = labelled(tmp_path / "x.parquet", [0, 1, label], datasets.Value("int64"))
    with pytest.raises(InputError, match=f"must be at least 0; row 2 has {label}"):
        classes(path)


@pytest.mark.parametrize(
    ("kinds", "wanted", "message"),
    [
        ({}, None, "class_conditional needs a column of classes; the columns are .*image"),
        ({"n": "int64"}, None, "needs a column of classes.*--label_column"),
        ({"label": "int64", "labels": "int8"}, None, r"several columns of classes, \['label', 'l"),
        ({"label": "int64"}, "lable", "must be one of the columns .*'lable'. Did you mean 'label'"),
        ({"label": "string"}, "label", "label_column 'label' must hold classes as integers"),
    ],
)
def test_no_clear_column_of_classes(tmp_path, kinds, wanted, message):
    features = {"image": datasets.Image()} | {k: datasets.Value(v) for k, v in kinds.items()}
    picture = Image.fromarray(np.zeros((8, 8), np.uint8))
    cells = {k: ["a" if v == "string" else 0] for k, v in kinds.items()}
    path = parquet(tmp_path / "x.parquet", features, image=[picture], **cells)
    with pytest.raises(InputError, match=message) as caught:
        classes(path, label_column=wanted)
    assert "\n" not in str(caught.value)


def test_a_named_column_of_classes(tmp_path):
    path = labelled(tmp_path / "x.parquet", [0, 1], datasets.Value("int64"), kind=[3, 2])
    assert classes(path, label_column="kind").labels(np.arange(2)).tolist() == [3, 2]


# Images not trained on


def greys(images):
    return [int(images.pixels(i)[0, 0, 0]) for i in range(len(images))]


def held_out(folder, fraction, **settings):
    settings = dict(train_data_dir=str(folder), resolution="8", held_out=fraction, **settings)
    config = TrainingConfig(**settings)
    return split_held_out(config, load_images(config))


def test_nothing_is_held_out_unless_asked(numbered, tmp_path):
    images, held = held_out(tmp_path / "n", 0)
    assert len(images) == 10
    assert held is None


def test_a_fraction_is_held_out_of_training_the_same_for_every_seed(numbered, tmp_path):
    images, held = held_out(tmp_path / "n", 0.3)
    assert (len(images), len(held)) == (7, 3)
    assert sorted(greys(images) + greys(held)) == list(range(10))
    other, other_held = held_out(tmp_path / "n", 0.3, seed=1)
    assert greys(other_held) == greys(held)
    assert greys(other) == greys(images)
    stream = ImageStream(images, seed=0, global_batch_size=7, flip=False)
    assert sorted(seen(stream.batch(0))) == sorted(greys(images))
    whole, _ = held_out(tmp_path / "n", 0)
    assert images.fingerprint() != whole.fingerprint()


def test_what_is_held_out_was_decodable(tiny_images):
    images, held = held_out(corrupt(tiny_images), 0.2, corrupt_images="skip")
    assert (len(images), len(held)) == (8, 2)
    pixels = [s.pixels(i).tobytes() for s in (images, held) for i in range(len(s))]
    assert len(set(pixels)) == 10


def test_something_must_be_held_out(numbered, tmp_path):
    with pytest.raises(InputError, match="at least one image; 0.01 of 10 is none"):
        held_out(tmp_path / "n", 0.01)


@pytest.mark.parametrize(("folder", "split"), [("test", "test"), ("val", "validation")])
def test_a_test_split_is_what_is_held_out(tmp_path, folder, split):
    for name, values in (("train", (1, 2, 3)), (folder, (8, 9))):
        (tmp_path / "x" / name).mkdir(parents=True)
        for value in values:
            save(tmp_path / "x" / name, f"{value}.png", np.full((8, 8), value, np.uint8))
    images, held = held_out(tmp_path / "x", 0.5)
    assert (greys(images), greys(held)) == ([1, 2, 3], [8, 9])
    for both in (f"train+{split}", f"train + {split}", "all"):  # it is trained on
        images, held = held_out(tmp_path / "x", 0.4, split=both)
        assert sorted(greys(images) + greys(held)) == [1, 2, 3, 8, 9]


def test_a_large_test_split_gives_2000_spread_images(monkeypatch):
    monkeypatch.setattr("ddpm_hf.data.HELD_OUT_MOST", 20)
    config = TrainingConfig(
        dataset_name="embedded", resolution="28", held_out=0.01, class_conditional=True
    )
    images, held = split_held_out(config, load_images(config))
    assert (len(images), len(held)) == (6000, 20)
    assert len(set(held.labels(np.arange(20)))) >= 5


def test_saved_splits_with_classes_are_found(tmp_path):
    def part(names, labels):
        pictures = [Image.fromarray(np.zeros((8, 8), np.uint8))] * len(labels)
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        return datasets.Dataset.from_dict(
            {"image": pictures, "label": labels}, features=datasets.Features(features)
        )

    def split(folder, test_names):
        parts = {"train": part(["a", "b"], [0, 1, 1]), "dev": part(test_names, [0])}
        datasets.DatasetDict(parts).save_to_disk(folder)
        config = TrainingConfig(
            dataset_name=str(folder), resolution="8", held_out=0.01, class_conditional=True
        )
        return split_held_out(config, load_images(config))

    images, held = split(tmp_path / "same", ["a", "b"])
    assert (len(images), len(held), held.num_classes) == (3, 1, 2)
    with pytest.raises(InputError, match="held_out: the split 'dev' has the classes"):
        split(tmp_path / "other", ["a", "c"])


@pytest.mark.parametrize("recipe", ["fashion-quick", "default"])
def test_images_are_held_out_under_any_recipe(tmp_path, recipe):
    """A copy of the settings by their constructor refused the recipe's name."""
    for name, values in (("train", (1, 2, 3)), ("test", (8, 9))):
        for value in values:
            save_in = tmp_path / "x" / name
            save_in.mkdir(parents=True, exist_ok=True)
            save(save_in, f"{value}.png", np.full((8, 8), value, np.uint8))
    config = TrainingConfig.from_recipe(
        recipe, train_data_dir=tmp_path / "x", resolution=8, preset="auto", held_out=0.5
    )
    images, held = split_held_out(config, load_images(config))
    assert (greys(images), greys(held), config.split) == ([1, 2, 3], [8, 9], "train")


@pytest.mark.parametrize("names", [("train", "bus", "car"), ("training", "resting")])
def test_a_class_that_is_called_like_a_split_is_not_taken_for_one(tmp_path, names):
    """All images but that class's were left out without a word."""
    for name in names:
        (tmp_path / "x" / name).mkdir(parents=True)
        save(tmp_path / "x" / name, "a.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match=f"sub-folder '{names[0]}', which is the word for a split"):
        load(tmp_path / "x")
    (tmp_path / "x" / names[0]).rename(tmp_path / "x" / "trains")
    assert len(load(tmp_path / "x")) == len(names)


@pytest.mark.parametrize("names", [("test", "bus"), ("dev", "car")])
def test_a_split_beside_classes_is_refused_whatever_is_asked_for(tmp_path, names):
    for name in names:
        save(tmp_path / "x" / name, "a.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match=f"sub-folder '{names[0]}', which is the word for a split"):
        load(tmp_path / "x")


def test_a_split_in_capitals_is_asked_about(tmp_path):
    """One set of both was trained on."""
    for name in ("Train", "Test"):
        save(tmp_path / "x" / name, "a.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match="'Test': write it in small letters if it is a split"):
        load(tmp_path / "x")


def test_a_folder_is_the_same_set_by_either_name(tmp_path):
    """By its name as a data set three of four images were lost, each to a split."""
    for name in ("test_1", "val_2", "train_3", "img_4"):
        save(tmp_path / "x", f"{name}.png", np.zeros((8, 8), np.uint8))
    assert len(load_images(TrainingConfig(dataset_name=str(tmp_path / "x"), resolution="8"))) == 4
    (tmp_path / "x" / "metadata.csv").write_text("file_name,label\ntest_1.png,1\n")
    assert is_image_folder(str(tmp_path / "x"))
    for name in ("x.parquet", "README.md"):
        (tmp_path / "x" / name).write_text("")
        assert not is_image_folder(str(tmp_path / "x"))
        (tmp_path / "x" / name).unlink()
    assert not is_image_folder(str(tmp_path / "nowhere"))


def test_a_folder_without_images_says_what_is_there(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="no file of an image that `datasets` knows; it is empty"):
        load(tmp_path / "x")
    for name in ("a.heic", "b.heic", "notes.txt"):
        (tmp_path / "x" / name).write_bytes(b"?")
    with pytest.raises(InputError, match=r"its files end in .heic \(2\), .txt \(1\)"):
        load(tmp_path / "x")


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("with_paths", [False, True])
def test_a_parquet_file_of_files_as_bytes(tmp_path, large, with_paths):
    """As pandas and others write them, who know nothing of `datasets`."""
    binary = pa.large_binary() if large else pa.binary()
    files = []
    for value in (3, 5):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(buffer, "png")
        files.append(buffer.getvalue())
    column = pa.array(files, binary)
    if with_paths:
        column = pa.StructArray.from_arrays([column, pa.array(["a", "b"])], ["bytes", "path"])
    table = pa.table({"picture": column, "number": pa.array([1, 2])})
    pq.write_table(table, tmp_path / "x.parquet")
    for wanted in (None, "picture"):
        config = TrainingConfig(
            dataset_name=str(tmp_path / "x.parquet"), resolution="8", image_column=wanted
        )
        assert greys(load_images(config)) == [3, 5]
    with pytest.raises(InputError, match="image_column must be one of the image columns"):
        load_images(replace(config, image_column="number"))


def test_an_empty_split_is_one_clear_line(tmp_path):
    saved_part([1, 2]).save_to_disk(tmp_path / "saved")
    config = TrainingConfig(dataset_name=str(tmp_path / "saved"), split="train[:0]", resolution="8")
    with pytest.raises(InputError, match="the image set has no images: its split is empty"):
        load_images(config)


def test_numbers_that_are_no_classes_make_no_huge_network(tmp_path):
    path = labelled(tmp_path / "x.parquet", [5, 10**6, 2 * 10**6], datasets.Value("int64"))
    with pytest.raises(InputError, match="reach 2000000 in 3 images: they are no classes"):
        classes(path)


def test_twelve_bits_in_files_of_sixteen_are_noticed(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8)
    folder = save(tmp_path / "dark", "a.png", values * 65)  # up to 4095
    assert load(folder).brightest == pytest.approx(4095 / 65535, rel=1e-3)  # bicubic of none
    assert load(save(tmp_path / "bright", "a.png", values * 1040)).brightest > 0.9
    assert load(save(tmp_path / "bytes", "a.png", np.full((8, 8), 51, np.uint8))).brightest == 0.2


def test_a_grey_test_split_is_held_out_in_the_colours_of_training(tmp_path):
    for part, mode in (("train", "RGB"), ("test", "L")):
        (tmp_path / "x" / part).mkdir(parents=True)
        for i in range(3):
            image = Image.new(mode, (8, 8), i if mode == "L" else (i, 9, 9))
            image.save(tmp_path / "x" / part / f"{i}.png")
    images, held = held_out(tmp_path / "x", 0.5)
    assert held.centred(np.arange(1)).shape == images.centred(np.arange(1)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("split", ["test", "tset", "train+test"])
def test_a_split_that_a_folder_does_not_have_is_refused(tmp_path, split):
    """Everything was trained on, under whatever name."""
    save(tmp_path / "flat", "a.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match="is no sub-folder of .*; a folder without any is `train`"):
        load(tmp_path / "flat", split=split)
    if split == "tset":
        for name in ("train", "test"):
            (tmp_path / "x" / name).mkdir(parents=True)
            save(tmp_path / "x" / name, "a.png", np.zeros((8, 8), np.uint8))
        with pytest.raises(
            InputError, match="split 'tset' is no sub-folder of .*, but test, train"
        ):
            load(tmp_path / "x", split=split)
        assert len(load(tmp_path / "x", split="all")) == 2
        shutil.rmtree(tmp_path / "x" / "train")
        with pytest.raises(InputError, match="split 'train' is no sub-folder of .*, but test are"):
            load(tmp_path / "x")
