"""Starting from another model: its settings, its weights, and what does not fit."""

import json
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline, TrainingConfig, build_scheduler, train
from ddpm_hf.commandline import parse_config
from ddpm_hf.config import recipe_of_origin
from ddpm_hf.errors import InputError
from ddpm_hf.origin import settings_of_origin

from .conftest import quick_settings_in
from .hub_server import run_client

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


PINNED = dict(cpu_threads=1, mixed_precision="no", memory_format="contiguous", compile="no")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, with settings that its successors should have."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    settings = quick_settings_in(folder.parent) | dict(max_train_steps=2, snr_gamma=3.0)
    train(TrainingConfig(**settings | dict(output_dir=str(folder))))
    return folder


def test_a_run_hands_on_its_recipe_its_network_and_its_process(trained):
    config = parse_config(["--from", str(trained), "--seed", "7"])
    assert config.init_from == config.model_config_name_or_path == str(trained)
    assert (config.snr_gamma, config.seed, config.resolution) == (3.0, 7, "8")
    assert (config.dataset_name, config.split) == ("embedded", "test[:48]")
    assert config.run_dir.name == "from-first"
    # What belongs to the machine, or is measured on it, is not handed on.
    assert (config.output_dir, config.cpu_threads, config.compile) == (None, "auto", "auto")


def test_a_recipe_of_ones_own_and_other_images_win_but_the_network_stays(trained, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("snr_gamma: 1.0\nprediction_type: epsilon\ndataset_name: other/set\n")
    argv = ["--from", str(trained), "--recipe", str(recipe), "--train_data_dir", "images"]
    config = parse_config(argv)
    assert (config.snr_gamma, config.prediction_type) == (1.0, "v_prediction")
    assert (config.train_data_dir, config.dataset_name) == ("images", None)
    assert config.resolution == "8"


def test_training_begins_with_its_weights(trained, tmp_path):
    config = TrainingConfig.from_model(
        trained, learning_rate=0, output_dir=tmp_path / "second", **PINNED
    )
    assert config.max_train_steps == 2
    made = train(config).output_dir
    before, after = load_file(trained / WEIGHTS), load_file(made / WEIGHTS)
    # The average of equal weights: equal but for its rounding, in float32.
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-7)
    assert json.loads((made / "config.json").read_text())["init_from"] == str(trained)


def test_starting_afresh_takes_the_weights_and_the_network_of_the_model(
    trained, tiny_unet, tmp_path
):
    """Not those of the run that it deletes, nor the seed's."""
    pipe = DDPMPipeline(tiny_unet, build_scheduler())
    pipe.save_pretrained(tmp_path / "other")
    settings = dict(output_dir=tmp_path / "run", learning_rate=0, max_train_steps=1, logger="none")
    train(TrainingConfig.from_model(trained, **PINNED, **settings))
    settings |= dict(
        dataset_name="embedded", split="test[:48]", train_batch_size=4, optimizer="adamw"
    )
    settings |= dict(eval_batch_size=1, ddpm_num_inference_steps=1, overwrite_output_dir=True)
    made = train(TrainingConfig.from_model(tmp_path / "other", **PINNED, **settings)).output_dir
    saved = load_file(made / WEIGHTS)
    assert saved.keys() == tiny_unet.state_dict().keys()
    for name, tensor in tiny_unet.state_dict().items():  # averaged: equal but for rounding
        torch.testing.assert_close(saved[name], tensor, rtol=1e-6, atol=1e-7)


def test_starting_afresh_reads_the_model_and_not_what_was_kept_of_it(trained, tmp_path):
    shutil.copytree(trained / "unet", tmp_path / "origin" / "unet")
    shutil.copytree(trained / "scheduler", tmp_path / "origin" / "scheduler")
    recipe = json.loads((trained / "config.json").read_text())
    kept = json.dumps(recipe | dict(snr_gamma=1.0))
    (tmp_path / "origin" / "config.json").write_text(kept)
    (tmp_path / "config.json").write_text(json.dumps(recipe | dict(init_from=str(trained))))
    words = ["--from", str(trained), "--output_dir", str(tmp_path)]
    afresh = [*words, "--overwrite_output_dir"]
    assert parse_config(words).snr_gamma == 1.0
    assert parse_config(afresh).snr_gamma == 3.0
    assert parse_config([*afresh, "false"]).snr_gamma == 1.0
    assert parse_config([*afresh, "--resume_from_checkpoint", "latest"]).snr_gamma == 1.0


def test_the_model_itself_is_not_overwritten(trained):
    config = TrainingConfig.from_model(
        trained, output_dir=trained, overwrite_output_dir=True, logger="none", **PINNED
    )
    with pytest.raises(InputError, match="would delete the model that training starts from"):
        train(config)
    assert (trained / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prediction_type", "epsilon"], "was trained with another process: it predicts 'v_pred"),
        (["--ddpm_num_steps", "500"], "was trained with another process"),
        (["--class_conditional"], "do not fit this network, in 'class_embedding.weight'"),
        (["--image_mode", "RGB"], "do not fit this network, in 'conv_in.weight'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(trained, tmp_path, flags, message):
    out = tmp_path / "second"
    pinned = [f"--{name}={value}" for name, value in PINNED.items()]
    config = parse_config(["--from", str(trained), "--output_dir", str(out), *pinned, *flags])
    with pytest.raises(InputError, match=message):
        train(config)
    assert not out.exists()


def test_a_pipeline_without_a_recipe_decides_network_and_process(tiny_unet, tmp_path):
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=500, variance_type="fixed_large_log")
    diffusers.DDPMPipeline(tiny_unet, scheduler).save_pretrained(tmp_path)
    assert settings_of_origin(str(tmp_path)) == {
        "model_config_name_or_path": str(tmp_path),
        "resolution": "8",
        "image_mode": "L",
        "class_conditional": False,
        "ddpm_num_steps": 500,
        "ddpm_beta_schedule": "linear",
        "prediction_type": "epsilon",
        "variance_type": "fixed_large",
    }


def test_paths_of_a_stranger_are_no_places_here(trained):
    recipe = json.loads((trained / "config.json").read_text())
    recipe |= dict(dataset_name="./photos", train_data_dir="/home/somebody", output_dir="/etc")
    (stranger := trained.parent / "stranger").mkdir()
    shutil.copytree(trained / "scheduler", stranger / "scheduler")
    shutil.copytree(trained / "unet", stranger / "unet")
    (stranger / "config.json").write_text(json.dumps(recipe))
    taken = recipe_of_origin("org/model", stranger, {})
    assert not {"dataset_name", "train_data_dir", "output_dir"} & set(taken)
    assert recipe_of_origin(str(stranger), None, {})["train_data_dir"] == "/home/somebody"


def test_words_on_disk_and_ours(tiny_unet, tmp_path):
    DDPMPipeline(tiny_unet, build_scheduler(ddpm_beta_schedule="laplace")).save_pretrained(tmp_path)
    assert settings_of_origin(str(tmp_path))["ddpm_beta_schedule"] == "laplace"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(variance_type="learned"), "variance 'learned', which training has no word for"),
        (dict(trained_betas=[0.1] * 1000), "table of betas, which training has no word for"),
        (dict(trained_betas=[0.1, 0.2]), "must be num_train_timesteps=1000 numbers"),
        (dict(_ddpm_hf=None, trained_betas=[0.1] * 1000), "cannot start from"),
        (dict(variance_type=[1]), "cannot start from"),
    ],
)
def test_a_process_without_a_word_is_refused(tiny_unet, tmp_path, change, message):
    diffusers.DDPMPipeline(tiny_unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        settings_of_origin(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "holds no pipeline"), ("{", "config.json cannot be read"), ("3", "JSON object")],
)
def test_a_folder_that_is_no_pipeline(tmp_path, text, message):
    if text is not None:
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        settings_of_origin(str(tmp_path))


@pytest.mark.slow
def test_a_run_goes_on_when_its_origin_is_gone(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "origin-folder")
    pinned = [f"--{name}={value}" for name, value in PINNED.items()]
    words = ["--from", "origin-folder", "--output_dir", "second", *pinned, "--logger", "none"]
    train(parse_config([*words, "--max_train_steps", "1"]))
    shutil.rmtree("origin-folder")
    result = train(parse_config([*words, "--max_train_steps", "2"]))
    assert result.step == 2
    with pytest.raises(InputError, match="cannot start from 'origin-folder'"):
        parse_config(["--from", "origin-folder", "--output_dir", "third"])


@pytest.mark.parametrize("name", ["write_text", "rename"])
def test_a_kill_while_the_origin_is_kept_leaves_a_folder_that_can_be_used(
    trained, tmp_path, monkeypatch, name
):
    settings = dict(
        output_dir=tmp_path / "run", max_train_steps=1, logger="none", eval_batch_size=1
    )
    config = TrainingConfig.from_model(trained, **PINNED, **settings)
    done = getattr(Path, name)

    def killed(path, *arguments, **options):
        if "origin" in str(path):
            raise KeyboardInterrupt
        return done(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, name, killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not (tmp_path / "run" / "origin").exists()
    assert train(config).step == 1
    kept = json.loads((tmp_path / "run" / "origin" / "unet" / "config.json").read_text())
    assert kept == json.loads((trained / "unet" / "config.json").read_text())


def test_weights_without_the_recipe_are_refused():
    with pytest.raises(InputError, match="use TrainingConfig.from_model.'org/x', "):
        TrainingConfig(init_from="org/x")


@pytest.mark.parametrize("flat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_of_the_hub(hub_server, tiny_unet, tmp_path, flat):
    """`flat`: all files at the root, like google/ddpm-cifar10-32; else private, by --hub_token."""
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    diffusers.DDPMPipeline(tiny_unet, scheduler).save_pretrained(tmp_path / "saved")
    files = {
        path.relative_to(tmp_path / "saved").as_posix(): path.read_bytes()
        for path in (tmp_path / "saved").rglob("*")
        if path.is_file()
    }
    if flat:
        files = {name.split("/")[-1]: content for name, content in files.items()}
    hub_server.add("google/ddpm", files)
    hub_server.add("org/ddpm", files, private=True)
    name = "google/ddpm" if flat else "org/ddpm"
    settings = quick_settings_in(tmp_path) | dict(max_train_steps=1)
    words = [f"--{key}={value}" for key, value in settings.items() if key != "preset"]
    entry = "import sys; from ddpm_hf.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", entry, "train", "--from", name, *words]
    token = [] if flat else ["--hub_token", "hf_read"]
    said = run_client(hub_server, tmp_path / "home", [*command, *token], token=None)
    assert f"Started from the weights of {name}" in said
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["init_from"], settings["prediction_type"]) == (name, "epsilon")
    assert f"base_model: {name}" in (tmp_path / "run" / "README.md").read_text()

    missing = [*command[:5], "google/none"]
    said = run_client(hub_server, tmp_path / "home", missing, token=None, expect=2)
    assert "cannot start from 'google/none'" in said


SAY_SETTINGS = """
from huggingface_hub import constants
from ddpm_hf.errors import InputError
from ddpm_hf.origin import settings_of_origin

def say(name):
    try:
        print(name, settings_of_origin(name).get("snr_gamma"))
    except InputError as error:
        print(error)

"""


def files_in(folder):
    """The configurations in a folder, by their paths."""
    paths = [path for path in folder.rglob("*.json") if path.name.endswith("config.json")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_model_that_was_read_once_is_read_without_a_connection(trained, hub_server, tmp_path):
    files = files_in(trained)
    hub_server.add("org/model", files)
    hub_server.add("org/bare", {name: files[name] for name in files.keys() - {"config.json"}})
    hub_server.add("org/new", files)
    code = (
        SAY_SETTINGS + "say('org/model'), say('org/bare')\n"
        "constants.HF_HUB_OFFLINE = True\n"
        "say('org/model'), say('org/bare'), say('org/new')"
    )
    *said, refused = run_client(hub_server, tmp_path / "home", code).splitlines()
    assert said == ["org/model 3.0", "org/bare None"] * 2
    assert "cannot start from 'org/new'" in refused
    assert "HF_HUB_OFFLINE is set" in refused


def test_a_recipe_that_cannot_be_read_now_is_not_left_out(hub_server, trained, tmp_path):
    hub_server.add("org/model", files_in(trained))
    for method in ("HEAD", "GET"):  # the client asks for the head first, or does not
        hub_server.fail(method, "/resolve/[^/]*/config.json", status=403, times=None)
    said = run_client(hub_server, tmp_path / "home", SAY_SETTINGS + "say('org/model')")
    assert "cannot start from 'org/model': you may not (made to fail)" in said
