"""The way back from an image: to the noise that DDIM makes it from, and to how noisy it is."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import InputError
from .functional import like
from .scheduler import DDPMScheduler

NUM_CANDIDATES = 24
"""Noise levels that are tried at once, twice: the second time between two of the first."""


def invert_ddim(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: DDPMScheduler,
    x_0: Tensor,
    timesteps: Sequence[int],
    *,
    iterations: int,
) -> Tensor:
    """Song et al. 2021 (DDIM), eq. (13) solved for x_t: the noise that decodes to these images.

    A step x_t -> x_s is undone by x_t = scaled x_s + coefficient * eps_hat(x_t), which is iterated
    from eps_hat(x_s): the plain inversion is one iteration. Nothing is clipped, which could not be
    undone.

    Args:
        predict: (x_t, t) -> the network's prediction without variance channels, (B, C, H, W); t is
            () or (B,), on the CPU.
        scheduler: The process.
        x_0: Clean images, (B, C, H, W) in [-1, 1].
        timesteps: The sub-chain, descending.
        iterations: Evaluations of the network a step.

    Returns:
        x_T, close to standard normal, (B, C, H, W).
    """
    x_s, s = x_0, -1
    for t in reversed(timesteps):
        alpha_bar_t, alpha_bar_s = scheduler.alpha_bar_at(t), scheduler.alpha_bar_at(s)
        ratio = (alpha_bar_t / alpha_bar_s).sqrt()
        coef_eps = (1 - alpha_bar_t).sqrt() - ratio * (1 - alpha_bar_s).sqrt()
        x_t = x_s
        for _ in range(iterations):
            eps_hat = scheduler.to_eps(
                scheduler.to_x_0(predict(x_t, torch.tensor(t)), x_t, t), x_t, t
            )
            x_t = like(ratio, x_s) * x_s + like(coef_eps, x_s) * eps_hat
        x_s, s = x_t, t
    return x_s


def noise_of_timestep(scheduler: DDPMScheduler, t: int) -> float:
    """Standard deviation of the noise in x_t / sqrt(alpha_bar_t), in grey levels of 255."""
    return 127.5 * float((1 / scheduler.alpha_bar_at(t) - 1).sqrt())


def timestep_of_noise(scheduler: DDPMScheduler, noise_level: float) -> int:
    """The timestep with the nearest `noise_of_timestep`.

    Raises:
        InputError: there is none, or more noise than at any.
    """
    finite = scheduler.alpha_bar[1:][scheduler.alpha_bar[1:] > 0]
    levels = 127.5 * (1 / finite - 1).sqrt()
    if not 0 < noise_level <= levels[-1]:
        raise InputError(
            f"noise_level must be above 0 and at most {levels[-1].item():.0f} grey levels, the "
            f"largest that the network knows; got {noise_level}"
        )
    return int((levels - noise_level).abs().argmin())


def estimate_timestep(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: DDPMScheduler, image: Tensor
) -> int:
    """The timestep whose noise is that of an image: where the network sees as much as it should.

    Noise taken for too little looks larger than E|eps_hat|**2, and for too much smaller. Without
    `ddpm-hf calibrate` that is taken to be 1, which finds somewhat too little noise.

    Args:
        predict: As in `invert_ddim`.
        scheduler: The process.
        image: A noisy image, (1, C, H, W), clean in [-1, 1].
    """
    stored = scheduler.analytic
    expected = torch.ones(len(scheduler.beta), dtype=torch.float64)
    if stored is not None:
        expected = torch.tensor(stored["mean_square_eps"], dtype=torch.float64)
    low, high = 0, int((scheduler.alpha_bar[1:] > 0).sum()) - 1
    for _ in range(2):
        t = torch.linspace(low, high, NUM_CANDIDATES).round().long().unique()
        x_t = like(scheduler.alpha_bar_at(t).sqrt(), image) * image
        eps_hat = scheduler.to_eps(scheduler.to_x_0(predict(x_t, t), x_t, t), x_t, t)
        seen = (eps_hat**2).flatten(1).mean(1).cpu() / expected[t]
        noisier = (seen > 1).nonzero().flatten()
        last = int(noisier[-1]) if len(noisier) else 0
        low, high = int(t[last]), int(t[min(last + 1, len(t) - 1)])
    return low
