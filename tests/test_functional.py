"""Beta schedules against golden numbers and diffusers, and the maths of a coefficient that meets an
image.
"""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch

from ddpm_hf.functional import (
    Gaussian,
    betas_from_alpha_bar,
    bits_per_dim,
    cosine_betas,
    discretised_gaussian_log_likelihood,
    like,
    linear_betas,
    make_betas,
    mean_flat,
    mix_seed,
    normal_kl,
    standard_normal_cdf,
)

from .conftest import PROCESSES, images, noise

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


@pytest.mark.parametrize(
    ("file", "betas"),
    [
        ("ddpm_linear_T1000", linear_betas(1000, 1e-4, 0.02)),
        ("ddpm_cosine_T4000", cosine_betas(4000)),
    ],
)
def test_betas_match_golden(shared, file, betas):
    golden = np.load(shared / "golden" / f"{file}.npz")["schedule/betas"]
    # Both are float64; cosine betas are differences of numbers near 1, so some 1e-16 / 1e-6.
    np.testing.assert_allclose(betas.numpy(), golden, rtol=1e-9)


@pytest.mark.parametrize("num_timesteps", [50, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_betas_equal_diffusers(schedule, num_timesteps):
    arguments = dict(beta_start=1e-4, beta_end=0.02)
    ours = make_betas(schedule, num_timesteps, **arguments)
    stock = diffusers.DDPMScheduler(num_timesteps, beta_schedule=schedule, **arguments).betas
    assert ours.dtype == torch.float64
    # Stock's are float32, with a few roundings of 6e-8 each.
    torch.testing.assert_close(ours, stock.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_betas_are_a_growing_diffusion(schedule):
    betas = make_betas(schedule, 1000)
    assert betas.shape == (1000,)
    assert (betas > 0).all()
    assert (betas < 1).all()
    if schedule != "laplace":  # whose betas are largest in the middle
        assert (betas.diff() >= 0).all()


def test_cosine_is_our_word_for_squaredcos_cap_v2():
    assert torch.equal(make_betas("cosine", 100), make_betas("squaredcos_cap_v2", 100))


def test_cosine_follows_its_alpha_bar_until_the_cap():
    """Eq. (17) of Nichol & Dhariwal: alpha_bar_t = f(t) / f(0); the cap of 0.999 acts on the last
    beta alone.
    """

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = cosine_betas(1000)
    expected = torch.tensor([f((t + 1) / 1000) / f(0) for t in range(999)], dtype=torch.float64)
    # A thousand float64 roundings in the product.
    torch.testing.assert_close((1 - betas[:-1]).cumprod(0), expected, rtol=1e-12, atol=1e-16)
    assert betas[-1] == 0.999


def test_betas_from_alpha_bar_inverts_the_cumulative_product():
    betas = betas_from_alpha_bar(lambda u: math.exp(-3 * u), 6)
    torch.testing.assert_close(betas, torch.full((6,), 1 - math.exp(-0.5), dtype=torch.float64))


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="beta_schedule must be linear, .*; got 'quadratic'"):
        make_betas("quadratic", 1000)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_like_never_rounds_a_coefficient_to_half_precision(dtype, expected):
    coefficient = torch.tensor([0.9999, 0.5], dtype=torch.float64)
    result = like(coefficient, torch.zeros(2, 3, 4, 4, dtype=dtype))
    assert result.dtype == expected
    assert result.shape == (2, 1, 1, 1)
    assert torch.equal(result.flatten(), coefficient.to(expected))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), (1, 1, 1, 1)), ((2,), (2, 1, 1, 1)), ((2, 3, 4, 4), (2, 3, 4, 4))],
)
def test_like_shapes(shape, expected):
    assert like(torch.zeros(shape), torch.zeros(2, 3, 4, 4)).shape == expected


def test_mean_flat_keeps_the_batch():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert mean_flat(x).tolist() == [5.5, 17.5]


def test_gaussian_sample_scales_by_the_standard_deviation():
    gaussian = Gaussian(torch.tensor([1.0, -1.0]), torch.tensor([4.0, 0.25]).log())
    sample = gaussian.sample(torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(sample, torch.tensor([3.0, -2.0]))


# KL and the decoder


def random_gaussians():
    """Two, float64, that differ in every pixel."""
    first, second = noise(2, 3, 4, 4).double(), images(2, 3, 4, 4).double()
    return Gaussian(first, second), Gaussian(second, first)


def test_normal_kl_is_that_of_torch_distributions():
    p, q = random_gaussians()
    normals = [torch.distributions.Normal(g.mean, (0.5 * g.log_variance).exp()) for g in (p, q)]
    expected = torch.distributions.kl_divergence(*normals)
    torch.testing.assert_close(normal_kl(p, q), expected, rtol=1e-12, atol=1e-13)  # float64


def test_normal_kl_is_zero_for_equal_gaussians_and_positive_else():
    p, q = random_gaussians()
    assert not normal_kl(p, p).any()
    assert (normal_kl(p, q) > 0).all()


def test_normal_kl_of_nearly_equal_variances_keeps_digits_in_float32():
    """At ratio r it is r**2 / 4 + r**3 / 12; with exp(r) - 1 float32 would be off by 3 % here."""
    ratio = torch.tensor([2e-3, -2e-3])
    zero = torch.zeros(2)
    kl = normal_kl(Gaussian(zero, ratio), Gaussian(zero, zero))
    expected = ratio.double() ** 2 / 4 + ratio.double() ** 3 / 12
    # expm1(r) - r cancels to r / 2 = 1e-3 of its terms: 6e-8 becomes 6e-5.
    torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=0)


def test_standard_normal_cdf_is_within_2e_4_of_the_exact_one():
    x = torch.linspace(-8, 8, 10_001, dtype=torch.float64)
    error = (standard_normal_cdf(x) - torch.special.ndtr(x)).abs().max()
    assert 1e-4 < error < 2e-4  # Page's approximation itself, not arithmetic


LEVELS = (torch.arange(256) / 127.5 - 1).reshape(256, 1, 1, 1)  # float32, as images are


@pytest.mark.parametrize("log_variance", [-12.0, -6.0, 0.0, 3.0])
@pytest.mark.parametrize("mean", [-1.0, -0.998, 0.0013, 0.7, 1.5])
def test_the_256_bins_of_a_pixel_sum_to_one(mean, log_variance):
    p = Gaussian(torch.full((256, 1, 1, 1), mean), torch.tensor(log_variance))
    mass = discretised_gaussian_log_likelihood(LEVELS, p).double().exp().sum()
    # Edges differ by up to 1e-7 between neighbours, over a deviation of exp(-6) = 2.5e-3 4e-5 of a
    # standard deviation, times a density of 0.4; the floor adds 256e-12.
    assert mass.item() == pytest.approx(1, abs=3e-5)


def test_bins_are_1_255_to_either_side_and_open_at_the_ends():
    p = Gaussian(torch.zeros(256, 1, 1, 1).double(), torch.tensor(-1.0).double())
    mass = discretised_gaussian_log_likelihood(LEVELS.double(), p).exp().flatten()

    def phi(x: float) -> float:
        return standard_normal_cdf(torch.tensor(x).double() * math.exp(0.5)).item()

    level = 1 / 127.5 * 200 - 1
    # LEVELS are rounded to float32: 6e-8 times a density of 0.66.
    assert mass[200].item() == pytest.approx(phi(level + 1 / 255) - phi(level - 1 / 255), abs=1e-7)
    assert mass[0].item() == pytest.approx(phi(-1 + 1 / 255), abs=1e-7)
    assert mass[255].item() == pytest.approx(1 - phi(1 - 1 / 255), abs=1e-7)


def test_an_impossible_pixel_costs_what_1e_12_does_and_has_a_finite_gradient():
    mean = torch.tensor([[0.5], [-1.0]], requires_grad=True)
    x_0 = torch.tensor([[-0.5], [1.0]])
    log_mass = discretised_gaussian_log_likelihood(x_0, Gaussian(mean, torch.tensor(-12.0)))
    assert log_mass.tolist() == [[pytest.approx(math.log(1e-12))]] * 2
    log_mass.sum().backward()
    assert not mean.grad.any()


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("file", PROCESSES)
def test_golden_decoder_terms(shared, file, variance_type, clip):
    golden = np.load(shared / "golden" / f"{file}.npz")
    key, last = f"p/{variance_type}/clip_{clip}", golden["t"] == 0
    mean, log_variance = (
        torch.from_numpy(golden[f"{key}/{name}"][last]) for name in ("mean", "log_variance")
    )
    x_0 = torch.from_numpy(golden["x_start"][last])  # all -1, and all 1
    log_mass = discretised_gaussian_log_likelihood(x_0, Gaussian(mean, log_variance))
    expected = golden[f"{key}/vb_bits_per_dim"][last]
    # float32; the bound of golden/README.md. The exact Phi is off by 1e-4.
    np.testing.assert_allclose(
        bits_per_dim(-log_mass.flatten(1).sum(1), x_0), expected, rtol=0, atol=1e-5 * expected.max()
    )


def test_bits_per_dim_of_a_uniform_guess_is_8():
    nats = torch.full((2,), 3 * 4 * 4 * math.log(256))
    torch.testing.assert_close(bits_per_dim(nats, images(2, 3, 4, 4)), torch.full((2,), 8.0))


# Seeds


def test_mix_seed_is_reproducible_and_fits_a_generator():
    seed = mix_seed(1, 2, 3)
    assert seed == mix_seed(1, 2, 3)
    assert 0 <= seed < 2**64
    torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_mix_seed_differs_for_different_numbers_of_one_length(length):
    tuples = list(itertools.product(range(6), repeat=length))
    assert len({mix_seed(*numbers) for numbers in tuples}) == len(tuples)


@pytest.mark.parametrize(
    ("first", "second"),
    [((5,), (5, 0)), ((5, 7), (5, 7, 0)), ((2**32,), (0, 1))],
    ids=["appended 0", "appended 0 to two", "seed above 32 bits"],
)
def test_mix_seed_differs_for_lists_of_different_length(first, second):
    """Streams are told apart by their numbers, (seed, image) from (seed, stream, position)."""
    assert mix_seed(*first) != mix_seed(*second)


def test_mix_seed_changes_half_of_the_bits():
    """Neighbouring seeds share nothing: of 64 bits 32 differ on average."""
    flips = [(mix_seed(0, i) ^ mix_seed(0, i + 1)).bit_count() for i in range(400)]
    # The standard deviation of the mean of 400 is 4 / 20 = 0.2: five of them.
    assert np.mean(flips) == pytest.approx(32, abs=1.0)
