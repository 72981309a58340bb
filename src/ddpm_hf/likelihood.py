"""The variational bound on images, term by term and in bits per dimension (Ho et al. 2020, eq. 5).

One pass, `vlb_terms`, serves all that reads the bound: the likelihood, the rate-distortion curve
(Fig. 5) and the calibration of variances and timesteps. Of a set of images it leaves sums,
`BoundSums`, which add up over batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import InputError, check_whole
from .functional import Gaussian, like, mean_flat, mix_seed, normal_kl
from .functional import bits_per_dim as to_bits_per_dim
from .losses import noise_and_predict, vlb_term
from .scheduler import DDPMScheduler

NOISE_STREAM, TIMESTEP_STREAM = 1, 2
"""Random streams of one seed, kept apart."""

GOLDEN = (5**0.5 - 1) / 2

NoiseFunction = Callable[[Tensor], Tensor]
"""Timesteps (B,) -> standard normal noise for each image, (B, C, H, W)."""


class Term(NamedTuple):
    """One term of the bound on a batch of images, and what its prediction was.

    Attributes:
        t: Timesteps, (B,).
        nats: L_{t-1} of eq. (5), or L_0 where t = 0, of whole images, (B,).
        x_0_mse, eps_mse: Mean squared errors of the clipped prediction, and of the noise that it
            stands for, (B,).
        eps_square: |eps_hat|**2 / D of the prediction as it came, (B,): see calibration.
        noise_square: |eps|**2 / D of the noise, (B,).
        x_0_hat: The clipped prediction, (B, C, H, W).
    """

    t: Tensor
    nats: Tensor
    x_0_mse: Tensor
    eps_mse: Tensor
    eps_square: Tensor
    noise_square: Tensor
    x_0_hat: Tensor


@torch.no_grad()
def vlb_terms(
    network: Callable,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    timesteps: Iterable[Tensor],
    noise: NoiseFunction,
) -> Iterator[Term]:
    """Eq. (5): `losses.vlb_term` at one timestep after another, clipped as in sampling.

    Args:
        network: (x_t, t) -> an output with `.sample`, as in `losses.simple_loss`.
        scheduler: The process, with any variance type.
        x_0: Clean images, (B, C, H, W), on the 256 levels in [-1, 1].
        timesteps: For each term the timesteps of the images, (B,), on the CPU.
        noise: Their noise.
    """
    for t in timesteps:
        eps = noise(t).to(x_0.device)
        x_t, output = noise_and_predict(network, scheduler, x_0, eps, t)
        x_0_hat = scheduler.predict_x_0(output, x_t, t, clip=False)
        clipped = scheduler.clip_x_0(x_0_hat)
        yield Term(
            t,
            vlb_term(scheduler, output, x_0, x_t, t),
            x_0_mse=mean_flat((clipped - x_0) ** 2),
            eps_mse=mean_flat((scheduler.to_eps(clipped, x_t, t) - eps) ** 2),
            eps_square=mean_flat(scheduler.to_eps(x_0_hat, x_t, t) ** 2),
            noise_square=mean_flat(eps**2),
            x_0_hat=clipped,
        )


def prior_kl(scheduler: DDPMScheduler, x_0: Tensor) -> Tensor:
    """Eq. (5): L_T = KL(q(x_T | x_0) || N(0, I)), in nats of whole images, (B,).

    x_0: Clean images, (B, C, H, W) in [-1, 1].
    """
    alpha_bar = scheduler.alpha_bar[-1]
    q = Gaussian(like(alpha_bar.sqrt(), x_0) * x_0, like((1 - alpha_bar).log(), x_0))
    prior = Gaussian(torch.zeros_like(x_0), torch.zeros_like(q.log_variance))
    return normal_kl(q, prior).flatten(1).sum(1)


# Which timesteps, with which noise


class Strata(NamedTuple):
    """Shares of [0, T), each of which an image visits once.

    Attributes:
        first, size: Where each begins and how many timesteps it has, (K,) int64.
    """

    first: Tensor
    size: Tensor

    @classmethod
    def split(cls, num_timesteps: int, count: int | None = None, *, power: float = 3) -> Strata:
        """All timesteps, or `count` shares: the decoder's t = 0, then ever larger ones.

        The terms of the bound fall steeply with t. Shares that grow as the third power estimate it
        20 to 75 times more exactly than equal ones, which `power` = 1 makes.

        Raises:
            InputError: count is not between 2 and T.
        """
        count = num_timesteps if count is None else count
        check_whole("timesteps", count, 2, num_timesteps)
        grid = torch.linspace(0, 1, count, dtype=torch.float64) ** power
        edges = (1 + (num_timesteps - 1) * grid).round().long()
        edges = torch.maximum(edges, torch.arange(1, count + 1))  # no share is empty
        edges = torch.cat([edges.new_zeros(1), edges])
        return cls(edges[:-1], edges.diff())

    def draw(self, seed: int, positions: np.ndarray) -> Tensor:
        """Timesteps of images, (B, K): uniform in each share, and even over the positions.

        Multiples of the golden ratio cover [0, 1) evenly however many there are; where each share
        begins depends on the seed.
        """
        rng = np.random.default_rng([seed, TIMESTEP_STREAM])
        uniform = (rng.random(len(self.size)) + positions[:, None] * GOLDEN) % 1
        offsets = torch.from_numpy(uniform * self.size.numpy()).long()
        return self.first + torch.minimum(offsets, self.size - 1)


def noise_for(seed: int, positions: Sequence[int], shape: Sequence[int]) -> NoiseFunction:
    """Noise as a function of (seed, position, timestep), for images of a shape (C, H, W).

    Drawn on the CPU: every device, batch and number of processes gets the same.
    """

    def noise(t: Tensor) -> Tensor:
        eps = torch.empty(len(positions), *shape)
        for out, position, timestep in zip(eps, positions, t.tolist(), strict=True):
            seeds = mix_seed(seed, NOISE_STREAM, int(position), timestep)
            out.normal_(generator=torch.Generator().manual_seed(seeds))
        return eps

    return noise


# The whole bound


class Bound(NamedTuple):
    """The bound on each image of a batch, bits per dimension, float64 on the CPU.

    Attributes:
        t: Timesteps, (B, K).
        total_bpd: The bound, (B,): -log2 p(x_0) / D is at most that, in expectation.
        prior_bpd: Its part L_T, (B,).
        vb_bpd: Its other terms, (B, K), each of one timestep.
        x_0_mse, eps_mse, eps_square, noise_square: See `Term`, (B, K).
    """

    t: Tensor
    total_bpd: Tensor
    prior_bpd: Tensor
    vb_bpd: Tensor
    x_0_mse: Tensor
    eps_mse: Tensor
    eps_square: Tensor
    noise_square: Tensor


def bits_per_dim(
    network: Callable,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    noise: NoiseFunction,
    *,
    strata: Strata | None = None,
    t: Tensor | None = None,
) -> Bound:
    """Eqs. (5), (13): the bound on -log2 p(x_0), per dimension; all timesteps, or an estimate.

    Args:
        network, scheduler, x_0, noise: See `vlb_terms`.
        strata, t: Shares of the timesteps and what is drawn from them, (B, K): each term then
            stands for its share, and the total is unbiased. All timesteps without them.

    Raises:
        InputError: images that are not finite, not in [-1, 1] or not on the 256 levels there; a
            network whose output is not finite; or strata without t.
    """
    _check_images(x_0)
    if (strata is None) != (t is None):
        raise InputError("strata and t go together: pass both, or neither for all timesteps")
    if strata is None:
        strata = Strata.split(len(scheduler.beta))
        t = strata.first.expand(len(x_0), -1)
    columns = [
        torch.stack([to_bits_per_dim(term.nats, x_0), *term[2:6]])
        for term in vlb_terms(network, scheduler, x_0, t.T, noise)
    ]
    vb, *others = torch.stack(columns, -1).cpu().double()
    prior = to_bits_per_dim(prior_kl(scheduler, x_0), x_0).cpu().double()
    total = prior + (vb * strata.size).sum(1)
    if not bool(total.isfinite().all()):
        wrong = t[~vb.isfinite()].unique().tolist()[:3]
        raise InputError(
            f"the network's output is not finite at the timesteps {wrong}: its weights are broken, "
            "or its precision is too low"
        )
    return Bound(t, total, prior, vb, *others)


def _check_images(x_0: Tensor) -> None:
    """Raise InputError for images that are no images in [-1, 1]."""
    low, high = x_0.aminmax()
    if not bool(x_0.isfinite().all()):
        raise InputError("images must be finite; got NaN or infinity among their pixels")
    if low < -1 or high > 1:
        raise InputError(
            f"images must be in [-1, 1]; got values from {low.item():g} to {high.item():g}: bytes "
            "become such images by x / 127.5 - 1"
        )
    levels = (x_0 + 1) * 127.5
    if float((levels - levels.round()).abs().max()) > 1e-3:
        raise InputError(
            "images must be on the 256 levels that bytes have in [-1, 1] (x / 127.5 - 1), since "
            f"eq. (13) is the probability of a level; got others, from {low.item():g} to "
            f"{high.item():g}: are these images in [0, 1]?"
        )


@dataclass
class BoundSums:
    """Sums over images, from which everything about a set follows; float64 on the CPU.

    Attributes:
        images: Number, prior_bpd, total_bpd and its square, (4,).
        timesteps: By timestep, (10, T): visits; vb_bpd; x_0_mse; eps_mse; eps_square, noise_square,
            their squares and their product; x_0_mse squared.
    """

    images: Tensor
    timesteps: Tensor

    @classmethod
    def zeros(cls, num_timesteps: int) -> BoundSums:
        """Nothing added yet."""
        return cls(torch.zeros(4).double(), torch.zeros(10, num_timesteps).double())

    def add(self, bound: Bound) -> None:
        """Add the images of a batch."""
        total = bound.total_bpd
        columns = torch.stack([torch.ones_like(total), bound.prior_bpd, total, total**2])
        self.images += columns.sum(1)
        eps, noise = bound.eps_square, bound.noise_square
        rows = [torch.ones_like(eps), bound.vb_bpd, bound.x_0_mse, bound.eps_mse]
        rows = [*rows, eps, noise, eps**2, noise**2, eps * noise, bound.x_0_mse**2]
        rows = torch.stack(rows)
        self.timesteps.index_add_(1, bound.t.flatten(), rows.flatten(1))

    def __add__(self, other: BoundSums) -> BoundSums:
        return BoundSums(self.images + other.images, self.timesteps + other.timesteps)

    @property
    def num_images(self) -> int:
        """How many images were added."""
        return int(self.images[0])

    @property
    def prior_bpd(self) -> float:
        """Mean of L_T, bits per dimension."""
        return float(self.images[1] / self.images[0])

    @property
    def total_bpd(self) -> float:
        """Mean bound, bits per dimension."""
        return float(self.images[2] / self.images[0])

    @property
    def standard_error(self) -> float:
        """Of `total_bpd`, over images, with the noise and timesteps of each; NaN for one image."""
        count, _, total, square = self.images
        variance = (square - total**2 / count).clamp(min=0) / (count - 1)
        return float((variance / count).sqrt())


class RateDistortion(NamedTuple):
    """Fig. 5, Table 4: what the images cost until x_t is known, and how far x_0_hat then is.

    Attributes:
        t: Timesteps, (K,), descending: the mean of each share.
        rate_bpd: Bits per dimension spent on x_T ... x_t: L_T and the terms above t, (K,).
        distortion_rmse: Root mean squared error of x_0_hat(x_t) on the scale of 0 to 255, (K,).
    """

    t: Tensor
    rate_bpd: Tensor
    distortion_rmse: Tensor


def rate_distortion(sums: BoundSums, strata: Strata) -> RateDistortion:
    """Section 4.3: rate and distortion along the reverse process, exact where shares have one t.

    Within a larger share both are those at its middle.
    """
    share = torch.repeat_interleave(torch.arange(len(strata.size)), strata.size)
    visits, vb, x_0_mse = (
        torch.zeros(len(strata.size)).double().index_add_(0, share, row)
        for row in sums.timesteps[:3]
    )
    size, term = strata.size, vb / visits
    above = (size * term).flip(0).cumsum(0).flip(0) - size * term
    rate = sums.prior_bpd + above + (size - 1) / 2 * term
    middle = strata.first + (size - 1) / 2
    return RateDistortion(middle.flip(0), rate.flip(0), 127.5 * (x_0_mse / visits).sqrt().flip(0))
