"""Every verb, really run; exit codes; one line for every error."""

import json
import os
import re
import subprocess
import sys
import zipfile
from contextlib import suppress

import diffusers
import numpy as np
import pytest
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler, build_scheduler
from ddpm_hf.bound import output_folder
from ddpm_hf.checkpoint import check_folder
from ddpm_hf.cli import main, run, share_cores
from ddpm_hf.errors import InputError
from ddpm_hf.sampling import SCHEDULERS, load_pipeline, sample_to

from .conftest import REPOSITORY


@pytest.fixture
def folder(tiny_unet, tmp_path):
    DDPMPipeline(tiny_unet, build_scheduler()).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def flags(settings):
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def test_train_then_sample(quick_settings, tmp_path):
    assert main(["train", *flags(quick_settings)]) == 0
    out, npy, grid = quick_settings["output_dir"], tmp_path / "x.npy", tmp_path / "grid.png"
    words = ["--num_images", "5", "--batch_size", "2", "--num_inference_steps", "3"]
    words += ["--scheduler", "ddim", "--output", str(npy), "--grid", str(grid)]
    assert main(["sample", out, *words]) == 0
    assert np.load(npy).shape == (5, 8, 8)
    assert Image.open(grid).mode == "L"


def test_the_script_is_the_verb(quick_settings):
    script = [sys.executable, str(REPOSITORY / "train_accelerate.py"), *flags(quick_settings)]
    result = subprocess.run([*script, "--dry_run"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["max_train_steps"] == 4
    bad = subprocess.run([*script, "--sed", "1"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.splitlines() == [
        "train_accelerate.py: error: unknown flag '--sed'. Did you mean '--seed'?"
    ]


def test_dry_run_writes_nothing(quick_settings, tmp_path, capsys):
    assert main(["train", *flags(quick_settings), "--dry_run"]) == 0
    assert json.loads(capsys.readouterr().out)["resolution"] == "8"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "verb must be one of train, sample, evaluate, calibrate, ema, push, convert; "
         "got 'trian'. Did you mean 'train'?"),
        (["sample"], "the following arguments are required: REPO_OR_FOLDER"),
        (["sample", "x"], "name what to write: --output, --grid or both"),
        (["sample", "./nowhere", "--grid", "g.png"], "cannot load a pipeline from './nowhere'"),
        (["sample", "x", "--schedler", "y"], "unrecognized arguments: --schedler y"),
        (["train", "--train_data_dir", "nowhere"], "train_data_dir must be a folder of images"),
        (["train", "--resolution", "30", "--preset", "cifar10", "--dataset_name", "embedded"],
         "resolution 30x30 cannot be halved 3 times"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_exit_code_two(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ddpm-hf: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_scheduler(folder, capsys):
    assert main(["sample", str(folder), "--grid", "g.png", "--scheduler", "dimm"]) == 2
    assert "scheduler must be one of ddpm, ddim" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help(argv, capsys):
    assert main(argv) == 0
    assert "sample" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_word(folder, tmp_path, name):
    pipe = load_pipeline(str(folder), name)
    assert type(pipe.scheduler).__name__ == SCHEDULERS[name]
    sample_to(tmp_path / "x.npy", pipe, 2, num_inference_steps=5)
    images = np.load(tmp_path / "x.npy")
    assert images.std((1, 2)).min() > 0
    assert not np.array_equal(images[0], images[1])


@pytest.mark.parametrize("word", ["sigmoid", "laplace"])
@pytest.mark.parametrize("whole", [True, False])
def test_schedules_that_only_ddpm_knows_by_name_are_sampled_by_all(
    tiny_unet, tmp_path, word, whole
):
    diffusers.DDPMPipeline(
        tiny_unet, diffusers.DDPMScheduler(beta_schedule=word, timestep_spacing="trailing")
    ).save_pretrained(tmp_path)
    if not whole:  # as a person writes it, with what differs from defaults
        file = tmp_path / "scheduler" / "scheduler_config.json"
        config = json.loads(file.read_text())
        del config["trained_betas"]
        file.write_text(json.dumps(config))
    pipe = load_pipeline(str(tmp_path), "dpm++")
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipe(1, num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_sampling_to_files_leaves_the_progress_bar_as_it_was(folder, tmp_path):
    pipe = load_pipeline(str(folder))
    pipe.set_progress_bar_config(desc="mine")
    sample_to(tmp_path / "x.npy", pipe, 1, num_inference_steps=1)
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_ddpm_is_ours_also_where_another_was_saved(folder, tmp_path):
    pipe = load_pipeline(str(folder), "ddim")
    pipe.save_pretrained(tmp_path / "ddim")
    assert type(load_pipeline(str(tmp_path / "ddim")).scheduler).__name__ == "DDIMScheduler"
    assert type(load_pipeline(str(tmp_path / "ddim"), "ddpm").scheduler) is DDPMScheduler


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_pngs_npy_and_npz_hold_the_same_images_whatever_the_batch(folder, tmp_path, batch_size):
    pipe = load_pipeline(str(folder), "ddim")
    for output in ("p", "x.npy", "x.npz"):
        sample_to(tmp_path / output, pipe, 7, batch_size=batch_size, seed=3, num_inference_steps=3)
    sample_to(tmp_path / "all.npy", pipe, 7, batch_size=7, seed=3, num_inference_steps=3)
    array = np.load(tmp_path / "x.npy")
    assert np.array_equal(array, np.load(tmp_path / "x.npz")["arr_0"])
    pngs = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "p").iterdir())]
    assert np.array_equal(array, np.stack(pngs))
    # float32 convolutions round differently in batches of another size: at most one grey level
    assert np.abs(array.astype(int) - np.load(tmp_path / "all.npy")).max() <= 1
    assert zipfile.ZipFile(tmp_path / "x.npz").namelist() == ["arr_0.npy"]


@pytest.mark.parametrize("name", ["x.NPY", "x.Npz"])
def test_an_array_in_capitals_is_an_array(folder, tmp_path, name):
    sample_to(tmp_path / name, load_pipeline(str(folder)), 2, num_inference_steps=1)
    loaded = np.load(tmp_path / name)
    assert (loaded["arr_0"] if name.endswith("z") else loaded).shape == (2, 8, 8)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_sampling_that_is_interrupted_leaves_no_unfinished_file(folder, tmp_path, name):
    pipe, calls, out = load_pipeline(str(folder)), [], tmp_path / "out"
    out.mkdir()

    def interrupt(*_):
        calls.append(len(list(out.iterdir())))
        if len(calls) == 3:  # in the second batch
            raise KeyboardInterrupt

    pipe.unet.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample_to(out / name, pipe, 4, batch_size=2, num_inference_steps=2)
    assert calls == [0, 0, 1]
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(output=None), "name what to write: output, grid or both"),
        (dict(output="x.npy", num_images=0), "num_images must be a whole number at least 1; got 0"),
        (dict(output="x.npy", batch_size=0), "batch_size must be a whole number at least 1; got 0"),
        (dict(output="x.npy", seed=-1), "seed must be a whole number at least 0; got -1"),
        (
            dict(output="x.npy", num_inference_steps=0),
            "must be a whole number between 1 and 1000; got 0",
        ),
        (
            dict(output="x.npy", num_inference_steps=1001),
            "must be a whole number between 1 and 1000; got 1001",
        ),
        (dict(output="x.npy", grid="g"), "grid must end like a picture, for example .png; got 'g'"),
        (dict(output="x.npy", grid="g.psd"), "grid must end like a picture, for example .png; got"),
        (dict(output=None, grid="pipe"), "pipe exists already"),
        (dict(output="empty.npy"), "empty.npy exists already: name another file"),
        (dict(output="x.npy", grid="file/g.png"), "file/g.png cannot be written, .*file is a file"),
        (dict(output="file/new/x.npy"), "file/new/x.npy cannot be written, .*file is a file"),
        (dict(output="s.jpg"), "output must be a folder, .npy or .npz, and grid a picture"),
    ],
)
def test_bad_sampling_arguments(folder, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.npy").mkdir()
    (tmp_path / "file").touch()
    options = {"num_images": 1, **options}
    with pytest.raises(InputError, match=message):
        sample_to(options.pop("output"), load_pipeline(str(folder)), **options)
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize("output", ["taken.npy", "taken"])
def test_existing_outputs_are_not_overwritten(folder, tmp_path, output):
    path = tmp_path / output
    (path if path.suffix else path / "a.txt").parent.mkdir(exist_ok=True)
    (path if path.suffix else path / "a.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already: name another file or an empty folder"):
        sample_to(path, load_pipeline(str(folder)), 1, num_inference_steps=2)
    assert (path if path.suffix else path / "a.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, None),
    ],
)
def test_waiting_threads_spin_briefly_unless_the_user_says_otherwise(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_classes_are_sampled_by_name_by_number_and_in_turn(tiny_unet, tmp_path):
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_config(tiny_unet.config, num_class_embeds=4)
    scheduler = build_scheduler(class_names=["cat", "dog", "hen"])
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "pipe")
    words = ["sample", str(tmp_path / "pipe"), "--num_images", "6", "--num_inference_steps", "2"]
    made = {}
    for name, label in {
        "all": [], "dog": ["--class_label", "dog"], "one": ["--class_label", "1"],
        "guided": ["--class_label", "dog", "--guidance_scale", "3"],
    }.items():  # fmt: skip
        output = tmp_path / f"{name}.npy"
        assert main([*words, *label, "--output", str(output)]) == 0
        made[name] = np.load(output).astype(int)
    assert np.array_equal(made["dog"], made["one"])
    # batches of other labels round differently: at most one grey level
    assert np.abs(made["dog"][[1, 4]] - made["all"][[1, 4]]).max() <= 1
    assert not np.array_equal(made["dog"][[0, 2]], made["all"][[0, 2]])
    assert not np.array_equal(made["dog"], made["guided"])


@pytest.mark.parametrize("output", ["out", "out.npy"])
def test_a_class_that_the_network_does_not_have(folder, capsys, tmp_path, output):
    output = tmp_path / "new" / output
    assert main(["sample", str(folder), "--class_label", "cat", "--output", str(output)]) == 2
    assert "this network is unconditional" in capsys.readouterr().err
    assert not output.parent.exists()


def test_a_place_that_cannot_be_written_is_one_line(folder, capsys, tmp_path):
    (tmp_path / "file").touch()
    words = ["sample", str(folder), "--num_inference_steps", "2", "--num_images", "1"]
    assert main([*words, "--grid", str(tmp_path / "file" / "g.png")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("ddpm-hf: error: ")
    assert "file" in said


def shown(capsys):
    """The one JSON object on standard output."""
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_every_verb_prints_its_result_as_json(quick_settings, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = quick_settings | dict(ema_profiles="0.05,0.1", ema_snapshot_steps=1)
    assert main(["train", "--json", *flags(settings)]) == 0
    trained = shown(capsys)
    run = settings["output_dir"]
    assert (trained["output_dir"], trained["step"], trained["pushed"]) == (run, 4, None)
    # The card's numbers are the same objects.
    assert trained["results"] == json.loads((tmp_path / "run" / "results.json").read_text())
    assert trained["results"][0]["value"] == trained["loss"]

    words = ["--num_images", "2", "--num_inference_steps", "2", "--output", "x.npy"]
    assert main(["sample", run, *words, "--json"]) == 0
    sampled = shown(capsys)
    assert (sampled["output"], sampled["num_inference_steps"]) == ("x.npy", 2)

    assert main(["ema", run, "--length", "0.07", "--output", "longer", "--json"]) == 0
    assert shown(capsys)["output"] == "longer"

    assert main(["train", "--dry_run", "--json", *flags(settings)]) == 0
    assert shown(capsys)["max_train_steps"] == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["push", "nowhere", "--repo", "org/x"], "nowhere is no folder"),
        (["convert", "nowhere.pt", "out"], "nowhere.pt is not a file"),
        (["train", "--sed", "1"], "unknown flag '--sed'"),
    ],
)
def test_errors_are_json_too(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "--json"]) == 2
    said = capsys.readouterr()
    assert message in json.loads(said.out)["error"]
    assert message in said.err


class Failing:
    """A verb that raises."""

    def __init__(self, error):
        self.error = error

    def __call__(self, argv):
        print("on its way")
        raise self.error


def test_an_error_without_words_is_json_and_a_traceback(capsys):
    full = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        run(Failing(full), ["--json"], "verb")
    assert shown(capsys) == {"error": repr(full)}


@pytest.mark.parametrize("error", [RuntimeError("x"), InputError("x"), KeyboardInterrupt()])
def test_one_process_of_many_prints_the_json(error, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with suppress(RuntimeError):
        run(Failing(error), ["--json"], "verb")
    assert capsys.readouterr().out == ""


def test_an_interrupt_is_one_line_json_and_exit_code_130(capsys):
    assert run(Failing(KeyboardInterrupt()), ["--json"], "ddpm-hf") == 130
    said = capsys.readouterr()
    assert json.loads(said.out) == {"error": "interrupted"}
    assert said.err.splitlines() == ["on its way", "ddpm-hf: interrupted"]


@pytest.mark.parametrize("verb", ["push", "train"])
def test_help_is_text_also_with_json(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help", "--json"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: ddpm-hf {verb}")


@pytest.mark.parametrize("words", ["push pipe --repo a/b --hub_token", "train --hub_tokn"])
def test_a_token_is_in_no_error(words, capsys):
    token = "hf_" + "aB3" * 10
    assert main([*words.split(), token, "--json"]) == 2
    said = capsys.readouterr()
    assert token not in said.out + said.err
    assert "error" in json.loads(said.out)


def test_an_error_of_another_kind_has_no_token_in_its_json(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_short")
    with pytest.raises(RuntimeError):
        run(Failing(RuntimeError("sent hf_short")), ["--json"], "verb")
    assert shown(capsys) == {"error": "RuntimeError('sent ***')"}


def test_a_token_on_the_command_line_reaches_no_tracker(quick_settings, monkeypatch, capsys):
    words = ["train", *flags(quick_settings), "--hub_token=hf_secretToken", "--dry_run"]
    monkeypatch.setattr(sys, "argv", ["ddpm-hf", *words])
    monkeypatch.setenv("HF_TOKEN", "another")
    assert main(words) == 0
    assert os.environ["HF_TOKEN"] == "hf_secretToken"
    assert "--hub_token=***" in sys.argv
    said = capsys.readouterr()
    assert "hf_secretToken" not in said.out + said.err
    assert "`hf auth login` is safer" in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "sample x --num_image 3 --grid g.png",
            "--num_image 3. Did you mean '--num_images'",
        ),
        ("sample x --zzz --grid g.png", "unrecognized arguments: --zzz. --help lists all flags"),
        ("push x --repo a --privat", "--privat. Did you mean '--private'"),
        ("train --center_cro", "unknown flag '--center_cro'. Did you mean '--center_crop'?"),
        ("train --token=hf_a", "unknown flag '--token'. Did you mean '--hub_token'?"),
        ("train my_images", "'my_images' stands without a flag: .* --train_data_dir my_images or"),
        ("train --lr 1e-4", "unknown flag '--lr'. --help lists all flags"),
    ],
)
def test_a_misspelt_flag_names_the_nearest(words, message, capsys):
    assert main(words.split()) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_file_is_no_folder_to_write_to(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="output_dir .*file is a file: name a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(InputError, match="output .*file is a file: name a folder"):
        output_folder(str(folder), tmp_path / "file")
