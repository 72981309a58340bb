"""Image sets of every kind, decoded once; batches that are a function of (seed, step)."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.config import TrainingConfig
from ddpm_hf.data import (
    ImageStream,
    deep_to_unit,
    flatten_transparency,
    load_images,
    open_dataset,
    resize_to_cover,
    to_network,
)
from ddpm_hf.errors import InputError


def load(path, **settings):
    """The set in a folder, with settings for the test."""
    settings = {"resolution": "8", **settings}
    return load_images(TrainingConfig(train_data_dir=str(path), **settings))


def save(folder, name, array):
    folder.mkdir(exist_ok=True)
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


@pytest.mark.parametrize(
    ("mode", "colour", "background", "expected_mode", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (0, 0, 255), "RGB", (0, 0, 255)),
        ("RGBA", (255, 0, 0, 255), (0, 0, 255), "RGB", (255, 0, 0)),
        ("LA", (0, 0), (255, 255, 255), "L", 255),
        ("LA", (0, 0), (255, 0, 0), "RGB", (255, 0, 0)),
        ("1", 1, (0, 0, 0), "L", 255),
        ("L", 9, (0, 0, 0), "L", 9),
        ("CMYK", (0, 255, 255, 0), (0, 0, 0), "RGB", (255, 0, 0)),
    ],
)
def test_modes(mode, colour, background, expected_mode, expected):
    flat = flatten_transparency(Image.new(mode, (2, 2), colour), background)
    assert (flat.mode, flat.getpixel((0, 0))) == (expected_mode, expected)


def test_palette_with_transparency():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30])
    assert flatten_transparency(image, (0, 0, 0)).getpixel((0, 0)) == (10, 20, 30)
    image.info["transparency"] = 0
    assert flatten_transparency(image, (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(("mode", "key"), [("RGB", (9, 9, 9)), ("L", 9)])
def test_a_colour_key_is_transparency(tmp_path, mode, key):
    """PNG's tRNS chunk leaves the mode as it is."""
    Image.new(mode, (2, 2), key).save(tmp_path / "a.png", transparency=key)
    flat = flatten_transparency(Image.open(tmp_path / "a.png"), (255, 255, 255))
    assert flat.mode == mode
    assert flat.getpixel((0, 0)) in (255, (255, 255, 255))


def test_stock_loses_what_is_kept_here(tmp_path):
    """Pitfall 4.17: convert("RGB") drops transparency, 16 bits and grey."""
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert clear.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert flatten_transparency(clear, (255, 255, 255)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[30000, 30001]], np.uint16))
    assert len(set(np.asarray(deep.convert("I").convert("RGB")).ravel())) == 1
    assert len(np.unique(np.asarray(deep_to_unit(flatten_transparency(deep, (0, 0, 0)))))) == 2


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


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_float_images_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match=r"pixels of mode F must be in \[0, 1\]"):
        deep_to_unit(Image.fromarray(np.full((2, 2), value, np.float32)))


def test_resize_has_antialiasing():
    """One-pixel stripes at half the size are grey; nearest or plain bilinear sampling keeps
    stripes.
    """
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(resize_to_cover(Image.fromarray(stripes), (16, 16), True)).astype(int)
    assert (
        np.abs(small[:, 2:-2] - 127).max() <= 20
    )  # bicubic's ripple; aliasing would give 0 and 255


@pytest.mark.parametrize(
    ("source", "size"), [((20, 24), (8, 8)), ((24, 20), (8, 12)), ((5, 7), (16, 8))]
)
def test_rectangles_are_covered_without_distortion(source, size):
    image = Image.new("L", source[::-1])
    covered = resize_to_cover(image, size, False)
    assert covered.height >= size[0]
    assert covered.width >= size[1]
    assert covered.height == size[0] or covered.width == size[1]
    assert resize_to_cover(image, size, True).size == size[::-1]


def test_rectangular_training_images(tiny_images):
    images = load(tiny_images, resolution="8x12")
    assert images.gather(np.arange(3), np.full((3, 3), 0.99), True).shape == (3, 3, 8, 12)


def test_crops_reach_both_ends_and_centre_crop_does_not_move(tiny_images):
    images, centred = load(tiny_images), load(tiny_images, center_crop=True)
    low, high = (images.gather(np.array([0]), np.full((1, 3), d), False) for d in (0.0, 0.999))
    assert not torch.equal(low, high)
    full = images.pixels(0)
    assert torch.equal(low[0], torch.from_numpy(full[:8, :8].transpose(2, 0, 1).copy()))
    assert torch.equal(high[0], torch.from_numpy(full[-8:, -8:].transpose(2, 0, 1).copy()))
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
    assert pixels[-1, 0, 0] == 0


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
