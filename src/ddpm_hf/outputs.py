"""What a run makes of its averaged weights: samples, held-out losses, the pipeline, its card."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import UNet2DModel

from .card import dataset_of, located, write_card
from .checkpoint import EVALUATED, METRICS, flush, list_checkpoints, read_metrics, step_of
from .functional import mix_seed
from .hub import Pushed
from .images import ImageSet, to_network
from .logbook import LossWindow, loss_by_bucket, save_loss_curve
from .losses import simple_loss
from .pictures import save_image_grid
from .pipeline import DDPMPipeline, seeded_generators
from .publishing import finish_pushes, publish_pipeline
from .results import Result, TrainingRecord, add_results, read_record, read_results, write_record
from .resuming import of_main, stop
from .run import Run, same_command
from .scheduler import DDPMScheduler
from .stopping import explained_failures

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
        results: What has been measured of the model, as on its card.
        pushed: Where it is on the Hub; None where it was not pushed.
    """

    output_dir: Path
    step: int
    loss: float | None
    samples: Path
    loss_curve: Path
    results: list[Result]
    pushed: Pushed | None = None


def save_samples(run: Run, step: int, path: Path) -> None:
    """Sample a grid, every process its share; image i has a seed of its own, at every step.

    Class i modulo their number, where there are classes.

    Raises:
        Stopped: a signal came; the state is saved, the grid is left to the next start.
        TrainingError: there is no memory for it.
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
    no_memory = f"out of memory while sampling {count} images: choose fewer --eval_batch_size"
    with explained_failures(no_memory, same_command(run.config)), run.accelerator.autocast():
        for denoised in steps:
            images = denoised.x_s
            if reason := run.stop.agreed():
                stop(run, reason, step)
    images = run.accelerator.gather(images.contiguous())
    if run.accelerator.is_main_process:
        order = torch.arange(len(images)).view(processes, -1).T.flatten()
        with run.log.spared(f"{path} could not be saved"):
            save_image_grid(images[order][:count], path)
        with run.log.spared(f"{path} could not be shown"):
            run.log.write_picture(step, path)


def save_left_out(run: Run, step: int) -> None:
    """Make the grid and the pipeline of a step whose checkpoint was the last thing before a stop.

    What is there already stays, and the end of a run makes its own.
    """

    def left_out() -> tuple[bool, bool]:
        samples, pipeline = run.samples_due(step), run.pipeline_due(step)
        if not 0 < step < run.total_steps or not (samples or pipeline):
            return False, False
        record = read_record(run.directory)
        if record and record.step == step:  # the pipeline comes last
            return False, False
        return samples and not run.grid_path(step).exists(), pipeline

    samples, pipeline = of_main(run, left_out)
    if samples:
        save_samples(run, step, run.grid_path(step))
    if pipeline:
        save_pipeline(run, step)


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
        x_0 = to_network(images.centred(spread[numbers]).to(device))
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


def save_pipeline(run: Run, step: int) -> None:
    """Write the pipeline into the run's folder, while training goes on, and push it if asked to."""
    unet = run.averaged_unet() if run.saves else None
    if run.accelerator.is_main_process:
        with run.log.spared("the pipeline could not be saved"):
            write_pipeline(run, step, unet)
            write_record(run.directory, training_record(run, step))
            if run.config.push_to_hub:
                save_loss_curve(run.directory / METRICS, run.directory / "loss_curve.png")
                add_losses(run, step)
                publish_pipeline(run, step, milestone=run.is_milestone(step))
    run.accelerator.wait_for_everyone()


def write_pipeline(run: Run, step: int, unet: UNet2DModel) -> None:
    """Write a pipeline into the run's folder, each file replaced in one piece.

    What shows an evaluation, samples or losses of another step goes before.
    """
    record = read_record(run.directory)
    if record is None or record.step != step:
        for name in (*EVALUATED, "samples/grid.png", "loss_curve.png"):
            (run.directory / name).unlink(missing_ok=True)
    partial_folder = run.directory / ".pipeline.partial"
    scheduler = DDPMScheduler.from_config(run.scheduler.config)
    try:
        DDPMPipeline(unet, scheduler).save_pretrained(partial_folder)
        for file in [path for path in partial_folder.rglob("*") if path.is_file()]:
            target = run.directory / file.relative_to(partial_folder)
            target.parent.mkdir(exist_ok=True)
            flush(file)  # before training.json says that the run is finished
            file.replace(target)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def write_report(run: Run, step: int, loss_curve: Path) -> None:
    """The curve of the loss, the numbers and the card; at last, that the run is finished."""
    save_loss_curve(run.directory / METRICS, loss_curve)
    record = training_record(run, step)
    write_record(run.directory, record)
    add_losses(run, step)
    write_card(run.directory)
    write_record(run.directory, replace(record, finished=True))


def add_losses(run: Run, step: int) -> None:
    """Put the losses that the run logged last in the place of older ones."""
    results = loss_results(run, step)
    add_results(run.directory, results, replacing={row.metric for row in results})


LOSSES = {
    "loss_at_t": "training loss",
    "train_loss": "L_simple, training images",
    "held_out_loss": "L_simple, held-out images",
}
"""Names in metrics.jsonl of losses by timestep, and what a card calls them."""


def training_record(run: Run, step: int) -> TrainingRecord:
    """What training.json says of this run."""
    rows, by_timestep = read_metrics(run.directory / METRICS), {}
    for name, words in LOSSES.items():
        found = [{k: v for k, v in row.items() if k.startswith(f"{name}/")} for row in rows]
        last = next((shares for shares in reversed(found) if shares), {})
        finite = {key.split("/")[1]: value for key, value in last.items() if value is not None}
        if finite:
            by_timestep[words] = finite
    return TrainingRecord(
        step=step,
        global_batch_size=run.plan.global_batch_size,
        num_images=None if run.config.streaming else len(run.stream.images),
        num_processes=run.accelerator.num_processes,
        seconds=max((row.get("train_seconds", 0.0) for row in rows), default=0.0),
        energy_kwh=max((row.get("energy_kwh", 0.0) for row in rows), default=0.0),
        parameters=sum(p.numel() for p in run.unet.parameters()),
        loss_by_timestep=by_timestep,
    )


def loss_results(run: Run, step: int) -> list[Result]:
    """The losses that the run logged last, as rows of results.json."""
    config, rows = run.config, read_metrics(run.directory / METRICS)
    weighted = config.snr_gamma and config.loss != "vlb"
    objective = config.loss + (f", min-SNR gamma {config.snr_gamma:g}" if weighted else "")
    plain = "L_simple (Ho et al., eq. 14) of the saved weights, evenly spread timesteps"
    count = HELD_OUT_IMAGES
    if run.held_out:
        count = min(count, len(run.held_out))
        if not config.streaming:  # of a stream only these are at hand
            count = min(count, len(run.stream.images))
    told = {
        "loss": (
            "training_loss",
            config.split,
            next((row["loss_images"] for row in reversed(rows) if "loss_images" in row), 0),
            f"objective {objective}, weights in training, mean of the last logged steps",
        ),
        "train_loss": ("simple_loss", config.split, count, plain),
        "held_out_loss": ("simple_loss", "held out", count, plain),
    }
    results = []
    for name, (metric, split, num_images, protocol) in told.items():
        value = next((row[name] for row in reversed(rows) if name in row), None)
        if value is not None and math.isfinite(value):
            results.append(
                Result(
                    metric=metric,
                    value=value,
                    unit="per dimension",
                    dataset=dataset_of(located(asdict(config)))["name"],
                    split=split,
                    num_images=num_images,
                    protocol=protocol,
                    seed=config.seed,
                    step=step,
                )
            )
    return results


def finish(run: Run, step: int) -> TrainingResult:
    """Save what was learned, say where it is; a run that was finished before is left alone.

    Raises:
        InputError: a disk that is full: the same command again tries again.
        Stopped: a signal came; the state is saved.
    """
    samples, loss_curve = run.directory / "samples" / "grid.png", run.directory / "loss_curve.png"
    if run.log.loss is None and is_finished(run.directory):
        run.accelerator.print(
            "This run is finished: add steps with --max_train_steps, or name another folder"
        )
    else:
        unet = run.averaged_unet() if run.saves else None
        of_main(run, partial(write_pipeline, run, step, unet))
        run.accelerator.print(f"Sampling {run.config.eval_batch_size} images", flush=True)
        save_samples(run, step, samples)
        of_main(run, partial(write_report, run, step, loss_curve))
    if run.config.streaming:
        run.report_faults()
    run.accelerator.print(
        f"Pipeline:   {run.directory}\nSamples:    {samples}\nLoss curve: {loss_curve}"
    )
    publish_pipeline(run, step, milestone=True)
    pushed = finish_pushes(run)
    run.close()
    results = read_results(run.directory)
    return TrainingResult(run.directory, step, run.log.loss, samples, loss_curve, results, pushed)


def is_finished(directory: Path) -> bool:
    """Whether everything that a run writes at its end is there, of its newest state."""
    record, states = read_record(directory), list_checkpoints(directory)
    if not (record and record.finished and states and (directory / "README.md").is_file()):
        return False
    return record.step == step_of(states[-1])
