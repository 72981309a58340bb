"""The way back from an image: what is taken for one, the noise that DDIM makes it from, and how
noisy it is.
"""

from collections.abc import Callable, Sequence
from numbers import Real

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from .errors import InputError
from .functional import like
from .scheduler import DDPMScheduler

logger = logging.get_logger(__name__)

Images = Image.Image | Sequence[Image.Image] | Tensor | np.ndarray
"""PIL images of mode L or RGB; or a tensor (B, C, H, W) or an array (B, H, W, C), uint8 in [0, 255]
or float in [-1, 1].
"""

NUM_CANDIDATES = 24
"""Noise levels that are tried at once, twice: the second time between two of the first."""

MOST_UNKNOWN_NOISE = 255
"""Grey levels of noise up to which an image of floats is taken for one whose noise is not known."""

DEVIATIONS = 6
"""Of the noise, how far beyond [-1, 1] a float may lie: by chance one in 10**9 lies further."""

MOST_CUT_NOISE = 170
"""Grey levels of noise up to which it is looked for where it is cut off: of more too little is left
to tell it by."""

PASSES = 3
"""Over an image whose noise is cut off, each with a better x_0_hat to draw by what is missing."""

NO_SIGNAL = 1e-6
"""An alpha_bar below this is pure noise: the last of the cosine schedule, or of a rescaled one."""


# What is taken for an image


def read_images(
    images: Images, shape: tuple[int, int, int], *, most: float = 1.0, why: str = ""
) -> Tensor:
    """Images as one float32 tensor, (B, C, H, W): bytes 0 to 255 become -1 to 1, floats stay.

    Floats that all lie in [0, 1] may be bright images, or images on another scale, as a pipeline
    gives them with `output_type="pt"`: they are taken for what they are, with a warning.

    Args:
        images: See `Images`.
        shape: (C, H, W) of the network's images.
        most: Largest magnitude of floats.
        why: What it follows from, for the message.

    Raises:
        InputError: anything else; another mode, size, shape or dtype; floats beyond `most` or not
            finite.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)):
        images = _pil_pixels(images, shape)
    x, is_float = _checked_tensor(images, shape)
    if not is_float:
        return x.float() / 127.5 - 1
    if not bool(x.isfinite().all()):
        raise InputError("images must be finite; got NaN or infinity among their pixels")
    low, high = x.min().item(), x.max().item()
    if max(-low, high) > most:
        raise InputError(
            f"images must be uint8, or float in [{-most:.4g}, {most:.4g}]{why}; got floats from "
            f"{low:g} to {high:g}: images on a scale of 0 to 255 are to be divided by 127.5, less 1"
        )
    if low >= 0 and high <= 1:
        logger.warning(
            f"images are floats from {low:g} to {high:g}, where -1 is black: if theirs is 0, as in "
            "what a pipeline gives, pass images * 2 - 1"
        )
    return x


def read_noisy_image(
    image: Images, shape: tuple[int, int, int], noise_level: float | None
) -> Tensor:
    """One image and its noise as `read_images` has them, (1, C, H, W).

    Floats may lie `DEVIATIONS` of the noise beyond [-1, 1]; where it is not known that of
    `MOST_UNKNOWN_NOISE`, which makes [-13, 13].

    Raises:
        InputError: as `read_images`; more images than one.
    """
    if noise_level is None:
        level, why = MOST_UNKNOWN_NOISE, " where noise_level is not given"
    else:
        level, why = noise_level, f" for noise_level={noise_level:g}"
    y = read_images(image, shape, most=1 + DEVIATIONS * level / 127.5, why=why)
    if len(y) != 1:
        raise InputError(f"denoise_image takes one image at a time; got {len(y)}")
    return y


def _pil_pixels(images: Sequence[Image.Image], shape: tuple[int, int, int]) -> np.ndarray:
    """PIL images as an array (B, H, W, C), uint8. Raises InputError."""
    if not images:
        raise InputError("images must be one or more; got none")
    channels, *size = shape
    mode, size = "L" if channels == 1 else "RGB", tuple(size[::-1])
    for image in images:
        if not isinstance(image, Image.Image):
            raise InputError(
                f"a list of images must be of PIL images; got {type(image).__name__} in it: stack "
                "tensors or arrays into one"
            )
        if image.mode != mode:
            fix = f"pass image.convert({mode!r})"
            if image.mode.startswith(("I", "F")):  # more than 8 bits: convert cuts off at 255
                fix = "scale its pixels to [-1, 1] and pass them as a float array (B, H, W, C)"
            raise InputError(
                f"PIL images must have the mode {mode}, as the network's; got {image.mode}: {fix}"
            )
        if image.size != size:
            raise InputError(
                f"PIL images must have the size {size}, as the network's; got {image.size}: pass "
                f"image.resize({size})"
            )
    return np.stack([np.atleast_3d(np.asarray(image)) for image in images])


def _checked_tensor(
    images: Tensor | np.ndarray, shape: tuple[int, int, int]
) -> tuple[Tensor, bool]:
    """(B, C, H, W), uint8 or float32, and whether it is float. Raises InputError."""
    is_array, layout = isinstance(images, np.ndarray), shape
    if is_array:
        layout = (*shape[1:], shape[0])
    elif not isinstance(images, Tensor):
        raise InputError(
            "images must be PIL images, a tensor (B, C, H, W) or an array (B, H, W, C); got "
            f"{type(images).__name__}"
        )
    if images.ndim != 4 or len(images) < 1 or tuple(images.shape[1:]) != layout:
        kind = "an array of images" if is_array else "images"
        raise InputError(
            f"{kind} must have the shape (B, {', '.join(map(str, layout))}), as the network's, "
            f"with B at least 1; got {tuple(images.shape)}"
        )
    is_float = images.dtype.kind == "f" if is_array else images.is_floating_point()
    name = str(images.dtype).removeprefix("torch.")
    if not is_float and name != "uint8":
        to_bytes = "images.astype('uint8')" if is_array else "images.to(torch.uint8)"
        raise InputError(
            f"images must be uint8 in [0, 255], or float in [-1, 1]; got {name}: if its levels are "
            f"0 to 255, pass {to_bytes}"
        )
    if is_array:
        array = images.astype(np.float32 if is_float else np.uint8, order="C")
        images = torch.from_numpy(array).moveaxis(-1, 1).contiguous()
    return images.float() if is_float else images, is_float


# The noise of an image


def invert_ddim(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: DDPMScheduler,
    x_0: Tensor,
    timesteps: Sequence[int],
    *,
    iterations: int,
) -> Tensor:
    """Song et al. 2021 (DDIM), eq. (13) solved for x_t: the noise that decodes to these images.

    A step x_t -> x_s is undone by x_t = scaled x_s + coefficient * eps_hat(x_t), which is iterated
    from eps_hat(x_s): the plain inversion is one iteration. Where x_t is pure noise, eps_hat(x_t)
    is x_t itself whatever the network says: there it is the noise between x_0_hat(x_t) and x_s.
    Nothing is clipped, which could not be undone.

    Args:
        predict: (x_t, t) -> the network's prediction without variance channels, (B, C, H, W); t is
            () or (B,), on the CPU.
        scheduler: The process.
        x_0: Clean images, (B, C, H, W) in [-1, 1].
        timesteps: The sub-chain, descending.
        iterations: Evaluations of the network a step.

    Returns:
        x_T, close to standard normal, (B, C, H, W).
    """
    x_s, s = x_0, -1
    for t in reversed(timesteps):
        alpha_bar_t, alpha_bar_s = scheduler.alpha_bar_at(t), scheduler.alpha_bar_at(s)
        ratio = (alpha_bar_t / alpha_bar_s).sqrt()
        coef_eps = (1 - alpha_bar_t).sqrt() - ratio * (1 - alpha_bar_s).sqrt()
        x_t, pure_noise = x_s, alpha_bar_t < NO_SIGNAL
        for _ in range(iterations):
            x_0_hat = scheduler.to_x_0(predict(x_t, torch.tensor(t)), x_t, t)
            eps_hat = scheduler.to_eps(x_0_hat, *((x_s, s) if pure_noise else (x_t, t)))
            x_t = like(ratio, x_s) * x_s + like(coef_eps, x_s) * eps_hat
        x_s, s = x_t, t
    return x_s


def noise_of_timestep(scheduler: DDPMScheduler, t: int) -> float:
    """Standard deviation of the noise in x_t / sqrt(alpha_bar_t), in grey levels of 255."""
    return 127.5 * float((1 / scheduler.alpha_bar_at(t) - 1).sqrt())


def timestep_of_noise(scheduler: DDPMScheduler, noise_level: float) -> int:
    """The timestep with the nearest `noise_of_timestep`.

    Raises:
        InputError: no number, none of noise, or more noise than at any.
    """
    finite = scheduler.alpha_bar[1:][scheduler.alpha_bar[1:] > 0]
    levels = 127.5 * (1 / finite - 1).sqrt()
    number = isinstance(noise_level, Real) and not isinstance(noise_level, bool)
    if not number or not 0 < noise_level <= levels[-1]:
        raise InputError(
            f"noise_level must be a number above 0 and at most {levels[-1].item():.0f} grey "
            f"levels, the largest that the network knows; got {noise_level!r}"
        )
    return int((levels - noise_level).abs().argmin())


def cut_off(image: Tensor) -> Tensor:
    """Pixels whose noise may have been cut off: those at black or white, where none is beyond.

    Args:
        image: A noisy image, (1, C, H, W), clean in [-1, 1].

    Returns:
        The same shape, bool.
    """
    at_the_end = image.abs() == 1
    return at_the_end & ~((image.abs() > 1).any() | at_the_end.all())


def noised_as(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: DDPMScheduler,
    image: Tensor,
    t: Tensor,
    eps: Tensor,
) -> tuple[Tensor, Tensor]:
    """An image taken for x_t / sqrt(alpha_bar_t), and x_0_hat, both (B, C, H, W).

    Noise that was cut off at black or white is drawn, given x_0_hat and that it led there. Left as
    it is, the network takes half of it for none, and the mean of the other half for grey.

    Args:
        predict: As in `invert_ddim`.
        scheduler: The process.
        image: A noisy image, (1, C, H, W), clean in [-1, 1].
        t: Timesteps, (B,), or () for those of all.
        eps: Standard normal, (B, C, H, W), or (1, C, H, W) for those of all: what is drawn by.
    """
    alpha_bar = scheduler.alpha_bar_at(t)
    scale, sigma = like(alpha_bar.sqrt(), image), like((1 / alpha_bar - 1).sqrt(), image)
    cut, end = cut_off(image), image.sign()
    x_0_hat, y = image, image
    for _ in range(PASSES if cut.any() else 1):
        # How far the end is from the clean pixel, in deviations. Where it is more than five, noise
        # does not lead there in float32: the pixel stays at its end.
        clean = x_0_hat.clamp(-1, 1)
        left = (end * clean - 1) / sigma
        tail = torch.special.ndtr(left) * torch.special.ndtr(eps)
        beyond = -torch.special.ndtri(tail.clamp(min=1e-7).cpu()).to(tail)  # MPS has no ndtri
        y = torch.where(cut, end * (end * clean + sigma * beyond).clamp(min=1), image)
        x_t = scale * y
        x_0_hat = scheduler.to_x_0(predict(x_t, t), x_t, t)
    return x_t, x_0_hat


def uncut_square(x_0: Tensor, sigma: Tensor) -> Tensor:
    """E eps**2 of the noise that leaves a pixel x_0 + sigma * eps in (-1, 1), (B, C, H, W)."""
    sigma = like(sigma, x_0)
    low, high = (-1 - x_0) / sigma, (1 - x_0) / sigma
    density_low, density_high = ((-(z**2) / 2).exp() / (2 * torch.pi) ** 0.5 for z in (low, high))
    inside = torch.special.ndtr(high) - torch.special.ndtr(low)
    return 1 - (high * density_high - low * density_low) / inside


def estimate_timestep(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: DDPMScheduler, image: Tensor
) -> int:
    """The timestep whose noise is that of an image: where the network sees as much as it should.

    Noise taken for too little looks larger than E|eps_hat|**2, and for too much smaller. Without
    `ddpm-hf calibrate` that is taken to be 1, which finds somewhat too little noise. Where noise
    was cut off, the pixels that are left tell it, by what is left of their noise.

    Args:
        predict: As in `invert_ddim`.
        scheduler: The process.
        image: A noisy image, (1, C, H, W), clean in [-1, 1].
    """
    stored = scheduler.analytic
    expected = torch.ones(len(scheduler.beta), dtype=torch.float64)
    if stored is not None:
        expected = torch.tensor(stored["mean_square_eps"], dtype=torch.float64)
    low, high = 0, int((scheduler.alpha_bar[1:] > 0).sum()) - 1
    kept = ~cut_off(image)[0]
    if not kept.all():
        high = int((scheduler.alpha_bar[1:] > 1 / (1 + (MOST_CUT_NOISE / 127.5) ** 2)).sum()) - 1
    eps = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    for _ in range(2):
        t = torch.linspace(low, high, NUM_CANDIDATES).round().long().unique()
        x_t, x_0_hat = noised_as(predict, scheduler, image, t, eps)
        square = scheduler.to_eps(x_0_hat, x_t, t) ** 2
        seen = square[:, kept].mean(1).cpu() / expected[t]
        if not kept.all():
            sigma = (1 / scheduler.alpha_bar_at(t) - 1).sqrt()
            seen /= uncut_square(x_0_hat.clamp(-1, 1), sigma)[:, kept].mean(1).cpu()
        noisier = (seen > 1).nonzero().flatten()
        last = int(noisier[-1]) if len(noisier) else 0
        low, high = int(t[last]), int(t[min(last + 1, len(t) - 1)])
    return low
