"""Averages of the weights: taken during training, and of any length after it.

A profile is how much each step's weights count in an average, given as a function step -> decay:
average(step) = decay * average(step - 1) + (1 - decay) * weights(step). Steps count from 1.
`warmup_decay` is the profile of the average that a run saves. `power_decay` is that of Karras et
al. 2024, whose length grows with the run: snapshots of two such averages determine those of other
lengths, which `post_hoc` makes.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import Polynomial
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .calibration import forget
from .checkpoint import flush, shard_like, whole, write_tensors
from .config import TrainingConfig
from .errors import InputError
from .pipeline import save_whole
from .sampling import load_pipeline


def warmup_decay(
    step: int | np.ndarray,
    *,
    inv_gamma: float,
    power: float,
    min_decay: float,
    max_decay: float,
) -> float | np.ndarray:
    """Decay 1 - (1 + (step - 1) / inv_gamma) ** -power, kept within its limits.

    Limits that are equal make it constant from step 1, as in Ho et al.; without a lower limit the
    first decay is 0, and the initial weights are dropped.
    """
    rising = 1 - (1 + (step - 1) / inv_gamma) ** -power
    return np.maximum(np.minimum(rising, max_decay), min_decay)


def power_decay(step: int, *, gamma: float) -> float:
    """Section 3.1 of Karras et al. 2024: (1 - 1 / step) ** (gamma + 1).

    Step s then has the weight (s/t)^(gamma+1) - ((s-1)/t)^(gamma+1) in the average at step t: the
    integral from s - 1 to s of the density (gamma + 1) tau^gamma / t^(gamma+1).
    """
    return (1 - 1 / step) ** (gamma + 1)


def relative_length(gamma: float) -> float:
    """Section 3.1 of Karras et al. 2024: sigma_rel, the density's standard deviation over t."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of_length(sigma_rel: float) -> float:
    """The inverse of `relative_length` (Algorithm 2 of Karras et al. 2024), a cubic equation.

    Raises:
        InputError: no power profile is that long.
    """
    if not 0 < sigma_rel < 12**-0.5:  # where gamma = 0 weighs all steps equally
        raise InputError(f"length must be between 0 and 0.288; got {sigma_rel}")
    # (gamma + 2)^2 (gamma + 3) - (gamma + 1) / sigma_rel^2 = 0 has one root above 0.
    cubic = Polynomial([2, 1]) ** 2 * Polynomial([3, 1]) - Polynomial([1, 1]) / sigma_rel**2
    return float(cubic.roots().real.max())


class Average:
    """A running average of a network's parameters, taken in place.

    Its state is the average and the number of optimiser steps done, `optimization_step`. Not
    diffusers' EMAModel: that has another profile at the first step (0, whatever is asked for),
    copies all weights at each update, and cannot average over several steps at once.

    Args:
        network: Averaged are its parameters, also where FSDP2 has sharded them.
        decay_at: The profile.
        update_every: Update every so many steps, by the product of their decays: the length of the
            average stays the same.
        sigma_rel: Relative length, if the profile is a power function.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        decay_at: Callable[[int], float],
        *,
        update_every: int = 1,
        sigma_rel: float | None = None,
    ) -> None:
        self.averages = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.decay_at, self.update_every, self.sigma_rel = decay_at, update_every, sigma_rel
        self.optimization_step = 0
        # torch has no operations on lists of sharded tensors.
        self.at_once = not any(hasattr(t, "full_tensor") for t in self.averages.values())

    @property
    def averaged_steps(self) -> int:
        """The step of the last update."""
        return self.optimization_step - self.optimization_step % self.update_every

    def decay(self, step: int) -> float:
        """The decay of an update at this step, over all steps since the update before."""
        since = range(step - self.update_every + 1, step + 1)
        return math.prod(float(self.decay_at(step)) for step in since)

    def step(self, parameters: Iterable[Tensor]) -> None:
        """Count an optimiser step, and update the average if it is time to."""
        self.optimization_step += 1
        if self.optimization_step % self.update_every:
            return
        weights = [parameter.detach() for parameter in parameters]
        towards = 1 - self.decay(self.optimization_step)
        if self.at_once:
            torch._foreach_lerp_(list(self.averages.values()), weights, towards)
            return
        for average, weight in zip(self.averages.values(), weights, strict=True):
            average.lerp_(weight, towards)

    def named_tensors(self) -> dict[str, Tensor]:
        """The average by the parameters' names, whole and on the CPU.

        Every process must call it where the network is sharded.
        """
        return {name: whole(tensor).cpu() for name, tensor in self.averages.items()}

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Go on from `named_tensors` after `step` optimiser steps; on every process."""
        for name, average in self.averages.items():
            average.copy_(shard_like(tensors[name], average))
        self.optimization_step = step


def build_ema(network: torch.nn.Module, config: TrainingConfig) -> Average:
    """The average that a run saves: constant decay (Ho et al.), or warm-up."""
    return Average(network, _main_profile(config), update_every=config.ema_update_every)


def build_power_averages(network: torch.nn.Module, config: TrainingConfig) -> list[Average]:
    """The averages of --ema_profiles, to be stored as snapshots."""
    return [
        Average(
            network,
            partial(power_decay, gamma=gamma_of_length(sigma_rel)),
            update_every=config.ema_update_every,
            sigma_rel=sigma_rel,
        )
        for sigma_rel in config.ema_lengths
    ]


def _main_profile(config: TrainingConfig) -> Callable:
    return partial(
        warmup_decay,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        min_decay=config.ema_min_decay,
        max_decay=config.ema_max_decay,
    )


def share_of_initial_weights(config: TrainingConfig, total_steps: int) -> float:
    """The weight that the initial parameters have in the average at the end of a run."""
    updated = total_steps - total_steps % config.ema_update_every
    first = min(updated, 3_000_000)
    decays = _main_profile(config)(np.arange(1.0, first + 1))
    # Later decays are hardly larger than the last of these; a run may be of a billion steps.
    return float(np.prod(decays) * decays[-1] ** (updated - first)) if first else 1.0


def check_updates(config: TrainingConfig, total_steps: int) -> None:
    """Raise InputError where the averages would never be updated, and stay as they began."""
    averages = config.use_ema or config.ema_lengths
    if averages and config.ema_update_every > total_steps:
        raise InputError(
            f"ema_update_every {config.ema_update_every} is longer than the run of {total_steps} "
            "steps, whose averages would stay untrained: choose a smaller --ema_update_every"
        )


def ema_warning(config: TrainingConfig, total_steps: int) -> str | None:
    """A line if more than 1 % of the initial weights would be left in the saved average."""
    if not config.use_ema or (share := share_of_initial_weights(config, total_steps)) <= 0.01:
        return None
    enough = 0.01 ** (1 / total_steps)
    digits = 1 - math.floor(math.log10(1 - enough))
    enough = math.floor(enough * 10**digits) / 10**digits
    return (
        f"Warning: --ema_min_decay {config.ema_min_decay} keeps {100 * share:.0f} % of the initial "
        f"weights after {total_steps} steps: use at most {enough}, or 0 to warm up"
    )


# Snapshots


class Snapshot(NamedTuple):
    """A stored average: its file, the step that it was taken at, and its power profile."""

    path: Path
    step: int
    sigma_rel: float
    gamma: float


def save_snapshot(run_dir: Path, average: Average, tensors: dict[str, Tensor]) -> None:
    """Write a power average to `ema/<step>-<sigma_rel>.safetensors`, whole or not at all.

    In float32, not the paper's float16: measured on a random walk with 20 snapshots, 16 bits cost a
    relative 2e-4 to 9e-4, several times what the reconstruction itself does.

    Args:
        run_dir: Folder of the run.
        average: Its last update names the step; before the first nothing is written.
        tensors: `average.named_tensors()`, which all processes call and one writes.
    """
    if (step := average.averaged_steps) == 0:
        return
    path = run_dir / "ema" / f"{step}-{average.sigma_rel}.safetensors"
    partial_file = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    about = dict(step=step, sigma_rel=average.sigma_rel, gamma=gamma_of_length(average.sigma_rel))
    try:
        write_tensors(partial_file, tensors, {key: str(value) for key, value in about.items()})
        flush(partial_file)
        partial_file.replace(path)
    finally:
        partial_file.unlink(missing_ok=True)
    flush(path.parent)


def list_snapshots(run_dir: Path) -> list[Snapshot]:
    """The snapshots of a run, oldest first.

    Raises:
        InputError: a file among them is none.
    """
    snapshots = []
    for path in (run_dir / "ema").glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
            snapshot = Snapshot(
                path, int(about["step"]), float(about["sigma_rel"]), float(about["gamma"])
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is no snapshot of an average: delete it") from error
        snapshots.append(snapshot)
    return sorted(snapshots, key=lambda snapshot: (snapshot.step, snapshot.sigma_rel))


def drop_snapshots(run_dir: Path, after_step: int) -> None:
    """Delete the snapshots of steps that were lost with a stop and will be done again."""
    for snapshot in list_snapshots(run_dir):
        if snapshot.step > after_step:
            snapshot.path.unlink()


# Averages after training


class Fit(NamedTuple):
    """A profile as a sum of others.

    Attributes:
        coefficients: One for each of the others, (N,); their sum is 1.
        error: Root mean square of what is left of the profile, relative to the profile's own.
    """

    coefficients: np.ndarray
    error: float


def inner_product(t_a, gamma_a, t_b, gamma_b) -> np.ndarray:
    """Section 3.2 of Karras et al. 2024: the integral of the product of two power densities.

    Args:
        t_a, gamma_a: The first, density (gamma_a + 1) tau^gamma_a / t_a^(gamma_a + 1) up to t_a.
        t_b, gamma_b: The second.
    """
    shorter, longer = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (shorter / t_a) ** gamma_a * (shorter / t_b) ** gamma_b / longer


def fit_profile(times: np.ndarray, gammas: np.ndarray, *, time: float, gamma: float) -> Fit:
    """Section 3.2 of Karras et al. 2024 (Algorithm 3): least squares on stored power profiles.

    Unlike theirs the coefficients must add up to 1, so that weights which do not change are
    reproduced whatever is stored: with few snapshots the plain solution rescales a network by
    percents. The averages of a training run are exactly these integrals, of weights that are
    constant within a step (or between two updates).

    Args:
        times, gammas: Steps and exponents of what is stored, (N,).
        time, gamma: Of what is wanted.
    """
    t = times / time
    gram = inner_product(t[:, None], gammas[:, None], t, gammas)
    towards = inner_product(t, gammas, 1.0, gamma)
    norm = np.sqrt(np.diag(gram))
    # Stationary point of the Lagrange function, in coefficients of profiles with norm 1.
    system = np.block([[gram / np.outer(norm, norm), 1 / norm[:, None]], [1 / norm, np.zeros(1)]])
    solution = np.linalg.lstsq(system, np.append(towards / norm, 1.0), rcond=None)[0]
    x = solution[:-1] / norm
    own = inner_product(1.0, gamma, 1.0, gamma)
    left = own - 2 * x @ towards + x @ gram @ x
    return Fit(x, math.sqrt(max(left, 0.0) / own))


class Reconstruction(NamedTuple):
    """An average made after training.

    Attributes:
        tensors: Averaged parameters by name, float32 on the CPU.
        step: The step that it ends at.
        num_snapshots: How many it was made from.
        error: How well its profile is met, see `Fit`.
    """

    tensors: dict[str, Tensor]
    step: int
    num_snapshots: int
    error: float


def reconstruct(run_dir: str | Path, length: float, step: int | None = None) -> Reconstruction:
    """The average of any relative length, from the snapshots of a run (Karras et al. 2024).

    Args:
        run_dir: Folder of the run.
        length: sigma_rel, the standard deviation of the profile relative to `step`.
        step: Stored step that it ends at; the last when not given.

    Raises:
        InputError: a length out of range, no such folder, too few snapshots, or none at that step.
    """
    gamma = gamma_of_length(length)
    snapshots = _usable_snapshots(Path(run_dir), step)
    step = snapshots[-1].step
    times, gammas = np.array([(s.step, s.gamma) for s in snapshots]).T
    fit = fit_profile(times, gammas, time=step, gamma=gamma)
    sums: dict[str, Tensor] = {}
    for snapshot, coefficient in zip(snapshots, fit.coefficients, strict=True):
        for name, tensor in load_file(snapshot.path).items():
            total = sums.setdefault(name, torch.zeros_like(tensor, dtype=torch.float64))
            total.add_(tensor, alpha=float(coefficient))
    tensors = {name: total.float() for name, total in sums.items()}
    return Reconstruction(tensors, step, len(snapshots), fit.error)


def _usable_snapshots(run_dir: Path, step: int | None) -> list[Snapshot]:
    """The snapshots up to `step`; InputError if they are not enough."""
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is no folder: name the folder of a run")
    snapshots = list_snapshots(run_dir)
    if not snapshots:
        raise InputError(f"{run_dir} holds no snapshots: train with --ema_profiles 0.05,0.10")
    steps = sorted({snapshot.step for snapshot in snapshots})
    if step is not None and step not in steps:
        nearest = min(steps, key=lambda stored: abs(stored - step))
        raise InputError(
            f"step must be one of the {len(steps)} stored ones, the last is {steps[-1]} and the "
            f"nearest {nearest}; got {step}"
        )
    used = [snapshot for snapshot in snapshots if step is None or snapshot.step <= step]
    if len({snapshot.sigma_rel for snapshot in used}) < 2:
        raise InputError(
            f"the snapshots in {run_dir} have one length, {used[0].sigma_rel}, and two are needed: "
            "train with --ema_profiles 0.05,0.10"
        )
    if used[0].step == used[-1].step:
        raise InputError(
            f"only step {used[0].step} is stored up to there, and two steps are needed: name a "
            "later --step, or train with fewer --ema_snapshot_steps"
        )
    return used


def post_hoc(
    run: str | Path, length: float, output: str | Path, step: int | None = None
) -> Reconstruction:
    """Write the pipeline of a run with weights averaged over another length.

    Args:
        run: Folder of a run trained with --ema_profiles.
        length: Relative length (sigma_rel) of the average, below 0.288.
        output: Folder of the new pipeline.
        step: Stored step that the average ends at; the last when not given.

    Raises:
        InputError: the output exists or cannot be written, the run holds no pipeline, or as
            `reconstruct`.
    """
    output = Path(output)
    if output.exists():
        raise InputError(f"{output} exists already: name another folder")
    made = reconstruct(run, length, step)
    pipe = load_pipeline(str(run))
    pipe.unet.load_state_dict(pipe.unet.state_dict() | made.tensors)
    forget(pipe.scheduler)
    save_whole(pipe, output)
    return made
