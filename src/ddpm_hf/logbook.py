"""What a run says while it trains: the bar, the lines, the curves, metrics.jsonl."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoint import METRICS, keep_metrics, read_metrics
from .config import TrainingConfig
from .devices import device_watts
from .functional import moved

BUCKETS = 10
"""Equal shares of the timesteps in which the loss is shown."""

LINE_SECONDS = 10.0
"""At least so long between two lines where there is no terminal to show a bar on."""


class LossWindow:
    """Mean loss since the last look, whole and by timestep; adding never waits for the device."""

    def __init__(self, device: torch.device, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self.sums = torch.zeros(3, BUCKETS, device=device)  # optimised loss, plain loss, count

    def add(self, losses: Tensor, t: Tensor, weight: Tensor | None = None) -> None:
        """Add the loss of each image, (B,), at timesteps (B,) on the CPU.

        `weight`, (B,), is that of importance sampling: the optimised loss has it, the plain not.
        """
        plain = losses.detach().float()
        optimised = plain if weight is None else plain * weight
        rows = torch.stack([optimised, plain, torch.ones_like(plain)])
        bucket = moved(t * BUCKETS // self.num_timesteps, rows.device)
        self.sums.index_add_(1, bucket, rows)

    def read(self, accelerator: Accelerator) -> tuple[float, list[float]]:
        """(mean optimised loss, plain loss per bucket) over all processes; starts a new window.

        A bucket without an image is NaN.
        """
        optimised, plain, count = accelerator.reduce(self.sums, reduction="sum").cpu().double()
        self.sums = torch.zeros_like(self.sums)
        return float(optimised.sum() / count.sum()), (plain / count).tolist()

    def state(self, accelerator: Accelerator) -> Tensor:
        """The sums of every process, (processes, 3, BUCKETS), which all ask for together."""
        return accelerator.gather(self.sums[None])

    def load(self, saved: Tensor, accelerator: Accelerator) -> None:
        """Go on with what `state` gave: with one's own sums, or on another process count with all
        on the main process.
        """
        rank, count = accelerator.process_index, accelerator.num_processes
        if len(saved) != count:
            saved = torch.cat([saved.sum(0, keepdim=True), saved.new_zeros(count - 1, 3, BUCKETS)])
        self.sums.copy_(saved[rank])


class Logbook:
    """Where a run writes what it measures. Every process has one; one of them writes."""

    def __init__(
        self, accelerator: Accelerator, config: TrainingConfig, total_steps: int, images: int
    ) -> None:
        self.accelerator, self.config = accelerator, config
        self.total_steps, self.images_per_step = total_steps, images
        self.window = LossWindow(accelerator.device, config.ddpm_num_steps)
        self.loss: float | None = None
        self.logged_step = 0
        self.seconds_before = self.energy_before = 0.0
        self.watts, self.loss_images = 0.0, 0
        self.bar: tqdm | None = None
        self._warned = False

    def open(self, step: int, settings: dict[str, Any]) -> None:
        """Go on at `step`: later lines of metrics are dropped, trackers get the settings."""
        if self.accelerator.is_main_process:
            metrics = self.config.run_dir / METRICS
            keep_metrics(metrics, step)
            rows = read_metrics(metrics)
            self.seconds_before, self.energy_before = (
                max((row.get(name, 0.0) for row in rows), default=0.0)
                for name in ("train_seconds", "energy_kwh")
            )
            self.watts = device_watts(self.accelerator.device) * self.accelerator.num_processes
        if self.config.logger != "none":
            plain = {k: v for k, v in settings.items() if isinstance(v, (int, float, str))}
            self.accelerator.init_trackers("ddpm_hf", config=plain)

    def start(self, step: int) -> None:
        """Training begins, or goes on, at `step`."""
        self.bar = tqdm(
            total=self.total_steps, initial=step, unit="step", desc="Training", disable=self.hidden
        )
        self.first_step, self.started, self.last_line = step, time.perf_counter(), 0.0

    @property
    def hidden(self) -> bool:
        """Whether bars stay hidden: there is no terminal, or another process shows them."""
        return not (self.accelerator.is_local_main_process and sys.stderr.isatty())

    def close(self) -> None:
        """Training ended, in whatever way."""
        if self.bar is not None:
            self.bar.close()

    @property
    def images_per_second(self) -> float:
        """Over this call, all processes together."""
        steps = self.step - self.first_step
        return steps * self.images_per_step / (time.perf_counter() - self.started)

    @property
    def train_seconds(self) -> float:
        """Seconds of training, over all starts of the run; what was lost with a stop is not in."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def energy_kwh(self) -> float:
        """An estimate over all starts of the run: time x the devices' power."""
        joules = (time.perf_counter() - self.started) * self.watts
        return self.energy_before + joules / 3.6e6

    def tick(self, step: int) -> bool:
        """A step is done; returns whether it is one to log."""
        self.step = step
        self.bar.update()
        return step % self.config.logging_steps == 0 or step == self.total_steps

    def read_losses(self) -> dict[str, float]:
        """The losses since the last call, over all processes; waits for the device."""
        self.loss_images = (self.step - self.logged_step) * self.images_per_step
        self.logged_step = self.step
        self.loss, buckets = self.window.read(self.accelerator)
        return {"loss": self.loss} | loss_by_bucket("loss_at_t", buckets)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write values to metrics.jsonl, where what is not finite is null, and to the trackers.

        A full disk stops neither.
        """
        if not self.accelerator.is_main_process:
            return
        try:
            with open(self.config.run_dir / METRICS, "a") as file:
                row = {name: v if math.isfinite(v) else None for name, v in values.items()}
                file.write(json.dumps({"step": step, **row}) + "\n")
            self.accelerator.log(values, step=step)
        except OSError as error:
            self.warn_once(f"cannot write the curves: {error}")

    def write_picture(self, step: int, path: Path) -> None:
        """Show a picture in the trackers that take pictures."""
        from PIL import Image

        if not self.accelerator.is_main_process:
            return
        picture = np.asarray(Image.open(path).convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": picture}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"samples": list(picture)}, step=step)

    def show(self, step: int, line: str) -> None:
        """Show a line of figures: beside the bar, or where there is none now and then by itself."""
        if not self.hidden:
            self.bar.set_postfix_str(line)
            return
        now = time.perf_counter()
        if now - self.last_line < LINE_SECONDS and step != self.total_steps:
            return
        self.last_line = now
        left = (self.total_steps - step) * self.images_per_step / self.images_per_second
        self.accelerator.print(
            f"Step {step} of {self.total_steps}: {line}, {duration(left)} left", flush=True
        )

    def say(self, line: str) -> None:
        """A line for the user, above the bar."""
        if self.accelerator.is_main_process:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def spared(self, failure: str) -> Iterator[None]:
        """A full disk inside does not end the run: it is said, and training goes on."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.say(f"Warning: {failure}, training goes on ({error})")

    def warn_once(self, line: str) -> None:
        """A line for the user, the first time only."""
        if not self._warned:
            self._warned = True
            self.say(f"Warning: {line}")


def loss_by_bucket(name: str, buckets: list[float]) -> dict[str, float]:
    """Named losses of the buckets that have one: {"loss_at_t/0.0-0.1": ...}, in shares of T."""
    return {
        f"{name}/{i / BUCKETS:.1f}-{(i + 1) / BUCKETS:.1f}": loss
        for i, loss in enumerate(buckets)
        if loss == loss
    }


def duration(seconds: float) -> str:
    """90 -> 1:30, 3700 -> 1:01:40."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def save_loss_curve(metrics: Path, path: Path) -> float | None:
    """Plot the logged losses, and their running mean, over the steps; returns the last loss."""
    from matplotlib.figure import Figure

    found = read_metrics(metrics)
    rows = [row for row in found if "loss" in row]
    if not rows:  # deleted by hand
        return None
    steps, losses = np.array([[row["step"], row["loss"]] for row in rows], float).T
    width = max(1, len(losses) // 20)
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
    axes.plot(steps, losses, color="lightgrey" if width > 1 else None, label="loss")
    if width > 1:
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], mean, label=f"mean of {width} logged values")
    for name in ("train_loss", "held_out_loss"):
        points = [(row["step"], row[name]) for row in found if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name.replace("_", " "))
    axes.set(xlabel="optimiser step", ylabel="loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return float(losses[-1])
