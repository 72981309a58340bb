"""Optimal variances and timesteps against golden numbers, an exact world and exhaustive search; how
they are stored, and that sampling uses them.
"""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import DDPMPipeline, DDPMScheduler, build_scheduler
from ddpm_hf.calibration import (
    Estimate,
    estimate_mean_square_eps,
    estimate_x_0_variance,
    forget,
    optimal_timesteps,
    step_costs,
    store,
)
from ddpm_hf.errors import InputError
from ddpm_hf.likelihood import BoundSums, Strata, bits_per_dim, noise_for

from .conftest import images, noise
from .test_scheduler import PROBES, WORLD, GaussianWorld

STEPS = (5, 10, 25, 50, 100, 200)


def exactly(value: torch.Tensor) -> Estimate:
    return Estimate(value, torch.zeros_like(value))


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "analytic_linear_T1000.npz")


@pytest.fixture(scope="module")
def calibrated(golden):
    """A scheduler with golden's statistics, and its optimal timesteps for every golden K."""
    scheduler = DDPMScheduler(timestep_spacing="linspace")
    store(scheduler, exactly(torch.from_numpy(golden["mean_square_eps"])), steps=STEPS)
    return scheduler


# Golden numbers


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", ["linear", "dp_seg"])
def test_optimal_variances_match_golden(golden, calibrated, name, num_steps):
    key = f"{name}/{num_steps}"
    timesteps = torch.from_numpy(golden[f"{key}/timesteps"])
    s, t = timesteps[:-1], timesteps[1:]
    expected = golden[f"{key}/optimal_variance"][1:]
    mean_square_eps = torch.from_numpy(golden["mean_square_eps"])
    ours = calibrated.optimal_variance(t, s, calibrated.x_0_variance(mean_square_eps))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)  # golden/README.md
    sampled = calibrated.reverse_log_variance(t, s, analytic=True).exp()
    np.testing.assert_allclose(sampled[1:], expected[1:], rtol=0, atol=1e-6)
    # The last noise is clipped, after golden: two grey levels in the mean.
    most = (2 * 2 / 255) ** 2 * math.pi / 2
    assert sampled[0] == pytest.approx(min(expected[0], most), rel=1e-9)


@pytest.mark.parametrize("num_steps", STEPS)
def test_optimal_timesteps_are_those_of_golden(golden, calibrated, num_steps):
    calibrated.set_timesteps(num_steps)
    assert calibrated.timesteps.tolist()[::-1] == golden[f"dp_seg/{num_steps}/timesteps"].tolist()
    assert calibrated.previous_timestep(calibrated.timesteps[-1]) == -1


def test_other_numbers_of_timesteps_are_spaced_as_configured(golden, calibrated):
    calibrated.set_timesteps(11)
    plain = DDPMScheduler(timestep_spacing="linspace")
    plain.set_timesteps(11)
    assert torch.equal(calibrated.timesteps, plain.timesteps)


# A world with exact answers


def world_statistics(scheduler: DDPMScheduler, of: GaussianWorld = WORLD) -> Estimate:
    """E|eps_hat|^2 of the exact network, for x_t ~ N(sqrt(a) m, a c + 1 - a)."""
    a = scheduler.alpha_bar[1:]
    return exactly((1 - a) / (a * of.c + 1 - a))


def final_variances(scheduler: DDPMScheduler, num_steps: int, step) -> tuple[float, float]:
    """Variance of the images at the end: the last step drawn too, or its mean taken."""
    scheduler.set_timesteps(num_steps)
    variance = before = 1.0
    for t in scheduler.timesteps.tolist():
        s = scheduler.previous_timestep(t)
        p = step(WORLD.output(scheduler, PROBES, t), PROBES, t, s).distribution
        slope = (p.mean[1] - p.mean[0]).item()
        before = slope**2 * variance
        variance = before + p.log_variance.exp().item()
    return variance, before


def world(**settings) -> DDPMScheduler:
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing", **settings)
    store(scheduler, world_statistics(scheduler))
    return scheduler


def uncalibrated(scheduler: DDPMScheduler) -> DDPMScheduler:
    plain = DDPMScheduler.from_config(scheduler.config)
    plain.register_to_config(_ddpm_hf={})
    return plain


@pytest.mark.parametrize("num_steps", [1, 2, 5, 50, 137, 1000])
def test_gaussian_world_ends_at_the_variance_of_the_data(num_steps):
    scheduler = world(variance_type="fixed_large")

    def step(*arguments):
        return scheduler.p_step(*arguments, analytic=True)

    drawn, of_mean = final_variances(scheduler, num_steps, step)
    # x_T is N(0, I) for N(., 1 - (1 - c) alpha_bar_T), 3e-5 off, of which 2.5e-6 reaches x_0.
    assert drawn == pytest.approx(WORLD.c, abs=1e-9)
    expected = {1: 0.000, 5: 0.081, 50: 0.244, 1000: 0.250}.get(num_steps, of_mean)
    assert of_mean == pytest.approx(expected, abs=6e-4)  # the design's table, three decimals


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_sub_chain_takes_the_calibrated_variance_by_itself(prediction_type):
    scheduler = world(prediction_type=prediction_type)
    drawn, _ = final_variances(scheduler, 20, scheduler.p_step)
    assert drawn == pytest.approx(WORLD.c, abs=1e-9)
    plain = uncalibrated(scheduler)
    assert final_variances(plain, 20, plain.p_step)[0] < 0.2


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_steps", [1, 5, 50])
def test_analytic_ddim_ends_there_too_for_any_eta(num_steps, eta):
    scheduler = world()

    def step(*arguments):
        return scheduler.ddim_step(*arguments, eta=eta, analytic=True)

    drawn, _ = final_variances(scheduler, num_steps, step)
    # The 3e-5 by which x_T differs reaches x_0 as c times as much where no noise replaces it.
    assert drawn == pytest.approx(WORLD.c, abs=1e-9 if eta == 1 else 1e-5)


def test_the_bound_of_a_sub_chain_is_least_with_the_optimal_variance():
    """In one dimension, by hand: E KL(q(x_s | x_t, x_0) || p(x_s | x_t)) over x_0 given x_t."""
    scheduler = world()
    t, s = 600, 300
    x_0_variance = WORLD.x_0_variance(scheduler, t).item()
    coef = scheduler.q_posterior(PROBES, PROBES * 0, t, s).mean[1].item()
    known = scheduler.posterior_log_variance(t, s).exp().item()

    def kl(variance):
        return 0.5 * (math.log(variance / known) + (known + coef**2 * x_0_variance) / variance - 1)

    optimal = scheduler.reverse_log_variance(t, s).exp().item()
    assert all(kl(optimal) < kl(optimal * factor) for factor in (0.9, 1.1))
    costs = step_costs(scheduler, scheduler.x_0_variance(world_statistics(scheduler).value))
    assert costs[s, t] == pytest.approx(kl(optimal), rel=1e-9)  # float64


def test_a_network_that_errs_gets_the_variance_of_its_error():
    """x_0_hat off by 0.3 everywhere: the bound is least with that in the variance, and the chain
    ends with as much more; E|eps_hat|^2 does not tell.
    """
    scheduler = world()
    implied = scheduler.x_0_variance(world_statistics(scheduler).value)
    store(scheduler, world_statistics(scheduler), x_0_variance=exactly(implied + 0.09))
    t, s = 600, 300
    coef = scheduler.q_posterior(PROBES, PROBES * 0, t, s).mean[1].item()
    more = scheduler.reverse_log_variance(t, s).exp() - world().reverse_log_variance(t, s).exp()
    assert more.item() == pytest.approx(coef**2 * 0.09, rel=1e-9)


# Which steps are calibrated ones


def test_all_timesteps_keep_the_variance_type():
    scheduler, output, x_t = world(), noise(2, 1, 4, 4), images(2, 1, 4, 4)
    plain = uncalibrated(scheduler)
    for num_steps, equal in ((1000, True), (900, False)):
        ends = []
        for each in (scheduler, plain):
            each.set_timesteps(num_steps)
            # 700 -> 699 in both, a step of one timestep also in the chain of 900
            assert each.previous_timestep(700) == 699
            ends.append(each.step(output, 700, x_t, torch.Generator().manual_seed(0)).prev_sample)
        assert torch.equal(*ends) == equal


def test_the_full_chain_is_not_calibrated_whatever_sub_chain_was_set():
    """The bound takes t -> t - 1, and may be computed between two samplings."""
    scheduler = world()
    plain = uncalibrated(scheduler)
    scheduler.set_timesteps(10)
    t = torch.arange(1000)
    assert torch.equal(
        scheduler.reverse_log_variance(t, t - 1), plain.reverse_log_variance(t, t - 1)
    )


def test_steps_of_a_batch_are_told_apart_one_by_one():
    scheduler = DDPMScheduler(variance_type="learned_range")
    store(scheduler, world_statistics(scheduler))
    t, s, v = torch.tensor([500, 500, 40]), torch.tensor([499, 300, -1]), images(3, 1, 2, 2)
    ours = scheduler.reverse_log_variance(t, s, v)
    assert ours.shape == v.shape
    plain = DDPMScheduler(variance_type="learned_range").reverse_log_variance(t, s, v)
    assert torch.equal(ours[0], plain[0])
    analytic = scheduler.reverse_log_variance(t, s, analytic=True)
    for i in (1, 2):
        torch.testing.assert_close(ours[i], torch.full_like(v[i], analytic[i]))


def test_the_last_noise_is_two_grey_levels_in_the_mean_and_one_for_ddim_and_cosine():
    level = 2 / 255 * math.sqrt(math.pi / 2)
    for settings, levels in (({}, 2), (dict(beta_schedule="squaredcos_cap_v2"), 1)):
        scheduler = DDPMScheduler(**settings)
        # eps_hat = 0: nothing is known of x_0, whose variance is then the bound's 1
        store(scheduler, exactly(torch.zeros(1000, dtype=torch.float64)))
        deviation = scheduler.reverse_log_variance(300, 0).exp().sqrt().item()
        assert deviation == pytest.approx(levels * level)
        assert scheduler.analytic_variance(300, 0, eta=0).sqrt().item() == pytest.approx(level)
        assert scheduler.reverse_log_variance(300, 1).exp().sqrt() > levels * level
        deviation = noise(1, 1, 200, 200).abs().mean() * deviation
        assert deviation == pytest.approx(levels * 2 / 255, rel=0.01)  # 40,000 draws: 0.4 %


def test_x_0_has_a_variance_of_at_most_one_and_at_least_none():
    scheduler = DDPMScheduler()
    t, s = torch.tensor([900]), torch.tensor([500])
    none, all_of_it = (torch.full((1000,), value).double() for value in (1.2, -50.0))
    least = scheduler.optimal_variance(t, s, scheduler.x_0_variance(none))
    assert least == scheduler.posterior_log_variance(t, s).exp()
    most = scheduler.optimal_variance(t, s, scheduler.x_0_variance(all_of_it))
    coef = scheduler.q_posterior(torch.ones(1, 1), torch.zeros(1, 1), t, s).mean.double()
    # q_posterior's result is float32 here
    assert most.item() == pytest.approx(least.item() + coef.item() ** 2, rel=1e-6)


def test_zero_terminal_snr_has_a_finite_variance():
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    store(scheduler, world_statistics(scheduler))
    at_the_end, before = scheduler.reverse_log_variance(
        torch.tensor([999, 998]), torch.tensor([500])
    )
    assert at_the_end.isfinite()
    assert at_the_end.item() == pytest.approx(before.item(), abs=0.01)  # neighbours


# Timesteps


def test_optimal_timesteps_are_the_best_of_all():
    scheduler = build_scheduler(ddpm_num_steps=12)
    costs = step_costs(scheduler, scheduler.x_0_variance(world_statistics(scheduler).value))
    found = optimal_timesteps(costs, range(2, 13))
    for count, chain in found.items():
        assert chain == sorted(chain, reverse=True)
        assert (len(chain), chain[0], chain[-1]) == (count, 11, 0)

        def cost(chain):
            return sum(costs[s, t].item() for t, s in itertools.pairwise(chain))

        choices = itertools.combinations(range(1, 11), count - 2)
        best = min(cost((11, *sorted(middle, reverse=True), 0)) for middle in choices)
        assert cost(chain) == pytest.approx(best, rel=1e-12)


def test_costs_are_of_steps_back_only_and_never_negative():
    costs = step_costs(DDPMScheduler(), torch.zeros(1000).double())
    assert costs.shape == (1000, 1000)
    assert costs.tril().isinf().sum() == 1000 * 1001 / 2
    forward = costs[tuple(torch.triu_indices(1000, 1000, 1))]
    assert (forward >= -1e-12).all()  # two ways to the same logarithm
    assert forward.isfinite().all()


@pytest.mark.parametrize("steps", [[1], [25, 1001]])
def test_a_number_of_steps_out_of_range(steps):
    with pytest.raises(InputError, match=f"whole number between 2 and 1000; got {steps[-1]}"):
        optimal_timesteps(torch.zeros(1000, 1000), steps)


# The estimate


def test_the_estimate_is_unbiased_and_its_error_is_as_stated():
    """Pixels ~ N(0, 0.03), in [-1, 1] but for one in 10^8; 40 timesteps with 150 images each."""
    scheduler = DDPMScheduler(40, beta_end=0.4, clip_sample=False)
    small = GaussianWorld(m=0.0, c=0.03)
    exact, sums = world_statistics(scheduler, small).value, BoundSums.zeros(40)
    x_0 = small.c**0.5 * torch.randn(1500, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    x_0 = ((x_0 + 1) * 127.5).round() / 127.5 - 1  # a variance of 5e-6 more

    def unet(x_t, t):
        a = scheduler.alpha_bar_at(t).float().reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample=(1 - a).sqrt() * x_t / (a * small.c + 1 - a))

    strata, positions = Strata.split(40, 4, power=1), np.arange(1500)
    t, eps = strata.draw(0, positions), noise_for(0, positions, (1, 6, 6))
    sums.add(bits_per_dim(unet, scheduler, x_0, eps, strata=strata, t=t))
    value, error = estimate_mean_square_eps(sums)
    z = ((value - exact) / error)[1:]
    assert z.abs().max() < 4  # 39 standard normal numbers
    assert 0.6 < z.square().mean() < 1.7
    # What an exact network's x_0_hat misses is the variance that it implies; to 5 standard errors
    # of 150 x 36 squares.
    around, its_error = estimate_x_0_variance(sums)
    torch.testing.assert_close(around, scheduler.x_0_variance(exact), rtol=5 * 0.019, atol=0)
    z = (around - scheduler.x_0_variance(exact)) / its_error
    # Where x_0_hat is nearly x_0 its error is that of the rounding of x_0, too.
    assert 0.5 < z[2:].square().mean() < 1.8
    # The plain mean, which is noise's mean square for large t, is many times less exact there.
    visits, plain, squares = sums.timesteps[0], sums.timesteps[4], sums.timesteps[6]
    of_mean = ((squares / visits - (plain / visits) ** 2) / visits).sqrt()
    assert (error[-10:] < of_mean[-10:] / 10).all()
    assert (error[1:] < 1.05 * of_mean[1:]).all()


def test_neighbours_make_the_variance_of_x_0_steadier_and_do_not_bend_it():
    sums = BoundSums.zeros(1000)
    t = torch.arange(1000, dtype=torch.float64)
    exact = 1e-4 + 5e-4 * t + torch.where(t < 20, 1e-3 * t**2, 0.4)  # steep at first, then a line
    sums.timesteps[0], sums.timesteps[2] = 3, 3 * exact
    smooth = torch.cat([torch.arange(0, 10), torch.arange(31, 1000)])  # without the corner at 20
    torch.testing.assert_close(
        estimate_x_0_variance(sums).value[smooth], exact[smooth].clamp(max=1), rtol=1e-9, atol=0
    )  # float64
    error = 0.1 * torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    sums.timesteps[2] *= 1 + error
    ratio = (estimate_x_0_variance(sums).value / exact - 1)[200:800]
    assert ratio.std() < 0.1 / 21**0.5 * 1.5  # means of 21, whose own mean moves it a little


def test_errors_of_two_visits_are_those_of_a_sample():
    """Of 1.0 and 1.2 the mean is known to 0.1: n - 1 in the variance, and not n."""
    sums = BoundSums.zeros(5)  # without neighbours
    sums.timesteps[0], sums.timesteps[2], sums.timesteps[9] = 2, 0.5 + 0.7, 0.5**2 + 0.7**2
    sums.timesteps[4], sums.timesteps[6] = 1.0 + 1.2, 1.0**2 + 1.2**2
    sums.timesteps[5], sums.timesteps[7], sums.timesteps[8] = 2, 2, 1.0 + 1.2  # noise 1 and 1
    for estimate in (estimate_x_0_variance(sums), estimate_mean_square_eps(sums)):
        assert estimate.standard_error.tolist() == pytest.approx([0.1] * 5, rel=1e-6)  # float64


def test_an_estimate_needs_two_visits_of_every_timestep():
    sums = BoundSums.zeros(10)
    sums.timesteps[0] = torch.tensor([3, 2, 2, 2, 1, 2, 2, 2, 2, 2])
    with pytest.raises(InputError, match="timestep 4 has 1: use more images, or more timesteps"):
        estimate_mean_square_eps(sums)


# On disk


def test_what_is_stored_survives_the_disk_stock_and_other_schedulers(tmp_path):
    scheduler = build_scheduler("cifar10", class_names=["cat"])
    statistics = Estimate(world_statistics(scheduler).value, torch.full((1000,), 0.00123456))
    store(scheduler, statistics, steps=[10], dataset="x", num_images=3)
    expected = dict(scheduler.extras)
    assert expected["format"] == 1
    assert expected["class_names"] == ["cat"]
    assert expected["analytic"]["dataset"] == "x"
    assert expected["analytic"]["standard_error"][0] == 0.00123
    scheduler.save_pretrained(tmp_path / "a")
    stock = diffusers.DDPMScheduler.from_pretrained(tmp_path / "a")
    ddim = diffusers.DDIMScheduler.from_config(stock.config)
    ddim.save_pretrained(tmp_path / "b")
    again = DDPMScheduler.from_pretrained(tmp_path / "b")
    assert again.extras["analytic"] == expected["analytic"]
    t, s = torch.tensor([900, 30]), torch.tensor([700, -1])
    assert torch.equal(again.reverse_log_variance(t, s), scheduler.reverse_log_variance(t, s))
    for each in (again, scheduler):
        each.set_timesteps(10)
    assert torch.equal(again.timesteps, scheduler.timesteps)


@pytest.mark.parametrize(
    "change",
    [
        dict(beta_schedule="squaredcos_cap_v2"),
        dict(beta_end=0.03),
        dict(num_train_timesteps=500),
        dict(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    ],
)
def test_statistics_of_another_schedule_are_refused(change):
    scheduler = DDPMScheduler.from_config(world().config, **change)
    for use in (
        lambda: scheduler.set_timesteps(10),
        lambda: scheduler.reverse_log_variance(400, 200),
    ):
        with pytest.raises(InputError, match="those of 1000 timesteps of another noise schedule"):
            use()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(999), "must be 1000 finite numbers, one a timestep; got 999, 999 of them"),
        (torch.full((1000,), torch.nan), "got 1000, 0 of them finite"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(value, message):
    scheduler = DDPMScheduler()
    with pytest.raises(InputError, match=message):
        store(scheduler, exactly(value.double()))
    with pytest.raises(InputError, match=message):
        store(scheduler, exactly(torch.ones(1000)), x_0_variance=exactly(value.double()))
    assert scheduler.extras == {}


def test_the_calibrated_variance_of_a_model_that_is_not_calibrated():
    with pytest.raises(InputError, match="needs a calibrated model: run `ddpm-hf calibrate`"):
        DDPMScheduler().reverse_log_variance(400, 200, analytic=True)


def test_a_pipeline_samples_by_it(tiny_unet, tmp_path):
    """`pipe(num_inference_steps=K)` is the chain of optimal timesteps and analytic variances."""
    scheduler = build_scheduler("cifar10")
    store(scheduler, world_statistics(scheduler), steps=[6])
    DDPMPipeline(tiny_unet, scheduler).save_pretrained(tmp_path)
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    for num_steps in (6, 7):
        ours = pipe(2, torch.Generator().manual_seed(0), num_steps, output_type="pt").images
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 1, 8, 8, generator=generator)
        chain = pipe.scheduler.timesteps.tolist()
        stored = scheduler.analytic["timesteps"]["6"]
        assert (chain == stored) == (num_steps == 6)
        for t, s in itertools.pairwise([*chain, -1]):
            with torch.no_grad():
                p = scheduler.p_step(tiny_unet(x, t).sample, x, t, s).distribution
            variance = scheduler.analytic_variance(t, s).float()
            x = p.mean + (
                variance.sqrt() * torch.randn(x.shape, generator=generator) if s >= 0 else 0
            )
        torch.testing.assert_close(ours, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)  # float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x_0_variance=[0.1] * 10), "are damaged .numbers out of range"),
        (dict(x_0_variance=[-5.0] * 1000), "are damaged .numbers out of range"),
        (dict(x_0_variance=[float("nan")] * 1000), "are damaged .numbers out of range"),
        (dict(mean_square_eps=[float("inf")] * 1000), "are damaged .numbers out of range"),
        (dict(mean_square_eps=["a"] * 1000), "are damaged .*calibrate the model again"),
        (dict(clip_pixels=None), "are damaged .*calibrate the model again"),
        (dict(clip_pixels=0), "are damaged .numbers out of range"),
        (dict(timesteps={"5": [999, 0]}), "timesteps that are no descending list of so many"),
        (dict(timesteps={"2": [0, 999]}), "timesteps that are no descending list of so many"),
        (dict(timesteps={"2": [1000, 0]}), "timesteps that are no descending list of so many"),
        (dict(timesteps={"2": ["x", 0]}), "are damaged .*calibrate the model again"),
        (dict(timesteps={"few": [999, 0]}), "are damaged .*calibrate the model again"),
        (dict(timesteps=[999, 0]), "are damaged .*calibrate the model again"),
    ],
)
def test_damaged_statistics_are_refused_where_they_are_used(change, message):
    scheduler = world()
    analytic = {**scheduler.analytic, **change}
    scheduler.register_to_config(_ddpm_hf={**scheduler.extras, "analytic": analytic})
    with pytest.raises(InputError, match=message):
        scheduler.set_timesteps(10)
    with pytest.raises(InputError, match=message):
        scheduler.reverse_log_variance(400, 200)


def test_statistics_without_a_part_are_damaged():
    scheduler = world()
    for name in ("mean_square_eps", "clip_pixels", "timesteps", "alpha_bar_sum"):
        analytic = {key: value for key, value in scheduler.analytic.items() if key != name}
        broken = DDPMScheduler.from_config(scheduler.config)
        broken.register_to_config(_ddpm_hf={"format": 1, "analytic": analytic})
        with pytest.raises(InputError, match=f"are damaged .KeyError.'{name}'"):
            broken.set_timesteps(10)


def test_the_bound_needs_no_statistics_so_that_wrong_ones_can_be_measured_anew():
    scheduler = DDPMScheduler.from_config(world().config, beta_schedule="squaredcos_cap_v2")
    t = torch.arange(1, 1000)
    assert scheduler.reverse_log_variance(t, t - 1).isfinite().all()
    forget(scheduler)
    assert scheduler.analytic is None
    scheduler.set_timesteps(10)


def test_forgetting_keeps_what_else_is_private():
    stock = diffusers.DDIMScheduler.from_config(world().config)
    stock.register_to_config(_ddpm_hf={**stock.config["_ddpm_hf"], "class_names": ["cat"]})
    forget(stock)
    # `world` is a bare scheduler, as of another trainer, whose networks have no null class.
    assert stock.config["_ddpm_hf"] == {"format": 1, "null_class": False, "class_names": ["cat"]}


def test_the_last_step_of_a_known_image_has_the_posteriors_floor():
    scheduler = DDPMScheduler()
    none = exactly(torch.zeros(1000).double())
    store(scheduler, world_statistics(scheduler), x_0_variance=none)
    found = scheduler.analytic_variance(50, -1).log().item()
    assert found == pytest.approx(scheduler.posterior_log_variance(50, -1).item())


def test_a_stored_variance_above_that_of_all_images_is_damage():
    scheduler = world()
    analytic = {**scheduler.analytic, "x_0_variance": [1.5] * 1000}
    scheduler.register_to_config(_ddpm_hf={**scheduler.extras, "analytic": analytic})
    with pytest.raises(InputError, match="damaged"):
        scheduler.set_timesteps(10)


def test_the_variance_of_x_0_is_at_most_that_of_all_images():
    sums = BoundSums.zeros(10)
    sums.timesteps[0], sums.timesteps[2], sums.timesteps[9] = 3, 6, 12
    assert estimate_x_0_variance(sums).value.max() == 1


def test_neighbours_are_a_hundredth_of_the_timesteps():
    sums = BoundSums.zeros(1000)
    sums.timesteps[0] = 2
    sums.timesteps[2, 490:511] = 1.0
    assert estimate_x_0_variance(sums).value[500] == 0.5


def test_a_table_of_betas_is_clipped_as_any_schedule():
    scheduler = DDPMScheduler(trained_betas=DDPMScheduler().beta.tolist())
    store(scheduler, world_statistics(scheduler))
    assert scheduler.analytic["clip_pixels"] == 1
