"""What a call of the pipeline is given: checked, and classes as numbers."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from .errors import InputError
from .scheduler import DDPMScheduler

ClassLabels = int | str | list[int | str] | Tensor
"""One class for all images, or one each, (B,): numbers or names."""

OUTPUT_TYPES = ("pil", "np", "numpy", "pt")


def check_output_type(output_type: str | None) -> None:
    """Raise ValueError, as diffusers does, for one that there is not."""
    if output_type is not None and output_type not in OUTPUT_TYPES:
        raise ValueError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}"
        )


def check_generators(generator: object, name: str, number: int) -> None:
    """Raise InputError for what is neither a generator nor a list of one for each image."""
    each = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in each):
        raise InputError(
            "generator must be a torch.Generator, or a list with one per image, as "
            f"torch.Generator().manual_seed(0); got {generator!r}"
        )
    if isinstance(generator, list) and len(generator) != number:
        raise InputError(f"pass one generator per image: got {len(generator)} for {name}={number}")


def check_guidance(guidance_scale: object) -> None:
    """Raise InputError unless the scale of guidance is a finite number."""
    if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise InputError(
            f"guidance_scale must be a finite number, 1.0 is none; got {guidance_scale!r}"
        )


def check_variance(
    scheduler: SchedulerMixin, eta: float | None, analytic: bool | None, solver_order: int
) -> None:
    """Raise InputError for an eta, a calibrated variance or an order that there cannot be."""
    if solver_order not in (1, 2):
        raise InputError(f"solver_order must be 1 or 2; got {solver_order!r}")
    asked = eta is not None or analytic is not None or solver_order != 1
    if asked and not isinstance(scheduler, DDPMScheduler):
        raise InputError(
            "eta, analytic and solver_order belong to this package's scheduler; the pipeline's "
            f"is {type(scheduler).__name__}: leave them out, or take --scheduler ddpm, in Python "
            "pipe.scheduler = ddpm_hf.DDPMScheduler.from_config(pipe.scheduler.config)"
        )
    if eta is not None and not (isinstance(eta, Real) and 0 <= eta <= 1):
        raise InputError(f"eta must be between 0 (DDIM) and 1 (DDPM); got {eta!r}")
    if solver_order == 2 and eta:
        raise InputError(f"solver_order=2 is of DDIM, eta=0; got eta={eta}")
    if analytic and scheduler.analytic is None:
        raise InputError("analytic needs a calibrated model: run `ddpm-hf calibrate` first")


def check_latents(
    latents: Tensor, image_shape: tuple[int, int, int], batch_size: int | None = None
) -> None:
    """Raise InputError unless latents are finite noise, of so many images or of any number."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        of = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise InputError(f"latents must be a float tensor, as encode gives; got {of}")
    shape, number = tuple(latents.shape), batch_size or "B"
    if shape[1:] != image_shape or not shape[0] or batch_size not in (None, shape[0]):
        wanted = ", ".join(map(str, (number, *image_shape)))
        more = "" if batch_size else ", B at least 1"
        raise InputError(f"latents must have the shape ({wanted}){more}; got {shape}")
    if not bool(latents.isfinite().all()):
        raise InputError("latents must be finite; got NaN or infinity among them")


def class_numbers(
    class_labels: ClassLabels | None,
    batch_size: int,
    guidance_scale: float,
    *,
    num_embeds: int | None,
    num_classes: int,
    names: Sequence[str] = (),
) -> list[int] | None:
    """Classes as numbers, one an image; None for an unconditional network.

    Args:
        class_labels: See `ClassLabels`. A number as text is one where no class has it for a name.
        batch_size: Number of images.
        guidance_scale: 1.0 is off; guidance needs a null class.
        num_embeds: Of the network; None for an unconditional one.
        num_classes: The null class not counted.
        names: Of the classes, where they have some.

    Raises:
        InputError: classes, or guidance, that do not fit the network.
    """
    check_guidance(guidance_scale)
    if num_embeds is None:
        if class_labels is not None or guidance_scale != 1:
            raise InputError(
                "this network is unconditional: leave out class_labels and guidance_scale"
            )
        return None
    has_null = num_classes < num_embeds
    if guidance_scale != 1 and not has_null:
        raise InputError(
            "this network was trained without a null class, which guidance needs: leave out "
            f"guidance_scale; got {guidance_scale}"
        )
    null = " (the last, the null class, is any class)" if has_null else ""
    named = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
    choices = f"0 to {num_embeds - 1}{null}" + (f" or one of {named}" if names else "")
    if class_labels is None:
        raise InputError(f"this network is class-conditional: pass class_labels, {choices}")
    if isinstance(class_labels, (Tensor, np.ndarray)):
        class_labels = class_labels.tolist()
    if isinstance(class_labels, (Integral, str)):
        class_labels = [class_labels] * batch_size
    if not isinstance(class_labels, Sequence):
        raise InputError(f"class_labels must be {choices}; got {class_labels!r}")
    if len(class_labels) != batch_size:
        raise InputError(
            f"pass one class for all images or one each: got {len(class_labels)} class_labels "
            f"for batch_size={batch_size}"
        )
    numbers = [_class_number(label, names) for label in class_labels]
    for number in numbers:
        if not (isinstance(number, Integral) and 0 <= number < num_embeds):
            raise InputError(f"class_labels must be {choices}; got {number!r}")
    return numbers


def _class_number(label: int | str, names: Sequence[str]) -> int | str:
    """The number of a class; the label itself where it is none."""
    if label in names:
        return names.index(label)
    return int(label) if isinstance(label, str) and label.isdecimal() else label
