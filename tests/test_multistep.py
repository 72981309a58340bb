"""DDIM of second order: diffusers' UniPC where it adds no noise, and a kept noise where it does."""

import itertools
from functools import partial

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.calibration import Estimate, store
from ddpm_hf.cli import main
from ddpm_hf.errors import InputError
from ddpm_hf.multistep import SecondOrder

from .conftest import noise
from .test_calibration import world, world_statistics
from .test_scheduler import WORLD

SETTINGS = {
    "epsilon": dict(),
    "v, cosine": dict(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
}


def run(scheduler, network, x, num_steps, **options):
    """The images after each step, of our solver, or of a scheduler of diffusers."""
    scheduler.set_timesteps(num_steps)
    solver, chain = None, []
    if isinstance(scheduler, DDPMScheduler):
        solver = SecondOrder(scheduler, **options)
    for t in scheduler.timesteps:
        output = network(x, t)
        x = solver.step(output, x, t)[0] if solver else scheduler.step(output, t, x).prev_sample
        chain.append(x)
    return chain


def curved(scheduler):
    """A network whose x_0_hat is no affine function of x_t, and changes with t."""

    def network(x_t, t):
        x_0_hat = (2 * x_t + 0.3 * torch.sin(5e-3 * t)).tanh()
        return scheduler.target(x_0_hat, scheduler.to_eps(x_0_hat, x_t, int(t)), int(t))

    return network


@pytest.mark.parametrize("num_steps", [2, 3, 10, 25])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_without_noise_it_is_diffusers_unipc(settings, num_steps):
    ours = DDPMScheduler(clip_sample=False, timestep_spacing="trailing", **settings)
    stock = diffusers.UniPCMultistepScheduler.from_config(ours.config)
    x = noise(2, 1, 4, 4)
    network = curved(ours)
    pairs = zip(run(ours, network, x, num_steps), run(stock, network, x, num_steps), strict=True)
    for mine, theirs in pairs:
        # Their tables are float32, in which 1 - alpha_bar of the cosine schedule's end is rough.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-4)
    first_order = run(diffusers.DDIMScheduler.from_config(ours.config), network, x, num_steps)
    if num_steps > 2:
        assert (mine - first_order[-1]).abs().max() > 5e-3


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_follows_the_exact_path_more_closely_than_ddim(settings):
    """Where pixels ~ N(m, c) the path keeps how many deviations x_t is from its mean."""
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing", **settings)
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config)

    def network(x_t, t):
        return WORLD.output(scheduler, x_t, int(t))

    def at(t, u):
        a = scheduler.alpha_bar_at(t)
        return a.sqrt() * WORLD.m + (a * WORLD.c + 1 - a).sqrt() * u

    u = noise(1, 1, 4, 4).double()
    errors = []
    for each in (scheduler, ddim):
        before_last = run(each, network, at(999, u).float(), 20)[-2]
        errors.append((before_last - at(int(each.timesteps[-1]), u)).abs().max().item())
    assert errors[0] < errors[1] / 4  # 0.011 and 0.052 under the cosine schedule


def test_noise_is_optimal_and_a_corrected_step_keeps_it():
    """With x_0_hat = 0 no guess differs from another, and a step is a factor and a draw."""
    scheduler, x = world(prediction_type="sample"), noise(2, 1, 4, 4)
    scheduler.set_timesteps(8)
    solver, by_hand = SecondOrder(scheduler, analytic=True), x.double()
    mine, generators = x, [torch.Generator().manual_seed(5) for _ in range(2)]
    for t, s in itertools.pairwise([*scheduler.timesteps.tolist(), -1]):
        mine, _ = solver.step(torch.zeros_like(x), mine, t, generators[0])
        a, b = scheduler.alpha_bar_at(t), scheduler.alpha_bar_at(s)
        by_hand = ((1 - b) / (1 - a)).sqrt() * by_hand
        if s >= 0:
            deviation = scheduler.analytic_variance(t, s, eta=0).sqrt()
            by_hand = by_hand + deviation * torch.randn(x.shape, generator=generators[1])
            torch.testing.assert_close(mine, by_hand.float(), rtol=0, atol=1e-5)  # float32
    assert torch.equal(mine, torch.zeros_like(x))  # the last step is its mean, x_0_hat


def test_a_start_of_pure_noise():
    settings = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing", **settings)
    x = noise(2, 1, 4, 4)
    chain = run(scheduler, curved(scheduler), x, 6)
    assert all(each.isfinite().all() for each in chain)
    scheduler.set_timesteps(6)
    t, s = scheduler.timesteps[:2].tolist()
    output = curved(scheduler)(x, scheduler.timesteps[0])
    first = scheduler.ddim_step(output, x, t, s).distribution.mean
    assert torch.equal(chain[0], first)
    # The second step cannot be corrected by the first, whose signal-to-noise ratio is 0.
    solver, u, v = SecondOrder(scheduler), *scheduler.timesteps[1:3].tolist()
    y, _ = solver.step(0.3 * x, x, t)
    z, _ = solver.step(0.5 * y, y, u)
    plain = scheduler.ddim_step(0.5 * y, y, u, v, clip=False).distribution.mean
    torch.testing.assert_close(z, plain, rtol=0, atol=1e-5)  # another order of float32 sums


# In the pipeline


@pytest.fixture
def pipe(tiny_unet):
    """With the exact network of the world, calibrated."""
    scheduler = DDPMScheduler(50, beta_end=0.3, clip_sample=False, timestep_spacing="trailing")
    store(scheduler, world_statistics(scheduler))
    pipe = DDPMPipeline(tiny_unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.forward = lambda x_t, t: UNet2DOutput(sample=WORLD.output(scheduler, x_t, t))
    return pipe


def images_of(pipe, num_inference_steps=10, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(2, generator, num_inference_steps, output_type="pt", **options).images


def test_a_calibrated_model_adds_noise_where_a_step_is_left_out(pipe):
    plain = images_of(pipe, solver_order=2, analytic=False)
    own = images_of(pipe, solver_order=2)
    assert torch.equal(own, images_of(pipe, solver_order=2, analytic=True, eta=0.0))
    assert not torch.equal(own, plain)
    whole = images_of(pipe, 50, solver_order=2)
    assert torch.equal(whole, images_of(pipe, 50, solver_order=2, analytic=False))
    # A chain remembers nothing of the one before.
    assert torch.equal(own, images_of(pipe, solver_order=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(solver_order=3), "solver_order must be 1 or 2; got 3"),
        (dict(solver_order=2, eta=0.5), "solver_order=2 is of DDIM, eta=0; got eta=0.5"),
    ],
)
def test_orders_that_there_are_not(pipe, options, message):
    with pytest.raises(InputError, match=message):
        images_of(pipe, **options)


def test_schedulers_of_diffusers_have_their_own_order(pipe):
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match="eta, analytic and solver_order belong to this package's"):
        images_of(pipe, solver_order=2)


def test_the_command(tiny_unet, tmp_path, capsys):
    scheduler = DDPMScheduler(50, beta_end=0.3, timestep_spacing="trailing")
    DDPMPipeline(tiny_unet, scheduler).save_pretrained(tmp_path / "model")
    words = ["sample", str(tmp_path / "model"), "--num_images", "2", "--grid"]
    assert main([*words, str(tmp_path / "a.png"), "--solver_order", "2"]) == 0
    assert (tmp_path / "a.png").is_file()
    assert main([*words, str(tmp_path / "b.png"), "--solver_order", "3"]) == 2
    assert "argument --solver_order: invalid choice: 3" in capsys.readouterr().err


def test_a_learned_variance_is_left_out():
    """Of one channel it would be broadcast over the prediction."""
    plain, learned = (
        DDPMScheduler(clip_sample=False, timestep_spacing="trailing", **settings)
        for settings in ({}, {"variance_type": "learned_range"})
    )
    for scheduler in (plain, learned):
        scheduler.set_timesteps(5)
    x, output = noise(2, 1, 4, 4), 0.5 * noise(2, 1, 4, 4)
    expected = SecondOrder(plain).step(output, x, 999)[0]
    assert torch.equal(
        SecondOrder(learned).step(torch.cat([output, output], 1), x, 999)[0], expected
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_the_noise_does_to_data_of_an_exact_network(settings):
    """The noise is optimal for a step by one prediction: DDIM ends at the data's variance by it,
    and second order, which misses less, beyond (see the module's docstring).
    """
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing", **settings)
    alpha_bar = scheduler.alpha_bar[1:]
    around = WORLD.c * (1 - alpha_bar) / (alpha_bar * WORLD.c + 1 - alpha_bar)
    around = Estimate(around, torch.zeros(1000).double())
    store(scheduler, world_statistics(scheduler), x_0_variance=around)

    def network(x_t, t):
        a = scheduler.alpha_bar_at(int(t)).item()
        centred = (x_t - a**0.5 * WORLD.m) / (a * WORLD.c + 1 - a)
        x_0_hat = WORLD.m + a**0.5 * WORLD.c * centred
        return scheduler.target(x_0_hat, (1 - a) ** 0.5 * centred, int(t))

    scheduler.set_timesteps(10)
    x_T = noise(4, 1, 128, 128)
    spread = {}
    for name, solver in {
        "first": partial(scheduler.reverse_step, eta=0.0, analytic=True),
        "second": SecondOrder(scheduler, analytic=True).step,
        "without": SecondOrder(scheduler).step,
    }.items():
        x, generator = x_T, torch.Generator().manual_seed(5)
        for t in scheduler.timesteps[:-1]:
            x, _ = solver(network(x, t), x, t, generator)
        a = float(scheduler.alpha_bar_at(int(scheduler.timesteps[-1])))
        spread[name] = x.var().item() / (a * WORLD.c + 1 - a)
    # Of 65,536 pixels a variance is known to 0.6 %.
    assert spread["first"] == pytest.approx(1, abs=0.03)
    assert spread["without"] == pytest.approx(1, abs=0.06)
    assert 1.1 < spread["second"] < 1.4
