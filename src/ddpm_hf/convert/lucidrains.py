"""lucidrains/denoising-diffusion-pytorch: recognised, and refused with the reason.

In every version its residual blocks are convolution, norm, activation, where UNet2DModel's are
norm, activation, convolution, and no choice of weights makes one the other. Most have a first
convolution of 7x7, linear attention and a GELU in the time embedding besides.
"""

import re
from collections.abc import Iterable

from torch import Tensor

from ..errors import InputError
from .layout import Network

BLOCK = re.compile(r"(.+\.)?downs\.0\.0\.(block1|mlp)\..+")
# What a name shows, and how it is said; a UNet2DModel has none of them.
SIGNS = {
    r".*\.block1\..+": "convolutions before their norms",
    r".*\binit_conv\.weight": "a first convolution of its own width",
    r".*\bdowns\.0\.2\..*to_qkv\.weight": "attention without biases, linear at full resolution",
    r".*\.mem_kv": "memory keys and values",
    r".*\bfinal_res_block\..+": "a skip around the whole network",
}


def recognises(names: Iterable[str]) -> bool:
    """Whether weights of these names are of this family."""
    return any(map(BLOCK.fullmatch, names))


def read(weights: dict[str, Tensor], given: dict, family: str | None) -> Network:
    """Raise InputError: a UNet2DModel cannot hold this network."""
    has = [
        word for sign, word in SIGNS.items() if any(re.fullmatch(sign, name) for name in weights)
    ]
    raise InputError(
        "this is a network of lucidrains' denoising-diffusion-pytorch, which a UNet2DModel cannot "
        f"hold exactly: it has {', '.join(has)}. Sample it with that package"
    )
