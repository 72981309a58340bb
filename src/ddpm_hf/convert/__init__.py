"""Checkpoints of other trainers as pipelines that diffusers opens: one module per family.

A conversion is exact or refused: the weights are only renamed, cut and reordered, and a network
that UNet2DModel cannot hold is named with the reason. What weights cannot say, the heads and the
process, is a setting with the family's published default.
"""

from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

from ..errors import InputError, check_choice
from ..pipeline import DDPMPipeline, save_whole
from ..scheduler import FORMAT, DDPMScheduler
from . import lucidrains, openai, pesser, pytorch_ddpm
from .layout import Network, build_unet
from .reading import read_checkpoint

FAMILIES = {
    "guided-diffusion": openai,
    "improved-diffusion": openai,
    "pesser": pesser,
    "pytorch-ddpm": pytorch_ddpm,
    "lucidrains": lucidrains,
}


class Converted(NamedTuple):
    """What was made of a checkpoint.

    Attributes:
        family: Whose network it is.
        folder: The pipeline.
        weights: `ema` or `model`, where the file has both; None where it has one set.
        parameters: The network's parameter count.
        settings: What was given.
        assumed: What was not given: read from the weights' shapes, or the family's default.
    """

    family: str
    folder: Path
    weights: str | None
    parameters: int
    settings: dict
    assumed: dict


class Settings(TypedDict, total=False):
    """What weights do not say; what is left out or None is as the family publishes it.

    Attributes:
        resolution: Side of the images.
        num_heads: Attention heads at every level (OpenAI).
        num_head_channels: Or the channels of one head (guided-diffusion).
        new_attention_order: q, k and v are split before the heads (guided-diffusion).
        rescale_timesteps: The network was given t * 1000 / T (OpenAI).
        ddpm_num_steps: T.
        ddpm_beta_schedule: `linear` or `cosine` (OpenAI).
        beta_start, beta_end: Ends of the linear schedule (the others).
        prediction_type: `epsilon`, `sample` or `v_prediction`.
        variance_type: `fixed_small` or `fixed_large`; a learned one shows in the weights.
    """

    resolution: int | None
    num_heads: int | None
    num_head_channels: int | None
    new_attention_order: bool | None
    rescale_timesteps: bool | None
    ddpm_num_steps: int | None
    ddpm_beta_schedule: str | None
    beta_start: float | None
    beta_end: float | None
    prediction_type: str | None
    variance_type: str | None


def convert(
    file: str | Path,
    output: str | Path,
    *,
    family: str | None = None,
    weights: str | None = None,
    **settings: Unpack[Settings],
) -> Converted:
    """Write the pipeline of a foreign checkpoint; plain diffusers opens it.

    Args:
        file: A state dict or training checkpoint, .pt, .ckpt or .safetensors. No code in it is run.
        output: Folder of the new pipeline.
        family: A key of FAMILIES; by default what the names of the weights show.
        weights: `ema` or `model`, of a file that has both (default: the averaged ones).
        settings: See `Settings`.

    Raises:
        InputError: a file that is no checkpoint or could run code, weights of an unknown family or
            that UNet2DModel cannot hold, a setting that does not fit, or a disk that is full.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output} exists already: name another or an empty folder")
    given = {name: value for name, value in settings.items() if value is not None}
    checkpoint = read_checkpoint(file, weights)
    network = _read(checkpoint.weights, given, family, file)
    pipe = _pipeline(network)
    save_whole(pipe, output)
    rest = {name: value for name, value in network.settings.items() if name not in given}
    return Converted(
        network.family,
        output,
        checkpoint.which,
        pipe.unet.num_parameters(),
        given,
        {name: value for name, value in rest.items() if value is not None},
    )


def _read(weights: dict, given: dict, family: str | None, file: str | Path) -> Network:
    """The network, by the module of its family."""
    if family is not None:
        check_choice("family", family, FAMILIES)
    found = [name for name, module in FAMILIES.items() if module.recognises(weights)]
    if not found:
        raise InputError(
            f"{file} has weights of no family that is known ({', '.join(FAMILIES)}); it has "
            f"{', '.join(list(weights)[:4])} and {max(0, len(weights) - 4)} more"
        )
    if family is not None and family not in found:
        raise InputError(f"{file} has weights of {' or '.join(found)}, not of {family}")
    try:
        return FAMILIES[found[0]].read(weights, given, family)
    except InputError:
        raise
    # The shape of a weight is looked at in many places; of a damaged one any of them may fail.
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{file} has weights of shapes that no network of {found[0]} has: {error}"
        ) from error


def _pipeline(network: Network) -> DDPMPipeline:
    """The pipeline of a network."""
    scheduler = DDPMScheduler(**network.process)
    extras = {"format": FORMAT}
    if network.unet.get("num_class_embeds"):
        # Ours have a null class, the last; these families have none, and no guidance by it.
        extras["null_class"] = False
    scheduler.register_to_config(_ddpm_hf=extras)
    return DDPMPipeline(build_unet(network.unet, network.tensors), scheduler)
