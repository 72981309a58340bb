"""Where a run computes: processes, how they share a batch, and threads."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object

from .config import TrainingConfig
from .errors import InputError

PATIENCE = timedelta(hours=2)
"""How long processes wait for one that decodes images, samples, or writes."""


def start_processes(config: TrainingConfig, *, anew: bool = True) -> PartialState:
    """Let the processes of this run meet, on the CPU where there is no other device.

    Args:
        config: Settings of the run.
        anew: Whatever `Accelerator` there is: a notebook may train twice, in different precisions.
            Without it they meet as they have met already, unless they parted after training.

    Raises:
        InputError: a logger that is not installed, or an engine, compiler or number of processes
            that was asked for and is not there.
    """
    if config.logger != "none" and importlib.util.find_spec(config.logger) is None:
        raise InputError(
            f'logger {config.logger!r} is not installed: pip install "ddpm_hf[track]", or choose '
            "another with --logger"
        )
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _is_on(f"ACCELERATE_USE_{name}"):
            raise InputError(f"{name} is not supported: launch with DDP (--multi_gpu) or FSDP2")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":  # accelerate's wrapper renames the weights
        raise InputError(
            f"the launcher asks for torch dynamo ({backend}): leave that out; training has "
            "--compile yes"
        )
    if not anew and _have_parted():
        if PartialState().num_processes > 1:
            raise InputError(
                "the processes parted when training ended: measure in a command of its own"
            )
        anew = True
    if anew:
        AcceleratorState._reset_state(True)
    on_cpu = _is_on("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    _check_processes(state.num_processes)
    if wants_fsdp():
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise InputError("FSDP 1 is not supported: set fsdp_version: 2 in the launcher's file")
        if config.optimizer == "muon":
            raise InputError(
                "optimizer muon needs whole matrices, and FSDP shards them: use adamw or adam"
            )
        if config.memory_format == "channels_last":
            raise InputError("FSDP shards contiguous weights only: leave out --memory_format")
        if on_cpu and config.mixed_precision not in ("auto", "no"):
            raise InputError("on a CPU FSDP2 computes in fp32: add --mixed_precision no")
        if state.num_processes == 1:
            raise InputError("FSDP shards over several processes, and this run has one")
    if state.device.type == "cpu" or config.cpu_threads != "auto":
        set_threads(config.cpu_threads)
    return state


def _have_parted() -> bool:
    """Whether a process group is gone that accelerate still believes in, as after training."""
    believed = PartialState._shared_state.get("distributed_type", DistributedType.NO)
    return believed != DistributedType.NO and not torch.distributed.is_initialized()


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")


def wants_fsdp() -> bool:
    """Whether the launcher asked for sharding; accelerate ignores that on a CPU without a word."""
    return _is_on("ACCELERATE_USE_FSDP")


def _check_processes(there: int) -> None:
    """Raise InputError where the launcher was asked for more processes than take part."""
    asked = int(os.environ.get("WORLD_SIZE", 1))
    # `accelerate launch --cpu --num_processes 2` sets an address to meet at and starts one process.
    sets = {"MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"}
    lonely = sets <= os.environ.keys()
    if there == 1 and (asked > 1 or (lonely and "WORLD_SIZE" not in os.environ)):
        raise InputError(
            f"the launcher was asked for {asked if asked > 1 else 'several'} processes, and one "
            "takes part. On a CPU use torchrun --nproc_per_node 2 train_accelerate.py ...; without "
            "a launcher every process needs RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, "
            "MASTER_PORT, and one process alone needs none of them"
        )


def on_main(act: Callable[[], Any]) -> Any:
    """What `act` gives on the main process, on every process.

    Raises:
        InputError: that of the main process, on every process, so that none waits for it.
    """
    answer = None
    if PartialState().is_main_process:
        try:
            answer = act()
        except InputError as error:
            answer = error
        except OSError as error:
            answer = InputError(f"cannot write: {error}")
    (answer,) = broadcast_object_list([answer])
    if isinstance(answer, InputError):
        raise answer
    return answer


def in_turn(processes: PartialState, load: Callable[[], Any]) -> Any:
    """What `load` gives, in one process of a machine first: the others read the cache it leaves.

    Raises:
        InputError: that one process's, on every process, so that none waits for it.
    """
    loaded, problem = None, None
    if processes.is_local_main_process:
        try:
            loaded = load()
        except InputError as error:
            problem = error
    problems = [error for error in gather_object([problem]) if error]
    if problems:
        raise problem or problems[0]
    return loaded if processes.is_local_main_process else load()


CPU_CORE_WATTS = 10.0
"""What a core of a busy server draws, about: a 250 W processor has some 25 of them."""


def device_watts(device: torch.device) -> float:
    """Power of one device at work, in watts, for an estimate of energy.

    A GPU's own limit, or 300 where it cannot be read; `CPU_CORE_WATTS` a thread on a CPU.
    """
    if device.type == "cpu":
        return CPU_CORE_WATTS * torch.get_num_threads()
    ask = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=10)
        return float(said.stdout.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 300.0


class BatchPlan(NamedTuple):
    """How processes share a global batch: each takes `accumulation` micro-steps of `per_device`."""

    global_batch_size: int
    per_device: int
    accumulation: int


def plan_batch(
    config: TrainingConfig, num_processes: int, before: dict[str, Any] | None = None
) -> BatchPlan:
    """Keep the global batch of a run on any number of processes.

    Args:
        config: `global_batch_size` where it is set; else the product of `train_batch_size`,
            `gradient_accumulation_steps` and the processes.
        num_processes: Processes that take part.
        before: The settings that the run was started with. Where these two are as they were, only
            the processes may have changed, and the run's global batch stays.

    Raises:
        InputError: the processes cannot share it equally.
    """
    asked = (config.train_batch_size, config.gradient_accumulation_steps)
    total = config.global_batch_size or math.prod(asked) * num_processes
    if before and not config.global_batch_size:
        same = (before.get("train_batch_size"), before.get("gradient_accumulation_steps")) == asked
        total = before.get("global_batch_size", total) if same else total
    if total % num_processes:
        raise InputError(
            f"a global batch of {total} images cannot be shared equally by {num_processes} "
            f"processes: start a number that divides {total}"
        )
    share = total // num_processes
    fewest = max(1, share // config.train_batch_size)
    accumulation = next(
        n for n in range(fewest, share + 1) if share % n == 0 and share <= n * asked[0]
    )
    return BatchPlan(total, share // accumulation, accumulation)


def start_accelerator(config: TrainingConfig, accumulation: int) -> Accelerator:
    """Accelerate over the processes of `start_processes`.

    Raises:
        InputError: the environment says another accumulation, which accelerate would follow.
    """
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if os.environ.get(name, str(accumulation)) != str(accumulation):
        raise InputError(
            f"{name}={os.environ[name]} is not the {accumulation} micro-steps that the settings "
            "give: unset it, and use --gradient_accumulation_steps"
        )
    return Accelerator(
        cpu=PartialState().device.type == "cpu",
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=accumulation,
        log_with=None if config.logger == "none" else config.logger,
        project_config=ProjectConfiguration(
            project_dir=str(config.run_dir), logging_dir=str(config.run_dir / config.logging_dir)
        ),
    )


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
