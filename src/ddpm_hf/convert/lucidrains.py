"""lucidrains/denoising-diffusion-pytorch: recognised, and refused with the reason.

In every version a residual block adds activation(norm(convolution)) to its input, and UNet2DModel's
adds a convolution: no choice of weights makes one the other. Most have a first convolution of 7x7,
linear attention and a GELU in the time embedding besides.
"""

import re
from collections.abc import Iterable

from torch import Tensor

from ..errors import InputError
from .layout import Network

BLOCK = re.compile(r"(.+\.)?downs\.0\.0\.(block1|mlp)\..+")
# What a name shows, and how it is said; a UNet2DModel has none of them.
SIGNS = {
    r".*\.block1\..+": "blocks that start with a convolution",
    r".*\.norm\.g": "norms over channels alone",
    r".*\binit_conv\.weight": "a 7x7 first convolution",
    r".*\.to_out\.1\.g": "linear attention",
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
