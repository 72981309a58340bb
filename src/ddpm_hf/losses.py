"""Training objectives, one loss per image (B,), their weightings, and how timesteps are drawn.

An objective is any function with the signature of `simple_loss`; `train(config, loss_fn)` takes it
as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .functional import like, mean_flat
from .scheduler import DDPMScheduler

LossFunction = Callable[[Callable, DDPMScheduler, Tensor, Tensor, Tensor], Tensor]
"""(unet, scheduler, x_0, eps, t) -> (B,)."""


def simple_loss(
    unet: Callable, scheduler: DDPMScheduler, x_0: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    """Eq. (14): L_simple, the squared error of the prediction at a random timestep, pixel mean.

    With prediction types other than epsilon it is the same error of x_0 or v. The variance channels
    of a network that has them take no part.

    Args:
        unet: (x_t, t) -> an output with `.sample`, (B, C, H, W) or (B, 2C, H, W).
        scheduler: The process.
        x_0: Clean images, (B, C, H, W) in [-1, 1].
        eps: Standard normal noise, (B, C, H, W).
        t: Timesteps on the CPU, (B,).
    """
    x_t = scheduler.q_sample(x_0, eps, t)
    output, _ = scheduler.split_output(unet(x_t, t.to(x_t.device)).sample, x_0.shape[1])
    return mean_flat((output.float() - scheduler.target(x_0, eps, t)) ** 2)


def min_snr_weight(scheduler: DDPMScheduler, t: Tensor, gamma: float) -> Tensor:
    """Hang et al. 2023, eq. (8): min(SNR, gamma) on the error of x_0, (B,) float64.

    SNR(t) = alpha_bar / (1 - alpha_bar). An error of eps is SNR times that of x_0, an error of v is
    SNR + 1 times.
    """
    alpha_bar = scheduler.alpha_bar_at(t)
    snr = alpha_bar / (1 - alpha_bar)
    divisor = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}
    return snr.clamp(max=gamma) / divisor[scheduler.config.prediction_type]


def min_snr_loss(
    unet: Callable, scheduler: DDPMScheduler, x_0: Tensor, eps: Tensor, t: Tensor, *, gamma: float
) -> Tensor:
    """`simple_loss` weighted by `min_snr_weight`, (B,)."""
    loss = simple_loss(unet, scheduler, x_0, eps, t)
    return like(min_snr_weight(scheduler, t, gamma), loss) * loss


def uniform_timesteps(draws: Tensor, num_timesteps: int) -> Tensor:
    """Independent timesteps from uniform draws in [0, 1): (B,) -> (B,) in [0, T)."""
    return (draws * num_timesteps).long()


def stratified_timesteps(draws: Tensor, num_timesteps: int) -> Tensor:
    """One timestep in each of B equal shares of [0, T): a batch covers them evenly.

    As Kingma et al. 2021 (VDM), appendix I.1, with a draw of its own in every share.
    """
    shares = torch.arange(len(draws), dtype=draws.dtype)
    return uniform_timesteps((shares + draws) / len(draws), num_timesteps).clamp(
        max=num_timesteps - 1
    )
