"""pesser/pytorch_diffusion: Ho et al.'s network in torch, with their weights or one's own.

It is the network of the paper (`presets.HO_BLOCKS`). Names are those of the TensorFlow code.
"""

import re
from collections.abc import Iterable

from torch import Tensor

from ..errors import InputError
from ..presets import HO_BLOCKS
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
    ddpm_num_steps=1000,
    beta_start=1e-4,
    beta_end=0.02,
    prediction_type="epsilon",
    variance_type=None,
)
ATTENTION_SIDE = 16  # the published networks attend at 16x16

ENDS = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
MIDDLE = {
    "block_1": "mid_block.resnets.0",
    "attn_1": "mid_block.attentions.0",
    "block_2": "mid_block.resnets.1",
}
INSIDE = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
BLOCK = re.compile(r"(down|up)\.(\d+)\.(?:(block|attn)\.(\d+)\.(\w+)|\1sample\.conv)")
MIDDLE_BLOCK = re.compile(r"mid\.(block_1|attn_1|block_2)\.(\w+)")


def recognises(names: Iterable[str]) -> bool:
    """Whether weights of these names are of this family."""
    return {"temb.dense.0.weight", "down.0.block.0.norm1.weight"} <= set(names)


def read(weights: dict[str, Tensor], given: dict, family: str | None) -> Network:
    """The network and its process.

    Args:
        weights: The checkpoint's.
        given: Settings, keys of DEFAULTS.
        family: Not needed here.

    Raises:
        InputError: a UNet2DModel cannot hold it, or a setting that does not fit.
    """
    check_settings("pesser", given, DEFAULTS)
    levels = _levels(weights)
    ends = dict(conv_in=weights["conv_in.weight"], conv_out=weights["conv_out.weight"])
    settings = DEFAULTS | given
    if settings["resolution"] is None:
        if True not in levels.attention:
            raise InputError("pass the resolution: no level of this network attends, to infer it")
        settings["resolution"] = ATTENTION_SIDE << levels.attention.index(True)
    if settings["variance_type"] is None:
        # Ho et al. sample CIFAR-10 with fixed_large and the networks of 256x256 with fixed_small.
        fixed = "fixed_large" if settings["resolution"] == 32 else "fixed_small"
        settings["variance_type"] = default_variance(**ends, fixed=fixed)
    unet = unet_arguments(
        levels,
        **ends,
        time_width=weights["temb.dense.0.weight"].shape[1],
        resolution=settings["resolution"],
        **{name: value for name, value in HO_BLOCKS.items() if name != "layers_per_block"},
    )
    betas = (settings["beta_start"], settings["beta_end"])
    process = process_arguments(unet, settings, betas)
    return Network("pesser", settings, unet, _tensors(weights, len(levels.widths)), process)


def _levels(weights: dict[str, Tensor]) -> Levels:
    number = range(count("down.{}.block.0.norm1.weight", weights))
    return Levels(
        tuple(weights[f"down.{i}.block.0.conv1.weight"].shape[0] for i in number),
        tuple(f"down.{i}.attn.0.q.weight" in weights for i in number),
        count("down.0.block.{}.norm1.weight", weights),
    )


def _tensors(weights: dict[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """The weights by UNet2DModel's names; 1x1 convolutions of attention are linear there."""
    tensors, unknown = {}, []
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        place = ENDS.get(module) or _place(module, num_levels)
        if place is None:
            unknown.append(name)
        else:
            linear = ".attentions." in place and tensor.ndim == 4
            tensors[f"{place}.{kind}"] = tensor.flatten(1) if linear else tensor
    check_known(unknown, "pesser")
    return tensors


def _place(module: str, num_levels: int) -> str | None:
    """UNet2DModel's name of a module within a block; None if the family has none of that name."""
    if match := MIDDLE_BLOCK.fullmatch(module):
        return f"{MIDDLE[match[1]]}.{INSIDE[match[2]]}" if match[2] in INSIDE else None
    match = BLOCK.fullmatch(module)
    if match is None or match[5] not in (None, *INSIDE):
        return None
    side, level, part, number, inside = match.groups()
    # Levels of the way up are numbered by their resolution here, and in their order there.
    block = f"{side}_blocks.{level if side == 'down' else num_levels - 1 - int(level)}"
    if part is None:
        return f"{block}.{side}samplers.0.conv"
    return f"{block}.{'resnets' if part == 'block' else 'attentions'}.{number}.{INSIDE[inside]}"
