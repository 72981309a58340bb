"""A checkpoint of another trainer, read without running anything that stands in it.

A `.pt` or `.ckpt` is a pickle, and a pickle is a program. Only torch's weights-only reader is used,
which knows tensors, numbers, strings and containers of them, and stops at anything else.
"""

import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InputError, check_choice

# Where trainers keep weights beside an optimiser's state: averaged ones, and those being trained.
WHERE = {"ema": ("ema_model", "ema"), "model": ("net_model", "model", "state_dict")}

# How a file of torch begins: a zip archive, or a pickle of protocol 2 or later.
BEGINNINGS = (b"PK", b"\x80")

# What torch raises for files that are something else; its reader checks little before it reads.
UNREADABLE = (
    RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, OSError,
    AssertionError, struct.error, SafetensorError,
)  # fmt: skip


class Weights(dict):
    """Tensors by their name; a name that is not there is an InputError."""

    def __missing__(self, name: str):
        raise InputError(f"the checkpoint lacks {name}, which its network needs; is it whole?")


class Checkpoint(NamedTuple):
    """What was read: the weights, and which they are: ema, model, or None for the only ones."""

    weights: Weights
    which: str | None


def read_checkpoint(file: str | Path, which: str | None = None) -> Checkpoint:
    """The weights in a file of torch or safetensors, on the CPU.

    Args:
        file: A state dict, or a dict that holds one under a name of WHERE.
        which: `ema` or `model`; by default the averaged weights where there are any.

    Raises:
        InputError: no such file, no checkpoint, a pickle of more than tensors, weights that are not
            there, or that are not finite.
    """
    if which is not None:
        check_choice("weights", which, WHERE)
    weights, held = _choose(_load(Path(file)), which, file)
    bad = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if bad:
        raise InputError(
            f"{file} holds numbers that are not finite, in {bad[0]} and {len(bad) - 1} other "
            "weights: its training failed, take an earlier checkpoint"
        )
    return Checkpoint(weights, held)


def _load(path: Path) -> object:
    """What stands in the file."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; name a checkpoint: .pt, .ckpt or .safetensors")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            if not file.read(2).startswith(BEGINNINGS):
                raise ValueError("it begins like neither a zip archive nor a pickle")
        with warnings.catch_warnings():  # about pickles of other versions, and TorchScript
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise InputError(
            f"{path} is a pickle of more than tensors{f' ({wanted[1]})' if wanted else ''}, or "
            "damaged; such a file can run code, so it was not read. Where you trust it, save the "
            "tensors alone, as safetensors"
        ) from error
    except UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"{path} is not a checkpoint of torch or safetensors, or is damaged: {reason}"
        ) from error


def _is_weights(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _choose(loaded: object, which: str | None, file: str | Path) -> Checkpoint:
    """The weights among what was loaded."""
    if _is_weights(loaded):
        if which is not None:
            raise InputError(f"{file} holds one set of weights: leave out weights={which!r}")
        return Checkpoint(Weights(loaded), None)
    inside = loaded if isinstance(loaded, dict) else {}
    found = {
        kind: inside[name]
        for kind, names in WHERE.items()
        for name in reversed(names)  # the first name wins
        if _is_weights(inside.get(name))
    }
    if not found:
        seen = ", ".join(map(str, list(inside)[:6])) or type(loaded).__name__
        places = ", ".join(name for names in WHERE.values() for name in names)
        raise InputError(
            f"{file} holds no weights by name, neither at its top nor under {places}; it has {seen}"
        )
    held = which or next(iter(found))
    if held not in found:
        raise InputError(f"{file} holds no weights={held!r}; it has {', '.join(found)}")
    return Checkpoint(Weights(found[held]), held)
