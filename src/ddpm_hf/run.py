"""What a run consists of: its folder, network, state, and what is saved of them."""

from __future__ import annotations

import json
import math
import shutil
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from torch import Tensor

from .checkpoint import (
    CONFIG,
    METRICS,
    Checkpoint,
    check_folder,
    clear_leftovers,
    clear_run,
    compare_runs,
    find_latest,
    join_optimizer,
    list_checkpoints,
    load_checkpoint,
    read_settings,
    rotate,
    save_checkpoint,
    set_aside,
    shard_like,
    split_optimizer,
    verify,
    whole,
    write_text,
)
from .config import TrainingConfig
from .data import ImageStream, load_images, to_network
from .devices import (
    BatchPlan,
    choose_precision,
    plan_batch,
    start_accelerator,
    start_processes,
    wants_fsdp,
)
from .ema import (
    Average,
    build_ema,
    build_power_averages,
    drop_snapshots,
    ema_warning,
    save_snapshot,
)
from .errors import InputError, Stopped, TrainingError
from .functional import mix_seed
from .hub import write_card
from .logbook import Logbook, save_loss_curve
from .losses import stratified_timesteps, uniform_timesteps
from .optimization import build_optimizer
from .pipeline import DDPMPipeline, save_image_grid, seeded_generators
from .presets import DEFAULT_PROCESS, build_scheduler, build_unet
from .scheduler import DDPMScheduler
from .stopping import StopSignals, UpdateGuard

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


class Draw(NamedTuple):
    """What Algorithm 1 draws for one process and micro-step.

    Attributes:
        x_0, eps: Clean images in [-1, 1] and noise, (B, C, H, W), on the device.
        t: Timesteps on the CPU, (B,).
    """

    x_0: Tensor
    eps: Tensor
    t: Tensor


@dataclass
class Run:
    """Everything that a run consists of. Built by `Run.build`; `train` drives it."""

    config: TrainingConfig
    accelerator: Accelerator
    plan: BatchPlan
    stream: ImageStream
    unet: torch.nn.Module
    scheduler: DDPMScheduler
    optimizer: Any
    lr_scheduler: Any
    ema: Average | None
    power_averages: list[Average]
    guard: UpdateGuard
    log: Logbook
    stop: StopSignals
    total_steps: int
    saved_step: int | None = None
    grad_norm: Tensor | None = None

    @classmethod
    def build(cls, config: TrainingConfig) -> Run:
        """Load the images and make the network, the process and the optimiser.

        Raises:
            InputError: what was asked for does not fit together; nothing has been written then.
        """
        processes = start_processes(config)
        check_folder(config.run_dir)
        before = None if starts_afresh(config) else read_settings(config.run_dir)
        plan = plan_batch(config, processes.num_processes, before)
        with processes.local_main_process_first():  # one decodes, the others read its cache
            images = load_images(config)
        config = replace_auto(config, before)
        accelerator = start_accelerator(config, config.mixed_precision, plan.accumulation)
        steps = math.ceil(config.num_epochs * len(images) / plan.global_batch_size)
        total_steps = config.max_train_steps or steps

        torch.manual_seed(config.seed)
        unet = build_unet(
            config.preset,
            resolution=config.image_size,
            image_channels=images.channels,
            dropout=config.dropout,
        ).to(accelerator.device)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        process = {name: getattr(config, name) for name in DEFAULT_PROCESS}
        optimizer = build_optimizer(unet, config)
        # Neither the data nor the schedule is prepared: accelerate would replay epoch 0 and tick
        # once per process.
        lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=total_steps,
        )
        unet, optimizer = prepare(accelerator, unet, optimizer)
        network = accelerator.unwrap_model(unet)
        run = cls(
            config=config,
            accelerator=accelerator,
            plan=plan,
            stream=ImageStream(images, config.seed, plan.global_batch_size, config.random_flip),
            unet=unet,
            scheduler=build_scheduler(config.preset, **process),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            ema=build_ema(network, config) if config.use_ema else None,
            power_averages=build_power_averages(network, config),
            guard=UpdateGuard(accelerator.device),
            log=Logbook(accelerator, config, total_steps, plan.global_batch_size),
            stop=StopSignals(),
            total_steps=total_steps,
        )
        run.announce()
        return run

    def announce(self) -> None:
        """Say what is trained on, where and how, and what deserves a warning."""
        config, images, plan = self.config, self.stream.images, self.plan
        count, say = self.accelerator.num_processes, self.accelerator.print
        height, width = images.size
        say(
            f"Training on {len(images)} {'RGB' if images.channels == 3 else 'grey'} images, "
            f"{height}x{width}; processes: {count}, on {self.accelerator.device.type}"
            f"{', sharded' if wants_fsdp() else ''}; "
            f"CPU threads: {torch.get_num_threads()} each; "
            f"mixed precision: {self.accelerator.mixed_precision}"
        )
        say(
            f"Global batch {plan.global_batch_size}: {count} processes x {plan.per_device} images "
            f"x {plan.accumulation} micro-steps"
        )
        for fault in images.faults:
            say(f"Skipped an image that cannot be decoded: {fault}")
        if images.faults:
            say(f"Skipped {len(images.faults)} images in all")
        if warning := ema_warning(config, self.total_steps):
            say(warning)
        if config.lr_warmup_steps >= self.total_steps:
            say(
                f"Warning: the learning rate warms up for {config.lr_warmup_steps} steps and the "
                f"run has {self.total_steps}: choose fewer --lr_warmup_steps"
            )

    @property
    def directory(self) -> Path:
        """Folder of the run."""
        return self.config.run_dir

    @property
    def averages(self) -> dict[str, Average]:
        """All averages of the weights, by their names in a checkpoint."""
        named = {"ema": self.ema} if self.ema else {}
        return named | {f"ema-{average.sigma_rel}": average for average in self.power_averages}

    # One step

    def draw(self, step: int, micro: int) -> Draw:
        """This process's rows of the global batch: Algorithm 1, lines 2-4. Seeds dropout as well.

        The noise of an image depends on the seed and its position, and on the kind of device.
        """
        config, rank, device = self.config, self.accelerator.process_index, self.accelerator.device
        first = (micro * self.accelerator.num_processes + rank) * self.plan.per_device
        rows = slice(first, first + self.plan.per_device)

        images, positions = self.stream.batch(step, rows)
        x_0 = to_network(images.to(device, non_blocking=True))

        generator = torch.Generator(device)
        eps = torch.empty_like(x_0)
        for noise, position in zip(eps, positions, strict=True):
            noise.normal_(
                generator=generator.manual_seed(mix_seed(config.seed, NOISE_STREAM, position))
            )

        draws = np.random.default_rng([config.seed, TIMESTEP_STREAM, step]).random(
            self.plan.global_batch_size
        )
        sampler = {"stratified": stratified_timesteps, "uniform": uniform_timesteps}[
            config.timestep_sampler
        ]
        t = sampler(torch.from_numpy(draws), config.ddpm_num_steps)[rows]

        torch.manual_seed(mix_seed(config.seed, DROPOUT_STREAM, step, micro, rank))
        return Draw(x_0, eps, t)

    def update(self) -> None:
        """Clip the gradient; step the optimiser, unless it is not finite, the schedule and the EMA.

        With a fused optimiser, and with a loss scaler, the device itself skips the update; any
        other waits for the device to know.
        """
        accelerator, optimizer = self.accelerator, self.optimizer
        limit = self.config.max_grad_norm or math.inf
        self.grad_norm = whole(accelerator.clip_grad_norm_(self.unet.parameters(), limit))
        skip = self.guard.note(self.grad_norm)
        if accelerator.scaler is not None:
            optimizer.step()
        elif optimizer.optimizer.defaults.get("fused"):
            optimizer.optimizer.found_inf = skip.float()  # as torch's GradScaler tells it
            optimizer.step()
        elif not bool(skip):
            optimizer.step()
        optimizer.zero_grad()
        self.lr_scheduler.step()
        for average in self.averages.values():
            average.step(self.unet.parameters())

    def log_step(self, step: int) -> None:
        """Write and show the figures of the steps since the last call; waits for the device."""
        values = self.log.read_losses()
        precision = self.accelerator.mixed_precision
        values |= {
            "lr": self.lr_scheduler.get_last_lr()[-1],
            "grad_norm": float(self.grad_norm),
            "images_per_second": self.log.images_per_second,
            "skipped_updates": self.guard.check(step, values["loss"], precision),
        }
        self.log.write(step, values)
        self.log.show(
            step, f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s"
        )

    def epoch_ended(self, done: int, every: int) -> bool:
        """Whether this step ended an epoch that is a multiple of `every`; the last has `finish`."""
        if not every or done == self.total_steps:
            return False
        before, after = (
            (n * self.plan.global_batch_size // len(self.stream.images)) // every
            for n in (done - 1, done)
        )
        return after > before

    def samples_due(self, done: int) -> bool:
        """Whether to save a grid of samples after this step."""
        every = self.config.save_images_steps
        if every is None:
            return self.epoch_ended(done, self.config.save_images_epochs)
        return done % every == 0 and done != self.total_steps

    # The folder of the run

    def open_folder(self) -> int:
        """Make the folder, or go on in it: returns the number of steps done already.

        Raises:
            InputError: the folder holds something else, or a run with another identity.
        """
        accelerator, config = self.accelerator, self.config
        settings = asdict(config) | {
            "global_batch_size": self.plan.global_batch_size,
            "learned_variance": config.variance_type == "learned_range",
            "data_fingerprint": self.stream.images.fingerprint(),
        }
        if not starts_afresh(config):
            for line in compare_runs(self.directory, settings):
                accelerator.print(line)
        accelerator.wait_for_everyone()
        if starts_afresh(config) and accelerator.is_main_process:
            clear_run(self.directory)
        accelerator.wait_for_everyone()
        folder = self._find_checkpoint()
        step = self._restore(load_checkpoint(folder)) if folder else 0
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for name in set_aside(self.directory, step):
                accelerator.print(f"Renamed {name} to aside-{name}: this run goes on before it")
            self.directory.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.directory)
            for average in self.power_averages:
                drop_snapshots(self.directory, average.optimization_step)
            write_text(self.directory / CONFIG, json.dumps(settings, indent=2) + "\n")
            if step == 0:
                batch = to_network(self.stream.batch(0).images[:64])
                save_image_grid(batch, self.directory / "samples" / "first_batch.png")
        self.log.open(step, settings)
        return step

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, if any, chosen by one process for all.

        Raises:
            InputError: no such checkpoint, a damaged one, or one that a process does not see.
        """
        chosen: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                chosen = [self._choose_checkpoint()]
            except InputError as error:
                chosen = [error]
        (folder,) = broadcast_object_list(chosen)
        if isinstance(folder, InputError):
            raise folder
        sees = torch.tensor(folder is None or folder.is_dir(), device=self.accelerator.device)
        if not self.accelerator.gather(sees[None]).all():
            raise InputError(
                f"not every process sees {folder}: output_dir must be on a disk that all machines "
                "share"
            )
        return folder

    def _choose_checkpoint(self) -> Path | None:
        wanted = self.config.resume_from_checkpoint
        if wanted and wanted != "latest":
            folder = self.directory / Path(wanted).name
            if folder not in list_checkpoints(self.directory):
                raise InputError(
                    f"resume_from_checkpoint {wanted!r} is no checkpoint of this run, which has "
                    f"{[path.name for path in list_checkpoints(self.directory)]}"
                )
            verify(folder)
            return folder
        folder, passed_over = find_latest(self.directory)
        for line in passed_over:
            self.accelerator.print(f"{line}; using the one before it")
        return folder

    def _restore(self, checkpoint: Checkpoint) -> int:
        """Bring the run to where a checkpoint was written; returns its step."""
        unet = self.accelerator.unwrap_model(self.unet)
        parameters = dict(unet.named_parameters())
        with torch.no_grad():
            for name, saved in checkpoint.tensors["unet"].items():
                parameters[name].copy_(shard_like(saved, parameters[name]))
        state = join_optimizer(
            checkpoint.tensors.get("optimizer", {}), checkpoint.state["optimizer"]
        )
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, entries in state["state"].items():
            entries |= {k: shard_like(v, order[index]) for k, v in entries.items()}
        self.optimizer.load_state_dict(state)
        schedule = self.lr_scheduler
        schedule.load_state_dict(checkpoint.state["lr_scheduler"])
        # The horizon may have changed since: take the rate that this run's schedule has here.
        bases = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        rates = [base * factor(schedule.last_epoch) for base, factor in bases]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for name, average in self.averages.items():
            average.load(checkpoint.tensors[name], checkpoint.state["ema_steps"][name])
        if self.accelerator.scaler is not None and "scaler" in checkpoint.state:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.guard = UpdateGuard(self.accelerator.device, checkpoint.state.get("skipped", 0))
        self.saved_step = checkpoint.step
        self.accelerator.print(
            f"Going on from checkpoint-{checkpoint.step}, {checkpoint.step} of {self.total_steps} "
            "steps done"
        )
        return checkpoint.step

    def save_checkpoint(self, step: int) -> bool:
        """Write and rotate checkpoints; every process waits. False where it could not be written.

        A full disk is said, and the run goes on: the checkpoints before this one stand.
        """
        if step == self.saved_step:
            return True
        self.accelerator.wait_for_everyone()
        tensors, state = self._state()
        saved = True
        if self.accelerator.is_main_process:
            try:
                save_checkpoint(self.directory, step, tensors, state)
                rotate(self.directory, self.config.checkpoints_total_limit)
            except OSError as error:
                saved = False
                self.log.say(
                    f"Warning: checkpoint-{step} could not be saved, those before it stand, and "
                    f"training goes on ({error})"
                )
        (saved,) = broadcast_object_list([saved])
        self.saved_step = step if saved else self.saved_step
        return saved

    def _state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """What a checkpoint holds, (tensors by group, JSON); under FSDP all processes gather it."""
        unet = self.accelerator.unwrap_model(self.unet)
        optimizer_tensors, optimizer_rest = split_optimizer(self.optimizer.optimizer)
        tensors = {"unet": unet.state_dict(), "optimizer": optimizer_tensors}
        state = {
            "optimizer": optimizer_rest,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "skipped": int(self.guard.skipped),
            "ema_steps": {name: a.optimization_step for name, a in self.averages.items()},
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        tensors = {
            group: {name: whole(tensor) for name, tensor in named.items()}
            for group, named in tensors.items()
        }
        averages = {name: average.named_tensors() for name, average in self.averages.items()}
        return tensors | averages, state

    def save_snapshots(self) -> None:
        """Store the power averages, for averages of other lengths after training."""
        for average in self.power_averages:
            tensors = average.named_tensors()
            if self.accelerator.is_main_process:
                save_snapshot(self.directory, average, tensors)

    # What a run makes

    def averaged_unet(self) -> UNet2DModel:
        """A plain network with the averaged weights, in eval mode; all processes ask together."""
        trained = self.accelerator.unwrap_model(self.unet)
        named = dict(trained.named_parameters())
        weights = self.ema.named_tensors() if self.ema else {k: whole(v) for k, v in named.items()}
        with torch.device("meta"):  # no random number is drawn
            unet = UNet2DModel.from_config(trained.config)
        device = self.accelerator.device
        copies = {name: w.detach().to(device, copy=True) for name, w in weights.items()}
        unet.load_state_dict(copies, assign=True)
        return unet.eval().requires_grad_(False)

    def save_samples(self, step: int, path: Path) -> None:
        """Sample a grid, every process its share; image i has a seed of its own, at every step.

        Raises:
            Stopped: a signal came; the grid is left out.
        """
        count, processes = self.config.eval_batch_size, self.accelerator.num_processes
        share = range(
            self.accelerator.process_index, math.ceil(count / processes) * processes, processes
        )
        pipe = DDPMPipeline(self.averaged_unet(), DDPMScheduler.from_config(self.scheduler.config))
        hidden = not self.accelerator.is_main_process or self.log.bar.disable
        pipe.set_progress_bar_config(desc="Sampling", leave=False, disable=hidden)
        generators = seeded_generators(self.config.seed, share)
        with self.accelerator.autocast():
            for denoised in pipe.denoise(
                len(share),
                generator=generators,
                num_inference_steps=self.config.ddpm_num_inference_steps,
            ):
                images = denoised.x_s
                if reason := self.stop.agreed():
                    raise self.stopped(reason, step)
        images = self.accelerator.gather(images.contiguous())
        if self.accelerator.is_main_process:
            order = torch.arange(len(images)).view(processes, -1).T.flatten()
            save_image_grid(images[order][:count], path)
            self.log.write_picture(step, path)

    def save_pipeline(self) -> None:
        """Write the pipeline into the run's folder, each file replaced in one piece."""
        unet = self.averaged_unet()
        if self.accelerator.is_main_process:
            partial_folder = self.directory / ".pipeline.partial"
            shutil.rmtree(partial_folder, ignore_errors=True)
            scheduler = DDPMScheduler.from_config(self.scheduler.config)
            DDPMPipeline(unet, scheduler).save_pretrained(partial_folder)
            for file in [path for path in partial_folder.rglob("*") if path.is_file()]:
                target = self.directory / file.relative_to(partial_folder)
                target.parent.mkdir(exist_ok=True)
                file.replace(target)
            shutil.rmtree(partial_folder)
        self.accelerator.wait_for_everyone()

    def finish(self, step: int) -> TrainingResult:
        """Save what was learned, say where it is; a run that was finished before is left alone."""
        result = TrainingResult(
            output_dir=self.directory,
            step=step,
            loss=self.log.loss,
            samples=self.directory / "samples" / "grid.png",
            loss_curve=self.directory / "loss_curve.png",
        )
        if result.loss is None and self._is_finished():
            self.accelerator.print(
                "This run is finished: add steps with --max_train_steps, or name another folder"
            )
        else:
            self.save_pipeline()
            self.save_samples(step, result.samples)
            if self.accelerator.is_main_process:
                last_loss = save_loss_curve(self.directory / METRICS, result.loss_curve)
                write_card(
                    self.config,
                    step=step,
                    loss=last_loss,
                    parameters=sum(p.numel() for p in self.unet.parameters()),
                    channels=self.stream.images.channels,
                    num_images=len(self.stream.images),
                    global_batch_size=self.plan.global_batch_size,
                )
        self.close()
        self.accelerator.print(
            f"Pipeline:   {result.output_dir}\n"
            f"Samples:    {result.samples}\n"
            f"Loss curve: {result.loss_curve}"
        )
        return result

    def stopped(self, reason: str, step: int) -> Stopped | TrainingError:
        """Save the state; returns what to raise."""
        saved = self.save_checkpoint(step)
        self.close()
        if not saved:
            return TrainingError(
                f"stopped by {reason} after step {step}, whose checkpoint could not be saved"
            )
        self.accelerator.print(
            f"Stopped by {reason} after step {step} of {self.total_steps}, which is saved: the "
            "same command again goes on",
            flush=True,
        )
        return Stopped(reason)

    def close(self) -> None:
        """End the run's processes and trackers; nothing can be trained or saved after."""
        self.log.close()
        self.accelerator.wait_for_everyone()
        # DDP's wrapper goes before its process group. The other way round the wrapper drops the
        # last reference to it under Python's lock, and may wait for gloo's threads for ever.
        self.unet = self.accelerator.unwrap_model(self.unet)
        self.stop.group = None
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _is_finished(self) -> bool:
        """Whether the last thing that a run writes, its card, is there and newer than its state."""
        card, states = self.directory / "README.md", list_checkpoints(self.directory)
        if not (card.is_file() and states):
            return False
        return card.stat().st_mtime_ns >= states[-1].stat().st_mtime_ns


def starts_afresh(config: TrainingConfig) -> bool:
    """Whether to delete the run that stands in the folder."""
    return config.overwrite_output_dir and not config.resume_from_checkpoint


def replace_auto(config: TrainingConfig, before: dict[str, Any] | None) -> TrainingConfig:
    """The settings with what is `auto` decided: as the run began, or else for this machine."""
    precision = config.mixed_precision
    if precision == "auto" and before:
        precision = before["mixed_precision"]
    config = copy(config)
    config.mixed_precision = choose_precision(precision)
    return config


def prepare(
    accelerator: Accelerator, unet: UNet2DModel, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, Any]:
    """Accelerate's wrappers; on a CPU, where it ignores FSDP, torch's own sharding."""
    if not (wants_fsdp() and accelerator.device.type == "cpu"):
        return accelerator.prepare(unet, optimizer)
    from torch.distributed.fsdp import fully_shard

    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        fully_shard(block)
    fully_shard(unet)
    optimizer.param_groups[0]["params"] = list(unet.parameters())
    return unet, accelerator.prepare(optimizer)
