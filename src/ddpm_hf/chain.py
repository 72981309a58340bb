"""The timesteps that a scheduler samples along: set, put right where diffusers errs, or refused.

Each of diffusers' schedulers places its timesteps in its own way. That its schedule is not the one
the network was trained with, that rounding adds a timestep -1, or that its steps are not as long as
its timesteps are apart, none of them says.
"""

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils import logging

from .errors import InputError, check_whole
from .scheduler import DDPMScheduler

logger = logging.get_logger(__name__)

MOST_SIGNAL = 0.05
"""sqrt(alpha_bar) up to which an image counts as pure noise, which sampling starts from: linear
from timestep 769 of 1,000, cosine from 967.
"""

MOST_STRAY = 0.05
"""How much shorter than the way to the next timestep a step may be before it is warned about."""

FIXED_STRIDE = (diffusers.DDIMScheduler, diffusers.DDIMParallelScheduler, diffusers.PNDMScheduler)
"""They step by T // K timesteps, however far apart they placed them."""


def set_chain(
    scheduler: SchedulerMixin,
    process: DDPMScheduler,
    num_inference_steps: int,
    device: torch.device,
    *,
    optimal: bool,
    whole: bool,
) -> None:
    """Set the timesteps; warn where the samples will suffer.

    Args:
        scheduler: Any of diffusers that samples DDPMs, or ours.
        process: What the network was trained with.
        num_inference_steps: K, at most the T trained timesteps.
        device: Of the timesteps.
        optimal: Take the optimal timesteps, where they are stored for that many.
        whole: The network knows whole timesteps only.

    Raises:
        InputError: a scheduler that does not sample this process, or not in so many steps.
    """
    check_scheduler(scheduler, process)
    check_whole("num_inference_steps", num_inference_steps, 1, len(process.beta))
    if isinstance(scheduler, diffusers.PNDMScheduler) and num_inference_steps < 4:
        raise InputError(f"PNDM needs num_inference_steps >= 4; got {num_inference_steps}")
    if isinstance(scheduler, DDPMScheduler) and not optimal:
        scheduler.set_even_timesteps(num_inference_steps, device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
    _cut_surplus(scheduler, num_inference_steps)
    last = float(scheduler.timesteps.max())
    if last >= len(process.beta):
        raise InputError(
            f"steps_offset={scheduler.config.get('steps_offset')} leads to timestep {last:g} of "
            f"{len(process.beta)}: use fewer steps"
        )
    if whole and scheduler.timesteps.is_floating_point():
        raise InputError(
            f"{type(scheduler).__name__} steps between timesteps, and this network knows whole "
            "ones only: use DDPM, DDIM, DPM-Solver++, UniPC or PNDM"
        )
    _warn_of_signal(scheduler, process, num_inference_steps)
    _warn_of_stride(scheduler, num_inference_steps, len(process.beta))


def check_scheduler(scheduler: SchedulerMixin, process: DDPMScheduler) -> None:
    """Raise InputError for a scheduler that samples from another process than the network's."""
    name = type(scheduler).__name__
    there = getattr(scheduler, "alphas_cumprod", None)
    if there is None:
        raise InputError(
            f"{name} samples from another kind of model than a DDPM: use DDPM, DDIM, DPM-Solver++, "
            "UniPC, Euler, Heun or PNDM"
        )
    # Of a process that ends in pure noise the last entry is what a scheduler can bear.
    difference = (there.cpu().double() - process.alpha_bar[1:])[:-1].abs().max()
    if difference > 1e-3:
        raise InputError(
            f"{name} has another noise schedule than the network was trained with (alpha_bar is "
            f"{difference:.2g} off; does it know rescale_betas_zero_snr?): use DDPM, DDIM, "
            "DPM-Solver++, UniPC or Euler"
        )
    if isinstance(scheduler, diffusers.PNDMScheduler) and (
        scheduler.config.prediction_type not in ("epsilon", "v_prediction")
    ):
        raise InputError(
            "PNDM needs a network that predicts epsilon or v; this one's prediction_type is "
            f"{scheduler.config.prediction_type!r}: use DDIM or another solver"
        )


def _cut_surplus(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Take away the timestep -1, one too many, that a float stride's rounding makes for some K.

    From there DDIM and PNDM take the noisiest entry of their table.
    """
    surplus = int((scheduler.timesteps < 0).sum())
    if not surplus:
        return
    sigmas = getattr(scheduler, "sigmas", None)
    kept = scheduler.timesteps[scheduler.timesteps >= 0]
    if sigmas is not None and len(sigmas) != len(scheduler.timesteps) + 1:
        raise InputError(
            f"{type(scheduler).__name__} makes a timestep -1 of {num_inference_steps} steps: use "
            f"{num_inference_steps - 1} or another number"
        )
    scheduler.timesteps = kept
    if sigmas is not None:  # the last one, of the clean image, stays
        scheduler.sigmas = torch.cat([sigmas[: len(kept)], sigmas[-1:]])


def _warn_of_signal(
    scheduler: SchedulerMixin, process: DDPMScheduler, num_inference_steps: int
) -> None:
    """Warn of a chain that starts well below the noise that sampling starts from."""
    spacing = scheduler.config.get("timestep_spacing")
    first = float(scheduler.timesteps[0])
    signal = float(process.alpha_bar_at(first).sqrt()) if spacing != "trailing" else 0.0
    if signal > MOST_SIGNAL:
        logger.warning(
            f"timestep_spacing={spacing!r} starts {num_inference_steps} steps at timestep "
            f"{first:g} of {len(process.beta)}, where an image is not yet pure noise: "
            f"{signal:.0%} of it is left, and the samples will be poor. Use 'trailing': "
            "pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, "
            "timestep_spacing='trailing')"
        )


def _warn_of_stride(scheduler: SchedulerMixin, num_inference_steps: int, trained: int) -> None:
    """Warn of steps that are shorter than the timesteps are apart."""
    step, way = trained // num_inference_steps, trained / num_inference_steps
    if not isinstance(scheduler, FIXED_STRIDE) or scheduler.config.timestep_spacing == "leading":
        return
    if step < (1 - MOST_STRAY) * way:
        logger.warning(
            f"in {num_inference_steps} steps {type(scheduler).__name__} goes {step} timesteps a "
            f"step, and its timesteps are {way:.2f} apart: the samples will suffer. Use a number "
            f"that divides {trained}, or eta=0.0 on ddpm_hf.DDPMScheduler, which is DDIM in any "
            "number of steps"
        )
