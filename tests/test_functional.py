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
    cosine_betas,
    like,
    linear_betas,
    make_betas,
    mean_flat,
    mix_seed,
)

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
