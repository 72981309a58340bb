"""The bound against golden numbers, its estimate from a few timesteps, and what is read from it."""

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import DDPMScheduler
from ddpm_hf.errors import InputError
from ddpm_hf.functional import bits_per_dim as to_bits_per_dim
from ddpm_hf.likelihood import (
    BoundSums,
    Strata,
    bits_per_dim,
    noise_for,
    prior_kl,
    rate_distortion,
    vlb_terms,
)

from .conftest import PROCESSES, images, noise


def gaussian_network(scheduler):
    """Exact for pixels ~ N(0, 1): eps_hat = sqrt(1 - alpha_bar_t) x_t, the golden network."""

    def unet(x_t, t):
        slope = (1 - scheduler.alpha_bar_at(t)).sqrt().to(x_t.dtype)
        output = slope.reshape(-1, 1, 1, 1) * x_t
        if scheduler.config.variance_type == "learned_range":
            output = torch.cat([output, torch.full_like(x_t, 0.5)], 1)
        return UNet2DOutput(sample=output)

    return unet


def on_levels(*shape):
    """Images on the 256 levels in [-1, 1]."""
    return ((images(*shape) + 1) * 127.5).round() / 127.5 - 1


@pytest.fixture(params=PROCESSES)
def golden(request, shared):
    arrays = np.load(shared / "golden" / f"{request.param}.npz")
    return PROCESSES[request.param], arrays


@pytest.mark.parametrize(
    "file", ["ddpm_linear_T1000", pytest.param("ddpm_cosine_T4000", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_whole_bound_matches_golden(shared, file, variance_type):
    arrays = np.load(shared / "golden" / f"{file}.npz")
    scheduler = DDPMScheduler(variance_type=variance_type, **PROCESSES[file])
    x_0, eps = (torch.from_numpy(arrays[f"bpd/{name}"]) for name in ("x_start", "noise"))
    bound = bits_per_dim(gaussian_network(scheduler), scheduler, x_0, lambda t: eps)
    expected = {
        key: arrays[f"bpd/{variance_type}/{key}"]
        for key in ("total_bpd", "prior_bpd", "vb", "xstart_mse", "mse")
    }
    # bits/dim: golden/README.md; float32 arithmetic.
    np.testing.assert_allclose(bound.total_bpd, expected["total_bpd"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(bound.prior_bpd, expected["prior_bpd"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(bound.vb_bpd, expected["vb"], rtol=0, atol=1e-4)
    for ours, key in ((bound.x_0_mse, "xstart_mse"), (bound.eps_mse, "mse")):
        largest = np.abs(expected[key]).max()
        np.testing.assert_allclose(ours, expected[key], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_terms_of_every_variance_match_golden(golden, variance_type):
    process, arrays = golden
    scheduler = DDPMScheduler(variance_type=variance_type, **process)
    x_0, eps, t, output, v = (
        torch.from_numpy(arrays[key]) for key in ("x_start", "noise", "t", "model_eps", "model_v")
    )
    if variance_type == "learned_range":
        output = torch.cat([output, v], 1)
    network = lambda x_t, t: UNet2DOutput(sample=output)  # noqa: E731
    (term,) = vlb_terms(network, scheduler, x_0, [t], lambda t: eps)
    expected = arrays[f"p/{variance_type}/clip_True/vb_bits_per_dim"]
    largest = np.abs(expected).max()
    bpd = to_bits_per_dim(term.nats, x_0)
    np.testing.assert_allclose(bpd, expected, rtol=0, atol=1e-5 * largest)
    x_0_hat = arrays[f"p/{variance_type}/clip_True/pred_xstart"]
    np.testing.assert_allclose(term.x_0_hat, x_0_hat, rtol=0, atol=1e-5 * np.abs(x_0_hat).max())


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_unclipped_noise_is_what_calibration_gets(prediction_type):
    """eps_square is of the noise as predicted: that of x_t by an exact network, unclipped."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x_0, eps = on_levels(4, 1, 8, 8), noise(4, 1, 8, 8)

    def unet(x_t, t):
        a = scheduler.alpha_bar_at(t).float().reshape(-1, 1, 1, 1)
        eps_hat, x_0_hat = (1 - a).sqrt() * x_t, a.sqrt() * x_t
        v_hat = a.sqrt() * eps_hat - (1 - a).sqrt() * x_0_hat
        said = {"epsilon": eps_hat, "sample": x_0_hat, "v_prediction": v_hat}
        return UNet2DOutput(sample=said[prediction_type])

    for t in (torch.full((4,), 3), torch.full((4,), 600)):
        (term,) = vlb_terms(unet, scheduler, x_0, [t], lambda t: eps)
        x_t = scheduler.q_sample(x_0, eps, t)
        expected = (1 - scheduler.alpha_bar_at(t)) * (x_t**2).mean((1, 2, 3))
        # float32; eps from x_0 or v loses 6e-8 / sqrt(1 - alpha_bar) = 3e-6 at t = 3
        torch.testing.assert_close(term.eps_square.double(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(term.noise_square, (eps**2).mean((1, 2, 3)))


def test_prior_kl_is_that_of_torch_distributions():
    scheduler = DDPMScheduler(
        100, beta_end=0.02
    )  # of which much of the image is left: alpha_bar 0.36
    x_0 = on_levels(3, 1, 4, 6)
    a = scheduler.alpha_bar[-1].float()
    q = torch.distributions.Normal(a.sqrt() * x_0, (1 - a).sqrt())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1))
    torch.testing.assert_close(prior_kl(scheduler, x_0), expected.sum((1, 2, 3)))


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_grey_rgb_and_rectangular_images_of_the_same_numbers_have_the_same_bound(variance_type):
    """The network acts on each number by itself, so that their arrangement cannot matter."""
    scheduler = DDPMScheduler(50, variance_type=variance_type)
    x_0 = on_levels(2, 3, 8, 8)
    totals = []
    for shape in ((3, 8, 8), (1, 12, 16), (3, 4, 16)):
        make = noise_for(0, [5, 6], (192,))
        bound = bits_per_dim(
            gaussian_network(scheduler),
            scheduler,
            x_0.reshape(2, *shape),
            lambda t, make=make, shape=shape: make(t).reshape(2, *shape),
        )
        totals.append(bound.total_bpd)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-6, atol=0)  # order of summation
    torch.testing.assert_close(totals[0], totals[2], rtol=1e-6, atol=0)


# Some of the timesteps


@pytest.mark.parametrize(("num_timesteps", "count"), [(1000, 50), (1000, 2), (10, 10), (1000, 999)])
def test_strata_cover_every_timestep_once_and_keep_the_decoder_apart(num_timesteps, count):
    strata = Strata.split(num_timesteps, count)
    assert len(strata.size) == count
    covered = torch.cat([torch.arange(f, f + s) for f, s in zip(*strata, strict=True)])
    assert torch.equal(covered, torch.arange(num_timesteps))
    assert strata.size[0] == 1
    equal = Strata.split(num_timesteps, count, power=1).size
    assert equal.sum() == num_timesteps
    assert equal[1:].max() - equal[1:].min() <= 1


def test_timesteps_are_uniform_in_each_share_and_even_over_the_images():
    strata = Strata.split(1000, 50, power=1)
    t = strata.draw(3, np.arange(2000))
    assert t.shape == (2000, 50)
    for k, (first, size) in enumerate(zip(*strata, strict=True)):
        visits = torch.bincount(t[:, k] - first, minlength=size)
        assert len(visits) == size
        # Multiples of the golden ratio are off by O(log N) in any interval, random ones by sqrt(N).
        assert (visits - 2000 / size).abs().max() <= 3
    assert torch.equal(strata.draw(3, np.array([7, 1999])), t[[7, 1999]])
    assert not torch.equal(strata.draw(4, np.arange(2000)), t)


def test_a_few_timesteps_estimate_the_bound_without_bias_and_state_their_error():
    """One image at 300 positions, so that timesteps and noise are all that differs."""
    scheduler, positions, shape = DDPMScheduler(100, beta_end=0.2), np.arange(300), (1, 12, 12)
    network, x_0 = gaussian_network(scheduler), on_levels(1, *shape).expand(300, *shape)
    few, every = BoundSums.zeros(100), BoundSums.zeros(100)
    strata = Strata.split(100, 16)
    t, eps = strata.draw(0, positions), noise_for(0, positions, shape)
    few.add(bits_per_dim(network, scheduler, x_0, eps, strata=strata, t=t))
    every.add(bits_per_dim(network, scheduler, x_0[:50], noise_for(1, range(50), shape)))
    error = (few.standard_error**2 + every.standard_error**2) ** 0.5
    assert abs(few.total_bpd - every.total_bpd) < 3.5 * error  # by chance 1 in 2,000
    # Without the shares' sizes, or without t = 0, more than a tenth would be missing.
    assert error < 0.02 * every.total_bpd


def test_noise_is_a_function_of_seed_position_and_timestep():
    t = torch.tensor([4, 4, 9])
    eps = noise_for(0, [10, 11, 11], (1, 2, 2))(t)
    assert torch.equal(noise_for(0, [11], (1, 2, 2))(t[2:]), eps[2:])
    different = [eps[0], eps[1], eps[2], noise_for(1, [10], (1, 2, 2))(t[:1])[0]]
    for i, a in enumerate(different):
        assert not any(torch.equal(a, b) for b in different[i + 1 :])


# Sums


@pytest.fixture(scope="module")
def measured():
    """Six images with all of 40 timesteps: (bound of each, scheduler)."""
    scheduler = DDPMScheduler(40, beta_end=0.4)
    eps = noise_for(0, range(6), (1, 4, 6))
    return bits_per_dim(gaussian_network(scheduler), scheduler, on_levels(6, 1, 4, 6), eps)


def test_sums_of_parts_are_those_of_the_whole(measured):
    whole, parts = BoundSums.zeros(40), [BoundSums.zeros(40) for _ in range(2)]
    whole.add(measured)
    for part, rows in zip(parts, (slice(0, 2), slice(2, 6)), strict=True):
        part.add(type(measured)(*(column[rows] for column in measured)))
    total = parts[0] + parts[1]
    assert total.num_images == whole.num_images == 6
    torch.testing.assert_close(total.images, whole.images, rtol=1e-12, atol=0)  # float64
    torch.testing.assert_close(total.timesteps, whole.timesteps, rtol=1e-12, atol=0)
    values = measured.total_bpd.numpy()
    assert whole.total_bpd == pytest.approx(values.mean(), rel=1e-12)
    assert whole.standard_error == pytest.approx(values.std(ddof=1) / 6**0.5, rel=1e-9)


def test_rate_and_distortion_along_the_reverse_process(measured):
    sums = BoundSums.zeros(40)
    sums.add(measured)
    curve = rate_distortion(sums, Strata.split(40))
    assert curve.t.tolist() == list(range(39, -1, -1))
    assert curve.rate_bpd[0] == pytest.approx(sums.prior_bpd)  # x_T costs L_T
    assert (curve.rate_bpd.diff() > 0).all()
    # Rate and the decoder's L_0, which is what the distortion costs, are the whole bound.
    l_0 = measured.vb_bpd[:, 0].mean()
    assert curve.rate_bpd[-1] + l_0 == pytest.approx(sums.total_bpd, rel=1e-12)
    rmse = 127.5 * measured.x_0_mse.mean(0).sqrt().flip(0)
    torch.testing.assert_close(curve.distortion_rmse, rmse, rtol=1e-12, atol=0)


def test_rate_of_larger_shares_is_that_of_their_middle(measured):
    """Every timestep of a share equally costly: the line through the exact points."""
    flat = measured._replace(vb_bpd=torch.full_like(measured.vb_bpd, 0.25))
    sums = BoundSums.zeros(40)
    sums.add(flat)
    exact, coarse = (rate_distortion(sums, Strata.split(40, k, power=1)) for k in (None, 14))
    assert coarse.t.tolist() == [38, 35, 32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    cubic = rate_distortion(sums, Strata.split(40, 6))
    assert cubic.rate_bpd[-1] == pytest.approx(exact.rate_bpd[-1])
    assert coarse.rate_bpd.tolist() == pytest.approx(exact.rate_bpd[39 - coarse.t.long()].tolist())


# Bad input


@pytest.mark.parametrize(
    ("pixel", "message"),
    [
        (float("nan"), "images must be finite; got NaN or infinity"),
        (float("inf"), "images must be finite; got NaN or infinity"),
        (255.0, r"images must be in \[-1, 1\]; got values from .* to 255: bytes become"),
        (-1.01, r"images must be in \[-1, 1\]; got values from -1.01"),
        (2 / 255, r"on the 256 levels that bytes have in \[-1, 1\] .*; got others, from"),
    ],
)
def test_images_that_are_none_are_refused(pixel, message):
    scheduler, x_0 = DDPMScheduler(), on_levels(2, 1, 4, 4)
    x_0[1, 0, 2, 3] = pixel
    with pytest.raises(InputError, match=message):
        bits_per_dim(gaussian_network(scheduler), scheduler, x_0, noise_for(0, [0, 1], (1, 4, 4)))


def test_images_in_0_to_1_are_refused():
    scheduler, x_0 = DDPMScheduler(), (on_levels(2, 1, 4, 4) + 1) / 2
    with pytest.raises(InputError, match=r"got others, from 0\.\d+ to .*: are these images in \[0"):
        bits_per_dim(gaussian_network(scheduler), scheduler, x_0, noise_for(0, [0, 1], (1, 4, 4)))


def test_strata_and_what_is_drawn_from_them_go_together():
    scheduler, x_0 = DDPMScheduler(), on_levels(1, 1, 4, 4)
    noise, strata = noise_for(0, [0], (1, 4, 4)), Strata.split(1000, 5)
    for alone in (dict(strata=strata), dict(t=strata.draw(0, np.arange(1)))):
        with pytest.raises(InputError, match="strata and t go together"):
            bits_per_dim(gaussian_network(scheduler), scheduler, x_0, noise, **alone)


def test_a_broken_network_is_refused():
    scheduler, x_0 = DDPMScheduler(8, beta_end=0.5), on_levels(1, 1, 4, 4)

    def unet(x_t, t):
        return UNet2DOutput(sample=torch.where(t[0] == 3, torch.nan, x_t))

    with pytest.raises(InputError, match=r"output is not finite at the timesteps \[3\]"):
        bits_per_dim(unet, scheduler, x_0, noise_for(0, [0], (1, 4, 4)))


@pytest.mark.parametrize("count", [1, 1001])
def test_a_number_of_timesteps_out_of_range(count):
    with pytest.raises(InputError, match=f"whole number between 2 and 1000; got {count}"):
        Strata.split(1000, count)


def test_the_bound_asks_no_float64_of_the_images_device():
    """MPS has none. What is made of the images is watched; tables are float64, on the CPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 4 and result.numel() > 2:
                assert result.dtype != torch.float64, function
            return result

    scheduler = DDPMScheduler(20, beta_end=0.5)
    with Watch():
        bits_per_dim(gaussian_network(scheduler), scheduler, on_levels(2, 1, 4, 4), fixed_noise)


def fixed_noise(t):
    return noise(len(t), 1, 4, 4)
