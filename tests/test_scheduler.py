"""The process against golden numbers, exact worlds, its identities, and stock diffusers: where
stock is right they agree, and where it is wrong a test named after the pitfall shows both.
"""

import inspect
import json
import logging
import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch

from ddpm_hf import DDPMScheduler, build_scheduler
from ddpm_hf.functional import Gaussian
from ddpm_hf.scheduler import PREDICTION_TYPES, TIMESTEP_SPACINGS, VARIANCE_TYPES

from .conftest import PROCESSES, SWAPS, T_ALL, images, noise

StockScheduler = diffusers.DDPMScheduler


# Golden numbers


class Golden(NamedTuple):
    process: dict
    arrays: dict[str, torch.Tensor]

    def inputs(self, *names: str) -> list[torch.Tensor]:
        return [self.arrays[name] for name in names]


@pytest.fixture(scope="module", params=PROCESSES)
def golden(request, shared) -> Golden:
    arrays = np.load(shared / "golden" / f"{request.param}.npz")
    return Golden(
        PROCESSES[request.param],
        {key: torch.from_numpy(arrays[key]) for key in arrays if not key.startswith("bpd/fixed")},
    )


def assert_golden(ours: torch.Tensor, reference: torch.Tensor, bound: float = 1e-5) -> None:
    """golden/README.md's bound: 1e-5 of the array's largest magnitude, for float32 arithmetic."""
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= bound * reference.abs().max()


def test_golden_schedule(golden):
    scheduler = DDPMScheduler(**golden.process)
    t = torch.arange(scheduler.config.num_train_timesteps)
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1)
    log_variance = scheduler.posterior_log_variance(t, t - 1)
    ours = {
        "betas": scheduler.beta,
        "alphas_cumprod": scheduler.alpha_bar[1:],
        "posterior_log_variance_clipped": log_variance,
        "posterior_mean_coef1": scheduler.q_posterior(one, zero, t, t - 1).mean[:, 0],
        "posterior_mean_coef2": scheduler.q_posterior(zero, one, t, t - 1).mean[:, 0],
    }
    for key, values in ours.items():
        assert_golden(values, golden.arrays[f"schedule/{key}"], 1e-10)  # float64 on both sides
    # The exact variance of the last step is 0; ours and golden's clipped logarithm take entry 1.
    assert golden.arrays["schedule/posterior_variance"][0] == 0
    assert_golden(log_variance[1:].exp(), golden.arrays["schedule/posterior_variance"][1:], 1e-10)
    assert log_variance[0] == log_variance[1]


def test_golden_q_sample(golden):
    x_0, eps, t = golden.inputs("x_start", "noise", "t")
    scheduler = DDPMScheduler(**golden.process)
    assert_golden(scheduler.q_sample(x_0, eps, t), golden.arrays["q_sample"])


def test_golden_q_posterior(golden):
    x_0, x_t, t = golden.inputs("x_start", "q_sample", "t")
    q = DDPMScheduler(**golden.process).q_posterior(x_0, x_t, t, t - 1)
    log_variance = q.log_variance.flatten()
    assert_golden(q.mean, golden.arrays["q_posterior/mean"])
    assert_golden(log_variance, golden.arrays["q_posterior/log_variance_clipped"])
    variance = golden.arrays["q_posterior/variance"]
    assert_golden(log_variance.exp()[t > 0], variance[t > 0])


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_golden_p_step(golden, variance_type, clip):
    x_t, t, output, v = golden.inputs("q_sample", "t", "model_eps", "model_v")
    if variance_type == "learned_range":
        output = torch.cat([output, v], 1)
    scheduler = DDPMScheduler(variance_type=variance_type, clip_sample=clip, **golden.process)
    (mean, log_variance), x_0_hat = scheduler.p_step(output, x_t, t, t - 1)
    key = f"p/{variance_type}/clip_{clip}"
    assert_golden(x_0_hat, golden.arrays[f"{key}/pred_xstart"])
    assert_golden(mean, golden.arrays[f"{key}/mean"])
    assert_golden(log_variance.expand_as(mean), golden.arrays[f"{key}/log_variance"])


@pytest.mark.parametrize("num_steps", [10, 25, 50, 100])
def test_golden_respaced_tables(golden, num_steps):
    timesteps, betas, alphas_cumprod, variance = golden.inputs(
        *(
            f"respaced/{num_steps}/{key}"
            for key in ("timesteps", "betas", "alphas_cumprod", "posterior_variance")
        )
    )
    scheduler = DDPMScheduler(**golden.process)
    scheduler.set_timesteps(timesteps=timesteps.flip(0).tolist())
    t = scheduler.timesteps.flip(0)
    assert torch.equal(t, timesteps)
    s = torch.tensor([scheduler.previous_timestep(i) for i in t])
    assert s.tolist() == [-1, *timesteps[:-1].tolist()]
    alpha_bar, log_variance = scheduler.alpha_bar_at(t), scheduler.posterior_log_variance(t, s)
    assert_golden(alpha_bar, alphas_cumprod, 1e-10)  # float64 on both sides
    assert_golden(1 - alpha_bar / scheduler.alpha_bar_at(s), betas, 1e-10)
    assert_golden(log_variance[1:].exp(), variance[1:], 1e-10)
    # Golden holds the exact 0 of the last step; ours the floor, of the full chain whatever K.
    assert variance[0] == 0
    assert log_variance[0] == golden.arrays["schedule/posterior_variance"][1].log()


@pytest.mark.parametrize("num_steps", [10, 25, 50, 100])
def test_golden_ancestral_mean_path(golden, num_steps):
    """Algorithm 2 without its noise, by the analytic network eps_hat = sqrt(1 - alpha_bar_t) x."""
    scheduler = DDPMScheduler(**golden.process)
    timesteps = golden.arrays[f"respaced/{num_steps}/timesteps"].tolist()
    x = golden.arrays["bpd/noise"]
    for t, s in zip(timesteps[::-1], [*timesteps[-2::-1], -1], strict=True):
        eps_hat = (1 - scheduler.alpha_bar_at(t)).sqrt().float() * x
        x = scheduler.p_step(eps_hat, x, t, s).distribution.mean
    assert_golden(x, golden.arrays[f"respaced/{num_steps}/ancestral_mean_path"])


@pytest.mark.parametrize("num_steps", [10, 25, 50, 100])
def test_golden_ddim(golden, num_steps):
    """eta = 0, with the noise derived again from the clipped image."""
    scheduler = DDPMScheduler(**golden.process)
    timesteps = golden.arrays[f"respaced/{num_steps}/timesteps"].tolist()
    x = golden.arrays["bpd/noise"]
    for t, s in zip(timesteps[::-1], [*timesteps[-2::-1], -1], strict=True):
        eps_hat = (1 - scheduler.alpha_bar_at(t)).sqrt().float() * x
        p = scheduler.ddim_step(eps_hat, x, t, s).distribution
        assert p.log_variance.isneginf().all()
        x = p.mean
    assert_golden(x, golden.arrays[f"respaced/{num_steps}/ddim_eta0_sample"])


def test_ddim_with_eta_1_is_ddpm_with_fixed_small():
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    output, x_t = noise(8, 1, 4, 4).double(), images(8, 1, 4, 4).double()
    t, s = T_ALL[2:], T_ALL[1:-1]
    ddpm = scheduler.p_step(output[2:], x_t[2:], t, s).distribution
    ddim = scheduler.ddim_step(output[2:], x_t[2:], t, s, eta=1.0).distribution
    # float64, where 1 - alpha_bar_s - beta-tilde loses some digits
    torch.testing.assert_close(ddim.mean, ddpm.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(ddim.log_variance, ddpm.log_variance, rtol=1e-12, atol=0)


# A world with exact answers


@dataclass(frozen=True)
class GaussianWorld:
    """Data ~ N(m, c I): the optimal network is known, and with it every step of the chain."""

    m: float
    c: float

    def x_0_hat(self, scheduler: DDPMScheduler, x_t: torch.Tensor, t: int) -> torch.Tensor:
        """E[x_0 | x_t]."""
        a = scheduler.alpha_bar_at(t)
        return self.m + a.sqrt() * self.c * (x_t - a.sqrt() * self.m) / (a * self.c + 1 - a)

    def x_0_variance(self, scheduler: DDPMScheduler, t: int) -> torch.Tensor:
        """Var[x_0 | x_t]."""
        a = scheduler.alpha_bar_at(t)
        return self.c * (1 - a) / (a * self.c + 1 - a)

    def output(self, scheduler: DDPMScheduler, x_t: torch.Tensor, t: int) -> torch.Tensor:
        """What the optimal network says."""
        a, x_0_hat = scheduler.alpha_bar_at(t), self.x_0_hat(scheduler, x_t, t)
        eps_hat = (1 - a).sqrt() * (x_t - a.sqrt() * self.m) / (a * self.c + 1 - a)
        return {
            "epsilon": eps_hat,
            "sample": x_0_hat,
            "v_prediction": a.sqrt() * eps_hat - (1 - a).sqrt() * x_0_hat,
        }[scheduler.config.prediction_type]


WORLD = GaussianWorld(m=0.3, c=0.25)
PROBES = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)


class Moments(NamedTuple):
    """Mean and variance of the images that a chain ends at."""

    mean: float
    variance_drawn: float  # the last step drawn too
    variance: float  # the mean of the last step taken


def ancestral_moments(scheduler: DDPMScheduler, num_steps: int, *, optimal: bool = False):
    """Exact moments of Algorithm 2: each step is affine in x_t, so images at 0 and 1 tell all of
    it. `optimal` takes the variance that Bao et al. 2022 derive in place of the scheduler's.
    """
    scheduler.set_timesteps(num_steps)
    mean, variance, before = 0.0, 1.0, 1.0  # x_T ~ N(0, I)
    for t in scheduler.timesteps.tolist():
        s = scheduler.previous_timestep(t)
        p = scheduler.p_step(WORLD.output(scheduler, PROBES, t), PROBES, t, s).distribution
        offset, slope = p.mean[0].item(), (p.mean[1] - p.mean[0]).item()
        added = p.log_variance.exp().max().item()
        if optimal:
            coef_x_0 = scheduler.q_posterior(PROBES, PROBES * 0, t, s).mean[1].item()
            exact = added if s >= 0 else 0.0
            added = exact + coef_x_0**2 * WORLD.x_0_variance(scheduler, t).item()
        before = slope**2 * variance
        mean, variance = offset + slope * mean, before + added
    return Moments(mean, variance, before)


def world_scheduler(**settings) -> DDPMScheduler:
    return DDPMScheduler(clip_sample=False, timestep_spacing="trailing", **settings)


# The table of design section 8, T = 1000 linear; printed to three decimals: half a unit, and a bit.
ROUNDED = 6e-4
STEPS = (1, 5, 50, 1000)


@pytest.mark.parametrize(
    ("variance_type", "drawn", "expected"),
    [
        ("fixed_small", True, (0.000, 0.062, 0.197, 0.246)),
        ("fixed_small", False, (0.000, 0.062, 0.197, 0.246)),
        ("fixed_large", True, (1.000, 0.471, 0.268, 0.251)),
        ("fixed_large", False, (0.000, 0.130, 0.262, 0.251)),
    ],
)
def test_gaussian_world_ends_at_the_variance_of_theory(variance_type, drawn, expected):
    for num_steps, value in zip(STEPS, expected, strict=True):
        end = ancestral_moments(world_scheduler(variance_type=variance_type), num_steps)
        assert (end.variance_drawn if drawn else end.variance) == pytest.approx(value, abs=ROUNDED)


@pytest.mark.parametrize(
    ("num_steps", "of_mean"), [(1, 0.000), (5, 0.081), (50, 0.244), (1000, 0.250)]
)
def test_gaussian_world_is_sampled_exactly_with_the_optimal_variance(num_steps, of_mean):
    """Law of total variance over x_0 given x_t: with it the chain ends at c whatever its length."""
    end = ancestral_moments(world_scheduler(), num_steps, optimal=True)
    # x_T is N(0, I) for N(., 1 - (1 - c) alpha_bar_T), 3e-5 off, of which 2.5e-6 reaches x_0.
    assert end.variance_drawn == pytest.approx(WORLD.c, abs=1e-9)
    assert end.variance == pytest.approx(of_mean, abs=ROUNDED)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gaussian_world_ends_at_the_mean_of_the_data(prediction_type):
    for num_steps in STEPS:
        end = ancestral_moments(world_scheduler(prediction_type=prediction_type), num_steps)
        # x_T ~ N(0, I) for N(sqrt(alpha_bar_T) m, .): of the 0.002 that it lacks, a slope of
        # c sqrt(alpha_bar_T) = 0.0016 reaches x_0.
        assert end.mean == pytest.approx(WORLD.m, abs=5e-6)


def test_gaussian_world_by_sampling_with_step():
    """`step` itself, drawn: the numbers of the table in a million pixels."""
    scheduler = world_scheduler(variance_type="fixed_large")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 1000, 1000, generator=generator)
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        output = WORLD.output(scheduler, x, int(t)).float()
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    # Standard error of a variance: 0.130 sqrt(2 / 1e6) = 2e-4; five of them. The mean's is 4e-4.
    assert x.var().item() == pytest.approx(0.130, abs=1e-3)
    assert x.mean().item() == pytest.approx(WORLD.m, abs=4e-3)


# Identities


def log_density(p: Gaussian, x: torch.Tensor) -> torch.Tensor:
    square = (x - p.mean) ** 2 / p.log_variance.exp()
    return -0.5 * (square + p.log_variance + math.log(2 * math.pi))


@pytest.mark.parametrize(("t", "s"), [(1, 0), (10, 9), (500, 499), (999, 998), (999, 0), (700, 80)])
@pytest.mark.parametrize("process", PROCESSES)
def test_bayes_rule(process, t, s):
    """q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0), for any images and any t > s."""
    scheduler = DDPMScheduler(**PROCESSES[process])
    x_0, x_s, x_t = (images(3, 2, 1, 4, 4) * 2).double()

    def q(x: torch.Tensor, a: torch.Tensor) -> Gaussian:
        return Gaussian(a.sqrt() * x, (1 - a).log())

    a_t, a_s = scheduler.alpha_bar_at(t), scheduler.alpha_bar_at(s)
    left = log_density(scheduler.q_posterior(x_0, x_t, t, s), x_s) + log_density(q(x_0, a_t), x_t)
    right = log_density(q(x_s, a_t / a_s), x_t) + log_density(q(x_0, a_s), x_s)
    # float64, where 1 - alpha_bar_s = 5e-6 and up loses 1e-11 of the posterior variance.
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("t", [1, 37, 999])
def test_q_posterior_of_two_steps_is_that_of_one_long_step(t):
    """Chapman-Kolmogorov: q(x_s | x_0) follows from x_t by one long posterior step, mean and
    variance.
    """
    scheduler = DDPMScheduler()
    x_0 = images(2, 1, 4, 4).double()
    for s in range(0, t, max(1, t // 5)):
        a_t, a_s = scheduler.alpha_bar_at(t), scheduler.alpha_bar_at(s)
        q = scheduler.q_posterior(x_0, a_t.sqrt() * x_0, t, s)
        slope = scheduler.q_posterior(x_0 * 0, x_0 * 0 + 1, t, s).mean.max()
        # float64; 1 - alpha_bar keeps 12 of 16 digits at t = 0.
        torch.testing.assert_close(q.mean, a_s.sqrt() * x_0, rtol=1e-11, atol=1e-11)
        variance = slope**2 * (1 - a_t) + q.log_variance.exp().max()
        torch.testing.assert_close(variance, 1 - a_s, rtol=1e-11, atol=1e-15)


def test_q_posterior_of_the_last_step_is_the_clean_image():
    x_0, x_t = images(8, 1, 4, 4), noise(8, 1, 4, 4)
    q = DDPMScheduler().q_posterior(x_0, x_t, T_ALL, torch.full_like(T_ALL, -1))
    torch.testing.assert_close(q.mean, x_0, rtol=1e-7, atol=0)  # its coefficient is 1 - 1e-16


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_round_trip_of_target_to_x_0_and_to_eps(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x_0, eps = images(8, 3, 4, 4).double(), noise(8, 3, 4, 4).double()
    x_t = scheduler.q_sample(x_0, eps, T_ALL)
    x_0_hat = scheduler.to_x_0(scheduler.target(x_0, eps, T_ALL), x_t, T_ALL)
    eps_hat = scheduler.to_eps(x_0_hat, x_t, T_ALL)
    # float64: 1 / sqrt(alpha_bar_T) = 158 and 1 / sigma_0 = 100 times 1e-16, times each other.
    assert x_0_hat.dtype == eps_hat.dtype == torch.float64
    torch.testing.assert_close(x_0_hat, x_0, rtol=0, atol=1e-12)
    torch.testing.assert_close(eps_hat, eps, rtol=0, atol=1e-12)


def test_p_step_is_one_for_the_three_prediction_types():
    x_0, eps = images(8, 1, 4, 4).double(), noise(8, 1, 4, 4).double()
    means = []
    for prediction_type in PREDICTION_TYPES:
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        x_t = scheduler.q_sample(x_0, eps, T_ALL)
        p = scheduler.p_step(scheduler.target(x_0, eps, T_ALL), x_t, T_ALL, T_ALL - 1)
        means.append(p.distribution.mean)
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-12)  # float64, as above
    torch.testing.assert_close(means[2], means[1], rtol=0, atol=1e-12)


def test_one_timestep_and_one_per_image_are_the_same():
    scheduler = DDPMScheduler()
    x, eps = images(8, 1, 4, 4), noise(8, 1, 4, 4)
    t, s = torch.full((8,), 500), torch.full((8,), 400)
    assert torch.equal(scheduler.q_sample(x, eps, 500), scheduler.q_sample(x, eps, t))
    one, many = scheduler.p_step(eps, x, 500, 400), scheduler.p_step(eps, x, t, s)
    assert torch.equal(one.x_0_hat, many.x_0_hat)
    assert torch.equal(one.distribution.mean, many.distribution.mean)
    assert (one.distribution.log_variance == many.distribution.log_variance).all()


def test_alpha_bar_at_minus_one_is_the_clean_image():
    scheduler = DDPMScheduler()
    assert scheduler.alpha_bar_at(-1) == 1
    assert scheduler.alpha_bar_at(-1.0) == 1
    assert scheduler.alpha_bar_at(torch.tensor([-1, 0])).tolist() == [1, 1 - scheduler.beta[0]]
    assert scheduler.alpha_bar.shape == (1001,)
    assert scheduler.alpha_bar.dtype == torch.float64


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_alpha_bar_at_floats_is_the_noise_level_of_diffusers(name):
    """Seven timesteps by linspace lie between the trained ones: 999, 832.5, 666, ..."""
    scheduler = build_scheduler("cifar10")
    other = getattr(diffusers, name).from_config(scheduler.config, timestep_spacing="linspace")
    other.set_timesteps(7)
    t = other.timesteps
    assert (t != t.round()).any()
    a = scheduler.alpha_bar_at(t)
    assert a.dtype == torch.float64
    # Theirs is float32 from 1 - alpha_bar in float32, which loses 6e-8 / 1e-4 at t = 0.
    torch.testing.assert_close((1 / a - 1).sqrt(), other.sigmas[:-1].double(), rtol=5e-4, atol=0)


def test_alpha_bar_at_floats_meets_the_integers_and_falls_between_them():
    scheduler = DDPMScheduler()
    t = torch.arange(1000)
    # sqrt(1 / a - 1) and back: float64.
    torch.testing.assert_close(
        scheduler.alpha_bar_at(t.double()), scheduler.alpha_bar_at(t), rtol=1e-12, atol=0
    )
    between = scheduler.alpha_bar_at(t[:-1] + 0.5)
    assert (between < scheduler.alpha_bar_at(t[:-1])).all()
    assert (between > scheduler.alpha_bar_at(t[1:])).all()


def test_alpha_bar_at_floats_by_hand():
    """Noise levels 1 / 3 and 1 (alpha_bar 0.9, 0.5): a quarter of the way lies 1 / 2."""
    scheduler = DDPMScheduler(2, trained_betas=[0.1, 4 / 9])
    assert scheduler.alpha_bar_at(0.25).item() == pytest.approx(1 / (1 + 0.5**2))


@pytest.mark.parametrize("t", [999.0, 998.5, 998.0])
def test_alpha_bar_at_floats_with_zero_terminal_snr(t):
    """Euler's and Heun's timesteps are floats also where alpha_bar_T = 0: infinite noise."""
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    low, high = scheduler.alpha_bar_at(math.ceil(t)), scheduler.alpha_bar_at(math.floor(t))
    a = scheduler.alpha_bar_at(t)
    assert low <= a * (1 + 1e-12)  # float64
    assert a <= high * (1 + 1e-12)


# Equality with diffusers, where diffusers is right


def channels(variance_type: str, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A network's output for x, with the variance channels that the type asks for."""
    output = torch.randn(x.shape, generator=generator)
    if variance_type not in ("learned", "learned_range"):
        return output
    v = torch.rand(x.shape, generator=generator)  # `learned` reads a variance, > 0
    return torch.cat([output, v * 2 - 1 if variance_type == "learned_range" else v], 1)


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("variance_type", [v for v in VARIANCE_TYPES if v != "fixed_large_log"])
def test_step_equals_diffusers(variance_type, spacing):
    settings = dict(variance_type=variance_type, timestep_spacing=spacing)
    ours, stock = DDPMScheduler(**settings), StockScheduler(**settings)
    ours.set_timesteps(50)
    stock.set_timesteps(50)
    data, ours_seed, stock_seed = (torch.Generator().manual_seed(i) for i in (0, 1, 1))
    x = torch.randn(2, 1, 8, 8, generator=data)
    for t in stock.timesteps:
        output = channels(variance_type, x, data)
        a = ours.step(output, t, x, generator=ours_seed)
        b = stock.step(output, t, x, generator=stock_seed)
        if t == stock.timesteps[-1] > 0:  # stock draws noise here, on purpose we do not: trap 2
            continue
        # Stock's float32 tables: 1 / sqrt(alpha_bar_T) = 158 times 6e-8 in x_0_hat, where not
        # clipped to 1; the noise's deviation of 0.01 at t = 0 ... 4 is 2e-4 off, relative.
        torch.testing.assert_close(a.prev_sample, b.prev_sample, rtol=0, atol=3e-5)
        torch.testing.assert_close(
            a.pred_original_sample, b.pred_original_sample, rtol=0, atol=3e-5
        )
        x = b.prev_sample


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "clip",
    [dict(clip_sample_range=0.5), dict(clip_sample=False), dict(thresholding=True)],
    ids=["range", "none", "thresholding"],
)
def test_step_equals_diffusers_for_every_prediction_and_clip(prediction_type, clip):
    settings = dict(prediction_type=prediction_type, sample_max_value=1.5, **clip)
    ours, stock = DDPMScheduler(**settings), StockScheduler(**settings)
    output, x_t = noise(2, 3, 8, 8), images(2, 3, 8, 8)
    for t in (0, 300, 700):
        a, b = (
            scheduler.step(output, t, x_t, torch.Generator().manual_seed(0), return_dict=False)
            for scheduler in (ours, stock)
        )
        # Stock's float32 tables, in coefficients of up to 12 at t = 700.
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(a[1], b[1], rtol=0, atol=1e-5)


def test_step_takes_one_generator_per_image():
    x_t, output = images(2, 1, 4, 4), noise(2, 1, 4, 4)
    scheduler = DDPMScheduler()
    pair = scheduler.step(output, 500, x_t, [torch.Generator().manual_seed(i) for i in (3, 4)])
    second = scheduler.step(output[1:], 500, x_t[1:], torch.Generator().manual_seed(4))
    assert torch.equal(pair.prev_sample[1:], second.prev_sample)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("process", PROCESSES)
def test_forward_process_equals_diffusers_in_float32(process, method):
    ours, stock = DDPMScheduler(**PROCESSES[process]), StockScheduler(**PROCESSES[process])
    x_0, eps = images(8, 3, 4, 4), noise(8, 3, 4, 4)
    a, b = (getattr(scheduler, method)(x_0, eps, T_ALL) for scheduler in (ours, stock))
    assert a.dtype == torch.float32
    # Stock's float32 alpha_bar is 6e-8 off: 3e-6 in sqrt(1 - alpha_bar) = 0.01 (cosine, T = 4000:
    # 1.3e-5 in 0.002), times eps of up to 4.
    torch.testing.assert_close(a, b, rtol=0, atol=6e-5)


def test_get_velocity_is_the_target_of_v_prediction_in_the_type_of_the_images():
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    x_0, eps = images(8, 1, 4, 4).bfloat16(), noise(8, 1, 4, 4).bfloat16()
    v = scheduler.target(x_0, eps, T_ALL)
    assert v.dtype == torch.float32
    assert torch.equal(scheduler.get_velocity(x_0, eps, T_ALL), v.bfloat16())


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_set_timesteps_equals_diffusers(spacing):
    ours, stock = (cls(timestep_spacing=spacing) for cls in (DDPMScheduler, StockScheduler))
    for num_steps in range(1, 1001):
        ours.set_timesteps(num_steps)
        stock.set_timesteps(num_steps)
        assert torch.equal(ours.timesteps, stock.timesteps)


@pytest.mark.parametrize("num_train_timesteps", [100, 500, 1000, 4000])
def test_set_timesteps_trailing_has_the_number_asked_for_where_diffusers_has_one_more(
    num_train_timesteps,
):
    """Stock walks down by a float stride and for some counts arrives at a rounding error above 0:
    one timestep too many, -1 (for K = 61 of T = 1000, say).
    """
    settings = dict(num_train_timesteps=num_train_timesteps, timestep_spacing="trailing")
    ours, stock = DDPMScheduler(**settings), StockScheduler(**settings)
    too_many = 0
    for num_steps in range(1, num_train_timesteps + 1):
        ours.set_timesteps(num_steps)
        stock.set_timesteps(num_steps)
        assert len(ours.timesteps) == num_steps
        assert ours.timesteps[0] == num_train_timesteps - 1
        assert ours.timesteps[-1] >= 0
        assert (ours.timesteps.diff() < 0).all()
        if len(stock.timesteps) != num_steps:
            assert len(stock.timesteps) == num_steps + 1
            assert stock.timesteps[-1] == -1
            too_many += 1
    assert too_many == {100: 5, 500: 29, 1000: 62, 4000: 274}[num_train_timesteps]


def test_set_timesteps_trailing_equals_diffusers_where_its_count_is_right():
    """The same images from the same seed as stock need the same timesteps."""
    ours, stock = (cls(timestep_spacing="trailing") for cls in (DDPMScheduler, StockScheduler))
    different = []
    for num_steps in range(1, 1001):
        ours.set_timesteps(num_steps)
        stock.set_timesteps(num_steps)
        right = len(stock.timesteps) == num_steps
        if right and not torch.equal(ours.timesteps, stock.timesteps):
            different.append(num_steps)
    assert different == []


def test_set_timesteps_takes_a_list_as_diffusers_does():
    ours, stock = DDPMScheduler(timestep_spacing="trailing"), StockScheduler()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(timesteps=[900, 400, 3])
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert [ours.previous_timestep(t) for t in ours.timesteps] == [400, 3, -1]


@pytest.mark.parametrize(
    "settings",
    [
        dict(beta_schedule="linear"),
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        dict(beta_schedule="squaredcos_cap_v2"),
        dict(beta_schedule="sigmoid"),
        dict(beta_schedule="laplace"),
        dict(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3),
        dict(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    ],
    ids=lambda settings: " ".join(f"{k}={v}" for k, v in settings.items()),
)
def test_tables_equal_diffusers(settings):
    ours, stock = DDPMScheduler(**settings), StockScheduler(**settings)
    # Theirs are float32, a thousand roundings of 6e-8 in the product; the rescaled betas are
    # differences of it.
    atol = 1e-5 if "rescale_betas_zero_snr" in settings else 1e-6
    torch.testing.assert_close(ours.beta, stock.betas.double(), rtol=0, atol=atol)
    torch.testing.assert_close(
        ours.alpha_bar[1:], stock.alphas_cumprod.double(), rtol=1e-4, atol=1e-6
    )
    assert torch.equal(ours.betas, stock.betas)  # the inherited tables stay for diffusers' callers
    assert torch.equal(ours.alphas_cumprod, stock.alphas_cumprod)


@pytest.mark.parametrize(
    "method",
    ["__init__", "add_noise", "get_velocity", "previous_timestep", "set_timesteps", "step"],
)
def test_overridden_methods_keep_the_signature_of_diffusers(method):
    """diffusers inspects them: `generator` in `step` decides what a pipeline passes."""
    ours, stock = (
        [
            (p.name, p.kind, p.default)
            for p in inspect.signature(getattr(cls, method)).parameters.values()
        ]
        for cls in (DDPMScheduler, StockScheduler)
    )
    assert ours == stock


# Where stock diffusers fails: one test a pitfall, by its number


@pytest.mark.parametrize("t", range(10))
def test_pitfall_4_1_bfloat16_images_get_their_noise(t):
    """Stock rounds alpha_bar to bfloat16 first, and to 1 for t = 0 ... 9: no noise at all."""
    x_0, eps = images(64, 1, 8, 8).bfloat16() / 4, noise(64, 1, 8, 8).bfloat16()
    timesteps = torch.full((64,), t)
    assert torch.equal(StockScheduler().add_noise(x_0, eps, timesteps), x_0)
    scheduler = DDPMScheduler()
    x_t = scheduler.add_noise(x_0, eps, timesteps)
    assert x_t.dtype == torch.bfloat16
    a = scheduler.alpha_bar_at(t)
    sigma = (x_t.double() - a.sqrt() * x_0.double()).std()
    # 4096 pixels: 1.1 % standard error; rounding x_t < 0.4 to 2^-9 adds 6e-4 to sigma = 0.01.
    torch.testing.assert_close(sigma, (1 - a).sqrt(), rtol=0.04, atol=0)
    exact = scheduler.q_sample(x_0.double(), eps.double(), timesteps)
    assert scheduler.q_sample(x_0, eps, timesteps).dtype == torch.float32
    torch.testing.assert_close(
        x_t.double(), exact, rtol=2**-8, atol=1e-6
    )  # rounded once, at the end


def test_pitfall_4_2_trailing_timesteps_start_at_the_noise():
    """Leading spacing, stock's default, starts 600 steps at 599, where sqrt(alpha_bar) = 0.16."""
    stock, ours = StockScheduler(), build_scheduler("cifar10")
    stock.set_timesteps(600)
    ours.set_timesteps(600)
    assert stock.timesteps[0] == 599
    assert ours.alpha_bar_at(599).sqrt() > 0.15
    assert ours.timesteps[0] == 999
    assert ours.alpha_bar_at(ours.timesteps[0]).sqrt() < 0.007


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("fixedlarge", "fixed_large"),
        ("fixedsmall", "fixed_small"),
        ("learnt_range", "learned_range"),
    ],
)
def test_pitfall_4_5_unknown_variance_word_is_refused(word, meant):
    """Stock takes Ho's `fixedlarge`, and samples with fixed_small."""
    other = StockScheduler(variance_type=word)
    assert other._get_variance(500) == StockScheduler()._get_variance(500)
    assert other._get_variance(500) != StockScheduler(variance_type="fixed_large")._get_variance(
        500
    )
    with pytest.raises(ValueError, match=f"variance_type must be .* Did you mean '{meant}'"):
        DDPMScheduler(variance_type=word)


def test_trap_1_fixed_large_log_means_fixed_large():
    """Stock takes the root of a logarithm: NaN."""
    output, x_t = noise(2, 1, 4, 4), images(2, 1, 4, 4)

    def x_s(cls: type, variance_type: str) -> torch.Tensor:
        scheduler = cls(variance_type=variance_type)
        return scheduler.step(output, 500, x_t, torch.Generator().manual_seed(0)).prev_sample

    assert x_s(StockScheduler, "fixed_large_log").isnan().all()
    assert torch.equal(x_s(DDPMScheduler, "fixed_large_log"), x_s(DDPMScheduler, "fixed_large"))


@pytest.mark.parametrize(
    ("variance_type", "fraction"), [("fixed_small", None), ("learned_range", -1.0)]
)
def test_pitfall_4_6_log_variance_of_the_last_step_is_hos(variance_type, fraction):
    """Stock clamps the variance at t = 0 to 1e-20, a decoder NLL in units of 1e-10; Ho takes the
    one after it.
    """
    v = None if fraction is None else torch.full((1, 1, 2, 2), fraction)
    stock = StockScheduler(variance_type=variance_type)._get_variance(0, predicted_variance=v)
    stock_log = stock.log() if v is None else stock
    torch.testing.assert_close(stock_log, torch.full_like(stock_log, -46.05), rtol=0, atol=0.01)
    ours = DDPMScheduler(variance_type=variance_type)
    log_variance = ours.reverse_log_variance(0, -1, v)
    assert log_variance.min().item() == pytest.approx(-9.8167, abs=1e-4)  # golden, 4 digits
    assert log_variance.min().item() == pytest.approx(
        ours.posterior_log_variance(1, 0).item(),
        rel=1e-6,  # float32 variance channels
    )


def test_pitfall_4_6_fixed_large_takes_the_floor_at_t_0_alone():
    scheduler = DDPMScheduler(variance_type="fixed_large")
    log_variance = scheduler.reverse_log_variance(
        torch.tensor([0, 1, 99]), torch.tensor([-1, 0, -1])
    )
    expected = [
        scheduler.posterior_log_variance(1, 0),
        scheduler.beta[1].log(),
        (1 - scheduler.alpha_bar_at(99)).log(),
    ]
    # float64; beta from alpha_bar loses 4 of 16 digits, in a logarithm of -9.
    assert log_variance.tolist() == pytest.approx([v.item() for v in expected], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_4_13_half_precision_step_is_rounded_once(dtype):
    """Stock computes in the images' own type, and rounds at every operation."""
    output, x_t = noise(16, 1, 8, 8).to(dtype), images(16, 1, 8, 8).to(dtype)
    error = {}
    for scheduler in (DDPMScheduler(), StockScheduler()):
        mean = DDPMScheduler().p_step(output.double(), x_t.double(), 500, 499).distribution.mean
        generator = torch.Generator().manual_seed(0)
        result = scheduler.step(output, 500, x_t, generator)
        assert result.prev_sample.dtype == dtype
        eps = torch.randn(
            x_t.shape,
            generator=torch.Generator().manual_seed(0),
            dtype=torch.float32 if isinstance(scheduler, DDPMScheduler) else dtype,
        )
        sigma = DDPMScheduler().posterior_log_variance(500, 499).mul(0.5).exp()
        exact = mean + sigma * eps.double()
        distance = (result.prev_sample.double() - exact).abs()
        unit = torch.finfo(dtype).eps / 2 * exact.abs()  # half a unit in the last place, at most
        error[type(scheduler)] = (distance / unit.clamp(min=torch.finfo(dtype).tiny)).max().item()
    assert error[DDPMScheduler] <= 1.01  # float32 inside: 1e-7 against 1e-3
    assert error[StockScheduler] > 2


def test_pitfall_4_13_half_precision_output_meets_a_float32_state():
    output, x_t = noise(2, 1, 4, 4).bfloat16(), images(2, 1, 4, 4)
    exact = DDPMScheduler(clip_sample=False).to_x_0(output.double(), x_t.double(), 800)
    ours, stock = (
        cls(clip_sample=False).step(output, 800, x_t).pred_original_sample
        for cls in (DDPMScheduler, StockScheduler)
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)  # float32
    assert (stock.double() - exact).abs().max() > 1e-3  # sigma * eps_hat in bfloat16


def test_pitfall_4_14_the_process_does_not_depend_on_the_sub_chain_last_set():
    """After set_timesteps(10) stock's variance of t = 500 is that of another step, or none."""
    stock, ours = StockScheduler(), DDPMScheduler()
    output, x_t = noise(2, 1, 4, 4), images(2, 1, 4, 4)
    stock_900 = stock._get_variance(900)
    before = ours.p_step(output, x_t, 500, 499).distribution
    stock.set_timesteps(10)
    ours.set_timesteps(10)
    assert stock._get_variance(900) > 2 * stock_900
    stock.set_timesteps(7)
    with pytest.raises(IndexError):
        stock._get_variance(500)
    after = ours.p_step(output, x_t, 500, 499).distribution
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.log_variance, after.log_variance)


def test_pitfall_4_14_a_timestep_outside_the_sub_chain_has_a_message():
    stock, ours = StockScheduler(), DDPMScheduler()
    for scheduler in (stock, ours):
        assert scheduler.previous_timestep(500) == 499  # no sub-chain set
        scheduler.set_timesteps(timesteps=[900, 400, 3])
    with pytest.raises(IndexError):
        stock.previous_timestep(500)
    with pytest.raises(ValueError, match=r"500 is not in the sub-chain .*: \[900, 400, 3\]"):
        ours.previous_timestep(500)
    with pytest.raises(ValueError, match="timestep 500 is not in the sub-chain"):
        ours.step(noise(1, 1, 2, 2), 500, images(1, 1, 2, 2))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "sigmoid"])
@pytest.mark.parametrize("num_timesteps", [100, 300, 4000])
def test_pitfall_4_16_fewer_timesteps_still_end_at_the_noise(num_timesteps, schedule):
    """The beta range is made for T = 1000; of the image stock's 100 timesteps keep 60 %."""
    full = build_scheduler(ddpm_beta_schedule=schedule)
    ours = build_scheduler(ddpm_num_steps=num_timesteps, ddpm_beta_schedule=schedule)
    end = ours.alpha_bar[-1].sqrt().item()
    # The sum of beta is kept; log(1 - beta) is -beta - beta^2 / 2, with beta up to 0.2.
    assert 0.6 * full.alpha_bar[-1].sqrt() < end < 1.1 * full.alpha_bar[-1].sqrt()
    assert end < 0.03
    stock = StockScheduler(num_timesteps, beta_schedule=schedule).alphas_cumprod[-1].sqrt()
    assert stock > 0.2 if num_timesteps < 1000 else stock < 1e-3 * end


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_trap_2_the_last_step_of_trailing_timesteps_adds_no_noise(variance_type):
    """Stock skips the noise at t = 0 only, and ten trailing steps end with that of t = 99."""
    settings = dict(variance_type=variance_type, timestep_spacing="trailing")
    output, x_t = noise(2, 1, 8, 8), images(2, 1, 8, 8)
    image = {}
    for scheduler in (DDPMScheduler(**settings), StockScheduler(**settings)):
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[-1] == 99
        image[type(scheduler)] = scheduler.step(output, 99, x_t).prev_sample
    scheduler = DDPMScheduler(**settings)
    mean = scheduler.p_step(output, x_t, 99, -1).distribution.mean
    assert torch.equal(image[DDPMScheduler], mean)
    noise_left = (image[StockScheduler] - mean).std().item()
    if variance_type == "fixed_large":
        sigma = (1 - scheduler.alpha_bar_at(99)).sqrt().item()
        assert noise_left == pytest.approx(sigma, rel=0.4)  # 128 pixels: 6 % standard error
        assert sigma > 0.3
    else:
        assert noise_left < 1e-6  # its exact variance is 0, and clamped to 1e-20


@pytest.mark.parametrize("process", PROCESSES)
def test_trap_4_tables_are_float64(process):
    """Stock's float32 posterior variance is 4e-4 off, relative; 5e-3 for cosine, T = 4000."""
    ours, stock = DDPMScheduler(**PROCESSES[process]), StockScheduler(**PROCESSES[process])
    beta = ours.beta.numpy().astype(np.longdouble)
    alpha_bar = np.cumprod(1 - beta)
    exact = beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    t = torch.arange(1, len(beta))
    ours_variance = ours.posterior_log_variance(t, t - 1).exp().numpy()
    stock_variance = np.array([stock._get_variance(i).item() for i in t.tolist()])
    # float64 where 1 - alpha_bar is 1e-4 (cosine, T = 4000: 5e-6): 1e-16 / 5e-6, and a logarithm.
    assert np.abs(ours_variance / exact - 1).max() < 1e-10
    assert np.abs(stock_variance / exact - 1).max() > 3e-4


def test_trap_5_a_pipeline_records_a_class_that_diffusers_has(tiny_unet):
    """Stock writes the package of a subclass into model_index.json, which then does not load."""

    class Subclass(StockScheduler):
        """What a scheduler of one's own is, without the cure."""

    def recorded(scheduler) -> tuple[str, str]:
        return diffusers.DDPMPipeline(tiny_unet, scheduler).config["scheduler"]

    assert recorded(Subclass())[0] != "diffusers"
    assert recorded(DDPMScheduler()) == ("diffusers", "DDPMScheduler")


# Variance words


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_the_six_variance_words_of_diffusers_load(variance_type, tmp_path):
    StockScheduler(variance_type=variance_type).save_pretrained(tmp_path)
    scheduler = DDPMScheduler.from_pretrained(tmp_path)
    assert scheduler.config.variance_type == variance_type
    x_t = images(2, 1, 4, 4)
    output = channels(variance_type, x_t, torch.Generator().manual_seed(0))
    assert scheduler.step(output, 500, x_t).prev_sample.isfinite().all()


@pytest.mark.parametrize("word", ["fixed_small", "fixed_large"])
def test_log_words_are_aliases(word):
    t, s = T_ALL[1:], T_ALL[:-1]
    plain, log = (DDPMScheduler(variance_type=w) for w in (word, f"{word}_log"))
    assert torch.equal(plain.reverse_log_variance(t, s), log.reverse_log_variance(t, s))


def test_learned_variance_is_read_from_the_channels():
    scheduler = DDPMScheduler(variance_type="learned")
    variance = torch.tensor([0.25, 0.0, -1.0]).reshape(1, 1, 1, 3)
    x_t = torch.zeros(1, 1, 1, 3)
    p = scheduler.p_step(torch.cat([x_t, variance], 1), x_t, 500, 400).distribution
    expected = torch.tensor([0.25, 1e-20, 1e-20]).log()  # no logarithm of 0 or of a negative
    torch.testing.assert_close(p.log_variance.flatten(), expected)


def test_learned_range_lies_between_the_fixed_variances():
    t, s = T_ALL[1:], T_ALL[:-1]
    small, large, learned = (
        DDPMScheduler(variance_type=word)
        for word in ("fixed_small", "fixed_large", "learned_range")
    )
    for fraction, end in ((-1.0, small), (1.0, large)):
        v = torch.full((len(t), 1, 2, 2), fraction)
        log_variance = learned.reverse_log_variance(t, s, v)
        assert log_variance.shape == v.shape
        # float32 channels against float64
        torch.testing.assert_close(
            log_variance[:, 0, 0, 0].double(), end.reverse_log_variance(t, s), rtol=1e-6, atol=1e-6
        )


# Zero terminal SNR


def test_zero_terminal_snr_works_with_v_prediction():
    scheduler = DDPMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False
    )
    assert scheduler.alpha_bar[-1] == 0
    x_0, eps = images(8, 1, 4, 4).double(), noise(8, 1, 4, 4).double()
    t, s = torch.full((8,), 999), torch.full((8,), 500)
    x_t = scheduler.q_sample(x_0, eps, t)
    assert torch.equal(x_t, eps)  # pure noise
    p = scheduler.p_step(scheduler.target(x_0, eps, t), x_t, t, s)
    torch.testing.assert_close(p.x_0_hat, x_0)
    # From pure noise the posterior is q(x_s | x_0) itself.
    a_s = scheduler.alpha_bar_at(500)
    torch.testing.assert_close(p.distribution.mean, a_s.sqrt() * x_0)
    variance = p.distribution.log_variance.exp().max()
    torch.testing.assert_close(variance, 1 - a_s, rtol=1e-12, atol=0)  # float64


# Messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(trained_betas=[0.1, 0.2]), "got 2 betas and num_train_timesteps=1000"),
        (dict(trained_betas=[0.1], num_train_timesteps=1), "num_train_timesteps >= 2 betas; got 1"),
        (dict(num_train_timesteps=1), "num_train_timesteps >= 2 betas; got 1"),
        (dict(beta_end=1.5), r"every beta must be in \(0, 1\]; got values from 0.0001 to 1.5"),
        (dict(beta_start=0.0), r"every beta must be in \(0, 1\]; got values from 0.0 to"),
        (
            dict(trained_betas=[0.1, -0.2, 0.3], num_train_timesteps=3),
            r"every beta must be in \(0, 1\]; got values from -0.2 to 0.3",
        ),
        (
            dict(trained_betas=[0.1, math.nan, 0.3], num_train_timesteps=3),
            r"every beta must be in \(0, 1\]; got values from nan",
        ),
        (dict(rescale_betas_zero_snr=True), "'epsilon' cannot recover .* use .*'v_prediction'"),
        (
            dict(trained_betas=[0.1, 0.5, 1.0], num_train_timesteps=3),
            "'epsilon' cannot recover the image from pure noise",
        ),
        (dict(beta_end=0.9), "'epsilon' cannot recover the image from pure noise"),
        (
            dict(
                trained_betas=[0.1, 1.0, 0.3], num_train_timesteps=3, prediction_type="v_prediction"
            ),
            "only the last timestep may be pure noise, .* timestep 1 of 3 is",
        ),
        (dict(variance_type="other"), "variance_type must be one of fixed_small, .*; got 'other'"),
        (dict(prediction_type="v"), "prediction_type must be one of epsilon, .*; got 'v'"),
        (dict(prediction_type="eps"), "prediction_type must be one of"),
        (dict(timestep_spacing="trail"), "timestep_spacing must be .* Did you mean 'trailing'"),
    ],
)
def test_constructor_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        DDPMScheduler(**settings)


def test_constructor_refuses_an_unknown_beta_schedule_as_diffusers_does():
    with pytest.raises(NotImplementedError, match="quadratic is not implemented"):
        DDPMScheduler(beta_schedule="quadratic")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "pass either num_inference_steps or timesteps"),
        (
            dict(num_inference_steps=2, timesteps=[9, 3]),
            "pass either num_inference_steps or timesteps",
        ),
        (dict(num_inference_steps=0), "steps must be a whole number at least 1; got 0"),
        (dict(num_inference_steps=-3), "steps must be a whole number at least 1; got -3"),
        (dict(num_inference_steps=2.5), "steps must be a whole number at least 1; got 2.5"),
        (dict(timesteps=[9.5, 3]), r"descending list of timesteps >= 0; got \[9.5, 3\]"),
        (dict(num_inference_steps=1001), "1001 cannot be larger than"),
        (dict(timesteps=[]), r"descending list of timesteps >= 0; got \[\]"),
        (dict(timesteps=[9, -1]), r"descending list of timesteps >= 0; got \[9, -1\]"),
        (dict(timesteps=[3, 9]), "descending order"),
        (dict(timesteps=[9, 9]), "descending order"),
        (dict(timesteps=[1000, 3]), "must start before .*1000"),
    ],
)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_set_timesteps_refuses(spacing, arguments, message):
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)


@pytest.mark.parametrize(
    ("variance_type", "received", "message"),
    [
        ("fixed_small", 6, "'fixed_small' needs .* out_channels=3 for images of 3 channels; got 6"),
        ("fixed_large", 1, "'fixed_large' needs .* out_channels=3 for images of 3 channels; got 1"),
        ("learned_range", 3, "'learned_range' needs .* out_channels=6 .* 3 channels; got 3"),
        ("learned", 9, "'learned' needs .* out_channels=6 .* 3 channels; got 9"),
    ],
)
def test_split_output_refuses_a_wrong_number_of_channels(variance_type, received, message):
    scheduler = DDPMScheduler(variance_type=variance_type)
    output, x_t = torch.zeros(2, received, 4, 4), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=message):
        scheduler.split_output(output, 3)
    with pytest.raises(ValueError, match=message):
        scheduler.step(output, 500, x_t)


def test_split_output_splits_a_learned_variance():
    output = noise(2, 6, 4, 4)
    prediction, v = DDPMScheduler(variance_type="learned_range").split_output(output, 3)
    assert torch.equal(prediction, output[:, :3])
    assert torch.equal(v, output[:, 3:])
    assert DDPMScheduler().split_output(output, 6) == (output, None)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_reverse_log_variance_asks_for_the_channels_of_a_learned_type(variance_type):
    scheduler = DDPMScheduler(variance_type=variance_type)
    with pytest.raises(ValueError, match=f"'{variance_type}' needs model_variance"):
        scheduler.reverse_log_variance(500, 499)


def test_extras_of_a_newer_format_are_refused(tmp_path):
    scheduler = DDPMScheduler()
    assert scheduler.extras == {}
    scheduler.register_to_config(_ddpm_hf={"format": 1, "class_names": ["cat"]})
    assert scheduler.extras["class_names"] == ["cat"]
    scheduler.register_to_config(_ddpm_hf={"format": 2})
    scheduler.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"newer ddpm_hf \(format 2, .* up to 1\): pip install"):
        DDPMScheduler.from_pretrained(tmp_path).extras  # noqa: B018  the property raises


# The configuration on disk and through other schedulers

OTHERS = ("DDPMScheduler", *SWAPS)


@pytest.fixture
def heard(caplog):
    """What diffusers says through its logger, which does not propagate; a warning is an error."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # stock's, about numpy; users see none
        yield caplog
    logger.removeHandler(caplog.handler)


def settings_of(scheduler) -> dict:
    """The configuration, without what diffusers adds about itself and what other schedulers left
    in it.
    """
    return {key: scheduler.config[key] for key in inspect.signature(StockScheduler).parameters}


def test_messages_are_heard(heard):
    """The tests below that expect silence can fail: a public key is not silent."""
    diffusers.DDIMScheduler.from_config({**DDPMScheduler().config, "ddpm_hf": {}})
    assert any("ddpm_hf" in message for message in heard.messages)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "laplace"])
def test_configuration_survives_another_scheduler_and_back(schedule, name, heard, tmp_path):
    ours = build_scheduler(
        ddpm_num_steps=500,
        ddpm_beta_schedule=schedule,
        prediction_type="v_prediction",
        variance_type="fixed_large",
    )
    other = getattr(diffusers, name)
    ours.save_pretrained(tmp_path / "ours")
    there = other.from_pretrained(tmp_path / "ours")
    there.save_pretrained(tmp_path / "there")
    back = DDPMScheduler.from_pretrained(tmp_path / "there")
    live = DDPMScheduler.from_config(other.from_config(ours.config).config)
    assert heard.messages == []
    for scheduler in (back, live):
        assert scheduler.extras == ours.extras
        assert scheduler.extras["format"] == 1
        assert settings_of(scheduler) == settings_of(ours)
        assert torch.equal(scheduler.alpha_bar, ours.alpha_bar)
    # What the other scheduler samples is the same process; theirs is float32.
    torch.testing.assert_close(
        there.alphas_cumprod.double(), ours.alpha_bar[1:], rtol=1e-4, atol=1e-6
    )


def test_what_is_on_disk_names_stock_and_keeps_our_key(tmp_path):
    scheduler = build_scheduler(ddpm_beta_schedule="sigmoid")
    scheduler.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert on_disk["_class_name"] == "DDPMScheduler"
    assert on_disk["_ddpm_hf"] == {"format": 1, "beta_schedule": "sigmoid"}
    assert on_disk["trained_betas"] == scheduler.beta.tolist()
    stock_keys = {*inspect.signature(StockScheduler).parameters}
    assert set(on_disk) - {"_class_name", "_diffusers_version", "_ddpm_hf"} == stock_keys


def test_stock_loads_and_saves_again_without_losing_the_extras(heard, tmp_path):
    build_scheduler("cifar10").save_pretrained(tmp_path / "ours")
    stock = StockScheduler.from_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert type(stock) is StockScheduler
    assert stock.config.variance_type == "fixed_large"
    assert DDPMScheduler.from_pretrained(tmp_path / "stock").extras == {"format": 1}
    assert heard.messages == []


def test_defaults_are_those_of_diffusers():
    assert settings_of(DDPMScheduler()) == settings_of(StockScheduler())


@pytest.mark.parametrize("t", [-2, 1000, torch.tensor([3, -5]), 1000.5])
def test_alpha_bar_at_refuses_timesteps_that_do_not_exist(t):
    """Python's negative indices would answer -2 with the noisiest level."""
    with pytest.raises(ValueError, match=r"timesteps must be in \[-1, 999\]"):
        DDPMScheduler().alpha_bar_at(t)


def test_set_timesteps_refuses_an_offset_beyond_the_last_timestep():
    scheduler = DDPMScheduler(steps_offset=1)
    with pytest.raises(ValueError, match="steps_offset=1 leads to timestep 1000 of 1000"):
        scheduler.set_timesteps(1000)
    scheduler.set_timesteps(500)
    assert scheduler.timesteps[0] == 999


def test_no_float64_reaches_a_device_that_may_lack_it():
    """MPS has no float64: coefficients are cast before they move. The meta device stands for it,
    and every operation on it is watched.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                    assert tensor.dtype != torch.float64, function
            return result

    scheduler = DDPMScheduler(variance_type="learned_range", prediction_type="v_prediction")
    x, t = torch.zeros(2, 1, 4, 4, device="meta"), torch.tensor([5, 900])
    with Watch():
        output = torch.cat([scheduler.target(x, x, t), x], 1)
        step = scheduler.p_step(output, scheduler.q_sample(x, x, t), t, t - 1)
        assert step.distribution.mean.device.type == "meta"
        assert step.distribution.log_variance.dtype == torch.float32


@pytest.mark.parametrize(("t", "s"), [(5, 5), (5, 6), (torch.tensor([9, 3]), torch.tensor([2, 4]))])
def test_a_step_that_does_not_go_back_is_refused(t, s):
    """Its variance would be negative, and the image NaN."""
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="a reverse step goes from t to s < t"):
        DDPMScheduler().p_step(x, x, t, s)
