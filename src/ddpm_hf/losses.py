"""Training objectives, one loss per image (B,), their weightings, and how timesteps are drawn.

An objective is any function with the signature of `simple_loss`; `train(config, loss_fn)` takes it
as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .functional import (
    bits_per_dim,
    discretised_gaussian_log_likelihood,
    like,
    mean_flat,
    normal_kl,
)
from .scheduler import DDPMScheduler

LossFunction = Callable[[Callable, DDPMScheduler, Tensor, Tensor, Tensor], Tensor]
"""(unet, scheduler, x_0, eps, t) -> (B,)."""


def noise_and_predict(
    unet: Callable, scheduler: DDPMScheduler, x_0: Tensor, eps: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """x_t of eq. (4), and the network's output for it, both float32; arguments of `simple_loss`."""
    x_t = scheduler.q_sample(x_0, eps, t)
    return x_t, unet(x_t, t.to(x_t.device)).sample.float()


def squared_error(
    scheduler: DDPMScheduler, output: Tensor, x_0: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    """Mean over the pixels of (output - target)**2, variance channels left out, (B,)."""
    prediction, _ = scheduler.split_output(output, x_0.shape[1])
    return mean_flat((prediction - scheduler.target(x_0, eps, t)) ** 2)


def simple_loss(
    unet: Callable, scheduler: DDPMScheduler, x_0: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    """Eq. (14): L_simple, the squared error of the prediction at a random timestep, pixel mean.

    With prediction types other than epsilon it is the same error of x_0 or v. The variance channels
    of a network that has them take no part.

    Args:
        unet: (x_t, t) -> an output with `.sample`, (B, C, H, W) or (B, 2C, H, W). For a
            class-conditional network, functools.partial(unet, class_labels=labels).
        scheduler: The process.
        x_0: Clean images, (B, C, H, W) in [-1, 1].
        eps: Standard normal noise, (B, C, H, W).
        t: Timesteps on the CPU, (B,).
    """
    _, output = noise_and_predict(unet, scheduler, x_0, eps, t)
    return squared_error(scheduler, output, x_0, eps, t)


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


def vlb_term(
    scheduler: DDPMScheduler,
    output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    clip: bool = True,
) -> Tensor:
    """Eq. (5): one term of the bound, L_{t-1}, or L_0 where t = 0; nats of the whole image, (B,).

    L_{t-1} is the divergence of the reverse step from the posterior that it is to match, L_0 the
    negative log-likelihood of the pixels under the last step, eq. (13).

    Args:
        scheduler: The process, with any variance type.
        output: The network's answer to x_t, (B, C, H, W), or (B, 2C, H, W) with a learned variance.
        x_0: Clean images, (B, C, H, W), on the 256 levels in [-1, 1].
        x_t: Noised images, (B, C, H, W).
        t: Timesteps on the CPU, (B,).
        clip: Clip the predicted image as the scheduler does in sampling; training does not, since
            there is no gradient outside the range.
    """
    q = scheduler.q_posterior(x_0, x_t, t, t - 1)
    p = scheduler.p_step(output, x_t, t, t - 1, clip=clip).distribution
    posterior_kl = normal_kl(q, p).flatten(1).sum(1)
    decoder_nll = -discretised_gaussian_log_likelihood(x_0, p).flatten(1).sum(1)
    return torch.where((t == 0).to(x_0.device), decoder_nll, posterior_kl)


def vlb_loss(
    unet: Callable, scheduler: DDPMScheduler, x_0: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    """Eq. (5): `vlb_term` in bits/dim, unclipped, (B,); its mean over all t is 1 / T of the bound.

    The bound without its constant L_T. Arguments: those of `simple_loss`.
    """
    x_t, output = noise_and_predict(unet, scheduler, x_0, eps, t)
    return bits_per_dim(vlb_term(scheduler, output, x_0, x_t, t, clip=False), x_0)


def hybrid_loss(
    unet: Callable,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    eps: Tensor,
    t: Tensor,
    *,
    gamma: float | None = None,
) -> Tensor:
    """Nichol & Dhariwal 2021, eq. (16): L_simple + 0.001 L_vlb for a learned variance, (B,).

    The bound, T times its term at a random timestep, trains the variance alone: it takes the
    prediction as a constant (section 3.1). Arguments: those of `simple_loss`, and

    Args:
        gamma: Weight L_simple, and not the bound, by `min_snr_weight`.

    Raises:
        ValueError: a fixed variance, which leaves the bound nothing to train.
    """
    x_t, output = noise_and_predict(unet, scheduler, x_0, eps, t)
    error = squared_error(scheduler, output, x_0, eps, t)
    if gamma is not None:
        error = like(min_snr_weight(scheduler, t, gamma), error) * error
    prediction, variance = scheduler.split_output(output, x_0.shape[1])
    if variance is None:
        raise ValueError(
            "hybrid_loss trains a learned variance: use variance_type='learned_range'; got "
            f"{scheduler.config.variance_type!r}"
        )
    frozen = torch.cat([prediction.detach(), variance], 1)
    term = bits_per_dim(vlb_term(scheduler, frozen, x_0, x_t, t, clip=False), x_0)
    return error + 0.001 * scheduler.config.num_train_timesteps * term


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
