"""The objectives against golden numbers and exact networks, their weighting, and how timesteps are
drawn.
"""

from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.training_utils import compute_snr

from ddpm_hf.functional import bits_per_dim
from ddpm_hf.losses import (
    LossSecondMoment,
    drop_classes,
    hybrid_loss,
    min_snr_loss,
    min_snr_weight,
    simple_loss,
    stratified_timesteps,
    uniform_timesteps,
    vlb_loss,
    vlb_term,
)
from ddpm_hf.scheduler import DDPMScheduler

from .conftest import PROCESSES, T_ALL, images, noise

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")


class Golden:
    """Arrays of one golden file, and its process."""

    def __init__(self, shared, file):
        self.arrays = np.load(shared / "golden" / f"{file}.npz")
        self.process = PROCESSES[file]
        self.x_0, self.eps, self.t, self.x_t, self.eps_hat, self.v = (
            torch.from_numpy(self.arrays[key])
            for key in ("x_start", "noise", "t", "q_sample", "model_eps", "model_v")
        )

    def scheduler(self, variance_type, **settings):
        return DDPMScheduler(variance_type=variance_type, **self.process, **settings)

    def output(self, variance_type):
        return torch.cat([self.eps_hat, self.v], 1) if "learned" in variance_type else self.eps_hat

    def check(self, ours, key):
        """float32 arithmetic over 48 pixels; the bound of golden/README.md."""
        expected = self.arrays[key]
        np.testing.assert_allclose(
            ours.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
        )


@pytest.fixture(params=PROCESSES)
def golden(request, shared):
    return Golden(shared, request.param)


def says(output):
    """A network that answers always the same."""
    return lambda x_t, t: UNet2DOutput(sample=output)


# L_simple


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_simple_loss_matches_golden(golden, variance_type):
    unet = says(golden.output(variance_type))
    scheduler = golden.scheduler(variance_type)
    golden.check(simple_loss(unet, scheduler, golden.x_0, golden.eps, golden.t), "loss/simple")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_simple_loss_of_an_exact_network_is_zero(prediction_type):
    """Data of a single image: the noise in x_t is known, and so are eps, x_0 and v."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x_0 = images(1, 3, 4, 4)

    def unet(x_t: torch.Tensor, t: torch.Tensor) -> UNet2DOutput:
        a = scheduler.alpha_bar[t + 1].reshape(-1, 1, 1, 1)
        eps_hat = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
        v_hat = a.sqrt() * eps_hat - (1 - a).sqrt() * x_0
        known = {"epsilon": eps_hat, "sample": x_0.expand_as(x_t), "v_prediction": v_hat}
        return UNet2DOutput(sample=known[prediction_type])

    x_0_batch = x_0.expand(8, -1, -1, -1)
    loss = simple_loss(unet, scheduler, x_0_batch, noise(8, 3, 4, 4), T_ALL)
    assert loss.shape == (8,)
    # x_t is float32: its rounding of 6e-8 over sigma_0 = 0.01 is 6e-6 in eps, squared 4e-11.
    assert loss.max() < 1e-10


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_simple_loss_is_the_mean_square_of_the_error(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x_0, eps = images(8, 1, 4, 4), noise(8, 1, 4, 4)
    error = torch.arange(8.0).reshape(-1, 1, 1, 1)
    output = scheduler.target(x_0, eps, T_ALL) + error
    loss = simple_loss(says(output), scheduler, x_0, eps, T_ALL)
    torch.testing.assert_close(loss, torch.arange(8.0) ** 2)  # float32 defaults: 1e-6 relative


def test_simple_loss_gives_the_network_the_noised_image_and_the_timesteps():
    scheduler = DDPMScheduler()
    x_0, eps = images(8, 1, 4, 4), noise(8, 1, 4, 4)
    seen = {}

    def unet(x_t: torch.Tensor, t: torch.Tensor) -> UNet2DOutput:
        seen.update(x_t=x_t, t=t)
        return UNet2DOutput(sample=x_t)

    simple_loss(unet, scheduler, x_0, eps, T_ALL)
    assert torch.equal(seen["x_t"], scheduler.q_sample(x_0, eps, T_ALL))
    assert torch.equal(seen["t"], T_ALL)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_simple_loss_leaves_variance_channels_out(variance_type):
    x_0, eps = images(8, 1, 4, 4), noise(8, 1, 4, 4)
    prediction = noise(8, 1, 4, 4) * 0.5
    output = torch.cat([prediction, torch.full_like(prediction, 1e3)], 1).requires_grad_()
    loss = simple_loss(
        says(output),
        DDPMScheduler(variance_type=variance_type),
        x_0,
        eps,
        T_ALL,
    )
    fixed = simple_loss(says(prediction), DDPMScheduler(), x_0, eps, T_ALL)
    assert torch.equal(loss.detach(), fixed)
    loss.sum().backward()
    assert output.grad[:, 0].abs().min() > 0
    assert not output.grad[:, 1].any()


def test_simple_loss_refuses_a_network_with_channels_too_many():
    x = images(8, 1, 4, 4)
    with pytest.raises(ValueError, match="out_channels=1 for images of 1 channels; got 2"):
        simple_loss(
            lambda x_t, t: UNet2DOutput(sample=x_t.repeat(1, 2, 1, 1)),
            DDPMScheduler(),
            x,
            x,
            T_ALL,
        )


def test_simple_loss_of_a_real_network_in_bfloat16_is_float32(tiny_unet):
    scheduler = DDPMScheduler()
    x_0, eps = images(8, 1, 8, 8), noise(8, 1, 8, 8)
    with torch.no_grad():
        full = simple_loss(tiny_unet, scheduler, x_0, eps, T_ALL)
        with torch.autocast("cpu", torch.bfloat16):
            half = simple_loss(tiny_unet, scheduler, x_0, eps, T_ALL)
    assert half.dtype == torch.float32
    # bfloat16 has 8 bits: 0.4 % a rounding, a dozen layers.
    torch.testing.assert_close(half, full, rtol=0.05, atol=0)


# The bound


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_vlb_term_matches_golden(golden, variance_type, clip, clip_sample):
    """Clipped where both the scheduler does so and the caller wants it."""
    scheduler = golden.scheduler(variance_type, clip_sample=clip_sample)
    output = golden.output(variance_type)
    nats = vlb_term(scheduler, output, golden.x_0, golden.x_t, golden.t, clip=clip)
    assert nats.dtype == torch.float32
    key = f"p/{variance_type}/clip_{clip and clip_sample}/vb_bits_per_dim"
    golden.check(bits_per_dim(nats, golden.x_0), key)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_vlb_term_matches_golden_at_every_timestep(golden, variance_type):
    """The analytic network for N(0, I), at all T timesteps."""
    scheduler = golden.scheduler(variance_type)
    t = torch.arange(len(scheduler.beta))
    slope = (1 - scheduler.alpha_bar_at(t)).sqrt().float().reshape(-1, 1, 1, 1)
    terms = []
    for image, eps in zip(golden.arrays["bpd/x_start"], golden.arrays["bpd/noise"], strict=True):
        x_0, eps = (torch.from_numpy(x).expand(len(t), 3, 8, 8) for x in (image, eps))
        x_t = scheduler.q_sample(x_0, eps, t)
        terms.append(bits_per_dim(vlb_term(scheduler, slope * x_t, x_0, x_t, t), x_0))
    golden.check(torch.stack(terms), f"bpd/{variance_type}/vb")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_vlb_term_is_zero_but_for_the_decoder_when_the_model_is_the_posterior(prediction_type):
    """With x_0 known, fixed_small's reverse step is q(x_s | x_t, x_0) itself."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x_0, eps = (images(8, 1, 4, 4) * 127.5).round() / 127.5, noise(8, 1, 4, 4)
    x_0, eps = x_0.double(), eps.double()
    x_t = scheduler.q_sample(x_0, eps, T_ALL)
    nats = vlb_term(scheduler, scheduler.target(x_0, eps, T_ALL), x_0, x_t, T_ALL)
    assert nats[1:].abs().max() < 1e-12  # float64
    # Half a bin is 0.53 of the standard deviation exp(-9.8 / 2): a mass of 0.40, 0.91 nats.
    assert nats[0].item() == pytest.approx(16 * 0.91, abs=0.1)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_vlb_term_is_one_for_the_three_prediction_types_with_a_learned_variance(prediction_type):
    """One wrong image, and one variance, said in three ways."""
    x_0, eps, v = images(8, 1, 4, 4).double(), noise(8, 1, 4, 4).double(), images(8, 1, 4, 4)
    x_0_hat = x_0 + 0.1 * noise(8, 1, 4, 4).flip(0)
    terms = []
    for word in ("sample", prediction_type):
        scheduler = DDPMScheduler(prediction_type=word, variance_type="learned_range")
        x_t = scheduler.q_sample(x_0, eps, T_ALL)
        said = scheduler.target(x_0_hat, scheduler.to_eps(x_0_hat, x_t, T_ALL), T_ALL)
        terms.append(vlb_term(scheduler, torch.cat([said, v], 1), x_0, x_t, T_ALL, clip=False))
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-9, atol=0)  # float64, as below


def test_vlb_loss_matches_golden(golden):
    scheduler, unet = golden.scheduler("learned_range"), says(golden.output("learned_range"))
    golden.check(vlb_loss(unet, scheduler, golden.x_0, golden.eps, golden.t), "loss/vlb")


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_vlb_loss_does_not_clip_whatever_the_scheduler_does_in_sampling(golden, variance_type):
    scheduler, unet = golden.scheduler(variance_type), says(golden.output(variance_type))
    assert scheduler.config.clip_sample
    loss = vlb_loss(unet, scheduler, golden.x_0, golden.eps, golden.t)
    golden.check(loss, f"p/{variance_type}/clip_False/vb_bits_per_dim")


def test_hybrid_loss_matches_golden(golden):
    scheduler, unet = golden.scheduler("learned_range"), says(golden.output("learned_range"))
    batch = (golden.x_0, golden.eps, golden.t)
    hybrid = hybrid_loss(unet, scheduler, *batch)
    golden.check(hybrid, "loss/hybrid")
    golden.check(simple_loss(unet, scheduler, *batch), "loss/hybrid/mse")
    golden.check(hybrid - simple_loss(unet, scheduler, *batch), "loss/hybrid/vb")


def test_hybrid_loss_weights_its_first_part_alone_by_the_snr(golden):
    scheduler, unet = golden.scheduler("learned_range"), says(golden.output("learned_range"))
    batch = (golden.x_0, golden.eps, golden.t)
    weighted = hybrid_loss(unet, scheduler, *batch, gamma=5.0)
    expected = hybrid_loss(unet, scheduler, *batch) - simple_loss(unet, scheduler, *batch)
    expected += min_snr_loss(unet, scheduler, *batch, gamma=5.0)
    # Float32 roundings, relative to a loss of which the difference is the smaller part.
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_hybrid_loss_trains_the_variance_by_the_bound_and_the_prediction_by_the_error(
    prediction_type, variance_type
):
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    x_0, eps = images(8, 1, 4, 4), noise(8, 1, 4, 4)
    variance = 0.5 + 0.4 * images(8, 1, 4, 4)

    def gradient(loss_fn):
        # A small error: at t = 0 a large one meets the floor of the decoder, without a gradient.
        prediction = scheduler.target(x_0, eps, T_ALL) + 0.01
        output = torch.cat([prediction, variance], 1).requires_grad_()
        loss_fn(says(output), scheduler, x_0, eps, T_ALL).sum().backward()
        return output.grad.split(1, dim=1)

    of_hybrid, of_simple, of_bound = map(gradient, (hybrid_loss, simple_loss, vlb_loss))
    assert torch.equal(of_hybrid[0], of_simple[0])  # the bound adds exactly 0
    assert torch.equal(of_hybrid[1], of_bound[1])  # T = 1000: weighted by 1
    assert of_bound[0].abs().amax((1, 2, 3)).min() > 0
    assert of_hybrid[1].abs().amax((1, 2, 3)).min() > 0


def test_hybrid_loss_refuses_a_fixed_variance():
    x = images(8, 1, 4, 4)
    with pytest.raises(ValueError, match="use variance_type='learned_range'; got 'fixed_small'"):
        hybrid_loss(says(x), DDPMScheduler(), x, x, T_ALL)


LOSSES = (simple_loss, partial(min_snr_loss, gamma=5.0), vlb_loss, hybrid_loss)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_losses_of_a_real_network_give_every_weight_a_finite_gradient(tiny_unet, loss_fn):
    unet = type(tiny_unet).from_config({**tiny_unet.config, "out_channels": 2})
    scheduler = DDPMScheduler(variance_type="learned_range")
    loss = loss_fn(unet, scheduler, images(8, 1, 8, 8), noise(8, 1, 8, 8), T_ALL)
    assert loss.shape == (8,)
    loss.mean().backward()
    assert all(p.grad.isfinite().all() for p in unet.parameters())


# Classes


def test_drop_classes_hides_those_whose_draw_is_below_the_probability():
    labels, draws = torch.tensor([0, 3, 7, 9]), torch.tensor([0.0, 0.05, 0.1, 0.95])
    assert drop_classes(labels, draws, 10, 0.1).tolist() == [10, 10, 7, 9]
    assert drop_classes(labels, draws, 10, 0.0).tolist() == labels.tolist()
    assert drop_classes(labels, draws, 10, 1.0).tolist() == [10] * 4
    assert drop_classes(labels, draws, 10, 0.1).dtype == torch.int64


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_losses_train_a_class_conditional_network_by_a_partial_of_it(tiny_unet, loss_fn):
    torch.manual_seed(0)
    unet = type(tiny_unet).from_config(tiny_unet.config, out_channels=2, num_class_embeds=4)
    scheduler = DDPMScheduler(variance_type="learned_range")
    batch = (images(8, 1, 8, 8), noise(8, 1, 8, 8), T_ALL)
    labels = torch.arange(8) % 2
    loss = loss_fn(partial(unet, class_labels=labels), scheduler, *batch)
    other = loss_fn(partial(unet, class_labels=1 - labels), scheduler, *batch)
    assert loss.shape == (8,)
    assert not torch.equal(loss, other)
    loss.mean().backward()
    used = unet.class_embedding.weight.grad.abs().amax(1) > 0
    assert used.tolist() == [True, True, False, False]


# Weights


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weight_values(prediction_type, gamma):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    snr = scheduler.alpha_bar[1:] / (1 - scheduler.alpha_bar[1:])
    expected = {
        "epsilon": torch.minimum(torch.ones_like(snr), gamma / snr),
        "sample": torch.minimum(snr, torch.full_like(snr, gamma)),
        "v_prediction": torch.minimum(snr / (snr + 1), gamma / (snr + 1)),
    }[prediction_type]
    weight = min_snr_weight(scheduler, torch.arange(1000), gamma)
    assert weight.dtype == torch.float64
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)  # float64 roundings


def test_min_snr_weight_by_hand():
    """beta = 0.1, then 0.5: alpha_bar is 0.9 and 0.45, the SNR 9 and 9 / 11."""
    t, expected = (
        torch.tensor([0, 1]),
        {
            "epsilon": [5 / 9, 1.0],
            "sample": [5.0, 9 / 11],
            "v_prediction": [0.5, 9 / 20],
        },
    )
    for prediction_type, values in expected.items():
        scheduler = DDPMScheduler(2, trained_betas=[0.1, 0.5], prediction_type=prediction_type)
        assert min_snr_weight(scheduler, t, 5.0).tolist() == pytest.approx(values, rel=1e-12)


def test_min_snr_weight_makes_one_objective_of_the_three_prediction_types():
    """One wrong x_0, said as eps, as x_0 and as v, costs the same."""
    x_0, eps = images(8, 1, 4, 4).double(), noise(8, 1, 4, 4).double()
    x_0_hat = x_0 + 0.1 * noise(8, 1, 4, 4).flip(0)
    costs = []
    for prediction_type in PREDICTION_TYPES:
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        x_t = scheduler.q_sample(x_0, eps, T_ALL)
        said = scheduler.target(x_0_hat, scheduler.to_eps(x_0_hat, x_t, T_ALL), T_ALL)
        error = (said - scheduler.target(x_0, eps, T_ALL)).square().mean((1, 2, 3))
        costs.append(min_snr_weight(scheduler, T_ALL, 5.0) * error)
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-9, atol=0)  # float64; eps at t = 0
    torch.testing.assert_close(costs[2], costs[1], rtol=1e-9, atol=0)  # loses 4 of 16 digits


def test_min_snr_weight_is_zero_where_no_signal_is_left():
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert min_snr_weight(scheduler, torch.tensor([999]), 5.0).tolist() == [0.0]


def test_pitfall_4_15_weight_of_the_x_0_loss_is_bounded():
    """Stock's training script weighs an x_0 loss by the SNR, unclipped: 9999 at t = 0."""
    t = torch.arange(1000)
    snr = compute_snr(diffusers.DDPMScheduler(prediction_type="sample"), t)
    assert snr[0] == pytest.approx(9999, rel=1e-3)  # stock's float32 alpha_bar: 6e-8 / 1e-4
    scheduler = DDPMScheduler(prediction_type="sample")
    assert min_snr_weight(scheduler, t, 5.0).max() == 5
    x_0, eps = images(8, 1, 4, 4), noise(8, 1, 4, 4)
    loss = simple_loss(
        lambda x_t, t: UNet2DOutput(sample=x_0 + 0.5), scheduler, x_0, eps, T_ALL * 0
    )
    torch.testing.assert_close(loss, torch.full((8,), 0.25))  # no weight of its own


# Timesteps

DRAWS = (uniform_timesteps, stratified_timesteps)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("num_timesteps", [2, 1000, 1023, 1024, 1025, 4000])
def test_timesteps_stay_in_range_for_the_smallest_and_largest_draw(draw, num_timesteps):
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))  # of torch.rand's float32
    assert draw(torch.zeros(1), num_timesteps).tolist() == [0]
    assert draw(largest.reshape(1), num_timesteps).tolist() == [num_timesteps - 1]
    t = draw(largest.expand(7), num_timesteps)
    assert t.dtype == torch.int64
    assert t.max() == num_timesteps - 1


@pytest.mark.parametrize("num_timesteps", [100, 1000])
@pytest.mark.parametrize("batch", [1, 4, 10, 50])
def test_stratified_timesteps_put_one_in_every_stratum(batch, num_timesteps):
    width = num_timesteps // batch
    for seed in range(20):
        draws = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
        t = stratified_timesteps(draws, num_timesteps)
        assert (t // width).tolist() == list(range(batch))


def test_stratified_timesteps_have_a_draw_of_their_own_in_every_stratum():
    draws = torch.tensor([0.25, 0.75, 0.0, 0.5])
    assert stratified_timesteps(draws, 400).tolist() == [25, 175, 200, 350]


@pytest.mark.parametrize("batch", [3, 7, 128, 300])
def test_stratified_timesteps_cover_evenly_a_range_that_the_batch_does_not_divide(batch):
    """Share i is [i T / B, (i + 1) T / B), cut to integers; with more images than timesteps too."""
    draws = torch.rand(batch, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = stratified_timesteps(draws, 200)
    for i in range(batch):
        assert i * 200 // batch <= t[i] <= (i + 1) * 200 / batch


@pytest.mark.parametrize("draw", DRAWS)
def test_timesteps_are_marginally_uniform(draw):
    """No chance: draws on a grid that is uniform over [0, 1) yield every timestep equally often."""
    batch, num_timesteps, repeats = 8, 200, 1000
    grid = (torch.arange(repeats, dtype=torch.float64) + 0.5) / repeats
    t = torch.cat([draw(u.expand(batch), num_timesteps) for u in grid])
    assert t.bincount(minlength=num_timesteps).tolist() == [batch * repeats // num_timesteps] * 200


def test_uniform_timesteps_are_independent_of_the_batch():
    draws = torch.rand(16, generator=torch.Generator().manual_seed(0))
    whole = uniform_timesteps(draws, 1000)
    parts = torch.cat([uniform_timesteps(part, 1000) for part in draws.split(4)])
    assert torch.equal(whole, parts)


# Loss-second-moment


def midpoints(number: int) -> torch.Tensor:
    """A grid that is uniform over [0, 1), in place of random draws."""
    return (torch.arange(number, dtype=torch.float64) + 0.5) / number


def warmed_up(losses: torch.Tensor) -> LossSecondMoment:
    """Timestep t has had the loss `losses[t]` ten times."""
    sampler = LossSecondMoment(len(losses))
    for _ in range(10):
        sampler.update(torch.arange(len(losses)), losses)
    return sampler


def test_loss_second_moment_is_uniform_until_every_timestep_has_ten_losses():
    sampler, draws = LossSecondMoment(4), midpoints(400)
    ten_of_three = torch.tensor([0, 1, 2]).repeat(10)
    sampler.update(ten_of_three, torch.arange(30.0))
    sampler.update(torch.full((9,), 3), torch.full((9,), 100.0))
    assert torch.equal(sampler.sample(draws), uniform_timesteps(draws, 4))
    assert torch.equal(sampler.weight(torch.arange(4)), torch.ones(4).double())
    sampler.update(torch.tensor([3]), torch.tensor([100.0]))
    assert (sampler.sample(draws) == 3).sum() > 200
    assert sampler.weight(torch.tensor([3])) < 1


def test_loss_second_moment_draws_in_proportion_to_the_root_mean_square():
    sampler = LossSecondMoment(2)
    sampler.update(torch.zeros(10).long(), torch.tensor([3.0, 1.0] * 5))  # sqrt(5), not 2
    sampler.update(torch.ones(10).long(), torch.full((10,), 5**0.5))
    assert sampler.probabilities.tolist() == pytest.approx([0.5, 0.5], rel=1e-7)
    sampler = warmed_up(torch.tensor([1.0, 2.0, 5.0]))
    expected = [0.999 * share + 0.001 / 3 for share in (1 / 8, 2 / 8, 5 / 8)]
    assert sampler.probabilities.tolist() == pytest.approx(expected, rel=1e-12)
    counts = sampler.sample(midpoints(100_000)).bincount(minlength=3)
    # An inverse distribution function cuts a grid of n points exactly, but for one at either edge.
    assert counts.tolist() == pytest.approx([100_000 * p for p in expected], abs=2)


def test_loss_second_moment_never_forgets_a_timestep():
    losses = torch.zeros(1000)
    losses[3] = 1.0
    sampler = warmed_up(losses)
    assert sampler.probabilities.min() == pytest.approx(1e-6)
    assert sampler.weight(torch.tensor([0])).item() == pytest.approx(1000)


def test_loss_second_moment_is_uniform_when_all_losses_are_zero():
    assert warmed_up(torch.zeros(5)).probabilities.tolist() == [0.2] * 5


def test_loss_second_moment_is_unbiased():
    """The mean of weight * f(t) is that of f over uniform timesteps, for any f."""
    sampler = warmed_up(torch.logspace(0, -4, 100))
    f = torch.linspace(-1, 3, 100, dtype=torch.float64)
    exact = (sampler.probabilities * sampler.weight(torch.arange(100)) * f).sum()
    assert exact.item() == pytest.approx(1, rel=1e-12)
    t = sampler.sample(midpoints(1_000_000))
    # Each timestep's share of a grid of n points is right to 1 / n, its weight up to 1 / (T p) <
    # 100, so 100 timesteps are off by 100 * 100 / n * mean |f| at most.
    assert (sampler.weight(t) * f[t]).mean().item() == pytest.approx(1, abs=0.02)


def test_loss_second_moment_lowers_the_variance_of_a_loss_that_varies_over_timesteps():
    losses = torch.logspace(0, -4, 100)
    sampler = warmed_up(losses)
    t = sampler.sample(midpoints(10_000))
    assert (sampler.weight(t) * losses[t]).std() < 0.1 * losses.std()


@pytest.mark.parametrize("num_timesteps", [2, 1000, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_second_moment_stays_in_range_for_the_smallest_and_largest_draw(dtype, num_timesteps):
    sampler = warmed_up(torch.linspace(0, 1, num_timesteps) + 0.1)
    largest = torch.nextafter(torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype))
    assert sampler.sample(torch.zeros(1, dtype=dtype)).tolist() == [0]
    assert sampler.sample(largest).tolist() == [num_timesteps - 1]
    assert sampler.sample(largest).dtype == torch.int64


def test_loss_second_moment_keeps_the_last_ten_also_within_one_batch():
    many, few = LossSecondMoment(2), LossSecondMoment(2)
    losses = torch.arange(25.0)
    many.update(torch.ones(25).long(), losses)
    for loss in losses[15:]:
        few.update(torch.ones(1).long(), loss.reshape(1))
    assert sorted(many.history[1].tolist()) == list(range(15, 25))
    assert sorted(few.history[1].tolist()) == list(range(15, 25))
    assert many.counts.tolist() == [0, 25]
    assert not many.history[0].any()


def test_loss_second_moment_goes_on_from_its_state(tmp_path):
    from safetensors.torch import load_file, save_file

    sampler, loaded = warmed_up(torch.linspace(1, 2, 20)), LossSecondMoment(20)
    sampler.update(torch.tensor([7, 7, 3]), torch.tensor([9.0, 8.0, 7.0]))
    save_file(sampler.state_dict(), tmp_path / "sampler.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "sampler.safetensors"))
    for one in (sampler, loaded):
        one.update(torch.tensor([7, 0]), torch.tensor([1.0, 2.0]))
    assert torch.equal(sampler.probabilities, loaded.probabilities)
    assert torch.equal(sampler.history, loaded.history)
    with pytest.raises(RuntimeError, match="size"):
        LossSecondMoment(21).load_state_dict(sampler.state_dict())
