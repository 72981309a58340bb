"""Networks and processes as a table: each model that a recipe trains, its source and size.

Plain data: torch and diffusers are imported inside the functions that build. `settings` use the
names of TrainingConfig's fields, so that a preset is one layer of the configuration (defaults <
preset < recipe < flags).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .errors import InputError, check_choice

if TYPE_CHECKING:
    from diffusers import UNet2DModel
    from torch import nn

    from .scheduler import DDPMScheduler

# What Ho et al.'s TensorFlow network means in UNet2DModel's arguments: GroupNorm with eps 1e-6,
# timestep embeddings [sin, cos] over half - 1 frequencies, stride-2 convolutions padded bottom and
# right, one attention head.
HO_BLOCKS = dict(
    layers_per_block=2,
    norm_eps=1e-6,
    freq_shift=1,
    flip_sin_to_cos=False,
    downsample_padding=0,
    attention_head_dim=None,
)
DEFAULT_PROCESS = dict(
    ddpm_num_steps=1000,
    ddpm_beta_schedule="cosine",
    prediction_type="v_prediction",
    variance_type="fixed_small",
)
# Ho et al. sample CIFAR-10 with fixed_large (run_cifar.py), LSUN and CelebA-HQ with fixed_small
# (run_lsun.py and run_celebahq.py use another diffusion_utils).
HO_PROCESS = dict(ddpm_num_steps=1000, ddpm_beta_schedule="linear", prediction_type="epsilon")

BETA_SCHEDULES = ("linear", "scaled_linear", "cosine", "squaredcos_cap_v2", "sigmoid", "laplace")

# Channels by number of levels, Ho et al.'s where they have one: 4 levels for CIFAR-10, 6 for
# 256x256.
AUTO_CHANNELS = {
    1: (128,),
    2: (128, 256),
    3: (128, 256, 256),
    4: (128, 256, 256, 256),
    5: (128, 128, 256, 256, 512),
    6: (128, 128, 256, 256, 512, 512),
}


@dataclass(frozen=True)
class Preset:
    """A network and the process that it was trained with.

    Attributes:
        source: Where the numbers come from.
        parameters: The network's parameter count at its own resolution and channels (tested); None
            for `auto`.
        blocks: Arguments of UNet2DModel that are the same at every resolution.
        channels: block_out_channels, one entry a level; empty for `auto`, which sizes itself by the
            resolution.
        attention: Levels with self-attention (0 is full resolution).
        initialisation: `ho` (`initialise`), `zero` (PyTorch's weights, zero where a branch ends) or
            `torch` (PyTorch's alone).
        settings: The layer that it adds to a TrainingConfig.
    """

    source: str
    parameters: int | None
    blocks: dict
    settings: dict
    channels: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    initialisation: Literal["ho", "zero", "torch"] = "ho"


PRESETS: dict[str, Preset] = {
    "auto": Preset(
        source="Ho et al. 2020's blocks, sized by the resolution (`auto_levels`)",
        parameters=None,
        blocks=HO_BLOCKS,
        initialisation="zero",  # under Muon better than Ho et al.'s: docs/log.md
        settings={},
    ),
    "cifar10": Preset(
        source="Ho et al. 2020, appendix B: 35.7M parameters; constants of their run_cifar.py",
        parameters=35_746_307,
        blocks=HO_BLOCKS,
        channels=(128, 256, 256, 256),
        attention=(1,),
        settings=dict(HO_PROCESS, resolution="32", variance_type="fixed_large", dropout=0.1),
    ),
    "lsun": Preset(
        source="Ho et al. 2020, appendix B: 114M parameters, LSUN and CelebA-HQ at 256x256",
        parameters=113_673_219,
        blocks=HO_BLOCKS,
        channels=(128, 128, 256, 256, 512, 512),
        attention=(4,),
        settings=dict(HO_PROCESS, resolution="256", variance_type="fixed_small", dropout=0.0),
    ),
    "lsun-large": Preset(
        source="Ho et al. 2020, appendix B: 256M parameters; base width 192 inferred from it",
        parameters=255_677_955,
        blocks=HO_BLOCKS,
        channels=(192, 192, 384, 384, 768, 768),
        attention=(4,),
        settings=dict(HO_PROCESS, resolution="256", variance_type="fixed_small", dropout=0.0),
    ),
    "fashion-quick": Preset(
        source="measured here: learns most in five minutes on two CPU cores (docs/log.md)",
        parameters=1_124_161,
        # Four or more channels a group: with 32 groups of one channel FD is 4.7 instead of 2.7.
        blocks=dict(
            HO_BLOCKS,
            layers_per_block=1,
            add_attention=False,
            norm_num_groups=8,
            resnet_time_scale_shift="scale_shift",
        ),
        channels=(32, 64, 64),
        initialisation="zero",
        settings=dict(resolution="28", dropout=0.0),
    ),
    "diffusers-unconditional": Preset(
        source="diffusers 0.42, examples/unconditional_image_generation/train_unconditional.py",
        parameters=113_673_219,
        blocks=dict(layers_per_block=2),
        channels=(128, 128, 256, 256, 512, 512),
        attention=(4,),
        initialisation="torch",
        settings=dict(HO_PROCESS, resolution="64", variance_type="fixed_small", dropout=0.0),
    ),
}


def auto_levels(resolution: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(channels, attention levels) for a resolution (height, width).

    Halve while the shorter side is 8 or more and both are even, up to six levels; attend where the
    shorter side is 9 to 16 pixels, as Ho et al. do at 16x16: that resolution holds objects, and
    attention there is still cheap.
    """
    sides = [min(resolution)]
    while (
        sides[-1] >= 8
        and len(sides) < 6
        and all(side % 2 ** len(sides) == 0 for side in resolution)
    ):
        sides.append(sides[-1] // 2)
    if sides[-1] > 16 and len(sides) < 6:  # attention in the middle, and a view of parts only
        wanted = next(times for times in range(6) if sides[0] / 2**times <= 16 or times == 5)
        check_halving("--preset auto", resolution, wanted)
    return AUTO_CHANNELS[len(sides)], tuple(i for i, side in enumerate(sides) if 8 < side <= 16)


def check_halving(network: str, resolution: tuple[int, int], times: int) -> None:
    """Raise InputError unless (height, width) can be halved so many times."""
    factor = 2**times
    if any(side % factor for side in resolution):
        height, width = (max(factor, side - side % factor) for side in resolution)
        raise InputError(
            f"resolution {resolution[0]}x{resolution[1]} cannot be halved {times} times, as the "
            f"network of {network} needs; use multiples of {factor}, for example "
            f"{height}x{width}"
        )


def unet_config(
    preset: str = "auto",
    *,
    resolution: tuple[int, int] | None = None,
    image_channels: int = 3,
    dropout: float | None = None,
    learned_variance: bool = False,
    num_classes: int | None = None,
    null_class: bool = True,
) -> dict:
    """Arguments of UNet2DModel for a preset.

    Args:
        preset: A key of PRESETS.
        resolution: (height, width) of the images; the preset's own by default.
        image_channels: 1 for grey, 3 for RGB.
        dropout: The preset's own by default.
        learned_variance: Twice the output channels: the prediction and a variance.
        num_classes: Condition on so many classes.
        null_class: And on one more, the last, which stands for any of them.

    Raises:
        InputError: unknown preset, no resolution for `auto`, or a resolution that the levels cannot
            halve.
    """
    check_choice("preset", preset, PRESETS)
    row = PRESETS[preset]
    if resolution is None:
        if "resolution" not in row.settings:
            raise InputError(
                "the auto preset is sized by the resolution: pass resolution=(height, width)"
            )
        resolution = (int(row.settings["resolution"]),) * 2
    channels, attention = (row.channels, row.attention) if row.channels else auto_levels(resolution)
    check_halving(f"preset {preset!r}", resolution, len(channels) - 1)
    kinds = ["Attn" if level in attention else "" for level in range(len(channels))]
    return dict(
        row.blocks,
        **_of_images(resolution, image_channels, learned_variance, num_classes, null_class),
        block_out_channels=channels,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        dropout=row.settings.get("dropout", 0.0) if dropout is None else dropout,
    )


def _of_images(
    resolution: tuple[int, int],
    image_channels: int,
    learned_variance: bool,
    num_classes: int | None,
    null_class: bool,
) -> dict:
    """The arguments of UNet2DModel that follow from the images and the variance."""
    height, width = resolution
    return dict(
        sample_size=height if height == width else [height, width],
        in_channels=image_channels,
        out_channels=image_channels * (2 if learned_variance else 1),
        num_class_embeds=None if num_classes is None else num_classes + null_class,
    )


def load_unet_config(
    name: str,
    *,
    resolution: tuple[int, int],
    image_channels: int = 3,
    dropout: float | None = None,
    learned_variance: bool = False,
    num_classes: int | None = None,
    null_class: bool = True,
) -> dict:
    """Arguments of a UNet2DModel from a file, but for what the images and the variance decide.

    Args:
        name: Id of a repository on the Hub, a folder, or a file of JSON, as
            `UNet2DModel.save_config` writes it; or a pipeline, whose network is in `unet`.
        resolution, image_channels, learned_variance, num_classes, null_class: As in `unet_config`,
            in place of the file's.
        dropout: The file's own by default.

    Raises:
        InputError: it cannot be loaded, is no UNet2DModel, or cannot halve the resolution.
    """
    from diffusers import UNet2DModel

    config, failure = None, None
    for where in ({}, {"subfolder": "unet"}):
        try:
            config = UNet2DModel.load_config(name, **where)
        except OSError as error:
            failure = failure or error
            continue
        if not isinstance(config, dict) or "_class_name" in config:  # not a run's settings
            break
    if config is None:
        raise InputError(
            f"model_config_name_or_path {name!r} cannot be loaded: {' '.join(str(failure).split())}"
        ) from failure
    kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
    if kind != "UNet2DModel":
        raise InputError(
            f"model_config_name_or_path {name!r} must be the configuration of a UNet2DModel; got "
            f"that of {kind!r}"
        )
    if "block_out_channels" in config:
        check_halving(repr(name), resolution, len(config["block_out_channels"]) - 1)
    config |= _of_images(resolution, image_channels, learned_variance, num_classes, null_class)
    config["class_embed_type"] = None  # another way to condition, which we do not train
    return config if dropout is None else config | dict(dropout=dropout)


def build_unet(
    preset: str = "auto", *, model_config: str | None = None, **arguments
) -> UNet2DModel:
    """The network of a preset, initialised.

    Args:
        preset: A key of PRESETS.
        model_config: Take the network from this configuration (`load_unet_config`), and from the
            preset the initialisation only.
        arguments: Those of `unet_config`.

    Raises:
        InputError: as `unet_config` and `load_unet_config`, or values that make no network.
    """
    from diffusers import UNet2DModel

    check_choice("preset", preset, PRESETS)
    if model_config is None:
        unet = UNet2DModel(**unet_config(preset, **arguments))
    else:
        config = load_unet_config(model_config, **arguments)
        try:
            unet = UNet2DModel.from_config(config)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"model_config_name_or_path {model_config!r} describes no network: "
                f"{' '.join(str(error).split())}"
            ) from error
    if PRESETS[preset].initialisation == "ho":
        initialise(unet)
    if PRESETS[preset].initialisation == "zero":
        zero_branches(unet)
    return unet


def initialise(unet: nn.Module) -> None:
    """Ho et al.'s initialisation, in place: fan-average uniform weights, zero biases, zero ends.

    The ends are those of `zero_branches`; their code scales them by 1e-10 instead of 0.
    """
    from torch import nn

    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    zero_branches(unet)


def zero_branches(unet: nn.Module) -> None:
    """Zero the last layer of each residual branch and of the network, in place.

    Every block then starts as the identity, and the output is exactly 0.
    """
    from torch import nn

    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".to_out.0")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def beta_range(schedule: str, num_timesteps: int) -> tuple[float, float]:
    """(beta_start, beta_end): Ho et al.'s 1e-4 and 0.02 for T = 1000, scaled by 1000 / T.

    So alpha_bar_T stays near 0. Only linear, scaled_linear and sigmoid use them.

    Raises:
        InputError: too few timesteps: betas would reach 1.
    """
    scale = 1000 / num_timesteps
    if 0.02 * scale >= 1 and schedule in ("linear", "scaled_linear", "sigmoid"):
        raise InputError(
            f"ddpm_num_steps must be more than 20 for the {schedule} schedule; got {num_timesteps}"
        )
    return 1e-4 * scale, 0.02 * scale


def build_scheduler(
    preset: str = "auto",
    *,
    class_names: Sequence[str] | None = None,
    null_class: bool = True,
    **settings,
) -> DDPMScheduler:
    """The process of a preset, written in words that stock diffusers reads.

    Trailing timesteps, so that a short chain starts at the noise. sigmoid and laplace, which six of
    stock's schedulers refuse, are written as `trained_betas`.

    Args:
        preset: A key of PRESETS.
        class_names: Names of the network's classes, in the order of their numbers, without the null
            class; kept where stock does not look.
        null_class: Whether the network of classes has one.
        settings: Any of ddpm_num_steps, ddpm_beta_schedule, prediction_type and variance_type, in
            place of the preset's (or else DEFAULT_PROCESS).

    Raises:
        InputError: an unknown word, or too few timesteps for the schedule's beta range.
    """
    from .functional import make_betas
    from .scheduler import FORMAT, DDPMScheduler

    check_choice("preset", preset, PRESETS)
    for name in settings:
        check_choice("setting of the process", name, DEFAULT_PROCESS)
    row = DEFAULT_PROCESS | PRESETS[preset].settings | settings
    schedule, steps = row["ddpm_beta_schedule"], row["ddpm_num_steps"]
    check_choice("ddpm_beta_schedule", schedule, BETA_SCHEDULES)
    beta_start, beta_end = beta_range(schedule, steps)
    extras = {"format": FORMAT}
    words = {"beta_schedule": "squaredcos_cap_v2" if schedule == "cosine" else schedule}
    if schedule in ("sigmoid", "laplace"):
        words = {"trained_betas": make_betas(schedule, steps, beta_start, beta_end).tolist()}
        extras["beta_schedule"] = schedule
    if class_names is not None:
        extras["class_names"] = list(class_names)
    if not null_class:
        extras["null_class"] = False
    scheduler = DDPMScheduler(
        num_train_timesteps=steps,
        beta_start=beta_start,
        beta_end=beta_end,
        prediction_type=row["prediction_type"],
        variance_type=row["variance_type"],
        timestep_spacing="trailing",
        **words,
    )
    scheduler.register_to_config(_ddpm_hf=extras)
    return scheduler
