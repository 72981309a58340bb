"""Networks and processes by name, from a file, and for classes. Ho et al.'s: test_ho_unet.py."""

import dataclasses
import json

import diffusers
import pytest
import torch
from diffusers import UNet2DModel

from ddpm_hf import DDPMScheduler, build_scheduler, build_unet
from ddpm_hf.errors import InputError
from ddpm_hf.presets import PRESETS, load_unet_config, unet_config

from .conftest import images


@pytest.fixture
def saved(tiny_unet, tmp_path):
    """The folder of a configuration: two levels, 8x8 grey, with dropout."""
    tiny_unet.register_to_config(dropout=0.3)
    tiny_unet.save_config(tmp_path / "unet")
    return str(tmp_path / "unet")


def edit(folder, **changes):
    """Change or, with None, leave out keys of a saved configuration."""
    path = f"{folder}/config.json"
    with open(path) as file:
        config = json.load(file) | changes
    with open(path, "w") as file:
        json.dump({key: value for key, value in config.items() if value is not None}, file)


# Classes and learned variances


@pytest.mark.parametrize("preset", PRESETS)
def test_a_network_of_n_classes_has_one_more_and_twice_the_channels_for_a_variance(preset):
    arguments = unet_config(preset, resolution=(32, 32), num_classes=10, learned_variance=True)
    assert arguments["num_class_embeds"] == 11
    assert (arguments["in_channels"], arguments["out_channels"]) == (3, 6)
    assert unet_config(preset, resolution=(32, 32))["num_class_embeds"] is None


@pytest.mark.parametrize("initialisation", ["ho", "zero", "torch"])
def test_a_class_conditional_network_starts_as_its_initialisation_says(
    saved, monkeypatch, initialisation
):
    preset = dataclasses.replace(PRESETS["auto"], initialisation=initialisation)
    monkeypatch.setitem(PRESETS, "auto", preset)
    torch.manual_seed(0)
    arguments = dict(image_channels=1, num_classes=2, learned_variance=True)
    unet = build_unet(model_config=saved, resolution=(8, 8), **arguments)
    with torch.no_grad():
        out = unet(images(3, 1, 8, 8), 5, class_labels=torch.arange(3)).sample
    assert out.shape == (3, 2, 8, 8)
    assert bool(out.any()) == (initialisation == "torch")
    # All start from PyTorch's N(0, 1): three classes of 64 numbers each.
    assert 0.7 < unet.class_embedding.weight.std() < 1.3


def test_classes_make_a_difference_once_weights_are_not_zero(tiny_unet):
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(tiny_unet.config, num_class_embeds=3).eval()
    x = images(1, 1, 8, 8).expand(3, -1, -1, -1)
    with torch.no_grad():
        out = unet(x, 5, class_labels=torch.arange(3)).sample
    assert (out[0] - out[1]).abs().max() > 1e-3
    assert (out[0] - out[2]).abs().max() > 1e-3


# Networks from a file


def test_a_configuration_is_taken_but_for_what_the_images_and_the_variance_decide(saved, tiny_unet):
    config = load_unet_config(
        saved, resolution=(16, 32), image_channels=3, learned_variance=True, num_classes=7
    )
    theirs = dict(tiny_unet.config)
    changes = dict(sample_size=[16, 32], in_channels=3, out_channels=6, num_class_embeds=8)
    for key in changes:
        assert config.pop(key) == changes[key]
        theirs.pop(key)
    for key, value in theirs.items():
        if not key.startswith("_"):
            assert config[key] == (list(value) if isinstance(value, tuple) else value), key
    assert load_unet_config(saved, resolution=(8, 8), dropout=0.1)["dropout"] == 0.1


def test_a_configuration_may_be_named_as_a_file(saved):
    by_file = load_unet_config(f"{saved}/config.json", resolution=(8, 8))
    assert by_file == load_unet_config(saved, resolution=(8, 8))


def test_a_network_from_a_configuration_is_that_of_diffusers(saved):
    """As in train_unconditional.py, --model_config_name_or_path with PyTorch's initialisation."""
    torch.manual_seed(0)
    ours = build_unet(
        "diffusers-unconditional", model_config=saved, resolution=(8, 8), image_channels=1
    )
    torch.manual_seed(0)
    stock = UNet2DModel.from_config(UNet2DModel.load_config(saved))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True)
    )
    assert ours.config == stock.config


def test_another_way_to_condition_on_classes_is_left_out(saved):
    edit(saved, class_embed_type="timestep")
    unet = build_unet(model_config=saved, resolution=(8, 8), image_channels=1)
    assert unet.class_embedding is None


def test_a_configuration_without_levels_is_not_checked_for_halving(saved):
    edit(saved, block_out_channels=None)
    assert load_unet_config(saved, resolution=(9, 9))["sample_size"] == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(_class_name="AutoencoderKL"), "must be .* of a UNet2DModel; got that of 'Auto"),
        (dict(_class_name=None), "must be the configuration of a UNet2DModel; got that of None"),
        (dict(up_block_types=["UpBlock2D"]), "describes no network: Must provide the same number"),
        (dict(norm_num_groups=5), "describes no network: num_channels"),
        (dict(time_embedding_type="learned"), "describes no network: empty"),  # of how many rows?
    ],
)
def test_a_configuration_that_is_no_network_is_refused_in_one_line(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(InputError, match=message) as caught:
        build_unet(model_config=saved, resolution=(8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_configuration_that_cannot_be_read_is_refused_in_one_line(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="model_config_name_or_path '/.*' ") as caught:
        load_unet_config(str(tmp_path), resolution=(8, 8))
    assert "\n" not in str(caught.value)


def test_a_configuration_that_is_nowhere_is_refused_in_one_line():
    """No valid name of a repository either, so that nothing asks the Hub."""
    with pytest.raises(InputError, match="'no/such/folder' cannot be loaded: ") as caught:
        load_unet_config("no/such/folder", resolution=(8, 8))
    assert "\n" not in str(caught.value)


def test_a_resolution_that_the_levels_cannot_halve_is_refused(saved):
    with pytest.raises(InputError, match="9x8 cannot be halved 1 times, as the network of '/"):
        load_unet_config(saved, resolution=(9, 8))


def test_an_unknown_preset_is_refused_beside_a_configuration(saved):
    with pytest.raises(InputError, match="preset must be one of"):
        build_unet("cifar", model_config=saved, resolution=(8, 8))


# Processes


def test_a_process_of_a_learned_variance_and_named_classes_survives_stock(tmp_path):
    ours = build_scheduler(variance_type="learned_range", class_names=("cat", "dog"))
    assert ours.config.variance_type == "learned_range"
    ours.save_pretrained(tmp_path / "ours")
    diffusers.DDPMScheduler.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "stock")
    loaded = DDPMScheduler.from_pretrained(tmp_path / "stock")
    assert loaded.extras == {"format": 1, "class_names": ["cat", "dog"]}


def test_a_process_without_names_has_no_such_key():
    assert build_scheduler().extras == {"format": 1}


@pytest.mark.parametrize(
    ("resolution", "example"),
    [((65, 65), "64x64"), ((255, 255), "240x240"), ((100, 100), "96x96"), ((50, 50), "48x48")],
)
def test_a_resolution_that_leaves_the_network_no_levels_is_refused(resolution, example):
    """Attention in the middle of 255 x 255 pixels, and a view of parts of the image only."""
    with pytest.raises(InputError, match=f"cannot be halved .* for example {example}"):
        unet_config(resolution=resolution)


def test_without_a_null_class_there_are_as_many_embeddings_as_classes():
    config = unet_config(resolution=(32, 32), num_classes=3, null_class=False)
    assert config["num_class_embeds"] == 3
    scheduler = build_scheduler(null_class=False)
    assert scheduler.extras["null_class"] is False
    assert "null_class" not in build_scheduler().extras
