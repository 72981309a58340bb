"""What the families share: a U-Net's shape in UNet2DModel's words, and weights put into one."""

from numbers import Integral
from typing import NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..errors import InputError, check_choice
from ..presets import check_halving
from ..scheduler import PREDICTION_TYPES

COUNTS = ("resolution", "num_heads", "num_head_channels", "ddpm_num_steps")


class Levels(NamedTuple):
    """A U-Net's shape, full resolution first.

    Attributes:
        widths: Channels of each level.
        attention: Whether each level attends.
        layers: Residual blocks of a level on the way down; there is one more on the way up.
    """

    widths: tuple[int, ...]
    attention: tuple[bool, ...]
    layers: int


class Network(NamedTuple):
    """A foreign network in diffusers' words.

    Attributes:
        family: Whose it is.
        settings: What was given, read or assumed, by its name in `convert`.
        unet: Arguments of UNet2DModel.
        tensors: Its weights, by UNet2DModel's names.
        process: Arguments of DDPMScheduler.
    """

    family: str
    settings: dict
    unet: dict
    tensors: dict[str, Tensor]
    process: dict


def check_settings(family: str, given: dict, defaults: dict) -> None:
    """Raise InputError for settings that the family does not have, and for numbers below 1."""
    for name, value in given.items():
        if name not in defaults:
            raise InputError(f"{name} is no setting of {family}; leave it out")
        if name in COUNTS and not (isinstance(value, Integral) and value >= 1):
            raise InputError(f"{name} must be a whole number, at least 1; got {value!r}")


def unet_arguments(
    levels: Levels,
    *,
    conv_in: Tensor,
    conv_out: Tensor,
    time_width: int,
    resolution: int,
    resample: str = "conv",
    **family,
) -> dict:
    """Arguments of UNet2DModel.

    Args:
        levels: The shape.
        conv_in, conv_out: Weights of the first and last convolution, (out, in, 3, 3).
        time_width: Numbers that a timestep is embedded in, before the first linear layer.
        resolution: Side of the images.
        resample: What changes the resolution: a convolution (`conv`) or a residual block
            (`resnet`).
        family: What is the same in all networks of a family.

    Raises:
        InputError: it is no denoiser of images, or UNet2DModel cannot hold it.
    """
    _check_ends(conv_in, conv_out)
    width = conv_in.shape[0]
    if not width == time_width == levels.widths[0]:
        raise InputError(
            f"the first convolution makes {width} channels, the first level {levels.widths[0]}, and"
            f" timesteps are embedded in {time_width}: a UNet2DModel has one width for the three "
            "and cannot hold this network exactly"
        )
    check_halving("this checkpoint", (resolution, resolution), len(levels.widths) - 1)
    plain = ("DownBlock2D", "UpBlock2D")
    if resample == "resnet":
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    down, up = (
        tuple(attending if attend else other for attend in levels.attention)
        for attending, other in zip(("AttnDownBlock2D", "AttnUpBlock2D"), plain, strict=True)
    )
    return dict(
        sample_size=resolution,
        in_channels=conv_in.shape[1],
        out_channels=conv_out.shape[0],
        layers_per_block=levels.layers,
        block_out_channels=levels.widths,
        down_block_types=down,
        up_block_types=up[::-1],
        downsample_type=resample,
        upsample_type=resample,
        **family,
    )


def _check_ends(conv_in: Tensor, conv_out: Tensor) -> None:
    """Raise InputError unless the network takes images and gives as much, or a variance too."""
    channels, out = conv_in.shape[1], conv_out.shape[0]
    if channels not in (1, 3) or out not in (channels, 2 * channels):
        raise InputError(
            f"the network takes {channels} channels and gives {out}: a denoiser of grey or RGB "
            "images takes 1 or 3 and gives as many, or twice that with a learned variance; one "
            "that takes 6 is an upsampler, and those are not converted"
        )


def default_variance(conv_in: Tensor, conv_out: Tensor, fixed: str) -> str:
    """`learned_range` where the network gives a variance, else the family's fixed one."""
    return "learned_range" if conv_out.shape[0] == 2 * conv_in.shape[1] else fixed


def process_arguments(
    unet: dict, settings: dict, betas: tuple[float, float], **more: object
) -> dict:
    """Arguments of DDPMScheduler.

    Args:
        unet: Arguments of the network: twice the channels mean a learned variance.
        settings: `ddpm_num_steps`, `prediction_type` and `variance_type`.
        betas: First and last of the linear schedule.
        more: Other arguments.

    Raises:
        InputError: words or numbers that are none of a process.
    """
    learned = unet["out_channels"] == 2 * unet["in_channels"]
    variances = ("learned_range",) if learned else ("fixed_small", "fixed_large")
    check_choice("variance_type", settings["variance_type"], variances)
    check_choice("prediction_type", settings["prediction_type"], PREDICTION_TYPES)
    if settings["ddpm_num_steps"] < 2:
        raise InputError(f"ddpm_num_steps must be at least 2; got {settings['ddpm_num_steps']}")
    if not 0 < betas[0] <= betas[1] < 1:
        raise InputError(f"0 < beta_start <= beta_end < 1 must hold; got {betas[0]} and {betas[1]}")
    return dict(
        num_train_timesteps=settings["ddpm_num_steps"],
        beta_start=betas[0],
        beta_end=betas[1],
        prediction_type=settings["prediction_type"],
        variance_type=settings["variance_type"],
        timestep_spacing="trailing",
        **more,
    )


def count(pattern: str, weights: dict) -> int:
    """How many numbers from 0 on, put into the pattern, make the name of a weight."""
    number = 0
    while pattern.format(number) in weights:
        number += 1
    return number


def check_known(unknown: list[str], family: str) -> None:
    """Raise InputError for weights that the family's U-Net does not have."""
    if unknown:
        raise InputError(
            f"the checkpoint has {len(unknown)} weights that the U-Net of {family} does not have, "
            f"such as {unknown[0]}: a UNet2DModel cannot hold it exactly"
        )


def build_unet(arguments: dict, tensors: dict[str, Tensor]) -> UNet2DModel:
    """A UNet2DModel with these weights, float32, and no others.

    Raises:
        InputError: it has others, of other shapes, or values that float32 cannot hold.
    """
    with torch.device("meta"):
        unet = UNet2DModel(**arguments)
    needed = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differ = sorted(n for n in needed.keys() | found if needed.get(n) != found.get(n))
    if differ:
        raise InputError(
            f"{len(differ)} weights do not fit a UNet2DModel: {differ[0]} needs shape "
            f"{needed.get(differ[0], 'none')} and has {found.get(differ[0], 'none')}. It cannot "
            "hold this network exactly, or the checkpoint is not whole"
        )
    own = {}
    for name, tensor in tensors.items():
        if not tensor.is_complex():
            # Each a tensor of its own: safetensors refuses parts of one storage.
            own[name] = tensor.detach().float().contiguous().clone()
        if tensor.is_complex() or not torch.isfinite(own[name]).all():
            raise InputError(f"{name} has values that float32 cannot hold; it is {tensor.dtype}")
    unet.load_state_dict(own, assign=True)
    return unet.eval()
