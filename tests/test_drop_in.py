"""Command lines of diffusers 0.42's train_unconditional.py run here unchanged."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.commandline import parse_command

from .conftest import REPOSITORY
from .hub_server import run_client

# Every flag of the script's parser, with a value where it takes one.
FLAGS = {
    "dataset_name": "huggan/flowers-102-categories", "dataset_config_name": "default",
    "model_config_name_or_path": "org/unet", "train_data_dir": "images", "output_dir": "out",
    "overwrite_output_dir": None, "cache_dir": "cache", "resolution": "64", "center_crop": None,
    "random_flip": None, "train_batch_size": "16", "eval_batch_size": "16",
    "dataloader_num_workers": "0", "num_epochs": "100", "save_images_epochs": "10",
    "save_model_epochs": "10", "gradient_accumulation_steps": "1", "learning_rate": "1e-4",
    "lr_scheduler": "cosine", "lr_warmup_steps": "500", "adam_beta1": "0.95",
    "adam_beta2": "0.999", "adam_weight_decay": "1e-6", "adam_epsilon": "1e-08", "use_ema": None,
    "ema_inv_gamma": "1.0", "ema_power": "0.75", "ema_max_decay": "0.9999",
    "hub_token": "hf_x", "hub_model_id": "me/model", "hub_private_repo": None,
    "logger": "tensorboard", "logging_dir": "/somewhere/logs", "local_rank": "-1",
    "mixed_precision": "fp16", "prediction_type": "sample", "ddpm_num_steps": "1000",
    "ddpm_num_inference_steps": "1000", "ddpm_beta_schedule": "linear",
    "checkpointing_steps": "500", "checkpoints_total_limit": "3",
    "resume_from_checkpoint": "latest", "enable_xformers_memory_efficient_attention": None,
    "preserve_input_precision": None,
}  # fmt: skip

# The commands of its README, without --multi_gpu and --push_to_hub; images and folder are ours.
COMMON = """--resolution=64 --center_crop --random_flip --train_batch_size=16 --num_epochs=100
    --gradient_accumulation_steps=1 --use_ema --learning_rate=1e-4 --lr_warmup_steps=500"""
README = {
    "flowers": f"--dataset_name=DATA {COMMON} --mixed_precision=no --output_dir=OUT",
    "pokemon": f"--dataset_name=DATA {COMMON} --mixed_precision=no --output_dir=OUT",
    "folder": f"--train_data_dir DATA {COMMON} --output_dir=OUT",
}
# What makes 100 epochs of a 36M network a matter of seconds; the last word wins.
SHORTER = """--max_train_steps 2 --num_epochs 1 --preset fashion-quick --ddpm_num_inference_steps 2
    --eval_batch_size 4"""


@pytest.fixture
def folder(tmp_path):
    """Twenty images in folders of their own, as the script wants them."""
    rng = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / "data" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 70, 3), np.uint8)).save(path)
    return tmp_path / "data"


@pytest.mark.parametrize("style", ["equals", "space"])
def test_every_flag_is_accepted_with_its_meaning(style):
    argv = []
    for name, value in FLAGS.items():
        words = [f"--{name}"] if value is None else [f"--{name}", value]
        argv += ["=".join(words)] if style == "equals" else words
    config, command = parse_command(argv)
    for name, value in FLAGS.items():
        holder = config if hasattr(config, name) else command
        got = getattr(holder, name)
        assert got == (True if value is None else type(got)(value)), name


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "folder" else pytest.mark.slow) for n in README],
)
def test_the_commands_of_its_readme_run(name, folder, tmp_path):
    words = README[name].replace("DATA", str(folder)).replace("OUT", str(tmp_path / "ddpm-ema"))
    script = [sys.executable, str(REPOSITORY / "train_accelerate.py"), *words.split()]
    result = subprocess.run([*script, *SHORTER.split()], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Training on 20 RGB images, 64x64" in result.stdout
    out = tmp_path / "ddpm-ema"
    settings = json.loads((out / "config.json").read_text())
    assert (settings["learning_rate"], settings["train_batch_size"]) == (1e-4, 16)
    assert (out / "model_index.json").is_file()
    assert (out / "checkpoint-2").is_dir()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_the_command_with_fp16_says_what_it_needs(folder, tmp_path):
    words = f"--dataset_name={folder} {COMMON} --mixed_precision=fp16 --output_dir={tmp_path}/out"
    script = [sys.executable, str(REPOSITORY / "train_accelerate.py"), *words.split()]
    result = subprocess.run([*script, *SHORTER.split()], capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = [x for x in result.stderr.splitlines() if "error" in x]
    assert line.endswith("mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")


@pytest.mark.slow
def test_a_command_of_its_readme_pushes(folder, tmp_path, hub_server):
    words = (
        README["flowers"].replace("DATA", str(folder)).replace("OUT", str(tmp_path / "ema-cats"))
    )
    script = [sys.executable, str(REPOSITORY / "train_accelerate.py"), *words.split()]
    said = run_client(hub_server, tmp_path / "home", [*script, "--push_to_hub", *SHORTER.split()])
    assert f"Pushed:     {hub_server.endpoint}/tester/ema-cats/commit/" in said
    assert (
        "unet/diffusion_pytorch_model.safetensors"
        in hub_server.repos["model", "tester/ema-cats"].tree()
    )
