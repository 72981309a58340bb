"""What a run consists of, and what one step of it does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import UNet2DModel
from filelock import FileLock
from torch import Tensor

from .card import located
from .checkpoint import check_folder, compare_runs, read_settings, unlock_folder, whole
from .config import TrainingConfig
from .data import ImageStream, check_batch, load_images, shuffled, split_held_out
from .devices import (
    BatchPlan,
    in_turn,
    on_main,
    plan_batch,
    start_accelerator,
    start_processes,
    wants_fsdp,
)
from .ema import Average, build_ema, build_power_averages, check_updates, ema_warning
from .errors import InputError
from .functional import mix_seed, moved
from .images import ImageSet, place_images, to_network
from .learner import build_learner, build_network, settle_speed, start_weights
from .logbook import Logbook
from .losses import LossSecondMoment, drop_classes, stratified_timesteps, uniform_timesteps
from .presets import DEFAULT_PROCESS, build_scheduler
from .probe import count_flops, peak_flops
from .remote import is_repo, open_hub
from .scheduler import DDPMScheduler
from .stopping import StopSignals, UpdateGuard
from .streaming import LaneStream, load_stream
from .uploads import BackgroundPush

TIMESTEP_STREAM, NOISE_STREAM, DROPOUT_STREAM, CLASS_STREAM = 3, 4, 5, 6
"""Random streams of one seed, beside those of data.py."""

TIMESTEP_SAMPLERS = {"stratified": stratified_timesteps, "uniform": uniform_timesteps}

SECONDS_TO_MFU = 60.0
"""A run shorter than this is not worth measuring what the device could do."""


class Draw(NamedTuple):
    """What Algorithm 1 draws for one process and micro-step.

    Attributes:
        x_0, eps: Clean images in [-1, 1] and noise, (B, C, H, W), on the device.
        t: Timesteps on the CPU, (B,).
        weight: Of each image's loss, (B,), on the device: 1 unless timesteps are drawn unequally.
        labels: Classes, some of them hidden, (B,), on the device; None without classes.
    """

    x_0: Tensor
    eps: Tensor
    t: Tensor
    weight: Tensor
    labels: Tensor | None


@dataclass
class Run:
    """Everything that a run consists of. Built by `Run.build`; `train` drives it."""

    config: TrainingConfig
    accelerator: Accelerator
    plan: BatchPlan
    stream: ImageStream | LaneStream
    held_out: ImageSet | None
    unet: torch.nn.Module
    scheduler: DDPMScheduler
    optimizer: Any
    lr_scheduler: Any
    ema: Average | None
    power_averages: list[Average]
    timestep_history: LossSecondMoment | None
    guard: UpdateGuard
    log: Logbook
    stop: StopSignals
    total_steps: int
    pushes: BackgroundPush | None = None
    lock: FileLock | None = None
    saved_step: int | None = None
    grad_norm: Tensor | None = None
    _losses: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def build(cls, config: TrainingConfig) -> Run:
        """Load the images and make the network, the process and the optimiser.

        Raises:
            InputError: what was asked for does not fit together; nothing has been written then,
                but an empty repository may have been made on the Hub.
        """
        config = copy(config)
        processes = start_processes(config)
        for line in on_main(partial(look_around, config)):
            processes.print(line)
        if is_repo(config.resume_from_checkpoint or ""):
            config.resume_from_checkpoint = "latest"
        before = None if config.starts_afresh else read_settings(config.run_dir)
        plan = plan_batch(config, processes.num_processes, before)
        if before is not None:  # another run is refused before its images are decoded
            compare_runs(config.run_dir, {"global_batch_size": plan.global_batch_size})
        stream, held_out = in_turn(processes, partial(open_images, config, plan.global_batch_size))
        images = stream.images
        if not config.streaming:
            images = stream.images = place_images(images, processes.device, config.data_on_device)
        total_steps = config.max_train_steps or math.ceil(
            config.num_epochs * len(images) / plan.global_batch_size
        )

        check_updates(config, total_steps)
        if config.loss != "simple" and images.deep:
            raise InputError(
                f"loss {config.loss} is the bound of 256 grey levels, and the images have more: "
                "use --loss simple"
            )
        process = {name: getattr(config, name) for name in DEFAULT_PROCESS}
        scheduler = build_scheduler(
            config.preset,
            class_names=images.class_names,
            null_class=images.num_classes is None or config.class_dropout_prob > 0,
            **process,
        )
        weights = start_weights(config, processes, scheduler)
        network = partial(build_network, config, images)
        settle_speed(config, before, network, plan, total_steps)
        accelerator = start_accelerator(config, plan.accumulation)
        unet, optimizer, lr_scheduler = build_learner(
            config, network, accelerator, total_steps, weights
        )
        averaged = accelerator.unwrap_model(unet)
        by_loss = config.timestep_sampler == "loss_second_moment"
        run = cls(
            config=config,
            accelerator=accelerator,
            plan=plan,
            stream=stream,
            held_out=held_out,
            unet=unet,
            scheduler=scheduler,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            ema=build_ema(averaged, config) if config.use_ema else None,
            power_averages=build_power_averages(averaged, config),
            timestep_history=LossSecondMoment(config.ddpm_num_steps) if by_loss else None,
            guard=UpdateGuard(accelerator.device),
            log=Logbook(accelerator, config, total_steps, plan.global_batch_size),
            stop=StopSignals(),
            total_steps=total_steps,
        )
        if accelerator.is_main_process and (config.push_to_hub or config.push_checkpoints):
            run.pushes = BackgroundPush(run.log.say)
        run.announce()
        return run

    def announce(self) -> None:
        """Say what is trained on, where and how, and what deserves a warning."""
        config, images, plan = self.config, self.stream.images, self.plan
        count, say = self.accelerator.num_processes, self.accelerator.print
        say(f"Training on {images.describe()}")
        if self.held_out:
            say(f"Held out: {self.held_out.describe()}")
            for fault in self.held_out.faults:
                say(f"Skipped a held-out image that cannot be decoded: {fault}")
        sharded = ", sharded by FSDP2" if wants_fsdp() else ""
        say(
            f"Processes: {count}, on {self.accelerator.device.type}{sharded}; CPU threads: "
            f"{torch.get_num_threads()} each; mixed precision: {config.mixed_precision}; memory "
            f"format: {config.memory_format}; compiled: {config.compile}"
        )
        say(
            f"Global batch: {plan.global_batch_size} images = {count} processes x "
            f"{plan.per_device} x {plan.accumulation} micro-steps"
        )
        if config.init_from:
            say(f"Started from the weights of {config.init_from}")
        self.report_faults()
        if config.streaming:
            say(
                "A stream has no epochs: grids come by --save_images_steps, the pipeline at the end"
            )
            say(f"The first {self.stream.window} images are read before the first step")
        elif images.deep and images.brightest < 0.25:
            say(
                f"Warning: the brightest of 64 images reaches {images.brightest:.1%} of white. Are "
                "they 12 bits in files of 16, or 8 in 32? Scale them, or all is nearly black"
            )
        if plan.per_device * 4 < min(config.train_batch_size, plan.global_batch_size // count):
            say(
                "Warning: so few images at once are slow: choose a global batch that divides better"
            )
        if warning := ema_warning(config, self.total_steps):
            say(warning)
        if config.lr_warmup_steps >= self.total_steps:
            say(
                f"Warning: the learning rate warms up for {config.lr_warmup_steps} steps and the "
                f"run has {self.total_steps}: choose fewer --lr_warmup_steps"
            )

    def report_faults(self) -> None:
        """Name the images that were left out: before training, or of a stream at its end.

        All processes ask together.
        """
        faults, say = self.stream.images.faults, self.accelerator.print
        if self.config.streaming:  # each process met those of its own lanes
            met: dict[tuple[int, int], str] = {}
            for corrupt in gather_object([self.stream.images.corrupt]):
                met |= corrupt
            faults = [met[place] for place in sorted(met)]
        for fault in faults:
            say(f"Skipped an image that cannot be decoded: {fault}")
        if faults:
            say(f"Skipped {len(faults)} images in all")

    @property
    def directory(self) -> Path:
        """Folder of the run."""
        return self.config.run_dir

    @property
    def averages(self) -> dict[str, Average]:
        """All averages of the weights, by their names in a checkpoint."""
        named = {"ema": self.ema} if self.ema else {}
        return named | {f"ema-{average.sigma_rel}": average for average in self.power_averages}

    @property
    def saves(self) -> bool:
        """Whether saving needs this process: the main one, and all where weights are sharded."""
        return self.accelerator.is_main_process or wants_fsdp()

    def averaged_unet(self) -> UNet2DModel:
        """A plain network with the averaged weights, in eval mode; all processes ask together."""
        trained = self.accelerator.unwrap_model(self.unet)
        if self.ema:
            weights = self.ema.named_tensors()
        else:
            weights = {name: whole(p.detach()) for name, p in trained.named_parameters()}
        with torch.device("meta"):  # no random number is drawn
            unet = UNet2DModel.from_config(trained.config)
        device = self.accelerator.device
        copies = {name: tensor.to(device, copy=True) for name, tensor in weights.items()}
        unet.load_state_dict(copies, assign=True)
        return unet.eval().requires_grad_(False)

    # One step

    def draw(self, step: int, micro: int) -> Draw:
        """This process's rows of the global batch: Algorithm 1, lines 2-4. Seeds dropout as well.

        The noise of an image depends on the seed and its position, and on the kind of device.
        """
        config, rank, device = self.config, self.accelerator.process_index, self.accelerator.device
        first = (micro * self.accelerator.num_processes + rank) * self.plan.per_device
        rows = slice(first, first + self.plan.per_device)

        images, positions, labels = self.stream.batch(step, rows)
        x_0 = to_network(moved(images, device))

        generator = torch.Generator(device)
        eps = torch.empty_like(x_0)
        for noise, position in zip(eps, positions, strict=True):
            noise.normal_(
                generator=generator.manual_seed(mix_seed(config.seed, NOISE_STREAM, position))
            )

        draws = self._uniform(TIMESTEP_STREAM, step)
        weight = torch.ones(len(x_0))
        if self.timestep_history:
            t = self.timestep_history.sample(draws)[rows]
            weight = self.timestep_history.weight(t).float()
        else:
            t = TIMESTEP_SAMPLERS[config.timestep_sampler](draws, config.ddpm_num_steps)
            # Strata come in order, and so do the lanes of a stream: neither may go with the other.
            t = t[shuffled(np.arange(len(t)), len(t), (config.seed, TIMESTEP_STREAM, step))[rows]]

        if labels is not None:
            hidden = self._uniform(CLASS_STREAM, step)[rows]
            null_class = self.stream.images.num_classes
            labels = torch.from_numpy(labels)
            labels = drop_classes(labels, hidden, null_class, config.class_dropout_prob)
            labels = moved(labels, device)

        torch.manual_seed(mix_seed(config.seed, DROPOUT_STREAM, step, micro, rank))
        return Draw(x_0, eps, t, moved(weight, device), labels)

    def _uniform(self, stream: int, step: int) -> Tensor:
        """A draw in [0, 1) for each image of a global batch, float64."""
        rng = np.random.default_rng([self.config.seed, stream, step])
        return torch.from_numpy(rng.random(self.plan.global_batch_size))

    def network(self, labels: Tensor | None, unet: torch.nn.Module | None = None):
        """The network, the trained one if none is given, as a function of (x_t, t) alone."""
        unet = unet or self.unet
        return unet if labels is None else partial(unet, class_labels=labels)

    def mean_loss(self, losses: Tensor, draw: Draw) -> Tensor:
        """What to minimise, (): the mean of the losses of a draw, (B,); they are remembered."""
        self.log.window.add(losses, draw.t, draw.weight)
        if self.timestep_history:
            self._losses.append((draw.t, losses.detach()))
        return (losses * draw.weight).mean()

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
        if self.timestep_history:
            self._remember_losses()

    def _remember_losses(self) -> None:
        """Tell the timestep sampler the losses of the global batch, in order; waits for the device.

        Losses that are not finite are left out, as their update is.
        """
        device = self.accelerator.device
        t, losses = (torch.stack(column).to(device) for column in zip(*self._losses, strict=True))
        self._losses.clear()
        # (processes, micro-steps, images) -> rows of the global batch
        t, losses = (
            self.accelerator.gather(column[None]).transpose(0, 1).flatten().cpu()
            for column in (t, losses)
        )
        finite = torch.isfinite(losses)
        self.timestep_history.update(t[finite], losses[finite])

    def log_step(self, step: int) -> None:
        """Write and show the figures of the steps since the last call; waits for the device."""
        values = self.log.read_losses()
        values |= {
            "train_seconds": self.log.train_seconds,
            "energy_kwh": self.log.energy_kwh,
            "loss_images": self.log.loss_images,
            "lr": self.lr_scheduler.get_last_lr()[-1],
            "grad_norm": float(self.grad_norm),
            "images_per_second": self.log.images_per_second,
            "skipped_updates": self.guard.check(step, values["loss"], self.config.mixed_precision),
        }
        line = f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s"
        long = time.perf_counter() - self.log.started > SECONDS_TO_MFU
        if long and self.accelerator.is_main_process and self._seconds_per_image_at_best:
            values["mfu"] = values["images_per_second"] * self._seconds_per_image_at_best
            line += f", {values['mfu']:.0%} MFU"
        self.log.write(step, values)
        self.log.show(step, line)

    @cached_property
    def _seconds_per_image_at_best(self) -> float | None:
        """Of all processes together, if they did nothing but the network's products at their peak.

        Images/s times this is the model FLOP/s utilisation (Chowdhery et al. 2022, appendix B).
        None where the device has no memory left to measure it.
        """
        config = dict(self.accelerator.unwrap_model(self.unet).config)
        try:
            peak = peak_flops(self.accelerator.device, self.config.mixed_precision)
        except torch.OutOfMemoryError:
            return None
        return count_flops(config) / (peak * self.accelerator.num_processes)

    def epoch_ended(self, done: int, every: int) -> bool:
        """Whether this step ended an epoch that is a multiple of `every`; not the last step.

        A stream has no epochs.
        """
        if not every or done == self.total_steps or self.config.streaming:
            return False
        before, after = (
            (n * self.plan.global_batch_size // len(self.stream.images)) // every
            for n in (done - 1, done)
        )
        return after > before

    def is_milestone(self, done: int) -> bool:
        """Whether the pipeline after this step, which is not the last, gets a tag on the Hub."""
        every = self.config.push_steps
        return every is not None and done % every == 0 and done != self.total_steps

    def pipeline_due(self, done: int) -> bool:
        """Whether to save the pipeline after this step; the end of a run saves its own."""
        return self.is_milestone(done) or self.epoch_ended(done, self.config.save_model_epochs)

    def samples_due(self, done: int) -> bool:
        """Whether to save a grid of samples after this step; the end of a run has its own."""
        every = self.config.save_images_steps
        if every is None:
            return self.epoch_ended(done, self.config.save_images_epochs)
        return done % every == 0 and done != self.total_steps

    def grid_path(self, done: int) -> Path:
        """The grid of samples after this step."""
        return self.directory / "samples" / f"step-{done}.png"

    def close(self) -> None:
        """End the run's processes and trackers; nothing can be trained or saved after."""
        self.accelerator.wait_for_everyone()
        self.release()
        for tracker in self.accelerator.trackers:
            with self.log.spared(f"the curves of {tracker.name} may not be whole"):
                tracker.finish()
        self.accelerator.trackers.clear()
        self.accelerator.end_training()

    @contextmanager
    def held(self) -> Iterator[Run]:
        """The run, let go of at the end, however it comes."""
        try:
            yield self
        finally:
            self.release()

    def release(self) -> None:
        """Let go of what must not outlive the processes' group, however the run ended.

        DDP's wrapper goes first. The other way round the wrapper drops the last reference to the
        group under Python's lock, and may wait for gloo's threads for ever.
        """
        self.log.close()
        self.unet = self.accelerator.unwrap_model(self.unet)
        self.stop.group = None
        self.accelerator.free_memory()
        lock, self.lock = self.lock, None
        if lock:  # once: the next lock of this name is another process's
            unlock_folder(lock)


def same_command(config: TrainingConfig) -> str:
    """How to go on with this run after a stop: which flags of its command would not."""
    named = config.resume_from_checkpoint not in (None, "", "latest")
    left_out = {
        "--overwrite_output_dir": config.overwrite_output_dir and (named or config.starts_afresh),
        "--resume_from_checkpoint": named,
    }
    words = " and ".join(flag for flag, given in left_out.items() if given)
    return f"the same command without {words}" if words else "the same command again"


def settings_of(config: TrainingConfig) -> dict[str, Any]:
    """The settings of a run as its folder has them, with what they say together."""
    trained = config.loss == "vlb" or config.variance_type == "learned_range"
    variance = config.variance_type if trained else "none"
    return located(asdict(config)) | {"trained_variance": variance}


def inside(path: Path, folder: Path) -> bool:
    """Whether a path leads into a folder, or is that folder."""
    return path.resolve().is_relative_to(folder.resolve())


def look_around(config: TrainingConfig) -> list[str]:
    """Look at the folder of the run and at its repositories; lines for the user.

    Raises:
        InputError: what is there is not of this run.
    """
    check_folder(config.run_dir)
    if not config.starts_afresh:  # before a checkpoint of the Hub comes into the folder
        settings = settings_of(config)
        del settings["global_batch_size"]  # the processes have a say in it
        compare_runs(config.run_dir, settings)
    for images in (config.train_data_dir, config.dataset_name):
        if images and Path(images).is_dir() and inside(config.run_dir, Path(images)):
            raise InputError(
                f"output_dir {config.run_dir} is inside of {images}, where its pictures would be "
                "trained on: name an --output_dir outside of it"
            )
    return open_hub(config, afresh=config.starts_afresh)


def open_images(
    config: TrainingConfig, global_batch_size: int
) -> tuple[ImageStream | LaneStream, ImageSet | None]:
    """The stream of images to train on, and images to measure the loss on."""
    order = (config.seed, global_batch_size, config.random_flip)
    if config.streaming:
        images, held_out = split_held_out(config, load_stream(config))
        return LaneStream(images, *order), held_out
    images, held_out = split_held_out(config, load_images(config))
    check_batch(images, global_batch_size)
    return ImageStream(images, *order), held_out
