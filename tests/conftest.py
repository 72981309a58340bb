"""Fixtures: a network and images small enough for a test, made from real classes; the shared
reference data.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import disable_progress_bars
from PIL import Image

from .hub_server import HubServer

REPOSITORY = Path(__file__).parent.parent

# The processes that the golden numbers are of, by file.
PROCESSES = {
    "ddpm_linear_T1000": dict(num_train_timesteps=1000),
    "ddpm_cosine_T4000": dict(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2"),
}
T_ALL = torch.tensor([0, 1, 10, 100, 500, 900, 998, 999])

# diffusers' schedulers that can be swapped in.
SWAPS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
)

# Threads that spin for each other on a busy machine slow tests down tenfold; results do not depend
# on them.
torch.set_num_threads(1)
disable_progress_bars()


def images(*shape: int) -> torch.Tensor:
    """Uniform in [-1, 1], always the same."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def noise(*shape: int) -> torch.Tensor:
    """Standard normal, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden numbers, real image sets and the yardstick; tests that need it skip
    without it.
    """
    folder = Path(os.environ.get("DDPM_HF_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"reference data not found: {folder} (set DDPM_HF_SHARED)")
    return folder


@pytest.fixture
def hub_server():
    """A Hub without repos; `run_client(hub_server, tmp_path, code)` runs its clients."""
    with HubServer() as hub:
        yield hub


@pytest.fixture
def tiny_unet():
    """A UNet2DModel of two levels for 8x8 grey images, with random weights in every layer."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).eval()


@pytest.fixture
def tiny_images(tmp_path) -> Path:
    """A folder of twelve 20x24 RGB PNGs, smooth and different from each other."""
    folder = tmp_path / "images"
    folder.mkdir()
    y, x = np.mgrid[0:20, 0:24]
    for i in range(12):
        rgb = np.stack([x * 10, y * 12, np.full_like(x, i * 20)], -1)
        Image.fromarray(rgb.astype(np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def quick_settings(tmp_path) -> dict:
    """Settings of a run of seconds: a small network, few steps, one grid of four images."""
    return dict(
        dataset_name="embedded",
        preset="fashion-quick",
        image_mode="L",
        split="test[:48]",
        resolution="8",
        train_batch_size=4,
        max_train_steps=4,
        lr_warmup_steps=0,
        optimizer="adamw",
        learning_rate=2e-4,
        cpu_threads="1",
        mixed_precision="no",
        memory_format="contiguous",
        compile="no",
        checkpointing_steps=2,
        logging_steps=1,
        eval_batch_size=4,
        ddpm_num_inference_steps=2,
        logger="none",
        output_dir=str(tmp_path / "run"),
    )
