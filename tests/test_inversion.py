"""From images back to their noise, and samples of what is behind a noisy image; in the world where
the best answer is known.
"""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from ddpm_hf import DDPMPipeline, build_scheduler
from ddpm_hf.calibration import store
from ddpm_hf.errors import InputError
from ddpm_hf.inversion import (
    cut_off,
    estimate_timestep,
    noise_of_timestep,
    noised_as,
    read_images,
    read_noisy_image,
    timestep_of_noise,
    uncut_square,
)

from .conftest import images, noise
from .test_calibration import world_statistics
from .test_scheduler import WORLD


def world_images(*shape):
    """Pixels of the world, clipped to [-1, 1]: 8 % of them lie beyond."""
    return (WORLD.m + WORLD.c**0.5 * noise(*shape)).clamp(-1, 1)


@pytest.fixture
def pipe(tiny_unet):
    """A pipeline whose network is exact for pixels ~ N(m, c)."""
    scheduler = build_scheduler("cifar10")
    scheduler.register_to_config(clip_sample=False, variance_type="fixed_small")
    pipe = DDPMPipeline(tiny_unet, scheduler)
    pipe.set_progress_bar_config(disable=True)

    def forward(x_t, t, class_labels=None):
        a = scheduler.alpha_bar_at(t).float().reshape(-1, *[1] * (t.ndim * 3))
        centred = x_t - a.sqrt() * WORLD.m
        return UNet2DOutput(sample=(1 - a).sqrt() * centred / (a * WORLD.c + 1 - a))

    pipe.unet.forward = forward
    return pipe


# Noise of an image


def test_decoding_inverts_encoding(pipe):
    x_0 = world_images(4, 1, 8, 8)
    errors = {}
    for iterations in (1, 3, 20):
        latents = pipe.encode(x_0, 25, iterations=iterations)
        errors[iterations] = float((pipe.decode(latents, 25) - x_0).abs().max())
    # An iteration takes off a part that depends on the step; 20 leave float32's rounding.
    assert errors[20] < 1e-4 < errors[3] < errors[1] / 3
    assert latents.std() == pytest.approx(1, abs=0.15)  # 256 numbers, and pixels are clipped


def test_encoding_inverts_decoding(pipe):
    latents = noise(2, 1, 8, 8)
    again = pipe.encode(pipe.decode(latents, 30).clamp(-1, 1), 30, iterations=20)
    kept = pipe.decode(latents, 30).abs() < 1
    assert kept.float().mean() > 0.8
    # float32 through 30 steps and their iterations
    torch.testing.assert_close(again[kept], latents[kept], rtol=0, atol=1e-3)


def test_latents_of_encode_start_a_pipeline(pipe):
    """DDIM of the pipeline, on the same timesteps, is `decode`."""
    pipe.scheduler.register_to_config(timestep_spacing="linspace")
    latents = noise(2, 1, 8, 8)
    sampled = pipe(2, num_inference_steps=20, latents=latents, eta=0.0, output_type="pt").images
    decoded = (pipe.decode(latents, 20) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(sampled, decoded, rtol=0, atol=1e-5)  # float32


def of_classes(pipe):
    """A network of two classes, whose pixels are those of the world, and those upside down."""

    def forward(x_t, t, class_labels=None):
        a = pipe.scheduler.alpha_bar_at(t).float().reshape(-1, *[1] * (t.ndim * 3))
        mean = WORLD.m * (1 - 2 * class_labels.reshape(-1, 1, 1, 1))
        centred = x_t - a.sqrt() * mean
        return UNet2DOutput(sample=(1 - a).sqrt() * centred / (a * WORLD.c + 1 - a))

    pipe.unet.register_to_config(num_class_embeds=3)
    pipe.unet.forward = forward


def test_each_image_is_encoded_and_decoded_as_of_its_class(pipe):
    of_classes(pipe)
    x_0 = world_images(2, 1, 8, 8)
    latents = pipe.encode(x_0, 10, class_labels=[0, 1])
    for i in (0, 1):
        alone = pipe.encode(x_0[i : i + 1], 10, class_labels=i)
        torch.testing.assert_close(latents[i : i + 1], alone, rtol=0, atol=1e-5)  # float32
        other = pipe.encode(x_0[i : i + 1], 10, class_labels=1 - i)
        assert (latents[i] - other[0]).abs().mean() > 0.1
    back = pipe.decode(latents, 10, class_labels=[0, 1])
    one = pipe.decode(latents[1:], 10, class_labels=1)
    torch.testing.assert_close(back[1:], one, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="this network is class-conditional: pass class_labels"):
        pipe.encode(x_0, 10)


def test_an_image_is_denoised_as_of_its_class(pipe):
    of_classes(pipe)
    pipe.scheduler.register_to_config(clip_sample=False)
    y = torch.zeros(1, 1, 8, 8)
    for label, sign in ((0, 1), (1, -1)):
        made = pipe.denoise_image(
            y, 1000.0, num_images=4, class_label=label, output_type="pt", num_inference_steps=50
        )
        assert (made.images.mean() - 0.5).sign() == sign * (1 if WORLD.m > 0 else -1)


def test_settings_that_are_changed_later_hold_for_denoise_image_too(pipe):
    """In x_0_hat of a pixel beyond 1 the clip shows."""
    y = torch.full((1, 1, 8, 8), 3.0)
    made = {}
    for clip in (True, False):
        pipe.scheduler.register_to_config(clip_sample=clip, clip_sample_range=0.1)
        generator = torch.Generator().manual_seed(0)
        options = dict(generator=generator, num_inference_steps=20, output_type="pt")
        made[clip] = pipe.denoise_image(y, 100.0, **options).images
    assert made[True].max() <= 0.55 + 1e-6  # 0.1 of [-1, 1]; the last step takes x_0_hat
    assert made[False].min() > 0.55


def test_timesteps_that_a_person_gave_the_pipeline_are_not_those_of_denoise_image(pipe):
    """The lines on a card for plain diffusers, given to ours: it ran the chain that was there."""
    y, made = torch.zeros(1, 1, 8, 8), []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        options = dict(generator=generator, num_inference_steps=100, output_type="pt")
        made.append(pipe.denoise_image(y, 20.0, **options).images)
        scheduler = pipe.scheduler
        scheduler.set_timesteps = lambda *_, s=scheduler, **__: type(s).set_timesteps(s, 7)
    assert torch.equal(*made)


def test_what_a_broken_network_makes_is_refused(pipe):
    pipe.unet.forward = lambda x_t, t, class_labels=None: UNet2DOutput(sample=x_t * torch.nan)
    for call in (
        lambda: pipe(1, num_inference_steps=2),
        lambda: pipe.encode(FLOATS, 2),
        lambda: pipe.decode(FLOATS, 2),
        lambda: pipe.denoise_image(FLOATS, 20.0, num_inference_steps=10),
    ):
        with pytest.raises(InputError, match="the network's output is not finite: its weights"):
            call()


def test_pil_images_bytes_and_floats_are_the_same_image(pipe):
    pixels = ((images(1, 1, 8, 8) + 1) * 127.5).round().to(torch.uint8)
    pil = Image.fromarray(pixels[0, 0].numpy())
    expected = pipe.encode(pixels.float() / 127.5 - 1, 4)
    for same in (pil, [pil], pixels):
        assert torch.equal(pipe.encode(same, 4), expected)


# Noisy images


@pytest.mark.parametrize("level", [4, 20, 60, 150])
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_noise_of_an_image_is_estimated(pipe, level, calibrated):
    if calibrated:
        store(pipe.scheduler, world_statistics(pipe.scheduler))
    y = WORLD.m + WORLD.c**0.5 * images(1, 1, 64, 64) * 3**0.5 + level / 127.5 * noise(1, 1, 64, 64)
    t = estimate_timestep(lambda x_t, t: pipe.unet(x_t, t).sample, pipe.scheduler, y)
    estimated = noise_of_timestep(pipe.scheduler, t)
    if calibrated:
        # Of 4,096 pixels the variance c + sigma^2 is known to 2 %: of sigma more, the less it is.
        tolerance = 0.02 * (WORLD.c * 127.5**2 + level**2) / level
        assert abs(estimated - level) < max(tolerance, 1)
    else:
        assert estimated < level  # where E|eps_hat|^2 is below 1, as here at every t


@pytest.fixture
def known_image(pipe):
    """A pipeline whose network knows the clean image: a grey field on black, with white on it."""
    x_0 = torch.full((1, 1, 64, 64), -1.0)
    x_0[..., 16:48, 8:56] = -0.3
    x_0[..., 24:32, 16:48] = 1.0

    def forward(x_t, t, class_labels=None):
        a = pipe.scheduler.alpha_bar_at(t).float().reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample=(x_t - a.sqrt() * x_0) / (1 - a).sqrt())

    pipe.unet.forward = forward
    pipe.unet.register_to_config(sample_size=64)
    return pipe, x_0


def bytes_of(x):
    """What a file keeps of an image: 256 levels, and nothing beyond black and white."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("level", [10.0, 40.0, 100.0])
def test_noise_that_a_file_cut_off_is_estimated(known_image, level):
    pipe, x_0 = known_image
    noisy = bytes_of(x_0 + level / 127.5 * noise(*x_0.shape))
    assert ((noisy == 0) | (noisy == 255)).float().mean() > 0.3  # of black, half is cut off
    made = pipe.denoise_image(noisy, num_inference_steps=1, output_type="pt")
    # 2,500 pixels or so are left: 1.5 % of sigma, and half a grey level of rounding.
    assert made.noise_level == pytest.approx(level, rel=0.05)


def test_noise_that_was_cut_off_is_drawn_beyond(known_image):
    pipe, x_0 = known_image
    t = torch.tensor(timestep_of_noise(pipe.scheduler, 40.0))
    alpha_bar = pipe.scheduler.alpha_bar_at(t)
    sigma = float((1 / alpha_bar - 1).sqrt())
    y = bytes_of(x_0 + sigma * noise(*x_0.shape)).float() / 127.5 - 1
    eps = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    x_t, x_0_hat = noised_as(lambda x, t: pipe.unet(x, t).sample, pipe.scheduler, y, t, eps)
    drawn = (x_t / alpha_bar.sqrt()).float()
    kept = ~cut_off(y)[0]
    unchanged = y.expand(8, -1, -1, -1)[:, kept]
    torch.testing.assert_close(drawn[:, kept], unchanged, rtol=0, atol=1e-6)  # float32
    black, white = (cut_off(y) & (x_0 == end) & (y == end) for end in (-1, 1))
    for where, end in ((black, -1), (white, 1)):
        beyond = (drawn - end)[:, where[0]] * end
        assert beyond.min() >= 0
        # Half a normal distribution, of 1,000 draws or more: known to 2.2 %.
        assert beyond.square().mean().sqrt().item() == pytest.approx(sigma, rel=0.08)
        assert beyond.mean().item() == pytest.approx(sigma * (2 / torch.pi) ** 0.5, rel=0.08)
    grey = cut_off(y) & (x_0 == -0.3) & (y == -1)
    assert grey.any()
    assert drawn[:, grey[0]].max() < -0.99  # further than the end, by rounding at least
    # The mean of a normal distribution below -1: from the second pass on, which knows the grey.
    normal = torch.distributions.Normal(0.0, 1.0)
    far = torch.tensor(0.7 / sigma)
    mean = -0.3 - sigma * float(normal.log_prob(far).exp() / (1 - normal.cdf(far)))
    # Of 40 draws or so, each .1 off; the first pass alone is .14 lower.
    assert drawn[:, grey[0]].mean().item() == pytest.approx(mean, abs=0.07)
    torch.testing.assert_close(x_0_hat, x_0.expand(8, -1, -1, -1), rtol=0, atol=1e-4)  # float32


@pytest.mark.parametrize("level", [10.0, 20.0, 30.0, 60.0])
@pytest.mark.parametrize("clean", [0.0, -1.5])
def test_noise_that_is_drawn_leads_where_the_image_was(pipe, level, clean):
    """A white pixel stays white, however unlikely the network takes it to be."""
    y = torch.zeros(1, 1, 8, 8)
    y[..., 3, 3] = 1.0
    t = torch.tensor(timestep_of_noise(pipe.scheduler, level))
    alpha_bar = pipe.scheduler.alpha_bar_at(t)

    def predict(x_t, t):
        return pipe.scheduler.to_eps(torch.full_like(x_t, clean), x_t, t)

    x_t, _ = noised_as(predict, pipe.scheduler, y, t, noise(50, 1, 8, 8))
    drawn = (x_t / alpha_bar.sqrt()).float()[..., 3, 3]
    sigma = float((1 / alpha_bar - 1).sqrt())
    assert drawn.min() >= 1 - 1e-6  # float32
    # Of 1 + 4 sigma it would be by one draw in 10,000 if it were near; from further still less.
    assert drawn.max() < 1 + 4 * sigma
    if clean < -1:  # taken for black, and not for more
        far = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(-2 / sigma))
        assert (drawn > 1 + 1e-6).any() == (far > 1e-7).item()


@pytest.mark.parametrize(("level", "least", "most"), [(150, 130, 170), (400, 160, 171)])
def test_cut_off_noise_is_looked_for_up_to_a_level(known_image, level, least, most):
    pipe, x_0 = known_image
    y = bytes_of(x_0 + level / 127.5 * noise(*x_0.shape))
    assert least < pipe.denoise_image(y, num_inference_steps=2).noise_level < most


def test_only_pixels_at_the_ends_of_an_image_that_ends_there_are_cut_off():
    image = torch.tensor([-1.0, -0.999, 0.0, 1.0]).reshape(1, 1, 2, 2)
    assert cut_off(image).flatten().tolist() == [True, False, False, True]
    assert not cut_off(torch.tensor([-1.0, -1.2, 0.0, 1.0]).reshape(1, 1, 2, 2)).any()
    assert not cut_off(torch.ones(1, 1, 2, 2)).any()  # nothing would be left


@pytest.mark.parametrize("x_0", [-1.0, -0.4, 0.9])
@pytest.mark.parametrize("sigma", [0.02, 0.3, 2.0])
def test_what_is_left_of_noise_has_the_square_that_it_is_expected_to(x_0, sigma):
    eps = noise(200_000).double()
    kept = (x_0 + sigma * eps).abs() < 1
    expected = uncut_square(torch.full((1, 1, 1, 1), x_0), torch.tensor([sigma])).item()
    assert eps[kept].square().mean().item() == pytest.approx(expected, rel=0.02)  # 50,000 and more


@pytest.mark.parametrize("level", [30.0, 100.0])
def test_samples_behind_a_noisy_image_have_the_posteriors_moments(pipe, level):
    """N(m, c) and noise: the posterior of a pixel has a known mean and variance."""
    store(pipe.scheduler, world_statistics(pipe.scheduler))
    y, sigma_2 = torch.full((1, 1, 8, 8), 0.6), (level / 127.5) ** 2
    made = pipe.denoise_image(
        y, level, num_images=200, generator=torch.Generator().manual_seed(0), output_type="pt"
    )
    assert made.noise_level == pytest.approx(level, rel=0.02)
    samples = made.images * 2 - 1
    mean = (0.6 * WORLD.c + WORLD.m * sigma_2) / (WORLD.c + sigma_2)
    variance = WORLD.c * sigma_2 / (WORLD.c + sigma_2)
    # 12,800 pixels. Those beyond 1 are clipped: up to 13 % for much noise.
    assert samples.mean().item() == pytest.approx(mean, abs=0.03)
    expected = torch.distributions.Normal(mean, variance**0.5).sample((100_000,)).clamp(-1, 1).var()
    assert samples.var().item() == pytest.approx(expected.item(), rel=0.1)


def test_denoise_image_takes_and_gives_pictures(pipe):
    picture = Image.fromarray(np.full((8, 8), 200, np.uint8))
    made = pipe.denoise_image(picture, num_images=2)
    assert [(image.mode, image.size) for image in made.images] == [("L", (8, 8))] * 2
    assert made.noise_level > 0


def test_fixed_large_is_not_sampled_in_few_steps(pipe):
    """Its variance is for all T steps; of a few, one pixel's would double."""
    y, ends = torch.full((1, 1, 8, 8), 0.6), []
    for variance_type in ("fixed_small", "fixed_large"):
        pipe.scheduler.register_to_config(variance_type=variance_type)
        generator = torch.Generator().manual_seed(0)
        ends.append(pipe.denoise_image(y, 50.0, generator=generator, output_type="pt").images)
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)  # two float32 forms


@pytest.mark.parametrize("t", [0, 5, 500, 999])
def test_noise_levels_and_timesteps_are_inverse(t):
    scheduler = build_scheduler("cifar10")
    assert timestep_of_noise(scheduler, noise_of_timestep(scheduler, t)) == t


# Input that is taken, and that is not


def levels(dtype, *shape):
    """Grey levels 0 to 255 in a dtype."""
    return ((images(*shape) + 1) * 127.5).round().to(dtype)


def test_an_array_is_channels_last_as_a_pipeline_gives_it(tiny_unet):
    tiny_unet.register_to_config(in_channels=3)
    shape = DDPMPipeline(tiny_unet, build_scheduler()).image_shape
    tensor = levels(torch.uint8, 2, 3, 8, 8)
    array = tensor.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(one) for one in array]
    expected = tensor.float() / 127.5 - 1
    floats = expected.permute(0, 2, 3, 1).numpy()
    upside_down = floats[:, ::-1][:, ::-1]  # negative strides, which torch refuses
    for same in (tensor, array, pictures, tuple(pictures), floats, upside_down, expected.double()):
        assert torch.equal(read_images(same, shape), expected)
    half = read_images(expected.half(), shape)
    assert half.dtype == torch.float32
    assert torch.equal(half, expected.half().float())


@pytest.mark.parametrize(
    ("pixels", "warned"),
    [
        (lambda: images(2, 1, 8, 8).abs(), True),  # what `pipe(output_type="pt")` gives
        (lambda: images(2, 1, 8, 8), False),
        (lambda: images(2, 1, 8, 8).abs() + 0.5, False),  # of a noisy image, beyond 1
        (lambda: torch.full((2, 1, 8, 8), 200, dtype=torch.uint8), False),
    ],
)
def test_floats_that_may_be_on_another_scale_are_warned_about(caplog, pixels, warned):
    """They are not rescaled: images that are bright have no pixel below 0 either."""
    logger = diffusers.utils.logging.get_logger("ddpm_hf.inversion")
    logger.addHandler(caplog.handler)
    try:
        x = read_images(pixels(), (1, 8, 8), most=2.0)
    finally:
        logger.removeHandler(caplog.handler)
    assert ("if theirs is 0" in caplog.text and "pass images * 2 - 1" in caplog.text) == warned
    if warned:
        assert torch.equal(x, pixels())


@pytest.mark.parametrize(("level", "most"), [(20.0, 1 + 6 * 20 / 127.5), (None, 13.0)])
def test_a_noisy_image_may_lie_six_deviations_of_its_noise_beyond(level, most):
    def read(pixel):
        return read_noisy_image(torch.full((1, 1, 8, 8), pixel), (1, 8, 8), level)

    for sign in (-1, 1):
        assert read(sign * (most - 1e-3))[0, 0, 0, 0] == pytest.approx(sign * (most - 1e-3))
        with pytest.raises(InputError, match="got floats from"):
            read(sign * (most + 1e-3))


def pil(mode, size=(8, 8)):
    return Image.new(mode, size)


FLOATS, BYTES = images(1, 1, 8, 8), levels(torch.uint8, 1, 1, 8, 8)
IMAGES = [
    # Anything else than images
    ("a.png", "images must be PIL images, a tensor .* or an array .*; got str"),
    (None, "or an array .*; got NoneType"),
    ([], "images must be one or more; got none"),
    ([FLOATS[0]], "a list of images must be of PIL images; got Tensor in it: stack tensors"),
    ([pil("L"), "b.png"], "must be of PIL images; got str in it"),
    # Another shape
    (FLOATS[:0], r"shape \(B, 1, 8, 8\), as the network's, with B at least 1; got \(0, 1, 8, 8\)"),
    (FLOATS[0], r"images must have the shape \(B, 1, 8, 8\), .*; got \(1, 8, 8\)"),
    (FLOATS.expand(1, 3, 8, 8), r"images must have the shape .*; got \(1, 3, 8, 8\)"),
    (FLOATS.numpy(), r"an array of images must have .* \(B, 8, 8, 1\), .*; got \(1, 1, 8, 8\)"),
    (np.zeros((8, 8)), r"must have the shape \(B, 8, 8, 1\), .*; got \(8, 8\)"),
    ([pil("L"), pil("L", (9, 8))], r"the size \(8, 8\), .*; got \(9, 8\): pass image.resize"),
    # Another number of bits, or channels
    (BYTES.long(), r"uint8 in .*, or float in .*; got int64: .* images.to\(torch.uint8\)"),
    (BYTES > 9, r"got bool: if its levels are 0 to 255, pass images.to\(torch.uint8\)"),
    (np.zeros((1, 8, 8, 1), np.uint16), r"got uint16: .* pass images.astype\('uint8'\)"),
    (pil("1"), r"must have the mode L, as the network's; got 1: pass image.convert\('L'\)"),
    (pil("RGB"), r"the mode L, .*; got RGB: pass image.convert\('L'\)"),
    (pil("I;16"), r"the mode L, .*; got I;16: scale its pixels to \[-1, 1\] and pass"),
    (pil("F"), r"the mode L, .*; got F: scale its pixels"),
    # Pixels that are none
    (FLOATS * torch.nan, "images must be finite; got NaN"),
    (FLOATS * torch.inf, "images must be finite; got NaN or infinity"),
    (BYTES.float(), "floats from 6 to 254: images on a scale of 0 to 255 are to be divided"),
]  # fmt: skip


@pytest.mark.parametrize("call", ["encode", "denoise_image"])
@pytest.mark.parametrize(("given", "message"), IMAGES)
def test_images_that_are_refused(pipe, call, given, message):
    with pytest.raises(InputError, match=message):
        getattr(pipe, call)(given)


def denoise(**options):
    return lambda pipe: pipe.denoise_image(FLOATS, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.encode(FLOATS * 1.5), r"uint8, or float in \[-1, 1\]; got floats from -1.4"),
        (lambda p: p.encode(FLOATS, 1), "steps must be a whole number between 2 and 1000; got 1"),
        (lambda p: p.encode(FLOATS, "9"), "steps must be a whole number between 2 .*; got '9'"),
        (lambda p: p.encode(FLOATS, iterations=0), "iterations must be a whole number at least 1"),
        (lambda p: p.decode(noise(1, 1, 8, 9)), r"shape \(B, 1, 8, 8\), .*; got \(1, 1, 8, 9\)"),
        (lambda p: p.decode(noise(0, 1, 8, 8)), r"B at least 1; got \(0, 1, 8, 8\)"),
        (lambda p: p.decode(torch.tensor(1.0)), r"the shape \(B, 1, 8, 8\), .*; got \(\)"),
        (lambda p: p.decode([0.0]), "latents must be a float tensor, as encode gives; got list"),
        (lambda p: p.decode(BYTES), "latents must be a float tensor, .*; got torch.uint8"),
        (lambda p: p.decode(FLOATS * torch.nan), "latents must be finite; got NaN or infinity"),
        (lambda p: p.decode(FLOATS, 1001), "steps must be .* between 2 and 1000; got 1001"),
        (lambda p: p(2, latents=noise(1, 1, 8, 8)), r"must have the shape \(2, 1, 8, 8\); got"),
        (lambda p: p(1, latents=FLOATS * torch.inf), "latents must be finite; got NaN or infinity"),
        (lambda p: p.denoise_image(images(2, 1, 8, 8)), "one image at a time; got 2"),
        (lambda p: p.denoise_image(FLOATS, 0.0), "noise_level must be a number above 0"),
        (lambda p: p.denoise_image(FLOATS, True), "noise_level must be a number above 0"),
        (lambda p: p.denoise_image(FLOATS, 1e9), "at most 20[0-9]{3} grey levels"),
        (lambda p: p.denoise_image(FLOATS, torch.nan), "must be a number above 0 .*; got nan"),
        (lambda p: p.denoise_image(FLOATS, "a"), "must be a number above 0 .*; got 'a'"),
        (lambda p: p.denoise_image(FLOATS * 2, 20), r"in \[-1.941, 1.941\] for noise_level=20;"),
        (lambda p: p.denoise_image(FLOATS * 14), r"in \[-13, 13\] where noise_level is not"),
        (denoise(num_images=0), "num_images must be a whole number at least 1; got 0"),
        (denoise(num_images=1.5), "num_images must be a whole number at least 1; got 1.5"),
        (denoise(num_inference_steps=0), "steps must be a whole number between 1 and 1000; got 0"),
        (denoise(num_inference_steps=-3), "between 1 and 1000; got -3"),
        (denoise(num_inference_steps=1001), "between 1 and 1000; got 1001"),
        (denoise(generator=[torch.Generator()] * 2), "per image: got 2 for num_images=1"),
        (denoise(generator=5), "generator must be a torch.Generator, or a list .*; got 5"),
        (denoise(class_label=[0, 1]), r"class_label is one for all samples .*; got \[0, 1\]"),
    ],
)  # fmt: skip
def test_bad_input(pipe, call, message):
    with pytest.raises(InputError, match=message):
        call(pipe)
