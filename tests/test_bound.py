"""`evaluate` and `calibrate` over sets of images: what they measure, write and refuse."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from PIL import Image

from ddpm_hf import (
    DDPMPipeline,
    DDPMScheduler,
    TrainingConfig,
    build_scheduler,
    calibrate,
    evaluate,
)
from ddpm_hf.bound import _check_visits, load, prepare
from ddpm_hf.card import write_card
from ddpm_hf.cli import main
from ddpm_hf.errors import InputError
from ddpm_hf.evaluation import plot_rate_distortion, table
from ddpm_hf.likelihood import RateDistortion, Strata, bits_per_dim, noise_for
from ddpm_hf.results import read_results
from ddpm_hf.sampling import load_pipeline

T = 50


def save_images(folder, count=7, size=(8, 8), channels=1):
    """PNGs of one size, different from each other."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    shape = size if channels == 1 else (*size, channels)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def grey(tmp_path):
    """Seven grey images of 8x8."""
    return save_images(tmp_path / "grey" / "test")


@pytest.fixture
def model(tiny_unet, tmp_path):
    scheduler = build_scheduler(ddpm_num_steps=T, ddpm_beta_schedule="linear")
    DDPMPipeline(tiny_unet, scheduler).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_evaluate_measures_the_bound_of_every_image(model, grey, tmp_path):
    result = evaluate(model, str(grey.parent), batch_size=3)
    pixels = np.stack([np.asarray(Image.open(grey / f"{i}.png")) for i in range(7)])
    x_0 = torch.from_numpy(pixels[:, None] / np.float32(127.5) - 1)
    pipe = DDPMPipeline.from_pretrained(model)
    bound = bits_per_dim(pipe.unet, pipe.scheduler, x_0, noise_for(0, range(7), (1, 8, 8)))
    totals = bound.total_bpd.numpy()
    # float32 convolutions round differently in batches of another size
    assert result.bits_per_dim == pytest.approx(totals.mean(), rel=1e-5)
    assert result.standard_error == pytest.approx(totals.std(ddof=1) / 7**0.5, rel=1e-3)
    low, high = result.interval
    assert low == pytest.approx(result.bits_per_dim - 1.96 * result.standard_error)
    assert high - low == pytest.approx(2 * 1.96 * result.standard_error)
    assert result.rate_bpd + result.distortion_bpd == pytest.approx(result.bits_per_dim)
    assert result.distortion_bpd == pytest.approx(bound.vb_bpd[:, 0].mean().item(), rel=1e-5)
    assert result.num_images == 7


def test_evaluate_writes_results_table_plot_and_strips(model, grey, tmp_path, capsys):
    words = ["evaluate", model, "--nll", "--dataset_name", str(grey.parent), "--timesteps", "20"]
    assert main(words) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "model"
    rows = {row.metric: row for row in read_results(folder)}
    assert set(rows) == {"bits_per_dim", "rate", "distortion", "distortion_rmse"}
    row = rows["bits_per_dim"]
    assert (row.unit, row.dataset, row.split, row.num_images) == ("bits/dim", "grey", "test", 7)
    assert row.protocol == "variational bound, 20 of 50 timesteps, stratified, fixed_small"
    assert row.standard_error > 0
    assert f"Bits/dim: {row.value:.4f}, 95 % within " in said
    curve = json.loads((folder / "rate_distortion.json").read_text())
    assert curve["dataset"] == "grey"
    assert len(curve["t"]) == len(curve["rate_bpd"]) == len(curve["distortion_rmse"]) == 20
    assert Image.open(folder / "rate_distortion.png").width > 500
    # seven rows of nine x_0_hat and the image, each of 56 pixels and a border
    assert Image.open(folder / "reconstructions.png").size == (10 * 58 + 2, 7 * 58 + 2)
    assert main(words) == 0
    assert len(read_results(folder)) == 4  # the same measurement takes the place of the first


def test_the_curve_is_drawn_over_all_steps_also_of_few_timesteps():
    """The first of 10 shares of 1,000 has its middle some 150 steps from the noise."""
    middle = torch.tensor([851.0, 130.0, 0.0])
    curve = RateDistortion(middle, torch.tensor([0.02, 0.4, 3.9]), torch.tensor([68.0, 14.0, 1.0]))
    distortion, bits, both = plot_rate_distortion(curve, 1000).axes
    for axes, column in ((distortion, curve.distortion_rmse), (bits, curve.rate_bpd)):
        (line,) = axes.get_lines()
        assert line.get_xdata().tolist() == [148, 869, 999]
        assert line.get_ydata().tolist() == column.tolist()
    (line,) = both.get_lines()
    assert line.get_xdata().tolist() == curve.rate_bpd.tolist()


def test_the_last_reconstruction_is_close_to_the_image(model, grey, tmp_path):
    """x_0_hat at t = 0 is x_t less a little noise, whatever the network says."""
    evaluate(model, str(grey.parent), timesteps=5, output=tmp_path / "out")
    strip = np.asarray(Image.open(tmp_path / "out" / "reconstructions.png").convert("L"), int)
    tiles = [strip[2 + 10 : 58 : 7, 2 + 58 * k + 10 : 58 * (k + 1) : 7] for k in range(10)]
    assert np.abs(tiles[8] - tiles[9]).mean() < 10 < np.abs(tiles[0] - tiles[9]).mean()
    assert not (tmp_path / "model" / "results.json").exists()


def test_a_subset_of_timesteps_agrees_within_its_error(model, grey):
    few, every = (evaluate(model, str(grey.parent), timesteps=k) for k in (20, None))
    error = (few.standard_error**2 + every.standard_error**2) ** 0.5
    assert abs(few.bits_per_dim - every.bits_per_dim) < 3 * error
    assert table(few.curve).count("\n") >= 10
    assert table(every.curve).splitlines()[1].split()[0] == str(T - 1)


def test_a_number_of_images_is_spread_over_the_set(model, grey, tmp_path):
    three = evaluate(model, str(grey.parent), timesteps=5, num_images=3)
    spread = tmp_path / "spread" / "test"
    spread.mkdir(parents=True)
    for i in (0, 3, 6):
        (grey / f"{i}.png").rename(spread / f"{i}.png")
    alone = evaluate(model, str(spread.parent), timesteps=5)
    assert three.num_images == alone.num_images == 3
    assert three.bits_per_dim == alone.bits_per_dim


def test_rgb_and_rectangular_images(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=(8, 12),
        in_channels=3,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    scheduler = build_scheduler(ddpm_num_steps=T, variance_type="learned_range")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    data = save_images(tmp_path / "rgb" / "test", 4, (8, 12), 3).parent
    result = evaluate(str(tmp_path / "model"), str(data), timesteps=10)
    assert result.bits_per_dim > 0
    assert read_results(tmp_path / "model")[0].protocol.endswith("stratified, learned_range")
    calibrated = calibrate(str(tmp_path / "model"), str(data), split="test", timesteps=T)
    pipe = DDPMPipeline.from_pretrained(calibrated.output_dir)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(1, num_inference_steps=5, output_type="np").images.shape == (1, 8, 12, 3)


# Calibration


def test_calibrate_in_place_and_sample_by_it(model, grey, tmp_path, capsys, monkeypatch):
    before = sorted(path for path in (tmp_path / "model").rglob("*"))
    words = ["calibrate", model, "--dataset_name", str(grey.parent), "--split", "test"]
    assert main([*words, "--timesteps", "40", "--steps", "5", "10"]) == 0
    said = capsys.readouterr().out
    assert "5 steps with that variance now take the timesteps optimal for the bound" in said
    assert sorted(path for path in (tmp_path / "model").rglob("*")) == before
    pipe = DDPMPipeline.from_pretrained(model)
    stored = pipe.scheduler.analytic
    assert len(stored["mean_square_eps"]) == len(stored["standard_error"]) == T
    about = {key: stored[key] for key in ("dataset", "split", "num_images", "seed")}
    assert about == {"dataset": "grey", "split": "test", "num_images": 7, "seed": 0}
    pipe.set_progress_bar_config(disable=True)
    pipe(1, num_inference_steps=10)
    assert pipe.scheduler.timesteps.tolist() == list(stored["timesteps"]["10"])
    stock = diffusers.DDPMPipeline.from_pretrained(model)
    assert type(stock.scheduler) is diffusers.DDPMScheduler
    lines = said.split("these lines:\n")[2].splitlines()[:2]
    exec("\n".join(lines), {"pipe": stock})
    stock(1, num_inference_steps=3)
    assert stock.scheduler.timesteps.tolist() == list(stored["timesteps"]["10"])
    monkeypatch.chdir(tmp_path)
    _, command = said.strip().splitlines()[-1].split("ddpm-hf ")
    assert main(command.split()) == 0
    assert (tmp_path / "grid.png").is_file()


def test_calibrate_into_another_folder_leaves_the_first(model, grey, tmp_path):
    made = calibrate(model, str(grey.parent), split="test", timesteps=T, output=tmp_path / "new")
    assert made.timesteps == {}
    assert DDPMScheduler.from_pretrained(f"{model}/scheduler").analytic is None
    pipe = DDPMPipeline.from_pretrained(tmp_path / "new")
    assert pipe.scheduler.analytic["num_images"] == 7
    assert made.standard_error == pytest.approx(
        max(pipe.scheduler.analytic["standard_error"]), rel=0.01
    )


def test_a_model_calibrated_into_another_folder_takes_its_run_along(model, grey, tmp_path):
    """Its background, recipe and results, and a card that is its own."""
    first, other = tmp_path / "model", tmp_path / "other"
    settings = vars(TrainingConfig(train_data_dir=str(grey), background="black"))
    (first / "config.json").write_text(json.dumps(settings))
    evaluate(model, str(grey.parent), timesteps=5)
    write_card(first)
    calibrate(model, str(grey.parent), split="test", num_images=7, timesteps=T, output=other)
    config, _ = prepare(str(other), str(grey.parent), "test", {})
    assert config.background == "black"
    assert read_results(other) == read_results(first)
    assert "# other" in (other / "README.md").read_text()
    assert "# model" in (first / "README.md").read_text()


def test_what_is_in_the_folder_of_a_calibrated_copy_stays(model, grey, tmp_path):
    """A person's card, and what `evaluate --output` measured there before."""
    other = tmp_path / "other"
    evaluate(model, str(grey.parent), timesteps=5, num_images=6)
    evaluate(model, str(grey.parent), timesteps=5, output=other)
    (other / "README.md").write_text("mine")
    rows = read_results(other)
    calibrate(model, str(grey.parent), split="test", num_images=7, timesteps=T, output=other)
    assert (other / "README.md").read_text() == "mine"
    assert read_results(other) == rows


@pytest.mark.slow
def test_measuring_after_training_in_one_script(model, grey, tmp_path):
    """Under torchrun the end of training parts the processes, of which accelerate knows nothing."""
    script = tmp_path / "job.py"
    script.write_text(f"""if True:
        import torch
        from accelerate import PartialState
        from ddpm_hf import evaluate
        assert PartialState(cpu=True).distributed_type.value != "NO"
        torch.distributed.destroy_process_group()
        print("measured", evaluate({model!r}, {str(grey.parent)!r}, timesteps=5).num_images)
    """)
    launch = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d",
              "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    said = {}
    for count in ("1", "2"):
        command = [sys.executable, *launch, "--nproc_per_node", count, str(script)]
        env = os.environ | {"ACCELERATE_USE_CPU": "1"}
        said[count] = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert "measured 7" in said["1"].stdout, said["1"].stderr
    assert "the processes parted when training ended: measure in a command" in said["2"].stderr


def test_measuring_leaves_the_callers_accelerator_as_it_is(model, grey):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        evaluate(model, str(grey.parent), timesteps=5)
        assert accelerator.device.type == "cpu"
        assert accelerator.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that nobody writes into")
def test_a_folder_that_cannot_be_written_is_known_before(model, grey, monkeypatch):
    monkeypatch.setattr(UNet2DModel, "forward", lambda *_: pytest.fail("it measured"))
    for verb in (evaluate, calibrate):
        with pytest.raises(InputError, match="cannot write into /proc/self .*: name another"):
            verb(model, str(grey.parent), split="test", output="/proc/self", timesteps=T)


def test_numbers_that_cannot_be_written_are_told(model, grey, tmp_path):
    (tmp_path / "model" / ".results.json.partial").mkdir()
    result = evaluate(model, str(grey.parent), timesteps=5, output=tmp_path / "elsewhere")
    measured = rf"Measured: {result.bits_per_dim:.4f} bits/dim, standard error "
    with pytest.raises(InputError, match=measured):
        evaluate(model, str(grey.parent), timesteps=5)


def test_another_scheduler_in_the_folder_is_calibrated_too(tiny_unet, grey, tmp_path):
    scheduler = diffusers.DDIMScheduler.from_config(build_scheduler(ddpm_num_steps=T).config)
    DDPMPipeline(tiny_unet, scheduler).save_pretrained(tmp_path / "ddim")
    calibrate(str(tmp_path / "ddim"), str(grey.parent), split="test", timesteps=T)
    again = diffusers.DDIMScheduler.from_pretrained(tmp_path / "ddim" / "scheduler")
    assert DDPMScheduler.from_config(again.config).analytic["num_images"] == 7


# Classes


def class_unet(num_class_embeds):
    """A network whose answer depends on the class."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        num_class_embeds=num_class_embeds,
    )
    unet.class_embedding.weight.data *= 3  # far apart
    return unet.eval()


@pytest.mark.parametrize("verb", [evaluate, calibrate])
def test_transparent_images_have_the_background_of_the_run(model, tmp_path, verb):
    """A model trained on black was measured on white."""
    (tmp_path / "clear").mkdir()
    for i in range(4):
        Image.new("LA", (8, 8), (200, 0)).save(tmp_path / "clear" / f"{i}.png")
    config, pipe = prepare(model, str(tmp_path / "clear"), "train", {})
    assert (load(config, pipe, None, False).pixels(0) == 255).all()
    (tmp_path / "model" / "config.json").write_text('{"background": "black"}')
    config, pipe = prepare(model, str(tmp_path / "clear"), "train", {})
    assert (load(config, pipe, None, False).pixels(0) == 0).all()
    config, pipe = prepare(model, str(tmp_path / "clear"), "train", {"background": "white"})
    assert (load(config, pipe, None, False).pixels(0) == 255).all()
    verb(model, str(tmp_path / "clear"), num_images=4, timesteps=T, background="#000000")
    told = read_results(tmp_path / "model")
    assert all("transparent images on #000000" in row.protocol for row in told)
    assert bool(told) == (verb is evaluate)


@pytest.mark.parametrize("verb", [evaluate, calibrate])
def test_numbers_do_not_go_into_the_folder_of_another_pipeline(model, grey, tmp_path, verb):
    other = shutil.copytree(model, tmp_path / "other")
    with pytest.raises(InputError, match="other holds another pipeline: name another folder"):
        verb(model, str(grey), output=other)
    assert {path.name for path in other.iterdir()} == {"model_index.json", "scheduler", "unet"}


def test_images_that_cannot_be_decoded_may_be_left_out(model, grey):
    (grey / "3.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="1 of 7 images cannot be decoded"):
        evaluate(model, str(grey), timesteps=2)
    assert evaluate(model, str(grey), timesteps=2, corrupt_images="skip").num_images == 6
    with pytest.raises(InputError, match="corrupt_images must be one of raise, skip"):
        evaluate(model, str(grey), corrupt_images="leave")


@pytest.fixture
def classes(tmp_path):
    """Three images each of two classes."""
    for name in ("cat", "dog"):
        save_images(tmp_path / "data" / "test" / name, 3)
    return tmp_path / "data"


@pytest.mark.parametrize("null_class", [True, False])
def test_classes_of_the_images_reach_the_network(classes, tmp_path, null_class):
    """Networks of other trainers have no null class."""
    scheduler = build_scheduler(ddpm_num_steps=T, class_names=["cat", "dog"])
    if not null_class:
        scheduler.register_to_config(_ddpm_hf={**scheduler.extras, "null_class": False})
    unet = class_unet(2 + null_class)
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    found = evaluate(str(tmp_path / "model"), str(classes), batch_size=6).bits_per_dim

    files = sorted((classes / "test").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])[:, None]
    x_0 = torch.from_numpy(pixels / np.float32(127.5) - 1)

    def by_hand(labels):
        def network(x_t, t):
            return unet(x_t, t, class_labels=torch.tensor(labels))

        bound = bits_per_dim(network, scheduler, x_0, noise_for(0, range(6), (1, 8, 8)))
        return bound.total_bpd.mean().item()

    assert found == pytest.approx(by_hand([0, 0, 0, 1, 1, 1]), rel=1e-5)  # float32 convolutions
    for wrong in ([1, 1, 1, 0, 0, 0], [0] * 6):
        assert found != pytest.approx(by_hand(wrong), rel=1e-3)


def test_calibrating_by_class(classes, tmp_path):
    scheduler = build_scheduler(ddpm_num_steps=T, class_names=["cat", "dog"])
    DDPMPipeline(class_unet(3), scheduler).save_pretrained(tmp_path / "model")
    calibrate(str(tmp_path / "model"), str(classes), split="test", timesteps=T)
    pipe = DDPMPipeline.from_pretrained(tmp_path / "model")
    assert pipe.scheduler.analytic["num_images"] == 6
    assert pipe.scheduler.extras["class_names"] == ["cat", "dog"]


def test_classes_that_the_network_does_not_have(classes, tmp_path, model, grey):
    scheduler = build_scheduler(ddpm_num_steps=T, class_names=["dog", "cat"])
    DDPMPipeline(class_unet(3), scheduler).save_pretrained(tmp_path / "classes")
    with pytest.raises(InputError, match="the set's classes are .*'cat', 'dog'.*, and the"):
        evaluate(str(tmp_path / "classes"), str(classes), timesteps=10)
    with pytest.raises(InputError, match="label_column='kind' has no effect: .* has no classes"):
        evaluate(model, str(grey.parent), timesteps=10, label_column="kind")


# Bad input


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (dict(size=(10, 8)), "row 0 of the images is 10x8, and the network's are 8x8: .*--fit"),
        (dict(channels=3), "the images are RGB and the network's are grey: .*--fit"),
    ],
)
def test_images_of_another_kind_are_refused_unless_they_are_to_be_fitted(
    model, tmp_path, images, message
):
    data = save_images(tmp_path / "other" / "test", **images).parent
    with pytest.raises(InputError, match=message):
        evaluate(model, str(data), timesteps=5)
    with pytest.raises(InputError, match=message):
        calibrate(model, str(data), split="test")
    assert evaluate(model, str(data), timesteps=5, fit=True).num_images == 7


def test_deep_images_have_no_bits_per_dim(model, tmp_path):
    folder = tmp_path / "deep" / "test"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(folder / "0.png")
    with pytest.raises(InputError, match="more than 8 bits; the bound is that of 256 grey levels"):
        evaluate(model, str(folder.parent), timesteps=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(timesteps=1), "timesteps must be a whole number between 2 and 50; got 1"),
        (dict(num_images=0), "num_images must be a whole number at least 1; got 0"),
        (dict(batch_size=0), "batch_size must be a whole number at least 1; got 0"),
        (dict(seed=-1), "seed must be a whole number at least 0; got -1"),
        (dict(strip_timesteps=[50]), r"must be timesteps from 0 to 49; got \[50\]"),
        (dict(strip_timesteps=[10.5]), r"must be timesteps from 0 to 49; got \[10.5\]"),
        (dict(strip_timesteps=[]), r"must be timesteps from 0 to 49; got \[\]"),
        (dict(split="tset"), "split 'tset' is no sub-folder of .*, but test are"),
        (dict(image_colum="x"), "image_colum is no setting of the images"),
    ],
)
def test_bad_arguments(model, grey, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(model, str(grey.parent), **options)


def test_the_command_that_calibrate_prints_works_for_another_scheduler(
    model, grey, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    load_pipeline(model, "ddim").save_pretrained("ddim")
    capsys.readouterr()
    words = ["--dataset_name", str(grey.parent), "--split", "test", "--timesteps", "40"]
    assert main(["calibrate", "ddim", *words]) == 0
    said = capsys.readouterr().out.strip()
    assert "take the optimal variance, but under --scheduler ddpm only" in said
    printed = said.split("ddpm-hf ")[-1].split()
    assert main([*printed, "--num_images", "1"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "x", "--dataset_name", "y"], "name what to measure: --nll"),
        (["evaluate", "x", "--nll"], "arguments are required: --dataset_name"),
        (["evaluate", "./nowhere", "--nll", "--dataset_name", "y"], "cannot load a pipeline"),
        (["calibrate", "x"], "arguments are required: --dataset_name"),
    ],
)
def test_bad_command_lines(argv, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(argv) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(timesteps=10), "every timestep needs two images or more, and 7 images at 10 time"),
        (dict(steps=25), r"steps must be a list of numbers, for example \[10, 25\]; got 25"),
        (dict(steps=[1]), "steps must be a whole number between 2 and 50; got 1"),
        (dict(steps=[10, 51]), "steps must be a whole number between 2 and 50; got 51"),
        (dict(timesteps=51), "timesteps must be a whole number between 2 and 50; got 51"),
        (dict(timesteps=0), "timesteps must be a whole number between 2 and 50; got 0"),
        (dict(seed=-1), "seed must be a whole number at least 0; got -1"),
    ],
)
def test_what_calibration_cannot_do_is_said_before_it_measures(
    model, grey, options, message, monkeypatch
):
    monkeypatch.setattr(UNet2DModel, "forward", lambda *_: pytest.fail("it measured"))
    with pytest.raises(InputError, match=message):
        calibrate(model, str(grey.parent), split="test", **options)


def test_a_place_that_cannot_be_written_is_said_before_it_is_measured(
    model, grey, tmp_path, monkeypatch
):
    monkeypatch.setattr(UNet2DModel, "forward", lambda *_: pytest.fail("it measured"))
    (tmp_path / "file").touch()
    for verb in (evaluate, calibrate):
        with pytest.raises(InputError, match="cannot write: .*file"):
            verb(model, str(grey.parent), split="test", output=tmp_path / "file" / "out")


def test_results_that_cannot_be_read_are_said_before_it_is_measured(
    model, grey, tmp_path, monkeypatch
):
    monkeypatch.setattr(UNet2DModel, "forward", lambda *_: pytest.fail("it measured"))
    for name in ("results.json", "training.json"):
        (tmp_path / "model" / name).write_text('{"fid": 3}')
        with pytest.raises(InputError, match=name):
            evaluate(model, str(grey.parent))
        (tmp_path / "model" / name).unlink()


def test_images_that_are_enough_to_calibrate_by_are_known_before(model, grey, monkeypatch):
    """Twice the largest share is not: the shares are drawn evenly, and not exactly so."""
    strata = Strata.split(T, 10, power=1)
    largest = int(strata.size.max())
    with pytest.raises(InputError, match="leave some with less: use num_images of") as caught:
        _check_visits(2 * largest, strata, 0)
    wanted = int(re.search(r"num_images of (\d+)", str(caught.value))[1])
    assert 2 * largest < wanted <= 4 * largest
    with pytest.raises(InputError, match=f"use num_images of {wanted} or"):
        _check_visits(wanted - 1, strata, 0)
    visits = torch.bincount(strata.draw(0, np.arange(wanted)).flatten(), minlength=T)
    assert visits.min() >= 2
    _check_visits(wanted, strata, 0)


def test_a_model_of_few_timesteps_is_evaluated(tiny_unet, grey, tmp_path):
    scheduler = build_scheduler(ddpm_num_steps=20, ddpm_beta_schedule="cosine")
    DDPMPipeline(tiny_unet, scheduler).save_pretrained(tmp_path / "short")
    result = evaluate(str(tmp_path / "short"), str(grey.parent))
    assert (result.output_dir / "shared_latents.png").is_file()


def test_rows_say_what_decides_them(model, grey, tmp_path):
    """Two measurements that differ in it are two rows."""
    evaluate(model, str(grey.parent), timesteps=5)
    evaluate(model, str(grey.parent), timesteps=5, fit=True)
    rows = read_results(tmp_path / "model")
    found = [row.protocol for row in rows if row.metric == "bits_per_dim"]
    assert len(found) == 2
    assert found[1] == f"{found[0]}, images resized to fit"


def test_an_old_folder_with_all_files_at_its_top_is_calibrated_in_place(model, grey, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "model").rglob("*.*"):
        path.rename(flat / path.name)
    calibrate(str(flat), str(grey.parent), split="test", timesteps=T)
    assert DDPMPipeline.from_pretrained(flat).scheduler.analytic is not None


def test_a_folder_without_a_pipeline_may_have_a_card(model, grey, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    evaluate(model, str(grey.parent), timesteps=5, output=tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_model_of_another_schedule_can_be_calibrated_again(model, grey, tmp_path):
    calibrate(model, str(grey.parent), split="test", timesteps=T)
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.3}))
    pipe = DDPMPipeline.from_pretrained(model)
    with pytest.raises(InputError, match="calibrate the model again with `ddpm-hf calibrate`"):
        pipe(1, num_inference_steps=5)
    with pytest.raises(InputError, match="calibrate the model again with `ddpm-hf calibrate`"):
        evaluate(model, str(grey.parent), timesteps=5)
    calibrate(model, str(grey.parent), split="test", timesteps=T)
    DDPMPipeline.from_pretrained(model)(1, num_inference_steps=5)


def test_a_variance_that_the_network_does_not_learn(model, grey, tmp_path):
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"variance_type": "learned_range"}))
    with pytest.raises(InputError, match="needs a network with out_channels=2 for images of 1"):
        evaluate(model, str(grey.parent), timesteps=5)


def test_a_single_file_has_one_split_and_one_image_no_interval(model, grey, tmp_path, capsys):
    images = datasets.Dataset.from_dict({"image": [str(grey / "0.png")]})
    images = images.cast_column("image", datasets.Image())
    images.to_parquet(tmp_path / "some_test.parquet")
    words = ["--dataset_name", str(tmp_path / "some_test.parquet"), "--timesteps", "5"]
    assert main(["evaluate", model, "--nll", *words]) == 0
    assert ", no interval, images: 1" in capsys.readouterr().out
    row = read_results(tmp_path / "model")[0]
    assert (row.dataset, row.split) == ("some_test.parquet", "all")


def test_strips_at_chosen_timesteps_and_samples_that_share_latents(model, grey, tmp_path):
    evaluate(
        model, str(grey.parent), timesteps=5, strip_timesteps=[10, 49], output=tmp_path / "out"
    )
    # seven rows of two x_0_hat and the image, each of 56 pixels and a border
    picture = Image.open(tmp_path / "out" / "reconstructions.png")
    assert picture.size == (3 * 58 + 2, 7 * 58 + 2)
    # two rows of three samples at four timesteps, and the image
    shared = Image.open(tmp_path / "out" / "shared_latents.png")
    assert shared.size == (13 * 58 + 2, 2 * 58 + 2)


def test_results_are_json(model, grey, capsys):
    words = ["--dataset_name", str(grey.parent), "--timesteps", "40", "--json"]
    assert main(["evaluate", model, "--nll", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["curve"]["rate_bpd"]) == 40
    assert shown["interval"][0] < shown["bits_per_dim"] < shown["interval"][1]
    assert main(["calibrate", model, *words, "--split", "test", "--steps", "5"]) == 0
    assert len(json.loads(capsys.readouterr().out)["timesteps"]["5"]) == 5


# Several processes


@pytest.mark.slow
def test_two_processes_measure_and_calibrate_the_same(model, grey, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import json, sys\nfrom ddpm_hf.cli import main\n"
        "sys.exit(any(main(argv) for argv in json.loads(sys.argv[1])))\n"
    )
    common = ["--dataset_name", str(grey.parent), "--split", "test", "--batch_size", "2"]
    made = {}
    for count in (1, 2):
        folder = ["--output", str(tmp_path / f"out-{count}")]
        jobs = [
            ["evaluate", model, *common, *folder, "--nll"],
            ["calibrate", model, *common, *folder, "--timesteps", "40"],
        ]
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(count),
                  "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
        command = [sys.executable, *(launch if count > 1 else []), str(script), json.dumps(jobs)]
        env = os.environ | {"ACCELERATE_USE_CPU": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count("Bits/dim: ") == 1  # one process speaks
        stored = DDPMPipeline.from_pretrained(tmp_path / f"out-{count}").scheduler.analytic
        rows = read_results(tmp_path / f"out-{count}")
        made[count] = ({row.metric: row.value for row in rows}, stored)
    # The same images in the same batches; two processes have half the threads each, with which
    # float32 convolutions round differently: 2e-8 of the bits/dim.
    assert made[1][0] == pytest.approx(made[2][0], rel=1e-6)
    for name in ("mean_square_eps", "x_0_variance"):
        assert made[1][1][name] == pytest.approx(made[2][1][name], rel=1e-5)


@pytest.mark.slow
def test_an_error_of_one_process_reaches_both(model, grey, tmp_path):
    """Broken weights: neither waits for the other."""
    pipe = DDPMPipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.unet.conv_out.bias += torch.nan
    pipe.save_pretrained(model)
    script = tmp_path / "job.py"
    script.write_text("import sys\nfrom ddpm_hf.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2",
              "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    words = ["evaluate", model, "--dataset_name", str(grey.parent), "--nll", "--timesteps", "4"]
    result = subprocess.run(
        [sys.executable, *launch, str(script), *words, "--batch_size", "7"],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "1"},
        timeout=300,
    )
    assert result.returncode != 0
    assert result.stderr.count("ddpm-hf: error: the network's output is not finite") == 2


def test_sample_takes_eta_and_the_calibrated_variance(model, grey, tmp_path):
    calibrate(model, str(grey.parent), split="test", timesteps=T)
    made = {}
    for name, words in {
        "own": [], "yes": ["--analytic", "yes"], "no": ["--analytic", "no"], "ddim": ["--eta", "0"]
    }.items():  # fmt: skip
        output = tmp_path / f"{name}.npy"
        common = ["sample", model, "--num_images", "3", "--num_inference_steps", "5"]
        assert main([*common, "--output", str(output), *words]) == 0
        made[name] = np.load(output)
    assert np.array_equal(made["own"], made["yes"])
    for a, b in (("own", "no"), ("own", "ddim"), ("no", "ddim")):
        assert not np.array_equal(made[a], made[b])
