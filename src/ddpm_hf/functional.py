"""Pure tensor maths: Gaussians, beta schedules, and where a coefficient meets an image.

Schedules are float64 on the CPU. A coefficient is finished in float64 and then cast, moved and
reshaped by `like`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Cast, move and reshape a per-image coefficient so that it multiplies images.

    Args:
        coefficient: (B,), or () for the whole batch, or (B, C, H, W); finished, on any device.
        x: (B, ...). Half-precision x gets float32 coefficients: a noise level is never rounded to
            bfloat16.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if coefficient.ndim < x.ndim:
        coefficient = coefficient.reshape(-1, *[1] * (x.ndim - 1))
    return moved(coefficient.to(dtype), x.device)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for a CUDA GPU.

    The way back would hand out numbers before they are there, and MPS reads memory that is freed by
    then (pytorch#189690).
    """
    return x.to(device, non_blocking=device.type == "cuda")


def mean_flat(x: Tensor) -> Tensor:
    """Mean over everything but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def mix_seed(*numbers: int) -> int:
    """One 64-bit seed from several numbers >= 0, each of which changes it beyond recognition.

    The length takes part: to SeedSequence alone a trailing 0 is nothing.
    """
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0])


class Gaussian(NamedTuple):
    """A diagonal Gaussian over images. `log_variance` broadcasts against `mean` (B, C, H, W)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """mean + standard deviation * eps, for eps ~ N(0, I) of the mean's shape."""
        return self.mean + (0.5 * self.log_variance).exp() * eps


def normal_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) of two diagonal Gaussians, per element in nats, (B, C, H, W); never below 0."""
    ratio = p.log_variance - q.log_variance
    # Near 0 expm1 keeps the digits that exp(ratio) - 1 loses.
    return 0.5 * (ratio.expm1() - ratio + (p.mean - q.mean) ** 2 * (-q.log_variance).exp())


def standard_normal_cdf(x: Tensor) -> Tensor:
    """Phi(x) by Page's 1977 tanh approximation, within 2e-4, as in Ho et al.'s code.

    Published bits/dim are computed with it: the exact Phi would change L_0 by some 1e-4 bits/dim.
    """
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def discretised_gaussian_log_likelihood(x_0: Tensor, p: Gaussian) -> Tensor:
    """Eq. (13): log of the mass that p gives to each pixel's bin, in nats, (B, C, H, W).

    A bin is 1 / 255 to either side of its level; those of -1 and 1 are open outwards. As in Ho et
    al.'s code a mass is at least 1e-12, and the gradient is 0 below.

    Args:
        x_0: Images on the 256 levels in [-1, 1], (B, C, H, W).
        p: A Gaussian over such images.
    """
    precision = (-0.5 * p.log_variance).exp()
    below_upper_edge = standard_normal_cdf((x_0 - p.mean + 1 / 255) * precision)
    below_lower_edge = standard_normal_cdf((x_0 - p.mean - 1 / 255) * precision)
    # Half a bin from the ends: a rounded -1 or 1 is still the outermost level.
    upper = torch.where(x_0 > 1 - 1 / 255, 1.0, below_upper_edge)
    lower = torch.where(x_0 < -1 + 1 / 255, 0.0, below_lower_edge)
    return (upper - lower).clamp(min=1e-12).log()


def bits_per_dim(nats: Tensor, x: Tensor) -> Tensor:
    """Nats of whole images, (B,), as bits per number in an image of x, (B, ...)."""
    return nats / (x[0].numel() * math.log(2))


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Ho et al. 2020, section 4: beta_1 = 1e-4 to beta_T = 0.02, made for T = 1000."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def scaled_linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Linear in sqrt(beta): Rombach et al. 2022 (latent diffusion)."""
    return linear_betas(num_timesteps, beta_start**0.5, beta_end**0.5) ** 2


def sigmoid_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """A sigmoid from beta_start to beta_end: Xu et al. 2022 (GeoDiff), diffusers' `sigmoid`."""
    ramp = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64).sigmoid()
    return ramp * (beta_end - beta_start) + beta_start


def betas_from_alpha_bar(alpha_bar: Callable[[float], float], num_timesteps: int) -> Tensor:
    """The betas whose cumulative product follows alpha_bar(u), u in [0, 1], each at most 0.999."""
    grid = [alpha_bar(i / num_timesteps) for i in range(num_timesteps + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in zip(grid, grid[1:], strict=False)]
    return torch.tensor(betas, dtype=torch.float64)


def cosine_betas(num_timesteps: int) -> Tensor:
    """Nichol & Dhariwal 2021, eq. (17), with s = 0.008."""
    return betas_from_alpha_bar(
        lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, num_timesteps
    )


def laplace_betas(num_timesteps: int) -> Tensor:
    """Hang et al. 2024, as diffusers' word `laplace` means it (the square root is theirs)."""

    def alpha_bar(u: float) -> float:
        log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
        return math.sqrt(1 / (1 + math.exp(-log_snr)))

    return betas_from_alpha_bar(alpha_bar, num_timesteps)


def make_betas(
    schedule: str, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    """Betas of a named schedule, (T,) float64.

    Args:
        schedule: linear, scaled_linear, squaredcos_cap_v2 (diffusers' word for cosine), cosine,
            sigmoid or laplace.
        num_timesteps: T.
        beta_start, beta_end: First and last beta; without effect on cosine and laplace.

    Raises:
        ValueError: unknown schedule.
    """
    match schedule:
        case "linear":
            return linear_betas(num_timesteps, beta_start, beta_end)
        case "scaled_linear":
            return scaled_linear_betas(num_timesteps, beta_start, beta_end)
        case "squaredcos_cap_v2" | "cosine":
            return cosine_betas(num_timesteps)
        case "sigmoid":
            return sigmoid_betas(num_timesteps, beta_start, beta_end)
        case "laplace":
            return laplace_betas(num_timesteps)
    raise ValueError(
        f"beta_schedule must be linear, scaled_linear, cosine, sigmoid or laplace; got {schedule!r}"
    )
