"""Loading what others made: what is refused and in which words, and what must go on loading."""

import json
import logging
import re
import shutil

import diffusers
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPipeline, DDPMScheduler, build_scheduler
from ddpm_hf.errors import InputError
from ddpm_hf.loading import MAX_CONFIG_BYTES

from .conftest import SWAPS
from .hub_server import run_client

INDEX, CONFIG = "model_index.json", "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
SAFE, PICKLE = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"


@pytest.fixture
def saved(tiny_unet, tmp_path):
    DDPMPipeline(tiny_unet, build_scheduler()).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit(path, **changes):
    """Change keys of a JSON file; ... removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def refusal(folder, **options) -> str:
    """The one line that loading ends with."""
    with pytest.raises(InputError) as caught:
        DDPMPipeline.from_pretrained(folder, **options)
    line = str(caught.value)
    assert line.startswith(f"cannot load a pipeline from '{folder}': ")
    assert "\n" not in line
    assert len(line) < 800
    return line


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(2, torch.Generator().manual_seed(0), 3, output_type="pt").images


def same_images(folder, tiny_unet, **options):
    """Loads, to what was saved."""
    loaded = DDPMPipeline.from_pretrained(folder, **options)
    scheduler = options.get("scheduler", build_scheduler())
    return torch.equal(images(loaded), images(DDPMPipeline(tiny_unet, scheduler)))


# What is refused

HUGE = 10**12


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        # The index
        (INDEX, dict(unet=["diffusers", "UNet2DConditionModel"]), "unet in its model_index.json m"),
        (INDEX, dict(unet=["../../evil", "UNet2DModel"]), 'must be ["diffusers", UNet2DModel]: no'),
        (INDEX, dict(unet=["os.path", "UNet2DModel"]), "nothing of another module is loaded; got"),
        (INDEX, dict(unet=["diffusers", "models/../UNet2DModel"]), "unet in its model_index.json"),
        (INDEX, dict(unet=["diffusers", "DDPMScheduler"]), "unet in its model_index.json must be"),
        (INDEX, dict(unet=[]), "unet in its model_index.json must be"),
        (INDEX, dict(unet=[["diffusers"], {}]), "unet in its model_index.json must be"),
        (INDEX, dict(unet=...), "unet in its model_index.json must be"),
        (INDEX, dict(scheduler=["ddpm_hf.scheduler", "DDPMScheduler"]), "one of its schedulers]"),
        (INDEX, dict(scheduler=["diffusers", "UNet2DModel"]), "scheduler in its model_index.json"),
        (INDEX, dict(scheduler=["diffusers", "NoneScheduler"]), "scheduler in its model_index.jso"),
        (INDEX, dict(scheduler=["diffusers", "OnnxRuntimeModel"]), "scheduler in its model_index"),
        (INDEX, dict(scheduler=[None, None]), "got [None, None]"),
        (INDEX, dict(vae=["diffusers", "AutoencoderKL"]), "has 'vae': a DDPM pipeline is a unet"),
        (INDEX, {"../../x": ["diffusers", "UNet2DModel"]}, "has '../../x': a DDPM pipeline is"),
        (INDEX, {"*": ["diffusers", "UNet2DModel"]}, "has '*': a DDPM pipeline is a unet and a"),
        (INDEX, dict(_class_name=["pipeline", "Evil"]), "_class_name=['pipeline', 'Evil'], which"),
        (INDEX, dict(_class_name="os.system"), "must have the name of a class as _class_name"),
        (INDEX, dict(_class_name=...), "must have the name of a class as _class_name"),
        (INDEX, dict(_evil=["diffusers", "UNet2DModel"]), "its model_index.json has _evil=["),
        (INDEX, dict(_ignore_files=[{}]), "its model_index.json has _ignore_files=[{}]"),
        # The scheduler
        (SCHEDULER, dict(num_train_timesteps=HUGE), "must be an integer between 1 and 100,000; go"),
        (SCHEDULER, dict(num_train_timesteps=0), "num_train_timesteps in its scheduler_config.jso"),
        (SCHEDULER, dict(num_train_timesteps=True), "must be an integer between 1 and 100,000; go"),
        (SCHEDULER, dict(num_train_timesteps="many"), "must be an integer between 1 and 100,000;"),
        (SCHEDULER, dict(beta_start=float("nan")), "scheduler_config.json cannot be read: NaN is"),
        (SCHEDULER, dict(beta_end=2.0, beta_schedule="linear"), "every beta must be in (0, 1]; go"),
        (SCHEDULER, dict(beta_start=-1, beta_schedule="linear"), "every beta must be in (0, 1]; g"),
        (SCHEDULER, dict(beta_end=float("inf"), beta_schedule="linear"), "every beta must be in"),
        (SCHEDULER, dict(beta_start="x", beta_schedule="linear"), "no DDPMScheduler can be built"),
        (SCHEDULER, dict(beta_schedule="other"), "no DDPMScheduler can be built from its schedule"),
        (SCHEDULER, dict(variance_type="other"), "variance_type must be one of fixed_small"),
        (SCHEDULER, dict(trained_betas=[0.1] * 999), "must be num_train_timesteps=1000 numbers; g"),
        (SCHEDULER, dict(trained_betas="0.1"), "must be num_train_timesteps=1000 numbers; got '0."),
        (SCHEDULER, dict(trained_betas=["a"] * 1000), "no DDPMScheduler can be built from its"),
        (SCHEDULER, dict(trained_betas=[1.5] * 1000), "every beta must be in (0, 1]; got values f"),
        (SCHEDULER, dict(_ddpm_hf={"format": 2}), "saved by a newer ddpm_hf (format 2, this one"),
        (SCHEDULER, dict(_ddpm_hf={"format": "1"}), "_ddpm_hf must be an object with a format num"),
        (SCHEDULER, dict(_ddpm_hf=[1]), "_ddpm_hf must be an object with a format number; got [1]"),
        (SCHEDULER, dict(_ddpm_hf={"class_names": 5}), "class_names in _ddpm_hf must be a list of"),
        (SCHEDULER, dict(_class_name="__path__"), "its scheduler_config.json is of a '__path__', "),
        (SCHEDULER, dict(_class_name={}), "its scheduler_config.json is of a {}, not of a Schedul"),
        (SCHEDULER, dict(_use_default_values=3), "_use_default_values in its scheduler_config.jso"),
        # The network
        (CONFIG, dict(_class_name="AutoencoderKL"), "is of a 'AutoencoderKL', not of a UNet2DMode"),
        (CONFIG, dict(_use_default_values=[{}]), "_use_default_values in its config.json must be "),
        (CONFIG, dict(dtype="x"), "unexpected keyword argument 'dtype'"),
        (CONFIG, dict(quantization_config={"quant_method": "x"}), "has a quantization_config, whi"),
        (CONFIG, dict(sample_size=HUGE), "sample_size in its config.json must be an integer betwe"),
        (CONFIG, dict(sample_size=[None, 8]), "between 1 and 4,096; got None"),
        (CONFIG, dict(sample_size=[8, -8]), "between 1 and 4,096; got -8"),
        (CONFIG, dict(sample_size=[8, 8, 8]), "between 1 and 4,096; got [8, 8, 8]"),
        (CONFIG, dict(layers_per_block=HUGE), "must be an integer between 1 and 16; got 10000"),
        (CONFIG, dict(block_out_channels=[16] * 1000), "config.json must be a list of at most 16;"),
        (CONFIG, dict(block_out_channels=16), "config.json must be a list of at most 16; got 16"),
        (CONFIG, dict(block_out_channels=[HUGE, HUGE]), "no UNet2DModel can be built from its con"),
        (CONFIG, dict(block_out_channels=[16, 4096]), "its weights do not fit its config.json: "),
        (CONFIG, dict(in_channels=10**6), "first conv_in.weight, (16, 1000000, 3, 3) by config."),
        (CONFIG, dict(num_class_embeds=10**9), "first class_embedding.weight, (1000000000, 64) by"),
        (CONFIG, dict(layers_per_block=2), "its weights do not fit its config.json: "),
        (CONFIG, dict(norm_num_groups=0), "no UNet2DModel can be built from its config.json: "),
        (CONFIG, dict(down_block_types=["os.system"] * 2), "no UNet2DModel can be built from its"),
        (CONFIG, dict(dropout=float("nan")), "its config.json cannot be read: NaN is no setting"),
    ],
)  # fmt: skip
def test_a_hostile_setting_is_refused_in_words(saved, file, changes, message):
    edit(saved / file, **changes)
    assert message in refusal(saved)


@pytest.mark.parametrize("file", [INDEX, SCHEDULER, CONFIG])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it has no {}, which a saved pipeline has"),
        (b"", "its {} cannot be read: Expecting value"),
        (b"\xff\xfe\x00", "its {} cannot be read: "),
        (b"[1]", "its {} must be a JSON object; got [1]"),
        (b"[" * 100_000, "its {} cannot be read: "),
        (b'{"a": 1' + b"0" * 10_000 + b"}", "its {} cannot be read: "),
        (b" " * (MAX_CONFIG_BYTES + 1), "its {} has more than 8,000,000 bytes"),
    ],
)
def test_a_file_that_is_no_json_is_refused_in_words(saved, file, content, message):
    (saved / file).unlink()
    if content is not None:
        (saved / file).write_bytes(content)
    assert message.format((saved / file).name) in refusal(saved)


@pytest.mark.parametrize(
    "option", ["custom_pipeline", "custom_revision", "trust_remote_code", "use_flashpack"]
)
def test_options_that_run_code_are_refused(saved, option):
    with pytest.raises(InputError, match=f"^leave out {option}: DDPMPipeline loads data"):
        DDPMPipeline.from_pretrained(saved, **{option: True})
    DDPMPipeline.from_pretrained(saved, **{option: None})


@pytest.mark.parametrize("name", ["None.py", "unet/diffusers.py", "scheduler/diffusers.py"])
def test_code_where_diffusers_looks_for_it_is_refused(saved, tmp_path, name):
    (saved / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert f"it has {name}, which asks for code to be run: that is never done" in refusal(saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pipeline.py", "diffusers.py", "unet/unet.py"])
def test_other_code_is_not_run(saved, tmp_path, name):
    (saved / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    DDPMPipeline.from_pretrained(saved)
    assert not (tmp_path / "ran").exists()


# Weights


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def as_pickle(folder, content=None):
    """Weights as .bin only."""
    torch.save(load_file(folder / SAFE) if content is None else content, folder / PICKLE)
    (folder / SAFE).unlink()


def test_a_pickle_loads_with_one_warning_that_says_how_to_convert(saved, tiny_unet, caplog, capfd):
    as_pickle(saved)
    diffusers.utils.logging.enable_propagation()
    try:
        assert same_images(saved, tiny_unet)
    finally:
        diffusers.utils.logging.disable_propagation()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning.startswith("diffusion_pytorch_model.bin is a pickle")
    assert "pipe.save_pretrained(folder) or pipe.push_to_hub(repo)" in warning


def test_safetensors_come_first(saved, tiny_unet, tmp_path, caplog):
    torch.save({"evil": Evil(tmp_path / "ran")}, saved / PICKLE)
    assert same_images(saved, tiny_unet)
    assert "pickle" not in caplog.text
    assert not (tmp_path / "ran").exists()


def test_the_kind_of_weights_may_be_asked_for(saved):
    shutil.copytree(saved, saved.parent / "bin")
    as_pickle(saved.parent / "bin")
    message = "it has no weights of the network: diffusion_pytorch_model.safetensors"
    assert message in refusal(saved.parent / "bin", use_safetensors=True)
    assert "diffusion_pytorch_model.bin" in refusal(saved, use_safetensors=False)
    DDPMPipeline.from_pretrained(saved.parent / "bin", use_safetensors=False)


def test_code_in_a_pickle_is_not_run(saved, tmp_path):
    as_pickle(saved, {"conv_in.weight": Evil(tmp_path / "ran")})
    line = refusal(saved)
    assert "its diffusion_pytorch_model.bin is damaged, or a pickle of more than tensors" in line
    assert "weights_only" not in line  # torch's own words say how to run it
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold tensors by name"),
        ({"conv_in.weight": 5}, "must hold tensors by name"),
        ({"conv_in.weight": torch.zeros(1).expand(10**9)}, "holds less than its tensors pretend"),
        (
            {"a": torch.zeros(1)},
            "its weights do not fit its config.json: 142 of 142 tensors",
        ),
    ],
)
def test_a_pickle_of_something_else_is_refused(saved, content, message):
    as_pickle(saved, content)
    assert message in refusal(saved)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (SAFE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        (SAFE, b"\xff" * 64),
        (SAFE, None),
        (PICKLE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        (PICKLE, None),
    ],
)
def test_damaged_weights_are_said_to_be(saved, name, content):
    if name == PICKLE:
        as_pickle(saved)
    path = saved / name
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    assert f"its {path.name} is damaged" in refusal(saved)


def test_missing_weights_are_said_to_be(saved):
    (saved / SAFE).unlink()
    message = "it has no weights of the network: diffusion_pytorch_model.safetensors or .bin"
    assert message in refusal(saved)
    shutil.rmtree(saved / "unet")
    assert "it has no config.json" in refusal(saved)


def shard(unet, folder):
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    return folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"


def test_sharded_weights_load(saved, tiny_unet):
    index = shard(tiny_unet, saved)
    assert len(list(index.parent.glob("*.safetensors"))) > 1
    assert same_images(saved, tiny_unet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(weight_map={"a": "../../outside.safetensors"}),
            "names '../../outside.safetensors', ou",
        ),
        (dict(weight_map={"a": "..\\outside.safetensors"}), "outside its folder"),
        (dict(weight_map={"a": {}}), "names {}, outside its folder"),
        (dict(weight_map={"a": "config.json"}), "names 'config.json', which is not there"),
        (dict(weight_map={"a": "no.safetensors"}), "names 'no.safetensors', which is not there"),
        (dict(weight_map=3), "must have a metadata and a weight_map"),
        (dict(metadata=3), "must have a metadata and a weight_map"),
    ],
)
def test_a_hostile_index_of_shards_is_refused(saved, tiny_unet, changes, message):
    index = shard(tiny_unet, saved)
    save_file({"a": torch.zeros(1)}, saved.parent / "outside.safetensors")
    edit(index, **changes)
    assert message in refusal(saved)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(), "diffusion_pytorch_model.bin.index.json"),
        (dict(variant="fp16"), "diffusion_pytorch_model.safetensors.index.fp16.json"),
        (dict(variant="fp16"), "diffusion_pytorch_model.safetensors.fp16.index.json"),
    ],
)
def test_an_index_that_diffusers_would_prefer_unchecked_is_refused(saved, options, name):
    if options:
        shutil.copy(saved / SAFE, saved / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    else:
        as_pickle(saved)
    (saved / "unet" / name).write_text("{}")
    assert f"its {name} is not supported: save its weights in one file" in refusal(saved, **options)


# What must go on loading


def test_a_variant(saved, tiny_unet):
    assert "diffusion_pytorch_model.fp16.safetensors or .bin" in refusal(saved, variant="fp16")
    half = DDPMPipeline.from_pretrained(saved).to(torch.float16)
    half.save_pretrained(saved, variant="fp16")
    (saved / SAFE).unlink()
    loaded = DDPMPipeline.from_pretrained(saved, variant="fp16", dtype=torch.float16)
    assert torch.equal(loaded.unet.conv_in.weight, tiny_unet.conv_in.weight.half())


def as_in_2022(folder):
    """All files at the top, the keys that google/ddpm-cifar10-32 has, the attention's old names."""
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / SAFE)
    for new, old in renamed.items():
        weights = {key.replace(f".{new}.", f".{old}."): value for key, value in weights.items()}
    assert any(".proj_attn." in key for key in weights)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / CONFIG).rename(folder / "config.json")
    (folder / SCHEDULER).rename(folder / "scheduler_config.json")
    shutil.rmtree(folder / "unet")
    shutil.rmtree(folder / "scheduler")
    edit(folder / INDEX, _diffusers_version="0.1.1")
    old = ("num_class_embeds", "resnet_time_scale_shift", "add_attention", "attn_norm_num_groups")
    edit(folder / "config.json", _diffusers_version="0.1.1", **dict.fromkeys(old, ...))
    stock = dict(
        _class_name="DDPMScheduler", _diffusers_version="0.1.1", variance_type="fixed_large"
    )
    stock |= dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    stock |= dict(clip_sample=True, trained_betas=None)
    (folder / "scheduler_config.json").write_text(json.dumps(stock))


def test_a_repo_of_2022(saved, tiny_unet):
    as_in_2022(saved)
    loaded = DDPMPipeline.from_pretrained(saved)
    assert loaded.scheduler.config.variance_type == "fixed_large"
    assert type(loaded.scheduler) is DDPMScheduler
    expected = DDPMPipeline(tiny_unet, DDPMScheduler(variance_type="fixed_large"))
    assert torch.equal(images(loaded), images(expected))
    as_pickle_at_the_top = saved / "diffusion_pytorch_model.bin"
    torch.save(load_file(saved / "diffusion_pytorch_model.safetensors"), as_pickle_at_the_top)
    (saved / "diffusion_pytorch_model.safetensors").unlink()
    assert torch.equal(images(DDPMPipeline.from_pretrained(saved)), images(expected))


@pytest.mark.parametrize("name", SWAPS)
def test_other_schedulers_are_loaded_as_saved_and_checked(tiny_unet, tmp_path, name):
    kind = getattr(diffusers, name)
    pipe = DDPMPipeline(tiny_unet, kind.from_config(build_scheduler().config))
    pipe.save_pretrained(tmp_path)
    assert type(DDPMPipeline.from_pretrained(tmp_path).scheduler) is kind
    edit(tmp_path / SCHEDULER, beta_schedule="linear", beta_end=2.0)
    assert "every beta of the schedule in its scheduler_config.json must be in" in refusal(tmp_path)


def test_a_scheduler_without_betas(tiny_unet, tmp_path):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    DDPMPipeline(tiny_unet, scheduler).save_pretrained(tmp_path)
    assert type(DDPMPipeline.from_pretrained(tmp_path).scheduler) is type(scheduler)


def test_unknown_keys_are_left_to_stock(saved, tiny_unet):
    for file in (CONFIG, SCHEDULER):
        edit(saved / file, new_in_a_later_version={"x": [1]}, _private="x")
    edit(saved / INDEX, _name_or_path="x", _class_name="DDIMPipeline")
    assert same_images(saved, tiny_unet)


def test_components_that_are_passed_are_not_read(saved, tiny_unet):
    (saved / SCHEDULER).unlink()
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    assert same_images(saved, tiny_unet, scheduler=scheduler)
    edit(saved / INDEX, scheduler=...)
    assert same_images(saved, tiny_unet, scheduler=scheduler)
    edit(saved / INDEX, scheduler=["os", "system"])  # stock would import it, to compare types
    assert "nothing of another module is loaded" in refusal(saved, scheduler=scheduler)
    edit(saved / INDEX, scheduler=...)
    shutil.rmtree(saved / "unet")
    DDPMPipeline.from_pretrained(saved, unet=tiny_unet, scheduler=scheduler)


def test_the_name_is_kept_and_a_path_may_be_one(saved):
    assert DDPMPipeline.from_pretrained(str(saved)).config._name_or_path == str(saved)
    assert DDPMPipeline.from_pretrained(saved).name_or_path == str(saved)


@pytest.mark.parametrize(
    "settings",
    [
        dict(
            down_block_types=("ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"),
            up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D", "ResnetUpsampleBlock2D"),
            block_out_channels=(32, 32, 64),
            time_embedding_type="fourier",
        ),
        dict(
            down_block_types=("KDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "KUpBlock2D"),
            block_out_channels=(32, 32),
        ),
        dict(
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 16),
            time_embedding_type="learned",
            num_train_timesteps=1000,
            mid_block_type=None,
            num_class_embeds=11,
        ),
    ],
)
def test_every_kind_of_block_is_built_on_the_meta_device(tmp_path, settings):
    unet = UNet2DModel(sample_size=16, norm_num_groups=4, layers_per_block=1, **settings)
    DDPMPipeline(unet, build_scheduler()).save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path).unet
    for key, value in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


# From the Hub

CLIENT = """
import json, sys
from ddpm_hf import DDPMPipeline

def said(name, **options):
    try:
        pipe = DDPMPipeline.from_pretrained(name, **options)
        return f"{pipe.name_or_path} {pipe.unet.dtype} {type(pipe.scheduler).__name__}"
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
"""


def loaded(name):
    return f"{name} torch.float32 DDPMScheduler"


def refused(name, reason):
    return f"InputError: cannot load a pipeline from '{name}': {reason}"


def files_of(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def hub(hub_server, saved):
    """A Hub with repos of many kinds, good and bad."""
    good = files_of(saved)
    hub_server.add("org/good", good)
    hub_server.repos["model", "org/good"].tags["v1"] = hub_server.repos[
        "model", "org/good"
    ].branches["main"]
    hub_server.add("org/private", good, private=True)
    hub_server.add("org/forbidden", good)
    hub_server.fail("GET", "models/org/forbidden", status=403, message="not you", times=None)
    hub_server.add("org/images", kind="dataset")
    hub_server.add("org/empty")
    hub_server.add("org/outside", good | {"scheduler/../../../../outside.json": b"{}"})
    entry = json.loads(good[INDEX]) | {"scheduler": ["os", "system"]}
    hub_server.add("org/evil", good | {INDEX: json.dumps(entry).encode()})
    shutil.copytree(saved, saved.parent / "2022")
    as_in_2022(saved.parent / "2022")
    hub_server.add("google/ddpm-cifar10-32", files_of(saved.parent / "2022"))
    as_pickle(saved)
    hub_server.add("org/bin", files_of(saved))
    return hub_server


def test_repos_good_and_bad(hub, tmp_path):
    code = """
print(json.dumps([
    said("org/good"),
    said("org/good"),
    said("org/good", revision="v1", dtype=__import__("torch").bfloat16),
    said("google/ddpm-cifar10-32"),
    said("org/bin"),
    said("org/private"),
    said("org/private", token=False, cache_dir="other"),
    said("org/good", token="hf_wrong", cache_dir="other"),
    said("org/forbidden"),
    said("org/good", revision="v9"),
    said("org/images"),
    said("org/empty"),
    said("org/evil"),
    said("org/outside"),
    said("org/nothing"),
    said("not/a/name"),
    said(""),
]))
"""
    home, at = tmp_path / "home" / "hf", hub.endpoint
    absent = f"there is no such folder, and {at} has no such model: check the name; "
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    answers = json.loads(run_client(hub, home, CLIENT + code))
    outside, nameless = answers.pop(13), answers.pop()
    assert answers == [
        loaded("org/good"),
        loaded("org/good"),
        "org/good torch.bfloat16 DDPMScheduler",
        loaded("google/ddpm-cifar10-32"),
        loaded("org/bin"),
        loaded("org/private"),
        refused("org/private", f"{absent}for a private one {log_in}"),
        refused(
            "org/good",
            f"the token is not valid (Invalid credentials in Authorization header): {log_in} anew",
        ),
        refused(
            "org/forbidden",
            "you may not (not you): use a token that may write to or read this model "
            f"({at}/settings/tokens), and {log_in}",
        ),
        refused(
            "org/good",
            f"it has no such revision: its branches and tags are on {at}/org/good/tree/main",
        ),
        refused(
            "org/images",
            "there is no such folder, and it is a dataset, not a model: check the name",
        ),
        refused(
            "org/empty", f"it has no file 'model_index.json': look at {at}/org/empty/tree/main"
        ),
        refused(
            "org/evil",
            'scheduler in its model_index.json must be ["diffusers", one of its schedulers]: '
            "nothing of another module is loaded; got ['os', 'system']",
        ),
        refused("org/nothing", f"{absent}the token in use may not see it: check `hf auth whoami`"),
        refused(
            "not/a/name",
            "there is no such folder, and no name of a repo is like this. Repo id must be in the "
            "form 'repo_name' or 'namespace/repo_name': 'not/a/name'. Use `repo_type` argument "
            "if needed.",
        ),
    ]
    assert nameless.startswith("InputError: cannot load a pipeline from '': there is no such folde")
    assert outside.startswith("InputError: cannot load a pipeline from 'org/outside': ")
    assert not list(tmp_path.rglob("outside.json"))
    # As stock asks: once for the revision, twice for each of four files, for the repo and its
    # list; when all is in the cache, for the revision and the repo. The tag costs one more.
    asked = [request for request in hub.requests if "org/good" in request.path and request.token]
    assert [r.method for r in asked[:11]].count("HEAD") == 4
    assert [(r.method, r.path) for r in asked[11:13]] == [
        ("GET", "/api/models/org/good"),
        ("GET", "/api/models/org/good/revision/main"),
    ]
    assert not hub.asked("GET", "org/evil/(?!resolve/[0-9a-f]+/model_index.json)")


def test_without_a_hub(hub, tmp_path):
    get = "from huggingface_hub import snapshot_download; snapshot_download('org/good')"
    run_client(hub, tmp_path, get)
    hub.listener.shutdown()
    hub.listener.server_close()
    # The setting is what HF_HUB_OFFLINE=1 sets when the client is imported, which takes seconds.
    code = """
print(json.dumps([
    said("org/good"),
    said("org/good", revision="v9"),
    said("org/nothing"),
    said("org/nothing", local_files_only=True),
]))
import huggingface_hub
huggingface_hub.constants.HF_HUB_OFFLINE = True
print(json.dumps([said("org/good"), said("org/good", revision="v9"), said("org/nothing")]))
from ddpm_hf.cli import main
sys.exit(main(["sample", "org/nothing", "--grid", "g.png"]))
"""
    down, offline, *rest = run_client(hub, tmp_path, CLIENT + code, expect=2).splitlines()
    absent, incomplete = "there is no such folder, and ", "the cache is not enough for that: "
    refusals = [f"no connection to {hub.endpoint}, and {incomplete}check the network"] * 2
    refusals.append(f"{incomplete}load it once without local_files_only")
    assert_starts(json.loads(down), [loaded("org/good"), *(absent + line for line in refusals)])
    refusals = [f"HF_HUB_OFFLINE is set, and {incomplete}unset it"] * 2
    assert_starts(json.loads(offline), [loaded("org/good"), *(absent + line for line in refusals)])
    (line,) = [line for line in rest if "org/nothing" in line]
    assert line.startswith("ddpm-hf: error: cannot load a pipeline from 'org/nothing': ")


def assert_starts(lines, starts):
    for line, start in zip(lines, starts, strict=True):
        assert re.sub("^InputError: cannot load a pipeline from '[^']*': ", "", line).startswith(
            start
        )
