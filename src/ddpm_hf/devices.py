"""Where a run computes: Accelerate set up for what is there, precision, and threads."""

import importlib.util
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from .config import TrainingConfig
from .errors import InputError


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Accelerate; on the CPU where there is no other device, so that torchrun's processes meet.

    Raises:
        InputError: a logger that is not installed, fp16 on a CPU, or an engine not supported yet.
    """
    if config.logger != "none" and importlib.util.find_spec(config.logger) is None:
        raise InputError(
            f'logger {config.logger!r} is not installed: pip install "ddpm_hf[track]", or choose '
            "another with --logger"
        )
    on_cpu = not torch.accelerator.is_available()
    precision = choose_precision(config.mixed_precision)
    if precision == "fp16" and on_cpu:
        raise InputError("mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    AcceleratorState._reset_state(True)  # a notebook may train twice, in different precisions
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.logger == "none" else config.logger,
        project_config=ProjectConfiguration(
            project_dir=str(config.run_dir), logging_dir=str(config.run_dir / config.logging_dir)
        ),
        # The others wait for the process that decodes the images.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    engine = accelerator.distributed_type.value
    if engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise InputError(f"{engine} is not supported yet: launch with DDP (--multi_gpu) instead")
    if accelerator.device.type == "cpu" or config.cpu_threads != "auto":
        set_threads(config.cpu_threads)
    return accelerator


def choose_precision(wanted: str) -> str:
    """no, fp16 or bf16. `auto` is what the launcher says, or bf16 on a GPU that computes in it."""
    if wanted != "auto":
        return wanted
    # `accelerate launch` always exports a precision; its "no" cannot be told from no choice.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched in ("fp16", "bf16"):
        return launched
    cuda = torch.cuda.is_available()
    return "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def set_threads(wanted: str) -> None:
    """Compute on all cores: launchers export OMP_NUM_THREADS=1, which leaves the others idle."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = available_cores() // local_processes if wanted == "auto" else int(wanted)
    torch.set_num_threads(max(1, threads))


def available_cores(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: its affinity, and a container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = cgroup.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or `max`: no quota
        return cores
