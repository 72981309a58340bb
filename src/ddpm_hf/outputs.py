"""What a run makes of its averaged weights: samples, held-out losses, the pipeline, its card."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import UNet2DModel

from .checkpoint import METRICS, list_checkpoints
from .data import ImageSet, to_network
from .functional import mix_seed
from .hub import write_card
from .logbook import LossWindow, loss_by_bucket, save_loss_curve
from .losses import simple_loss
from .pipeline import DDPMPipeline, save_image_grid, seeded_generators
from .resuming import of_main, stop
from .run import Run
from .scheduler import DDPMScheduler

HELD_OUT_STREAM = 7
HELD_OUT_IMAGES = 512
"""At most so many images of each kind are measured: the standard error of a bucket is then a few
per cent."""
GOLDEN = (math.sqrt(5) - 1) / 2


class TrainingResult(NamedTuple):
    """Where a run stands and what it left.

    Attributes:
        output_dir: The pipeline, loadable by `DDPMPipeline.from_pretrained`.
        step: Optimiser steps done.
        loss: Mean loss of the last logged steps; None if this call trained nothing.
        samples: Picture of the last grid of samples.
        loss_curve: Picture of the loss over the run.
    """

    output_dir: Path
    step: int
    loss: float | None
    samples: Path
    loss_curve: Path


def save_samples(run: Run, step: int, path: Path) -> None:
    """Sample a grid, every process its share; image i has a seed of its own, at every step.

    Class i modulo their number, where there are classes.

    Raises:
        Stopped: a signal came; the state is saved, the grid is left out.
    """
    count, processes = run.config.eval_batch_size, run.accelerator.num_processes
    share = range(
        run.accelerator.process_index, math.ceil(count / processes) * processes, processes
    )
    pipe = DDPMPipeline(run.averaged_unet(), DDPMScheduler.from_config(run.scheduler.config))
    hidden = not run.accelerator.is_main_process or run.log.hidden
    pipe.set_progress_bar_config(desc="Sampling", leave=False, disable=hidden)
    num_classes = run.stream.images.num_classes
    steps = pipe.denoise(
        len(share),
        generator=seeded_generators(run.config.seed, share),
        num_inference_steps=run.config.ddpm_num_inference_steps,
        class_labels=[i % num_classes for i in share] if num_classes else None,
    )
    with run.accelerator.autocast():
        for denoised in steps:
            images = denoised.x_s
            if reason := run.stop.agreed():
                stop(run, reason, step)
    images = run.accelerator.gather(images.contiguous())
    if run.accelerator.is_main_process:
        order = torch.arange(len(images)).view(processes, -1).T.flatten()
        with run.log.spared(f"{path} could not be saved"):
            save_image_grid(images[order][:count], path)
            run.log.write_picture(step, path)


def measure_held_out(run: Run, step: int) -> None:
    """Write L_simple of the averaged weights on held-out images and on images trained on.

    Both by timestep, with the same noise and timesteps at every step of the run: where the first is
    larger, the network has begun to memorise. Of a stream only the held-out images are at hand.
    """
    unet, values = run.averaged_unet(), {}
    sets = {"train_loss": run.stream.images, "held_out_loss": run.held_out}
    if run.config.streaming:
        del sets["train_loss"]
    count = min(HELD_OUT_IMAGES, *map(len, sets.values()))
    for name, images in sets.items():
        window = loss_on(run, unet, images, count)
        values[name], buckets = window.read(run.accelerator)
        values |= loss_by_bucket(name, buckets)
    run.log.write(step, values)
    shown = ", ".join(f"{name.replace('_', ' ')} {values[name]:.4f}" for name in sets)
    run.log.say(f"Step {step}: {shown}")


@torch.no_grad()
def loss_on(run: Run, unet: torch.nn.Module, images: ImageSet, count: int) -> LossWindow:
    """This process's share of L_simple on `count` images spread over a set, by timestep."""
    processes, device = run.accelerator.num_processes, run.accelerator.device
    window = LossWindow(device, run.config.ddpm_num_steps)
    spread = np.linspace(0, len(images) - 1, count).round().astype(int)
    mine = np.arange(count)[run.accelerator.process_index :: processes]
    for first in range(0, len(mine), run.plan.per_device):
        numbers = mine[first : first + run.plan.per_device]
        centre = np.full((len(numbers), 3), 0.5)
        x_0 = to_network(images.gather(spread[numbers], centre, False).to(device))
        eps = torch.stack(
            [
                torch.randn(x_0.shape[1:], generator=torch.Generator().manual_seed(seed))
                for seed in (mix_seed(run.config.seed, HELD_OUT_STREAM, int(n)) for n in numbers)
            ]
        ).to(device)
        # Evenly spread over all timesteps, for any number of images.
        t = torch.from_numpy(numbers * GOLDEN % 1 * run.config.ddpm_num_steps).long()
        labels = images.labels(spread[numbers])
        network = run.network(None if labels is None else torch.from_numpy(labels).to(device), unet)
        with run.accelerator.autocast():
            window.add(simple_loss(network, run.scheduler, x_0, eps, t), t)
    return window


def save_pipeline(run: Run) -> None:
    """Write the pipeline into the run's folder, while training goes on."""
    unet = run.averaged_unet() if run.saves else None
    if run.accelerator.is_main_process:
        with run.log.spared("the pipeline could not be saved"):
            write_pipeline(run, unet)
    run.accelerator.wait_for_everyone()


def write_pipeline(run: Run, unet: UNet2DModel) -> None:
    """Write a pipeline into the run's folder, each file replaced in one piece."""
    partial_folder = run.directory / ".pipeline.partial"
    scheduler = DDPMScheduler.from_config(run.scheduler.config)
    try:
        DDPMPipeline(unet, scheduler).save_pretrained(partial_folder)
        for file in [path for path in partial_folder.rglob("*") if path.is_file()]:
            target = run.directory / file.relative_to(partial_folder)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def write_report(run: Run, step: int, loss_curve: Path) -> None:
    """The curve of the loss, and the card: the last file that a run writes."""
    write_card(
        run.config,
        step=step,
        loss=save_loss_curve(run.directory / METRICS, loss_curve),
        parameters=sum(p.numel() for p in run.unet.parameters()),
        channels=run.stream.images.channels,
        num_images=None if run.config.streaming else len(run.stream.images),
        global_batch_size=run.plan.global_batch_size,
    )


def finish(run: Run, step: int) -> TrainingResult:
    """Save what was learned, say where it is; a run that was finished before is left alone.

    Raises:
        InputError: a disk that is full: the same command again tries again.
        Stopped: a signal came; the state is saved.
    """
    result = TrainingResult(
        output_dir=run.directory,
        step=step,
        loss=run.log.loss,
        samples=run.directory / "samples" / "grid.png",
        loss_curve=run.directory / "loss_curve.png",
    )
    if result.loss is None and is_finished(run.directory):
        run.accelerator.print(
            "This run is finished: add steps with --max_train_steps, or name another folder"
        )
    else:
        unet = run.averaged_unet() if run.saves else None
        of_main(run, partial(write_pipeline, run, unet))
        save_samples(run, step, result.samples)
        of_main(run, partial(write_report, run, step, result.loss_curve))
    if run.config.streaming:
        run.report_faults()
    run.close()
    run.accelerator.print(
        f"Pipeline:   {result.output_dir}\n"
        f"Samples:    {result.samples}\n"
        f"Loss curve: {result.loss_curve}"
    )
    return result


def is_finished(directory: Path) -> bool:
    """Whether the last thing that a run writes, its card, is there and newer than its state."""
    card, states = directory / "README.md", list_checkpoints(directory)
    if not (card.is_file() and states):
        return False
    return card.stat().st_mtime_ns >= states[-1].stat().st_mtime_ns
