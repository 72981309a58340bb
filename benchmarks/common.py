"""What the benchmarks share: where a result was measured, its file, and stock's training step."""

import functools
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from ddpm_hf.sampling import sample_to

HERE = Path(__file__).parent
NUM_IMAGES = {"fashion": 1000, "emoji": 946}
"""Images sampled for the yardstick; FD depends on their number."""


class EnoughError(Exception):
    """Raised in a loss function to leave `ddpm_hf.train` early."""


def hardware() -> str:
    """The processor's name and how many cores this process may use, or the GPU's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}"


def start_report(what: str, *paths: Path) -> dict:
    """Command, commit, date, machine and versions of a result; of `paths` only the names."""
    command = shlex.join(sys.argv[1:])
    for path in paths:
        command = command.replace(str(path), path.name)
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return {
        "what": what,
        "command": command,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {"torch": torch.__version__},
        "rows": [],
    }


def save_report(report: dict, name: str) -> None:
    """Write benchmarks/results/NAME.json."""
    (HERE / "results" / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")


@functools.cache
def load_yardstick(path: Path, images: str) -> tuple[ModuleType, np.ndarray]:
    """yardstick.py, and the features of its reference set: the longer part of a measurement."""
    spec = importlib.util.spec_from_file_location("yardstick", path)
    yardstick = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # it imports a neighbour for emoji
    spec.loader.exec_module(yardstick)
    real, held_out = yardstick.reference(images)
    yardstick.net, yardstick.held_out = yardstick.load_network(images), held_out
    return yardstick, yardstick.features(yardstick.net, real)


def measure_quality(
    pipe: DiffusionPipeline,
    yardstick: Path,
    images: str,
    *,
    num_inference_steps: int = 20,
    num_images: int | None = None,
    batch_size: int = 250,
    **options: float | bool,
) -> dict[str, float]:
    """FD, its floor and KID of images that a pipeline samples, by the yardstick.

    Args:
        pipe: The pipeline, sampled with its own scheduler.
        yardstick: Path of yardstick.py.
        images: Its reference set, a key of NUM_IMAGES.
        num_inference_steps: Network evaluations an image.
        num_images: NUM_IMAGES by default; FD of other numbers is no FD of these.
        batch_size: Images at once.
        options: Of `sample_to`.
    """
    measure, real = load_yardstick(yardstick, images)
    with tempfile.TemporaryDirectory() as folder:
        samples = f"{folder}/samples.npy"
        sample_to(
            samples,
            pipe,
            num_images or NUM_IMAGES[images],
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            **options,
        )
        generated = measure.features(measure.net, measure.read_images(samples))
    held_out = measure.features(measure.net, measure.held_out[: len(generated)])
    return {
        "fd": round(measure.frechet(generated, real), 3),
        "fd_floor": round(measure.frechet(held_out, real), 3),
        "kid_x1000": round(measure.kid(generated, real), 2),
    }


def stock_steps(
    unet: UNet2DModel,
    ema: EMAModel,
    images: Tensor,
    *,
    batch_size: int,
    total_steps: int,
    mixed_precision: str = "no",
) -> Iterator[float]:
    """The loop of diffusers 0.42's train_unconditional.py with its defaults; yields each loss.

    Decoding, logging and checkpoints are left out: that is in stock's favour.

    Args:
        unet: The network, trained in place.
        ema: Stock's averaged weights, see `stock_ema`.
        images: The image set, (N, C, H, W) in [-1, 1].
        batch_size: Images a step.
        total_steps: Horizon of the learning rate.
        mixed_precision: `no`, or `bf16`: images and noise are bf16 then.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision)
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=500, num_training_steps=total_steps
    )
    loader = DataLoader(TensorDataset(images), batch_size=batch_size, shuffle=True)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(
        unet, optimizer, loader, lr_scheduler
    )
    ema.to(accelerator.device)
    unet.train()
    while True:
        for (batch,) in loader:
            x_0 = batch.to(dtype)
            eps = torch.randn(x_0.shape, dtype=dtype, device=x_0.device)
            t = torch.randint(0, 1000, (len(x_0),), device=x_0.device)
            x_t = scheduler.add_noise(x_0, eps, t)
            with accelerator.accumulate(unet):
                loss = mse_loss(unet(x_t, t).sample.float(), eps.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(unet.parameters())
            yield loss.detach().item()


def stock_ema(unet: UNet2DModel) -> EMAModel:
    """Averaged weights as stock's --use_ema builds them."""
    return EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
