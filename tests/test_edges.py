"""Where variances, chains and predictions meet at their ends: chains of T and T - 1 steps, learned
variances of calibrated models, x_0 and v predicted, and an x_T that is pure noise.

All of it against the chain by hand, in float64, in the world whose best network is known: pixels
~ N(m, c). The noise is drawn as the pipeline draws it, so that images are equal, not only moments.
"""

import itertools
import math

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.calibration import store

from .conftest import images, noise
from .test_calibration import world_statistics
from .test_inversion import world_images
from .test_scheduler import WORLD

FRACTION = images(1, 1, 8, 8)
"""What the network says of a learned variance: -1 is beta-tilde and 1 is beta, pixel by pixel."""

SETTINGS = {
    "epsilon": dict(),
    "learned": dict(variance_type="learned_range"),
    "sample": dict(prediction_type="sample"),
    "zero-snr": dict(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "cosine": dict(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
}
ATOL = 2e-5
"""Float32 images of a few units through some ten steps; a wrong variance shows by 1e-2 or more."""


@pytest.fixture
def make_pipe(tiny_unet):
    """A pipeline with the exact network of a process, calibrated or not."""

    def make(calibrated=False, steps=(), **settings):
        scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing", **settings)
        if calibrated:
            store(scheduler, world_statistics(scheduler), steps=steps)
        pipe = DDPMPipeline(tiny_unet, scheduler)
        pipe.set_progress_bar_config(disable=True)

        def forward(x_t, t):
            output = WORLD.output(scheduler, x_t, t.reshape(-1, 1, 1, 1))
            learned = scheduler.config.variance_type == "learned_range"
            fraction = FRACTION.expand(len(x_t), -1, -1, -1)
            return UNet2DOutput(sample=torch.cat([output, fraction], 1) if learned else output)

        pipe.unet.forward = forward
        return pipe

    return make


# By hand


def small(process, t, s):
    """Eq. (7): beta-tilde."""
    a, b = process.alpha_bar_at(t), process.alpha_bar_at(s)
    return (1 - a / b) * (1 - b) / (1 - a)


def learned(process, t, s):
    """Nichol & Dhariwal 2021, eq. (15)."""
    fraction = (FRACTION.double() + 1) / 2
    large = 1 - process.alpha_bar_at(t) / process.alpha_bar_at(s)
    return (fraction * large.log() + (1 - fraction) * small(process, t, s).log()).exp()


def optimal(process, t, s):
    """Bao et al. 2022, theorem 1, with the known Var[x_0 | x_t]; the noise of a step to 0 is at
    most one grey level in the mean, and with a linear schedule two.
    """
    a, b = process.alpha_bar_at(t), process.alpha_bar_at(s)
    coef_x_0 = b.sqrt() * (1 - a / b) / (1 - a)
    variance = small(process, t, s) + coef_x_0**2 * WORLD.x_0_variance(process, t)
    levels = 2 if process.config.beta_schedule == "linear" else 1
    most = (levels * 2 / 255) ** 2 * math.pi / 2
    return variance.clamp(max=most if s == 0 else math.inf)


def by_hand(process, x, timesteps, variance, generator):
    """Algorithm 2, eqs. (6) and (11), from x, and the mean of its last step, (B, C, H, W)."""
    x = x.double()
    for t, s in itertools.pairwise([*timesteps, -1]):
        a, b = process.alpha_bar_at(t), process.alpha_bar_at(s)
        x_0_hat = WORLD.x_0_hat(process, x, t)
        x = (b.sqrt() * (1 - a / b) * x_0_hat + (a / b).sqrt() * (1 - b) * x) / (1 - a)
        if s >= 0:
            x = x + variance(process, t, s).sqrt() * torch.randn(x.shape, generator=generator)
    return x.float()


def ddim_gain(process, timesteps):
    """DDIM in this world: x_s - sqrt(b) m is a multiple of x_t - sqrt(a) m; of all steps together.

    By eq. (12) of Song et al. 2021 with E[x_0 | x_t] and the noise that goes with it.
    """
    gain = 1.0
    for t, s in itertools.pairwise([*timesteps, -1]):
        a, b = process.alpha_bar_at(t), process.alpha_bar_at(s)
        total = a * WORLD.c + 1 - a
        gain *= ((a * b).sqrt() * WORLD.c + ((1 - a) * (1 - b)).sqrt()) / total
    return gain


def seeded():
    return torch.Generator().manual_seed(3)


def last(pipe, num_inference_steps, **options):
    """What `pipe(latents=...)` makes into an image, before it is clipped to [-1, 1]."""
    *_, step = pipe.denoise(
        4, latents=noise(4, 1, 8, 8), generator=seeded(), num_inference_steps=num_inference_steps,
        **options,
    )  # fmt: skip
    return step.x_s


def as_image(x):
    return (x / 2 + 0.5).clamp(0, 1)


def assert_same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=ATOL)


# Sampling


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_sampling_is_algorithm_2_whatever_is_predicted(make_pipe, name, calibrated):
    """A sub-chain draws with the variance of its type, and of a calibrated model with the optimal
    one: learned_range too.
    """
    pipe = make_pipe(calibrated, **SETTINGS[name])
    by_type = learned if name == "learned" else small
    chain = range(999, 0, -125)  # trailing
    ends = {
        variance: by_hand(pipe.scheduler, noise(4, 1, 8, 8), chain, variance, seeded())
        for variance in (by_type, optimal)
    }
    assert (ends[by_type] - ends[optimal]).abs().mean() > 0.01
    assert_same(last(pipe, 8), ends[optimal if calibrated else by_type])
    made = pipe(
        4, latents=noise(4, 1, 8, 8), generator=seeded(), num_inference_steps=8, output_type="pt"
    )
    assert_same(made.images, as_image(ends[optimal if calibrated else by_type]))
    assert_same(last(pipe, 8, analytic=False), ends[by_type])


@pytest.mark.parametrize("name", SETTINGS)
def test_ddim_is_one_affine_map_whatever_is_predicted(make_pipe, name):
    pipe, latents = make_pipe(**SETTINGS[name]), noise(4, 1, 8, 8).double()
    process, chain = pipe.scheduler, range(999, 0, -125)
    start = process.alpha_bar_at(999).sqrt() * WORLD.m
    expected = WORLD.m + ddim_gain(process, chain) * (latents - start)
    assert_same(last(pipe, 8, eta=0.0), expected.float())


# The ends of a calibrated chain


@pytest.mark.parametrize("name", ["epsilon", "learned", "sample"])
def test_a_calibrated_chain_of_all_timesteps_but_one_and_of_all(make_pipe, name):
    """With stored timesteps for both: one left out is a sub-chain, which is calibrated; none is the
    chain of the paper, with the variance of its type.
    """
    settings = dict(num_train_timesteps=12, beta_end=0.6, **SETTINGS[name])
    pipe = make_pipe(True, steps=[11, 12], **settings)
    process, by_type = pipe.scheduler, learned if name == "learned" else small

    every, shorter = list(range(11, -1, -1)), process.analytic["timesteps"]["11"]
    # Which is left out is a draw in this world, whose every chain with optimal variances is exact.
    assert (len(shorter), shorter[0], shorter[-1]) == (11, 11, 0)
    assert set(shorter) < set(every)
    for chain, variance in ((shorter, optimal), (every, by_type)):
        ours = last(pipe, len(chain))
        assert process.timesteps.tolist() == chain
        assert_same(ours, by_hand(process, noise(4, 1, 8, 8), chain, variance, seeded()))
        for asked, variance in ((True, optimal), (False, by_type)):
            ours = last(pipe, len(chain), analytic=asked)
            taken = process.timesteps.tolist()
            assert taken == chain or not asked
            assert_same(ours, by_hand(process, noise(4, 1, 8, 8), taken, variance, seeded()))


@pytest.mark.parametrize(
    ("options", "takes_them"),
    [
        ({}, True),
        (dict(analytic=True), True),
        (dict(eta=0.0, analytic=True), True),
        (dict(analytic=False), False),
        (dict(eta=0.0), False),
        (dict(solver_order=2), False),
        (dict(solver_order=2, analytic=True), False),
    ],
)
def test_optimal_timesteps_are_for_the_optimal_variance(make_pipe, options, takes_them):
    """Under other samplers images are much worse by them (docs/log.md)."""
    pipe = make_pipe(True, steps=[5])
    process = pipe.scheduler
    process.set_timesteps(5)
    stored = process.timesteps.tolist()
    process.set_even_timesteps(5)
    even = process.timesteps.tolist()
    assert even != stored == list(process.analytic["timesteps"]["5"])
    last(pipe, 5, **options)
    assert process.timesteps.tolist() == (stored if takes_them else even)


# From images back


@pytest.mark.parametrize("name", SETTINGS)
def test_encode_and_decode_are_one_affine_map_and_its_inverse(make_pipe, name):
    """Where x_T is pure noise too, which eps_hat does not tell: it was .2 grey levels off there,
    and 5 with the cosine schedule.
    """
    pipe, x_0, steps = make_pipe(**SETTINGS[name]), world_images(4, 1, 8, 8), 10
    chain = torch.linspace(999, 0, steps).round().long().tolist()
    start = pipe.scheduler.alpha_bar_at(999).sqrt() * WORLD.m
    gain = ddim_gain(pipe.scheduler, chain)
    latents = pipe.encode(x_0, steps, iterations=40)
    assert_same(latents, (start + (x_0.double() - WORLD.m) / gain).float())
    assert_same(pipe.decode(latents, steps), x_0)
    z = noise(2, 1, 8, 8)
    assert_same(pipe.decode(z, steps), (WORLD.m + gain * (z.double() - start)).float())


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_noisy_image_is_sampled_by_the_variance_of_a_sub_chain(make_pipe, name, calibrated):
    pipe, level = make_pipe(calibrated, **SETTINGS[name]), 100.0
    process, y = pipe.scheduler, images(1, 1, 8, 8)
    noise_of = 127.5 * (1 / process.alpha_bar[1:] - 1).sqrt()
    t = int((noise_of - level).abs().argmin())
    chain = torch.linspace(t, 0, round(20 * (t + 1) / 1000)).round().long().tolist()
    assert len(chain) >= 4
    by_type = learned if name == "learned" else small
    variance = optimal if calibrated else by_type
    x_t = process.alpha_bar_at(t).sqrt() * y.double().expand(3, -1, -1, -1)
    made = pipe.denoise_image(
        y, level, num_images=3, generator=seeded(), num_inference_steps=20, output_type="pt"
    )
    assert made.noise_level == pytest.approx(noise_of[t].item(), rel=1e-9)
    assert_same(made.images, as_image(by_hand(process, x_t, chain, variance, seeded())))


def test_a_noisy_image_by_every_timestep_is_sampled_by_the_type(make_pipe):
    pipe = make_pipe(calibrated=True)
    process, y = pipe.scheduler, images(1, 1, 8, 8)
    noise_of = 127.5 * (1 / process.alpha_bar[1:] - 1).sqrt()
    x_t = process.alpha_bar_at(30).sqrt() * y.double()
    made = pipe.denoise_image(
        y, float(noise_of[30]), generator=seeded(), num_inference_steps=1000, output_type="pt"
    )
    expected = by_hand(process, x_t, range(30, -1, -1), small, seeded())
    assert_same(made.images, as_image(expected))
