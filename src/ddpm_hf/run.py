"""What a run consists of and does around a step: its folder, checkpoints, pictures, curves."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoint import (
    CONFIG,
    METRICS,
    Checkpoint,
    check_folder,
    clear_run,
    compare_runs,
    join_optimizer,
    keep_metrics,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    rotate,
    save_checkpoint,
    set_aside,
    split_optimizer,
    write_text,
)
from .config import TrainingConfig
from .data import ImageSet, ImageStream, load_images, to_network
from .devices import start_accelerator
from .ema import build_ema
from .errors import InputError
from .functional import mix_seed
from .hub import write_card
from .losses import stratified_timesteps, uniform_timesteps
from .optimization import build_optimizer
from .pipeline import DDPMPipeline, save_image_grid, seeded_generators
from .presets import DEFAULT_PROCESS, build_scheduler, build_unet
from .scheduler import DDPMScheduler

TIMESTEP_STREAM, NOISE_STREAM, DROPOUT_STREAM = 3, 4, 5
"""Random streams of one seed, beside those of data.py."""


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


class LossWindow:
    """Mean loss since the last look; adding never waits for the device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.values: list[Tensor] = []
        self.last: float | None = None

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro-step, ()."""
        self.values.append(loss.detach())

    def mean(self) -> float:
        """Mean over the window and all processes; starts a new window."""
        mean = self.accelerator.reduce(torch.stack(self.values).mean(), reduction="mean")
        self.values.clear()
        self.last = mean.item()
        return self.last


def announce(accelerator: Accelerator, images: ImageSet) -> None:
    """Say what is trained on and where, and which images were left out."""
    height, width = images.size
    accelerator.print(
        f"Training on {len(images)} {'RGB' if images.channels == 3 else 'grey'} images, "
        f"{height}x{width}; processes: {accelerator.num_processes}, on "
        f"{accelerator.device.type}; CPU threads: {torch.get_num_threads()} each; "
        f"mixed precision: {accelerator.mixed_precision}"
    )
    for fault in images.faults:
        accelerator.print(f"Skipped an image that cannot be decoded: {fault}")
    if images.faults:
        accelerator.print(f"Skipped {len(images.faults)} images in all")


@dataclass
class Run:
    """Everything that a run consists of. Built by `Run.build`; `train` drives it."""

    config: TrainingConfig
    accelerator: Accelerator
    stream: ImageStream
    unet: torch.nn.Module
    scheduler: DDPMScheduler
    optimizer: Any
    lr_scheduler: Any
    ema: EMAModel | None
    total_steps: int

    @classmethod
    def build(cls, config: TrainingConfig) -> Run:
        """Load the images and make the network, the process and the optimiser."""
        accelerator = start_accelerator(config)
        with accelerator.main_process_first():  # one process decodes, the others read its cache
            images = load_images(config)
        announce(accelerator, images)
        batch_size = config.train_batch_size * config.gradient_accumulation_steps
        batch_size *= accelerator.num_processes
        epochs = config.num_epochs * len(images) / batch_size
        total_steps = config.max_train_steps or math.ceil(epochs)
        if config.lr_warmup_steps >= total_steps:
            accelerator.print(
                f"Warning: the learning rate warms up for {config.lr_warmup_steps} steps and the "
                f"run has {total_steps}: choose fewer --lr_warmup_steps"
            )

        torch.manual_seed(config.seed)
        unet = build_unet(
            config.preset,
            resolution=config.image_size,
            image_channels=images.channels,
            dropout=config.dropout,
        ).to(accelerator.device)
        process = {name: getattr(config, name) for name in DEFAULT_PROCESS}
        optimizer = build_optimizer(unet, config)
        lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=total_steps,
        )
        ema = build_ema(unet, config) if config.use_ema else None
        # Neither the data nor the schedule is prepared: accelerate would replay epoch 0 and tick
        # once per process.
        unet, optimizer = accelerator.prepare(unet, optimizer)
        return cls(
            config=config,
            accelerator=accelerator,
            stream=ImageStream(images, config.seed, batch_size, config.random_flip),
            unet=unet,
            scheduler=build_scheduler(config.preset, **process),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            ema=ema,
            total_steps=total_steps,
        )

    @property
    def directory(self) -> Path:
        """Folder of the run."""
        return self.config.run_dir

    @property
    def global_batch_size(self) -> int:
        """Images per optimiser step, over all processes."""
        return self.stream.global_batch_size

    def progress_bar(self, first_step: int) -> tqdm:
        """The bar over optimiser steps, on one process of each machine."""
        hidden = not self.accelerator.is_local_main_process
        return tqdm(
            total=self.total_steps, initial=first_step, unit="step", desc="Training", disable=hidden
        )

    def draw(self, step: int, micro: int) -> tuple[Tensor, Tensor, Tensor]:
        """This process's rows of the global batch: clean images, noise, timesteps (on the CPU).

        Seeds dropout as well. The noise of an image depends on the seed and its position, and on
        the kind of device.
        """
        config, rank, device = self.config, self.accelerator.process_index, self.accelerator.device
        first = (micro * self.accelerator.num_processes + rank) * config.train_batch_size
        rows = slice(first, first + config.train_batch_size)

        images, positions = self.stream.batch(step, rows)
        x_0 = to_network(images.to(device))

        generator = torch.Generator(device)
        eps = torch.empty_like(x_0)
        for noise, position in zip(eps, positions, strict=True):
            noise.normal_(
                generator=generator.manual_seed(mix_seed(config.seed, NOISE_STREAM, position))
            )

        draws = np.random.default_rng([config.seed, TIMESTEP_STREAM, step]).random(
            self.global_batch_size
        )
        sampler = {"stratified": stratified_timesteps, "uniform": uniform_timesteps}[
            config.timestep_sampler
        ]
        t = sampler(torch.from_numpy(draws), self.config.ddpm_num_steps)[rows]

        torch.manual_seed(mix_seed(config.seed, DROPOUT_STREAM, step, micro, rank))
        return x_0, eps, t

    def epoch_ended(self, done: int, every: int) -> bool:
        """Whether this step ended an epoch that is a multiple of `every`; the last has `finish`."""
        if not every or done == self.total_steps:
            return False
        before, after = (
            (n * self.global_batch_size // len(self.stream.images)) // every
            for n in (done - 1, done)
        )
        return after > before

    # The folder of the run

    def open_folder(self) -> int:
        """Make the folder, or go on in it: returns the number of steps done already.

        Raises:
            InputError: the folder holds something else, or a run with another identity.
        """
        accelerator, config = self.accelerator, self.config
        identity = {
            "global_batch_size": self.global_batch_size,
            "learned_variance": config.variance_type == "learned_range",
            "data_fingerprint": self.stream.images.fingerprint(),
        }
        settings = asdict(config) | identity
        check_folder(self.directory)
        afresh = config.overwrite_output_dir and not config.resume_from_checkpoint
        if not afresh:
            for line in compare_runs(self.directory, settings):
                accelerator.print(line)
        accelerator.wait_for_everyone()
        if afresh and accelerator.is_main_process:
            clear_run(self.directory)
        accelerator.wait_for_everyone()
        checkpoint = self._find_checkpoint()
        step = self._restore(checkpoint) if checkpoint else 0
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for name in set_aside(self.directory, step):
                accelerator.print(f"Renamed {name} to aside-{name}: this run goes on before it")
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / CONFIG, json.dumps(settings, indent=2) + "\n")
            keep_metrics(self.directory / METRICS, step)
            if step == 0:
                batch = to_network(self.stream.batch(0).images[:64])
                save_image_grid(batch, self.directory / "samples" / "first_batch.png")
        if config.logger != "none":
            plain = {k: v for k, v in settings.items() if isinstance(v, (int, float, str))}
            accelerator.init_trackers("ddpm_hf", config=plain)
        return step

    def _find_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from, if any; always one of this run."""
        wanted = self.config.resume_from_checkpoint
        if wanted and wanted != "latest":
            folder = self.directory / Path(wanted).name
            if folder not in list_checkpoints(self.directory):
                raise InputError(
                    f"resume_from_checkpoint {wanted!r} is no checkpoint of this run, which has "
                    f"{[path.name for path in list_checkpoints(self.directory)]}"
                )
            return load_checkpoint(folder)
        latest, passed_over = load_latest(self.directory)
        for line in passed_over:
            self.accelerator.print(f"{line}; using the one before it")
        return latest

    def _restore(self, checkpoint: Checkpoint) -> int:
        """Bring the run to where a checkpoint was written; returns its step."""
        unet = self.accelerator.unwrap_model(self.unet)
        unet.load_state_dict(checkpoint.tensors["unet"])
        self.optimizer.load_state_dict(
            join_optimizer(checkpoint.tensors.get("optimizer", {}), checkpoint.state["optimizer"])
        )
        schedule = self.lr_scheduler
        schedule.load_state_dict(checkpoint.state["lr_scheduler"])
        # The horizon may have changed since: take the rate that this run's schedule has here.
        bases = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        rates = [base * factor(schedule.last_epoch) for base, factor in bases]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.ema:
            named = checkpoint.tensors["ema"]
            device = self.accelerator.device
            self.ema.shadow_params = [named[name].to(device) for name, _ in unet.named_parameters()]
            self.ema.optimization_step = checkpoint.state["ema_step"]
        if self.accelerator.scaler is not None and "scaler" in checkpoint.state:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.accelerator.print(
            f"Going on from checkpoint-{checkpoint.step}, {checkpoint.step} of {self.total_steps} "
            "steps done"
        )
        return checkpoint.step

    def save_checkpoint(self, step: int) -> None:
        """Write and rotate checkpoints; every process waits until it is there."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            unet = self.accelerator.unwrap_model(self.unet)
            optimizer_tensors, optimizer_rest = split_optimizer(self.optimizer.optimizer)
            tensors = {"unet": unet.state_dict(), "optimizer": optimizer_tensors}
            state = {"optimizer": optimizer_rest, "lr_scheduler": self.lr_scheduler.state_dict()}
            if self.ema:
                names = [name for name, _ in unet.named_parameters()]
                tensors["ema"] = dict(zip(names, self.ema.shadow_params, strict=True))
                state["ema_step"] = self.ema.optimization_step
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            save_checkpoint(self.directory, step, tensors, state)
            rotate(self.directory, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    # What a run shows

    def log(self, step: int, loss: float, images_per_second: float, bar: tqdm) -> None:
        """Write the curves, and the bar's figures."""
        bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:.0f} images/s")
        values = {
            "loss": loss,
            "lr": self.lr_scheduler.get_last_lr()[-1],
            "images_per_second": images_per_second,
        }
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with open(self.directory / METRICS, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    @contextmanager
    def averaged_weights(self) -> Iterator[UNet2DModel]:
        """The network with the averaged weights, in eval mode; the trained ones come back after."""
        unet = self.accelerator.unwrap_model(self.unet)
        unet.eval()
        if not self.ema:
            yield unet
            return
        self.ema.store(unet.parameters())
        self.ema.copy_to(unet.parameters())
        try:
            yield unet
        finally:
            self.ema.restore(unet.parameters())

    def save_samples(self, path: Path) -> None:
        """Sample a grid, every process its share; image i has a seed of its own, at every step."""
        count, processes = self.config.eval_batch_size, self.accelerator.num_processes
        share = range(
            self.accelerator.process_index, math.ceil(count / processes) * processes, processes
        )
        with self.averaged_weights() as unet:
            pipe = DDPMPipeline(unet, DDPMScheduler.from_config(self.scheduler.config))
            pipe.set_progress_bar_config(
                desc="Sampling", leave=False, disable=not self.accelerator.is_main_process
            )
            generators = seeded_generators(self.config.seed, share)
            steps = self.config.ddpm_num_inference_steps
            images = pipe(len(share), generators, steps, output_type="pt").images
        images = self.accelerator.gather(images.contiguous())
        if self.accelerator.is_main_process:
            order = torch.arange(len(images)).view(processes, -1).T.flatten()
            save_image_grid(images[order][:count] * 2 - 1, path)

    def save_pipeline(self) -> None:
        """Write the pipeline into the run's folder, each file replaced in one piece."""
        if self.accelerator.is_main_process:
            partial = self.directory / ".pipeline.partial"
            shutil.rmtree(partial, ignore_errors=True)
            with self.averaged_weights() as unet:
                DDPMPipeline(
                    unet, DDPMScheduler.from_config(self.scheduler.config)
                ).save_pretrained(partial)
            for file in [path for path in partial.rglob("*") if path.is_file()]:
                target = self.directory / file.relative_to(partial)
                target.parent.mkdir(exist_ok=True)
                file.replace(target)
            shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()

    def finish(self, step: int, loss: float | None) -> TrainingResult:
        """Save what was learned, say where it is; a run that was finished before is left alone."""
        result = TrainingResult(
            output_dir=self.directory,
            step=step,
            loss=loss,
            samples=self.directory / "samples" / "grid.png",
            loss_curve=self.directory / "loss_curve.png",
        )
        if loss is None and self._is_finished():
            self.accelerator.print(
                "This run is finished: add steps with --max_train_steps, or name another folder"
            )
        else:
            self.save_pipeline()
            self.save_samples(result.samples)
            if self.accelerator.is_main_process:
                last_loss = save_loss_curve(self.directory / METRICS, result.loss_curve)
                write_card(
                    self.config,
                    step=step,
                    loss=last_loss,
                    parameters=sum(p.numel() for p in self.unet.parameters()),
                    channels=self.stream.images.channels,
                    num_images=len(self.stream.images),
                    global_batch_size=self.global_batch_size,
                )
        self.accelerator.wait_for_everyone()
        # DDP's wrapper goes before its process group. The other way round the wrapper drops the
        # last reference to it under Python's lock, and may wait for gloo's threads for ever.
        self.unet = self.accelerator.unwrap_model(self.unet)
        self.accelerator.free_memory()
        self.accelerator.end_training()
        self.accelerator.print(
            f"Pipeline:   {result.output_dir}\n"
            f"Samples:    {result.samples}\n"
            f"Loss curve: {result.loss_curve}"
        )
        return result

    def _is_finished(self) -> bool:
        """Whether the last thing that a run writes, its card, is there and newer than its state."""
        card, states = self.directory / "README.md", list_checkpoints(self.directory)
        if not (card.is_file() and states):
            return False
        return card.stat().st_mtime_ns >= states[-1].stat().st_mtime_ns


def save_loss_curve(metrics: Path, path: Path) -> float | None:
    """Plot the logged losses, and their running mean, over the steps; returns the last loss."""
    from matplotlib.figure import Figure

    rows = (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    )
    if not rows:  # deleted by hand
        return None
    steps, losses = np.array([[row["step"], row["loss"]] for row in rows]).T
    width = max(1, len(losses) // 20)
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
    axes.plot(steps, losses, color="lightgrey", label="loss")
    if len(losses) > width:
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], mean, label=f"mean of {width} logged values")
    axes.set(xlabel="optimiser step", ylabel="loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return float(losses[-1])
