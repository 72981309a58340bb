"""w86763777/pytorch-ddpm: the CIFAR-10 network of Ho et al. with small differences.

A UNet2DModel with GroupNorm of eps 1e-5, one attention head, stride-2 convolutions padded on both
sides, and timesteps embedded by a table of sinusoids, sin and cos in turn; here they are computed,
all of sin first, and the columns of the layer that takes them change places. The number of
timesteps is that of the table. Its sampler does not clip the predicted image.
"""

import re
from collections.abc import Iterable

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from ..errors import InputError
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
    resolution=32,
    ddpm_num_steps=None,
    beta_start=1e-4,
    beta_end=0.02,
    prediction_type="epsilon",
    variance_type=None,
)
BLOCKS = dict(
    norm_eps=1e-5,
    flip_sin_to_cos=False,
    freq_shift=0,
    downsample_padding=1,
    attention_head_dim=None,
)

TABLE = "time_embedding.timembedding.0.weight"
FIRST_LINEAR = "time_embedding.timembedding.1"
ENDS = {
    FIRST_LINEAR: "time_embedding.linear_1",
    "time_embedding.timembedding.3": "time_embedding.linear_2",
    "head": "conv_in",
    "tail.0": "conv_norm_out",
    "tail.2": "conv_out",
}
INSIDE = {
    "block1.0": "norm1",
    "block1.2": "conv1",
    "temb_proj.1": "time_emb_proj",
    "block2.0": "norm2",
    "block2.3": "conv2",
    "shortcut": "conv_shortcut",
    "attn.group_norm": "group_norm",
    "attn.proj_q": "to_q",
    "attn.proj_k": "to_k",
    "attn.proj_v": "to_v",
    "attn.proj": "to_out.0",
    "main": "conv",
}
BLOCK = re.compile(r"(down|middle|up)blocks\.(\d+)\.(.+)")


def recognises(names: Iterable[str]) -> bool:
    """Whether weights of these names are of this family."""
    return {TABLE, "head.weight", "tail.2.weight"} <= set(names)


def read(weights: dict[str, Tensor], given: dict, family: str | None) -> Network:
    """The network and its process.

    Args:
        weights: The checkpoint's.
        given: Settings, keys of DEFAULTS.
        family: Not needed here.

    Raises:
        InputError: a UNet2DModel cannot hold it, or a setting that does not fit.
    """
    check_settings("pytorch-ddpm", given, DEFAULTS)
    levels = _levels(weights)
    ends = dict(conv_in=weights["head.weight"], conv_out=weights["tail.2.weight"])
    steps, width = weights[TABLE].shape
    found = dict(ddpm_num_steps=steps, variance_type=default_variance(**ends, fixed="fixed_large"))
    settings = DEFAULTS | found | given
    if settings["ddpm_num_steps"] != steps:
        raise InputError(
            f"ddpm_num_steps must be that of the checkpoint's table, {steps}; got "
            f"{settings['ddpm_num_steps']}"
        )
    _check_table(weights[TABLE])
    unet = unet_arguments(
        levels, **ends, time_width=width, resolution=settings["resolution"], **BLOCKS
    )
    betas = (settings["beta_start"], settings["beta_end"])
    process = process_arguments(unet, settings, betas, clip_sample=False)
    return Network("pytorch-ddpm", settings, unet, _tensors(weights, levels.layers), process)


def _levels(weights: dict[str, Tensor]) -> Levels:
    """The shape: each level but the last ends with a change of the resolution."""
    layers = count("downblocks.{}.block1.0.weight", weights)
    levels = 1 + sum(re.fullmatch(r"downblocks\.\d+\.main\.weight", n) is not None for n in weights)
    first = [level * (layers + 1) for level in range(levels)]
    return Levels(
        tuple(weights[f"downblocks.{i}.block1.2.weight"].shape[0] for i in first),
        tuple(f"downblocks.{i}.attn.proj_q.weight" in weights for i in first),
        layers,
    )


def _check_table(table: Tensor) -> None:
    """Raise InputError unless the table (T, C) is what UNet2DModel computes, in another order."""
    steps, width = table.shape
    ours = get_timestep_embedding(torch.arange(steps), width, False, 0)
    theirs = torch.cat([table[:, 0::2], table[:, 1::2]], dim=1)
    # Frequencies are rounded to float32 in another order, which moves angles by T * 2**-24 at most.
    if not torch.allclose(theirs.float(), ours, rtol=0, atol=steps * 2**-22):
        raise InputError(
            f"{TABLE} is not the table of sinusoids that this family embeds timesteps by: a "
            "UNet2DModel cannot hold this network exactly"
        )


def _tensors(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The weights by UNet2DModel's names; 1x1 convolutions of attention are linear there."""
    tensors, unknown = {}, []
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        place = ENDS.get(module) or _place(module, layers)
        if name == TABLE:
            continue
        if place is None:
            unknown.append(name)
            continue
        if name == f"{FIRST_LINEAR}.weight":
            tensor = torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)
        linear = ".attentions." in place and tensor.ndim == 4
        tensors[f"{place}.{kind}"] = tensor.flatten(1) if linear else tensor
    check_known(unknown, "pytorch-ddpm")
    return tensors


def _place(module: str, layers: int) -> str | None:
    """UNet2DModel's name of a module within a block; None if the family has none of that name."""
    match = BLOCK.fullmatch(module)
    if match is None or match[3] not in INSIDE:
        return None
    side, number, inside = match.groups()
    member = "attentions" if inside.startswith("attn.") else "resnets"
    if side == "middle":
        return f"mid_block.{member}.{number}.{INSIDE[inside]}"
    level, block = divmod(int(number), layers + (1 if side == "down" else 2))
    if inside == "main":
        member, block = f"{side}samplers", 0
    return f"{side}_blocks.{level}.{member}.{block}.{INSIDE[inside]}"
