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
    moved,
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
    return x_t, unet(x_t, moved(t, x_t.device)).sample.float()


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


def drop_classes(labels: Tensor, draws: Tensor, null_class: int, probability: float) -> Tensor:
    """Ho & Salimans 2022, algorithm 1, line 3: hide some classes behind the null class, (B,).

    Args:
        labels: Classes, (B,) integers.
        draws: Uniform in [0, 1), (B,), on the same device.
        null_class: The network's last class.
        probability: How often a class is hidden.
    """
    return torch.where(draws < probability, null_class, labels)


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


class LossSecondMoment:
    """Timesteps where the loss is large, Nichol & Dhariwal 2021, section 3.3, for a noisy bound.

    Eq. (18): p_t is proportional to sqrt(E[L_t**2]) over the last 10 losses of timestep t, and
    uniform until every timestep has 10. As in their code 0.1 % of the draws stay uniform, so that
    no timestep is forgotten.

    Unlike the other samplers it depends on the losses so far: `state_dict` belongs into a
    checkpoint, and every process has to see the losses of the whole batch, in one order.
    """

    HISTORY = 10
    UNIFORM = 0.001

    def __init__(self, num_timesteps: int) -> None:
        self.history = torch.zeros(num_timesteps, self.HISTORY, dtype=torch.float64)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    @property
    def probabilities(self) -> Tensor:
        """p_t, (T,) float64 on the CPU."""
        num_timesteps = len(self.counts)
        root_mean_square = self.history.square().mean(1).sqrt()
        if bool((self.counts < self.HISTORY).any()) or not bool(root_mean_square.any()):
            return torch.full_like(root_mean_square, 1 / num_timesteps)
        p = root_mean_square / root_mean_square.sum()
        return (1 - self.UNIFORM) * p + self.UNIFORM / num_timesteps

    def sample(self, draws: Tensor) -> Tensor:
        """Independent timesteps from uniform draws in [0, 1): (B,) -> (B,)."""
        t = torch.searchsorted(self.probabilities.cumsum(0), draws.double(), right=True)
        return t.clamp(max=len(self.counts) - 1)  # the sum may round to less than 1

    def weight(self, t: Tensor) -> Tensor:
        """1 / (T p_t), (B,) float64: losses times this have the mean of uniform timesteps.

        Before the `update` with those losses, which changes p.
        """
        return 1 / (len(self.counts) * self.probabilities[t])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses, without `weight`, of the timesteps of a whole batch, both (B,)."""
        history, counts = self.history.numpy(), self.counts.numpy()  # views, quick to index
        for timestep, loss in zip(t.tolist(), losses.tolist(), strict=True):
            history[timestep, counts[timestep] % self.HISTORY] = loss
            counts[timestep] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """`history` (T, 10) and `counts` (T,)."""
        return {"history": self.history, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`, of equally many timesteps."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
