"""OpenAI's improved-diffusion (Nichol & Dhariwal 2021) and guided-diffusion (Dhariwal & Nichol
2021), which name their weights alike.

Their U-Net is a UNet2DModel with GroupNorm of eps 1e-5, timesteps embedded as [cos, sin], and
stride-2 convolutions padded on both sides. Weights do not show the heads, the order of q, k and v,
and the process: DEFAULTS are those of the scripts, and the flags of each published checkpoint stand
in the repositories' READMEs.

A UNet2DModel cannot hold two kinds: several heads, as many at levels of different widths, for it
has one width of a head; and a first level whose multiplier is not 1.
"""

import re
from collections.abc import Iterable

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from ..errors import InputError, check_choice
from ..presets import beta_range
from .layout import (
    Levels,
    Network,
    check_known,
    check_settings,
    count,
    default_variance,
    process_arguments,
    unet_arguments,
)

DEFAULTS = dict(
    resolution=None,
    num_heads=4,
    num_head_channels=None,
    new_attention_order=False,
    ddpm_num_steps=1000,
    rescale_timesteps=None,
    ddpm_beta_schedule="linear",
    prediction_type="epsilon",
    variance_type=None,
)
BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
BLOCKS = dict(
    norm_eps=1e-5,
    attn_norm_num_groups=32,
    flip_sin_to_cos=True,
    freq_shift=0,
    downsample_padding=1,
)

# The scripts choose the multipliers by the side of the images, which is 64 when nothing is said.
SIDES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}
DEFAULT_SIDE = 64

ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
MIDDLE = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}
INSIDE = ATTENTION | {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "op": "conv",
    "conv": "conv",
}
BLOCK = re.compile(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.([012])\.(.+)")
UPSAMPLING = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.2)\.weight")


def recognises(names: Iterable[str]) -> bool:
    """Whether weights of these names are of this family."""
    return {"time_embed.0.weight", "output_blocks.0.0.in_layers.0.weight"} <= set(names)


def read(weights: dict[str, Tensor], given: dict, family: str | None) -> Network:
    """The network and its process.

    Args:
        weights: The checkpoint's.
        given: Settings, keys of DEFAULTS.
        family: Which of the two it is, if that was said.

    Raises:
        InputError: a UNet2DModel cannot hold it, or a setting that does not fit.
    """
    check_settings(family or "guided-diffusion", given, DEFAULTS)
    levels = _levels(weights)
    ends = dict(conv_in=weights["input_blocks.0.0.weight"], conv_out=weights["out.2.weight"])
    multipliers = tuple(width // levels.widths[0] for width in levels.widths)
    found = dict(
        resolution=SIDES.get(multipliers, DEFAULT_SIDE),
        variance_type=default_variance(**ends, fixed="fixed_large"),
    )
    settings = DEFAULTS | found | _heads(given) | given
    settings["rescale_timesteps"] = _rescales(settings, family)
    head_width = _head_width(levels, settings)
    schedule, steps = settings["ddpm_beta_schedule"], settings["ddpm_num_steps"]
    check_choice("ddpm_beta_schedule", schedule, BETA_SCHEDULES)
    unet = unet_arguments(
        levels,
        **ends,
        time_width=weights["time_embed.0.weight"].shape[1],
        resolution=settings["resolution"],
        **_kind(weights, levels),
        attention_head_dim=head_width,
        **BLOCKS,
    )
    tensors = _tensors(weights, levels, head_width, settings["new_attention_order"])
    if settings["rescale_timesteps"]:
        # UNet2DModel embeds whole timesteps; a table holds what it has at t * 1000 / T.
        unet |= dict(time_embedding_type="learned", num_train_timesteps=steps)
        times = torch.arange(steps).float() * (1000.0 / steps)
        tensors["time_proj.weight"] = get_timestep_embedding(times, levels.widths[0], True, 0)
    betas = beta_range(schedule, steps) if schedule == "linear" else (1e-4, 0.02)
    process = process_arguments(unet, settings, betas, beta_schedule=BETA_SCHEDULES[schedule])
    return Network(family or "guided-diffusion", settings, unet, tensors, process)


def _levels(weights: dict[str, Tensor]) -> Levels:
    """The shape: the way up changes the resolution after `layers` + 1 blocks."""
    ups = [int(match[1]) for match in map(UPSAMPLING.fullmatch, weights) if match]
    blocks = count("output_blocks.{}.0.in_layers.0.weight", weights)
    layers = min(ups, default=blocks - 1)
    first = [1 + level * (layers + 1) for level in range(len(ups) + 1)]
    return Levels(
        tuple(weights[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in first),
        tuple(f"input_blocks.{i}.1.qkv.weight" in weights for i in first),
        layers,
    )


def _kind(weights: dict[str, Tensor], levels: Levels) -> dict:
    """What the weights show of the options of the U-Net."""
    upsampling = {match[2] for match in map(UPSAMPLING.fullmatch, weights) if match}
    time = weights["middle_block.0.emb_layers.1.weight"].shape[0]
    classes = weights.get("label_emb.weight")
    return dict(
        resample="resnet" if upsampling - {"conv"} else "conv",
        resnet_time_scale_shift="scale_shift" if time == 2 * levels.widths[-1] else "default",
        num_class_embeds=None if classes is None else len(classes),
    )


def _heads(given: dict) -> dict:
    """No default number of heads where their width is given."""
    if "num_heads" in given and "num_head_channels" in given:
        raise InputError("num_heads and num_head_channels say the same twice: pass one of them")
    return dict(num_heads=None) if "num_head_channels" in given else {}


def _rescales(settings: dict, family: str | None) -> bool | None:
    """Whether the network was given t * 1000 / T in place of t; None where that is the same."""
    if settings["ddpm_num_steps"] == 1000:
        return None
    if settings["rescale_timesteps"] is None and family is None:
        raise InputError(
            f"with ddpm_num_steps={settings['ddpm_num_steps']} say whether timesteps were rescaled "
            "to 1000: pass family='improved-diffusion' (by default they were) or "
            "'guided-diffusion' (they were not), or rescale_timesteps itself"
        )
    if settings["rescale_timesteps"] is None:
        return family == "improved-diffusion"
    return settings["rescale_timesteps"]


def _head_width(levels: Levels, settings: dict) -> int | None:
    """Channels of one attention head; None is one head at every level.

    Raises:
        InputError: they do not divide a width, or differ between levels.
    """
    pairs = zip(levels.widths, levels.attention, strict=True)
    widths = sorted({width for width, attends in pairs if attends} | {levels.widths[-1]})
    heads, size = settings["num_heads"], settings["num_head_channels"]
    if any(width % (heads or size) for width in widths):
        raise InputError(
            f"num_heads={heads}, num_head_channels={size} does not divide the channels of every "
            f"attention, {', '.join(map(str, widths))}"
        )
    if heads == 1:
        return None
    sizes = [size or width // heads for width in widths]
    if len(set(sizes)) > 1:
        raise InputError(
            f"num_heads={heads} (the default is 4) makes heads of {', '.join(map(str, sizes))} "
            "channels, and a UNet2DModel has one width of a head: it cannot hold this network "
            "exactly. If it was trained with num_head_channels, pass that"
        )
    return sizes[0]


def _tensors(
    weights: dict[str, Tensor], levels: Levels, head_width: int | None, new_order: bool
) -> dict[str, Tensor]:
    """The weights by UNet2DModel's names; 1x1 convolutions of attention are linear there."""
    tensors, unknown = {}, []
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        place = ENDS.get(module) or _place(module, levels.layers)
        if place is None:
            unknown.append(name)
        elif place.endswith(".qkv"):
            heads = 1 if head_width is None else len(tensor) // 3 // head_width
            for part, rows in zip("qkv", _split(tensor, heads, new_order), strict=True):
                tensors[f"{place.removesuffix('qkv')}to_{part}.{kind}"] = rows
        else:
            tensors[f"{place}.{kind}"] = tensor.squeeze(-1) if ".to_out." in place else tensor
    check_known(unknown, "improved- or guided-diffusion")
    return tensors


def _place(module: str, layers: int) -> str | None:
    """UNet2DModel's name of a module within a block; None if the family has none of that name."""
    match = BLOCK.fullmatch(module)
    if match is None or match[4] not in INSIDE:
        return None
    way, number, part, inside = match.groups()
    if way is None:
        return f"{MIDDLE[int(part)]}.{INSIDE[inside]}"
    level, block = divmod(int(number) - (way == "input"), layers + 1)
    side = "down" if way == "input" else "up"
    if inside in ATTENTION:
        member = f"attentions.{block}"
    elif part != "0" or (side == "down" and block == layers):
        member = f"{side}samplers.0"
    else:
        member = f"resnets.{block}"
    return f"{side}_blocks.{level}.{member}.{INSIDE[inside]}"


def _split(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """Rows of q, k and v, (3, C, ...), from a weight (3C, C, 1) or bias (3C,).

    In the old order each head has its q, k and v side by side; in the new one all of q come first.
    """
    rows = qkv.squeeze(-1) if qkv.ndim == 3 else qkv
    if new_order:
        return rows.unflatten(0, (3, -1))
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)
