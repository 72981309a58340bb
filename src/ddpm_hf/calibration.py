"""Optimal variances and timesteps for a trained network (Bao et al. 2022, "Analytic-DPM").

What they need of it is one number a timestep, how far x_0 is from x_0_hat, which a pass over a few
thousand images estimates. Bao et al. derive it from E|eps_hat|**2, as for an exact network. Another
one has an error of its own, and the bound is least with that error (Bao et al. 2022b, "Estimating
the optimal covariance with imperfect mean"). Both are measured and stored with the scheduler, under
`_ddpm_hf`, and any sub-chain then samples with the variance that the bound is least with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from .errors import InputError, check_whole
from .likelihood import BoundSums
from .scheduler import FORMAT, DDPMScheduler

OF_OTHERS = {"null_class": False}
"""What holds of a network that was trained without this package."""

CLIP_PIXELS = {"linear": 2.0}
"""Most noise, in grey levels, of the last step that adds some; 1 for schedules other than these, as
in the paper's experiments.
"""


class Estimate(NamedTuple):
    """A mean at every timestep and its standard error, (T,) float64."""

    value: Tensor
    standard_error: Tensor


def estimate_x_0_variance(sums: BoundSums) -> Estimate:
    """E|x_0 - x_0_hat|**2 / D of every timestep, with x_0_hat clipped as in sampling, (T,).

    For an exact network it is `DDPMScheduler.x_0_variance` of E|eps_hat|**2 / D. Each is the mean
    over its neighbours too: it is smooth in t, and among T noisy numbers the optimal timesteps
    would be those that came out low by chance.
    """
    visits, total, square = (_near(sums.timesteps[row]) for row in (0, 2, 9))
    mean = total / visits
    variance = (square / visits - mean**2).clamp(min=0) * visits / (visits - 1)
    return Estimate(mean.clamp(max=1), (variance / visits).sqrt())


def estimate_mean_square_eps(sums: BoundSums) -> Estimate:
    """Bao et al. 2022, section 3, Gamma: the mean of |eps_hat|**2 / D over images and noise.

    Their estimate is the plain mean. |eps|**2 / D of the noise that was added goes along with it
    and its mean is known to be 1, so that what a regression on it explains is taken out (a control
    variate): at large t nearly all of the error. Neighbours lend each other that slope, which is
    smooth in t, and which is not to follow the few visits of one timestep.

    Args:
        sums: Of a pass over images, see likelihood; every timestep visited at least twice.

    Raises:
        InputError: a timestep was visited less than twice.
    """
    visits, (eps, noise, eps_eps, noise_noise, eps_noise) = sums.timesteps[0], sums.timesteps[4:9]
    if bool((visits < 2).any()):
        raise InputError(
            f"every timestep needs two images or more; timestep {int(visits.argmin())} has "
            f"{int(visits.min())}: use more images, or more timesteps of each"
        )
    mean, mean_noise = eps / visits, noise / visits
    covariance = _near(eps_noise - eps * mean_noise)
    slope = covariance / _near(noise_noise - noise * mean_noise).clamp(min=1e-30)
    squares = eps_eps - 2 * slope * eps_noise + slope**2 * noise_noise
    residual = mean - slope * mean_noise
    variance = (squares / visits - residual**2).clamp(min=0) * visits / (visits - 1)
    return Estimate(mean - slope * (mean_noise - 1), (variance / visits).sqrt())


def _near(row: Tensor) -> Tensor:
    """Sums over the timesteps near each, (T,): to either side a tenth of how far either
    end of [0, T) is, 1 % of T at most.

    Where things change fast, at small t, that is none.
    """
    total = torch.cat([row.new_zeros(1), row.cumsum(0)])
    t = torch.arange(len(row))
    width = (torch.minimum(t, len(row) - 1 - t) // 10).clamp(max=len(row) // 100)
    return total[t + width + 1] - total[t - width]


def step_costs(scheduler: DDPMScheduler, x_0_variance: Tensor) -> Tensor:
    """Bao et al. 2022, section 4: what the step t -> s costs of the bound, (s, t) of (T, T).

    With the optimal variance the bound of a sub-chain is a constant and, per dimension, half the
    sum of log(optimal variance / beta-tilde) over its steps, in nats. Infinite unless s < t.
    """
    num_timesteps = len(scheduler.beta)
    s, t = torch.triu_indices(num_timesteps, num_timesteps, offset=1)
    costs = torch.full((num_timesteps, num_timesteps), torch.inf, dtype=torch.float64)
    optimal = scheduler.optimal_variance(t, s, x_0_variance)
    costs[s, t] = (optimal.log() - scheduler.posterior_log_variance(t, s)) / 2
    return costs


def optimal_timesteps(costs: Tensor, steps: Sequence[int]) -> dict[int, list[int]]:
    """Bao et al. 2022, section 4: the sub-chains from T - 1 down to 0 of least cost, O(T**2 K).

    Dynamic programming on `least[t]`, the cost of the best sub-chain of so many timesteps from t
    down to 0.

    Args:
        costs: Of `step_costs`, (T, T).
        steps: How many timesteps, each between 2 and T.

    Returns:
        The timesteps, descending, by their number.

    Raises:
        InputError: a number out of range.
    """
    num_timesteps = len(costs)
    check_steps(steps, num_timesteps)
    least = torch.full((num_timesteps,), torch.inf, dtype=torch.float64)
    least[0] = 0
    came_from, found = [], {}
    for count in range(2, max(steps, default=0) + 1):
        least, before = (least[:, None] + costs).min(0)
        came_from.append(before)
        if count in steps:
            chain = [num_timesteps - 1]
            for before in reversed(came_from):
                chain.append(int(before[chain[-1]]))
            found[count] = chain
    return found


def check_steps(steps: Sequence[int], num_timesteps: int) -> None:
    """Raise InputError for a number of steps that no sub-chain from T - 1 down to 0 has."""
    if not isinstance(steps, Iterable):
        raise InputError(f"steps must be a list of numbers, for example [10, 25]; got {steps!r}")
    for count in steps:
        check_whole("steps", count, 2, num_timesteps)


def forget(scheduler: SchedulerMixin) -> bool:
    """Take the statistics out of any scheduler's configuration: old ones, or of other weights.

    Returns:
        Whether there were any.
    """
    extras = dict(scheduler.config.get("_ddpm_hf", {}))
    if extras.pop("analytic", None) is None:
        return False
    scheduler.register_to_config(_ddpm_hf=extras)
    return True


def store(
    scheduler: DDPMScheduler,
    estimate: Estimate,
    *,
    x_0_variance: Estimate | None = None,
    steps: Sequence[int] = (),
    **about: str | int,
) -> None:
    """Put the statistics, and optimal timesteps, into the scheduler's configuration.

    `save_pretrained` then writes them, plain diffusers carries them along unread, and
    `pipe(num_inference_steps=K)` samples with them for any K < T.

    Args:
        scheduler: Of the network that was measured.
        estimate: E|eps_hat|**2 / D, and its standard error.
        x_0_variance: Of x_0 around x_0_hat; what an exact network would have when not given.
        steps: The K whose optimal timesteps are stored; other K are spaced as configured.
        about: On what it was measured, stored beside.

    Raises:
        InputError: statistics that are not of this scheduler's T timesteps, or not finite; a K out
            of range.
    """
    value, standard_error = estimate
    for column in (value, value if x_0_variance is None else x_0_variance.value):
        if len(column) != len(scheduler.beta) or not bool(column.isfinite().all()):
            raise InputError(
                f"the statistics must be {len(scheduler.beta)} finite numbers, one a timestep; got "
                f"{len(column)}, {int(column.isfinite().sum())} of them finite"
            )
    around = scheduler.x_0_variance(value) if x_0_variance is None else x_0_variance.value
    chains = optimal_timesteps(step_costs(scheduler, around), steps) if steps else {}
    schedule = scheduler.config.beta_schedule if scheduler.config.trained_betas is None else ""
    analytic = {
        "mean_square_eps": value.tolist(),
        "standard_error": _short(standard_error),
        "alpha_bar_sum": scheduler.alpha_bar.sum().item(),
        "clip_pixels": CLIP_PIXELS.get(schedule, 1.0),
        "timesteps": {str(count): chain for count, chain in chains.items()},
        **about,
    }
    if x_0_variance is not None:
        analytic["x_0_variance"] = around.tolist()
        analytic["x_0_variance_error"] = _short(x_0_variance.standard_error)
    extras = {"format": FORMAT, **(scheduler.extras or OF_OTHERS), "analytic": analytic}
    scheduler.register_to_config(_ddpm_hf=extras)


def _short(errors: Tensor) -> list[float]:
    """Standard errors, to three digits."""
    return [float(f"{error:.2e}") for error in errors.tolist()]
