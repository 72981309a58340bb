"""DDIM of second order: every step with a better x_0_hat, from the predictions around it.

DDIM takes x_0_hat(x_t) for the whole way from t to s, along which the prediction changes. What it
is in the mean can be told before the step from the earlier prediction (DPM-Solver++ 2M, Lu et al.
2022), and after it from the next one, which the network has to make anyhow: the step is then taken
once more, corrected (UniPC, Zhao et al. 2023, of order 2 with B_2). No network evaluation is added.

Here a step may also add noise, of the variance that is optimal for DDIM (Bao et al. 2022); a
corrected step keeps the noise that it drew. That variance makes up for what one prediction does not
tell. Two tell more, so that of an exact network it is too much: Gaussian data come out with up to
1.3 times their variance in 10 steps. Trained networks looked better with it in 5 and 10 steps, and
worse from 25 on (docs/log.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .functional import like
from .scheduler import DDPMScheduler


class Visit(NamedTuple):
    """A step done: from where, what was predicted there, and what noise it added."""

    t: int
    x_t: Tensor
    x_0_hat: Tensor
    noise: Tensor | float


class SecondOrder:
    """The steps of one chain, which remember the last two.

    Args:
        scheduler: The process, with the chain set by `set_timesteps`.
        analytic: Add noise of the calibrated variance.
    """

    def __init__(self, scheduler: DDPMScheduler, *, analytic: bool = False) -> None:
        self.scheduler, self.analytic = scheduler, analytic
        self.visits: list[Visit] = []

    def step(
        self,
        output: Tensor,
        x_t: Tensor,
        t: int | Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x_s and x_0_hat, (B, C, H, W); arguments as in `DDPMScheduler.reverse_step`."""
        scheduler, t = self.scheduler, int(t)
        s = scheduler.previous_timestep(t)
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        # Not clipped, as in diffusers' solvers: the path is smooth, which a line through two
        # predictions asks for.
        x_0_hat = scheduler.predict_x_0(output, x_t, t, clip=False)
        if self.visits:
            x_t = self._corrected(x_0_hat, x_t, t)
        x_s = scheduler.ddim_mean(self._predicted(x_0_hat, t, s), x_t, t, s)
        noise = 0.0
        if self.analytic and s >= 0:
            eps = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
            noise = like(scheduler.analytic_variance(t, s, eta=0).sqrt(), x_t) * eps
        self.visits = [*self.visits[-1:], Visit(t, x_t, x_0_hat, noise)]
        return x_s + noise, x_0_hat

    def _predicted(self, x_0_hat: Tensor, t: int, s: int) -> Tensor:
        """Lu et al. 2022 (DPM-Solver++), algorithm 2: x_0_hat in the mean from t to s."""
        if not self.visits or s < 0:
            return x_0_hat
        before = self.visits[-1]
        ratio = (self._lambda(s) - self._lambda(t)) / (self._lambda(t) - self._lambda(before.t))
        return x_0_hat + like(ratio / 2, x_0_hat) * (x_0_hat - before.x_0_hat)

    def _corrected(self, x_0_hat: Tensor, x_t: Tensor, t: int) -> Tensor:
        """Zhao et al. 2023 (UniPC), algorithm 1: the step that led to x_t, with x_0_hat(x_t) known.

        Args:
            x_0_hat: The prediction at x_t, (B, C, H, W).
            x_t, t: Where the last step led to.
        """
        *earlier, last = self.visits
        h = self._lambda(t) - self._lambda(last.t)
        if not bool(h.isfinite()):  # from pure noise: there is nothing to correct it by
            return x_t
        change = x_0_hat - last.x_0_hat
        if not earlier:
            guess = last.x_0_hat + change / 2
        else:
            r = (self._lambda(earlier[0].t) - self._lambda(last.t)) / h
            # The moments of exp(-h u) that polynomials of degree 1 and 2 are to meet, over B_2(h).
            b_h = torch.expm1(-h)
            first = (b_h / -h - 1) / b_h
            second = 2 * ((b_h / -h - 1) / -h - 0.5) / b_h
            weight = (first - second) / (1 - r)
            slope = (earlier[0].x_0_hat - last.x_0_hat) * like(weight / r, x_t)
            guess = last.x_0_hat + slope + like(first - weight, x_t) * change
        return self.scheduler.ddim_mean(guess, last.x_t, last.t, t) + last.noise

    def _lambda(self, t: int) -> Tensor:
        """Half the logarithm of the signal-to-noise ratio, () float64."""
        alpha_bar = self.scheduler.alpha_bar_at(t)
        return (alpha_bar / (1 - alpha_bar)).log() / 2
