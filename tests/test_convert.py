"""Checkpoints of other trainers: converted networks answer as the originals, or are refused."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddpm_hf import DDPMPipeline
from ddpm_hf.cli import main
from ddpm_hf.convert import convert
from ddpm_hf.errors import InputError
from ddpm_hf.sampling import SCHEDULERS, load_pipeline, sample_to

from .foreign_networks import (
    OpenAIUNet,
    W86UNet,
    lucidrains_checkpoint,
    pesser_state,
    randomise,
)
from .test_ho_unet import HoUNet, tolerance


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def opened(state, **settings):
    """What is saved, converted, and opened by plain diffusers."""
    torch.save(state, "weights.pt")
    convert("weights.pt", "out", **settings)
    return diffusers.DDPMPipeline.from_pretrained("out")


def answers(network, t, side, channels=3, labels=None):
    """The network's outputs in float64, so that only the function counts and not its rounding."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(t), channels, side, side, generator=generator, dtype=torch.float64)
    more = () if labels is None else (labels,)
    with torch.no_grad():
        output = network.double()(x, t, *more)
    return output if isinstance(output, torch.Tensor) else output.sample


def differences(network, unet, side, last=999, **inputs):
    """Largest difference at some timesteps, in units of what the network's embedding in float32
    allows (test_ho_unet), but at most 1e-5 of the largest output."""
    t = torch.tensor([0, 1, last // 2, last])
    theirs, ours = answers(network, t, side, **inputs), answers(unet, t, side, **inputs)
    assert theirs.std() > 0.3
    allowed = tolerance(t).clamp(max=1e-5 * theirs.abs().max().item())
    return (theirs - ours).abs().amax(dim=(1, 2, 3)) / allowed


def openai(**arguments):
    return randomise(OpenAIUNet(**arguments))


BARE = openai(heads=4).state_dict()


# The same function


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        (dict(heads=4), {}),
        (dict(heads=2, new_order=True), dict(num_heads=2, new_attention_order=True)),
        (dict(heads=1, multipliers=(1, 3, 2), attention=(0, 1)), dict(num_heads=1)),
        (dict(heads=4, multipliers=(1,), attention=(0,)), {}),
        (dict(heads=4, layers=2, out=6, scale_shift=True, multipliers=(1, 2, 2), attention=(1, 2)),
         {}),
        (dict(head_channels=16, channels=1, updown=True, attention=()), dict(num_head_channels=16)),
        (dict(head_channels=32, new_order=True, scale_shift=True, updown=True, layers=2, out=6,
              multipliers=(1, 2, 3), attention=(1, 2)),
         dict(num_head_channels=32, new_attention_order=True)),
        (dict(heads=4, time_scale=0.25), dict(ddpm_num_steps=4000, family="improved-diffusion")),
        (dict(heads=4), dict(ddpm_num_steps=4000, family="guided-diffusion")),
        (dict(heads=4, time_scale=2.0), dict(ddpm_num_steps=500, rescale_timesteps=True)),
    ],
)  # fmt: skip
def test_openai_networks(arguments, flags):
    network = openai(**arguments)
    unet = opened(network.state_dict(), resolution=8, **flags).unet
    inputs = dict(channels=arguments.get("channels", 3), last=flags.get("ddpm_num_steps", 1000) - 1)
    assert (differences(network, unet, 8, **inputs) <= 1).all()


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        (dict(heads=2), {}),
        (dict(heads=4), dict(new_attention_order=True)),
        (dict(heads=4, time_scale=0.25), dict(ddpm_num_steps=4000, rescale_timesteps=False)),
    ],
)
def test_a_wrong_flag_makes_another_network(arguments, flags):
    network = openai(**arguments)
    unet = opened(network.state_dict(), resolution=8, **flags).unet
    assert differences(network, unet, 8).max() > 100


def test_an_openai_network_of_classes_has_no_null_class():
    network = openai(heads=4, classes=5, out=6, scale_shift=True)
    unet = opened(network.state_dict(), resolution=8).unet
    assert unet.config.num_class_embeds == 5
    labels = torch.tensor([0, 4, 2, 1])
    assert (differences(network, unet, 8, labels=labels) <= 1).all()
    pipe = DDPMPipeline.from_pretrained("out")
    assert pipe.num_classes == 5
    with pytest.raises(InputError, match="without a null class.*leave out guidance_scale; got 2"):
        pipe(1, class_labels=0, guidance_scale=2, num_inference_steps=1)
    with pytest.raises(InputError, match="class_labels must be 0 to 4; got 5"):
        pipe(1, class_labels=5, num_inference_steps=1)
    # every class in turn, the last too
    sample_to("all.npy", pipe, 6, num_inference_steps=1)
    sample_to("last.npy", pipe, 6, num_inference_steps=1, class_label=4)
    every, last = np.load("all.npy").astype(int), np.load("last.npy")
    # batches of other labels round differently: at most one grey level
    assert np.abs(every[4] - last[4]).max() <= 1
    assert not np.array_equal(every[5], last[5])


@pytest.mark.parametrize(
    "arguments",
    [
        dict(multipliers=(1, 2, 2, 2), side=32),
        dict(multipliers=(1, 3, 2), side=64, attention_sides=(64, 16)),
        dict(multipliers=(1,), side=16),
    ],
)
def test_pesser_networks(arguments):
    network = randomise(HoUNet(ch=32, dropout=0.1, **arguments))
    pipe = opened(pesser_state(network), resolution=arguments["side"])
    assert (differences(network, pipe.unet, 8) <= 1).all()


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (dict(), 999),
        (dict(multipliers=(1, 3, 2), layers=2, attention=(0, 2)), 999),
        (dict(base=96), 999),
        (dict(multipliers=(1,), attention=(), steps=200), 199),
    ],
)
def test_pytorch_ddpm_networks(arguments, last):
    network = randomise(W86UNet(**arguments))
    unet = opened(network.checkpoint()).unet
    assert (differences(network, unet, 8, last=last) <= 1).all()


@pytest.mark.parametrize("folder", ["guided_diffusion-new-attention-order", "pesser"])
def test_checkpoints_of_the_original_code(shared, folder):
    """Of the shared reference data: the originals' own answers, in float32."""
    source = shared / "foreign" / folder
    meta = json.loads((source / "meta.json").read_text())
    words = meta["arguments"]
    flags = dict(family=meta["family"])
    if "use_new_attention_order" in words:
        flags |= dict(
            num_heads=words["num_heads"], new_attention_order=words["use_new_attention_order"]
        )
    made = convert(source / meta["file"], "out", **flags)
    assert made.assumed["resolution"] == words.get("image_size", words.get("resolution"))
    reference = np.load(source / "reference.npz")
    x, t, out = (torch.from_numpy(reference[name]) for name in ("x", "t", "out"))
    with torch.no_grad():
        ours = diffusers.DDPMPipeline.from_pretrained("out").unet(x, t).sample
    assert (ours - out).abs().max() <= 1e-5 * out.abs().max()


# What is written


def test_what_weights_cannot_say_is_what_the_family_publishes():
    def process(state, **flags):
        shutil.rmtree("out", ignore_errors=True)
        return opened(state, **flags).scheduler.config

    small = BARE
    linear = process(small)
    assert linear.beta_schedule == "linear"
    assert (linear.beta_start, linear.beta_end) == (1e-4, 0.02)
    assert linear.variance_type == "fixed_large"
    # their scripts scale the linear schedule by 1000 / T
    longer = process(small, ddpm_num_steps=4000, rescale_timesteps=False)
    assert (longer.beta_start, longer.beta_end) == (2.5e-5, 0.005)
    assert longer.num_train_timesteps == 4000
    learned = {
        name: tensor.repeat(2, *[1] * (tensor.ndim - 1))
        for name, tensor in BARE.items()
        if name.startswith("out.2")
    }
    cosine = process(BARE | learned, ddpm_beta_schedule="cosine")
    assert cosine.beta_schedule == "squaredcos_cap_v2"
    assert cosine.variance_type == "learned_range"
    assert cosine.prediction_type == "epsilon"
    assert cosine.clip_sample
    cifar10 = pesser_state(HoUNet(32, (1, 2), 32, 0.0))
    assert process(cifar10).variance_type == "fixed_large"
    assert process(cifar10, variance_type="fixed_small").variance_type == "fixed_small"
    lsun = pesser_state(HoUNet(32, (1, 1, 1, 1, 1), 256, 0.0))
    assert process(lsun).variance_type == "fixed_small"
    w86 = W86UNet(steps=500).state_dict()
    other = process(w86, beta_end=0.03, prediction_type="sample")
    assert (other.num_train_timesteps, other.beta_end) == (500, 0.03)
    assert other.prediction_type == "sample"
    assert not other.clip_sample  # nor does their sampler
    assert other.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    ("multipliers", "resolution"), [((1, 2, 2, 2), 32), ((1, 1, 2, 2, 4, 4), 256), ((1, 2), 64)]
)
def test_the_resolution_of_openai_follows_from_the_multipliers(multipliers, resolution):
    network = OpenAIUNet(multipliers, heads=4, attention=())
    assert opened(network.state_dict()).unet.config.sample_size == resolution


def test_the_averaged_weights_are_taken_unless_others_are_asked_for():
    network = randomise(W86UNet())
    checkpoint = network.checkpoint()
    torch.save(checkpoint, "ckpt.pt")
    assert convert("ckpt.pt", "ema").weights == "ema"
    assert convert("ckpt.pt", "model", weights="model").weights == "model"
    ema, model = (
        diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet").conv_in.weight
        for folder in ("ema", "model")
    )
    assert torch.equal(ema, checkpoint["ema_model"]["head.weight"])
    assert torch.equal(model, checkpoint["net_model"]["head.weight"])


@pytest.mark.parametrize(
    ("name", "held"), [(None, None), ("state_dict", "model"), ("model", "model"), ("ema", "ema")]
)
def test_half_precision_weights_under_several_names(name, held):
    """float16 is widened exactly."""
    state = {key: tensor.half() for key, tensor in BARE.items()}
    torch.save(state if name is None else {name: state, "epoch": 3}, "weights.pt")
    assert convert("weights.pt", "out").weights == held
    weight = diffusers.UNet2DModel.from_pretrained("out", subfolder="unet").conv_in.weight
    assert torch.equal(weight, state["input_blocks.0.0.weight"].float())


def test_safetensors():
    save_file(BARE, "weights.safetensors")
    convert("weights.safetensors", "out")
    weight = diffusers.UNet2DModel.from_pretrained("out", subfolder="unet").conv_in.weight
    assert torch.equal(weight, BARE["input_blocks.0.0.weight"])


def test_a_learned_variance_is_sampled_as_by_plain_diffusers():
    """From the same noise, in all steps, to what 25 steps in float32 round differently."""
    flags = dict(ddpm_num_steps=25, rescale_timesteps=False)
    stock = opened(openai(heads=4, out=6).state_dict(), resolution=8, **flags)
    ours = DDPMPipeline.from_pretrained("out")
    images = [
        pipe(2, torch.Generator().manual_seed(0), num_inference_steps=25, output_type="np").images
        for pipe in (stock, ours)
    ]
    np.testing.assert_allclose(*images, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rescaled_timesteps_are_whole(name):
    """They stand in a table, and schedulers that step between timesteps are refused in words."""
    opened(openai(heads=4).state_dict(), resolution=8, ddpm_num_steps=2000, rescale_timesteps=True)
    pipe = load_pipeline("out", name)
    if name in ("euler", "heun"):
        with pytest.raises(InputError, match="steps between timesteps, .* use DDPM, DDIM"):
            pipe(1, num_inference_steps=4)
    else:
        assert np.isfinite(pipe(1, num_inference_steps=4, output_type="np").images).all()


# What is refused


class Creates:
    """Unpickled, it would create a file."""

    def __reduce__(self):
        return os.mkdir, ("PICKLE_RAN",)


def test_a_pickle_that_would_run_code_is_not_read(shared, tmp_path):
    torch.save({"model": Creates()}, "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Creates()}))
    assert pickle.loads((tmp_path / "plain.pt").read_bytes())  # it does, where it is unpickled
    os.rmdir("PICKLE_RAN")
    for file in ("zip.pt", "plain.pt", shared / "foreign" / "hostile" / "model-1.pt"):
        with pytest.raises(InputError, match="pickle of more than tensors.* can run code") as error:
            convert(file, "out")
        assert "\n" not in str(error.value)
        assert not os.path.exists("PICKLE_RAN")
        assert not os.path.exists("out")


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


RANDOM_TABLE = {"time_embedding.timembedding.0.weight": torch.rand(1000, 32)}


@pytest.mark.parametrize(
    ("state", "flags", "message"),
    [
        ({"x.weight": torch.ones(1)}, {}, "no family that is known .guided-diffusion.*x.weight"),
        ([BARE], {}, "holds no weights by name.*it has list"),
        ({"optimizer": {"state": {}}, "step": 3}, {}, "holds no weights.*it has optimizer, step"),
        ({"ema": BARE}, dict(weights="model"), "holds no weights='model'; it has ema"),
        (BARE, dict(weights="ema"), "holds one set of weights: leave out weights='ema'"),
        (BARE, dict(weights="best"), "weights must be one of ema, model; got 'best'"),
        (BARE, dict(family="gan"), "family must be one of guided-diffusion"),
        (BARE, dict(family="pesser"), "weights of guided-diffusion or improved-diffusion, not of"),
        (BARE | {"out.2.bias": torch.full((3,), torch.nan)}, {}, "not finite, in out.2.bias"),
        (BARE | {"extra.weight": torch.ones(1)}, {}, "does not have, such as extra.weight"),
        (without(BARE, "out.0.bias"), {}, "1 weights do not fit.*conv_norm_out.bias needs"),
        (without(BARE, "out.2.weight"), {}, "lacks out.2.weight"),
        (without(BARE, "output_blocks.1.0.in_layers.0.weight"), {}, "needs shape"),
        (BARE, dict(resolution=15), "15x15 cannot be halved 1 times.*this checkpoint"),
        (BARE, dict(resolution=0), "resolution must be a whole number, at least 1; got 0"),
        (BARE, dict(num_heads=5), "does not divide the channels of every attention, 64"),
        (BARE, dict(num_heads=2, num_head_channels=8), "say the same twice"),
        (BARE, dict(beta_end=0.1), "beta_end is no setting of guided-diffusion"),
        (BARE, dict(ddpm_beta_schedule="sqrt"), "one of linear, cosine; got 'sqrt'"),
        (BARE, dict(variance_type="learned_range"), "one of fixed_small, fixed_large"),
        (BARE, dict(ddpm_num_steps=10, rescale_timesteps=False), "must be more than 20"),
        (BARE, dict(ddpm_num_steps=1, rescale_timesteps=True, ddpm_beta_schedule="cosine"),
         "ddpm_num_steps must be at least 2; got 1"),
        (BARE, dict(prediction_type="x"), "prediction_type must be one of"),
        (BARE, dict(ddpm_num_steps=4000), "say whether timesteps were rescaled.*family="),
        (openai(heads=4, out=6).state_dict(), dict(variance_type="fixed_small"),
         "variance_type must be one of learned_range"),
        (openai(heads=4, channels=6, out=6).state_dict(), {}, "takes 6 is an upsampler"),
        (openai(heads=4, multipliers=(1, 2, 3), attention=(1,)).state_dict(), {},
         "num_heads=4 .the default is 4. makes heads of 16, 24 channels.*one width of a head"),
        (openai(heads=4, multipliers=(2, 4)).state_dict(), {}, "one width for the three"),
        (openai(heads=4, multipliers=(2, 4), first=64).state_dict(), {}, "embedded in 32"),
        (pesser_state(HoUNet(32, (1, 2), 64, 0.0)), {}, "pass the resolution"),
        (W86UNet().state_dict(), dict(ddpm_num_steps=4000), "checkpoint's table, 1000; got 4000"),
        (W86UNet().state_dict(), dict(beta_start=0.1), "beta_start <= beta_end < 1 must hold"),
        (W86UNet().state_dict() | RANDOM_TABLE, {}, "not the table of sinusoids"),
        (lucidrains_checkpoint(), {},
         "lucidrains.*cannot hold exactly.*start with a convolution.*linear attention, memory"),
    ],
)  # fmt: skip
def test_refusals(state, flags, message):
    torch.save(state, "weights.pt")
    with pytest.raises(InputError, match=message) as error:
        convert("weights.pt", "out", **flags)
    assert "\n" not in str(error.value)
    assert not os.path.exists("out")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.pt", b"not a checkpoint"),
        ("weights.pt", b""),
        ("weights.pt", b"PK\3\4" + bytes(100)),
        ("weights.safetensors", b"not a checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="is not a checkpoint of torch or safetensors") as error:
        convert(name, "out")
    assert "\n" not in str(error.value)


def test_a_truncated_checkpoint(tmp_path):
    torch.save(BARE, "weights.pt")
    whole = (tmp_path / "weights.pt").read_bytes()
    (tmp_path / "weights.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a checkpoint of torch.*or is damaged"):
        convert("weights.pt", "out")


def test_the_current_folder_may_be_the_output(tmp_path, monkeypatch):
    torch.save(BARE, "weights.pt")
    os.mkdir("out")
    monkeypatch.chdir("out")
    convert("../weights.pt", ".")
    assert diffusers.DDPMPipeline.from_pretrained(".").unet is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "weights.pt"]


def test_existing_folders_are_not_overwritten(tmp_path):
    torch.save(BARE, "weights.pt")
    os.mkdir("out")
    convert("weights.pt", "out")
    with pytest.raises(InputError, match="out exists already: name another or an empty folder"):
        convert("weights.pt", "out")
    with pytest.raises(InputError, match="nowhere.pt is not a file"):
        convert("nowhere.pt", "other")


# The command


def test_the_verb(capsys):
    network = openai(heads=2, new_order=True, out=6)
    torch.save(network.state_dict(), "ema_0.9999_500000.pt")
    flags = ["--num_heads", "2", "--new_attention_order", "--resolution", "8"]
    flags += ["--ddpm_num_steps", "50", "--no-rescale_timesteps", "--prediction_type", "sample"]
    assert main(["convert", "ema_0.9999_500000.pt", "out", *flags]) == 0
    wrote, assumed = capsys.readouterr().out.splitlines()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert wrote == f"Wrote out: guided-diffusion, {parameters:,} parameters"
    assert assumed.endswith(": ddpm_beta_schedule linear, variance_type learned_range")
    words = ["--num_images", "2", "--num_inference_steps", "2", "--output", "x.npy"]
    assert main(["sample", "out", *words]) == 0
    assert np.load("x.npy").shape == (2, 8, 8, 3)


def test_the_verb_says_errors_in_one_line(shared, capsys):
    assert main(["convert", str(shared / "foreign" / "hostile" / "model-1.pt"), "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddpm-hf: error: ")
    assert not os.path.exists("PICKLE_RAN")


@pytest.mark.parametrize(("mults", "size"), [((1, 1, 2, 3, 4), 128), ((1, 2, 3, 4), 64)])
def test_the_size_that_openais_levels_were_published_for(mults, size):
    network = OpenAIUNet(mults, heads=4, attention=())
    assert opened(network.state_dict()).unet.config.sample_size == size


def test_a_table_of_times_that_is_a_little_different_is_refused():
    weights, name = W86UNet().state_dict(), "time_embedding.timembedding.0.weight"
    torch.save(weights | {name: weights[name] + 0.01}, "w.pt")
    with pytest.raises(InputError, match="not the table"):
        convert("w.pt", "out")


def test_the_averaged_weights_are_found_by_what_is_in_them():
    torch.save({"ema": {"x": torch.ones(1)}, "ema_model": BARE}, "w.pt")
    assert convert("w.pt", "out").weights == "ema"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.full((3,), torch.inf), "not finite"),
        (torch.full((3,), 1e300, dtype=torch.float64), "values that float32 cannot hold"),
        (torch.ones(3, dtype=torch.complex64), "values that float32 cannot hold|not finite"),
    ],
)
def test_values_that_are_no_weights_are_refused(values, message):
    torch.save(BARE | {"out.2.bias": values}, "w.pt")
    with pytest.raises(InputError, match=message):
        convert("w.pt", "out")
    assert not Path("out").exists()


def test_flattened_weights_are_one_clear_line():
    torch.save({name: tensor.flatten() for name, tensor in BARE.items()}, "w.pt")
    with pytest.raises(InputError, match="w.pt has weights of shapes that no network of .* has"):
        convert("w.pt", "out")


@pytest.mark.parametrize("value", ["4", 4.5])
def test_counts_are_whole_numbers(value):
    torch.save(BARE, "w.pt")
    with pytest.raises(InputError, match="must be a whole number, at least 1; got"):
        convert("w.pt", "out", num_heads=value)


def test_what_an_earlier_conversion_left_is_not_taken_along():
    Path(".out.partial/unet").mkdir(parents=True)
    Path(".out.partial/unet/notes.txt").write_text("old")
    torch.save(BARE, "w.pt")
    convert("w.pt", "out")
    assert not list(Path("out").rglob("notes.txt"))
    assert not Path(".out.partial").exists()


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path):
    torch.save(BARE, "w.pt")
    code = (
        "import resource, sys; from ddpm_hf.cli import run, convert_command\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "sys.exit(run(convert_command, ['w.pt', 'out'], 'ddpm-hf'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 2, found.stderr
    assert "cannot write out:" in found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr
    assert not Path("out").exists()
    assert not Path(".out.partial").exists()
