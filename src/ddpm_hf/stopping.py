"""How a run stops before its end: signals, updates that are no numbers, memory, lost processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .devices import PATIENCE
from .errors import TrainingError

SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n)]
"""Signals that end a run after the step it is in; SLURM is usually told to send SIGUSR1."""

LAUNCHER_DIED = 1000
"""Stands for a launcher that died, among the numbers of signals."""

NONFINITE_LIMIT = 20
"""So many updates in a row without a finite gradient end a run. fp16 needs up to 16 to find its
loss scale."""


class StopSignals:
    """Notes signals instead of dying by them, so that a run can finish its step and save.

    Also notes when the launcher (`accelerate launch`, torchrun) died, which tells its processes
    nothing. A second Ctrl-C is a KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.noted = 0
        launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        self.launcher = os.getppid() if launched else None
        distributed = dist.is_available() and dist.is_initialized()
        # gloo: what is agreed on the CPU never waits for a GPU.
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if distributed else None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.group = None

    def _note(self, number: int, frame) -> None:
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = number

    def agreed(self) -> str | None:
        """Why to stop, or None: the same answer on every process, which all ask together."""
        if self.launcher is not None and os.getppid() != self.launcher:
            self.noted = self.noted or LAUNCHER_DIED
        noted = self.noted
        if self.group is not None:
            shared = torch.tensor(noted)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
            noted = int(shared)
        if not noted:
            return None
        return "its launcher's death" if noted == LAUNCHER_DIED else signal.Signals(noted).name


class UpdateGuard:
    """Counts the updates that were skipped because their gradient was not finite.

    The counts stay on the device: only `check` waits for it.
    """

    def __init__(self, device: torch.device, skipped: int = 0) -> None:
        self.skipped = torch.full((), skipped, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.long, device=device)

    def note(self, norm: Tensor) -> Tensor:
        """Count the update with this gradient norm, (); returns whether to skip it, () bool."""
        bad = ~torch.isfinite(norm)
        self.skipped += bad
        self.in_a_row = (self.in_a_row + 1) * bad
        return bad

    def check(self, step: int, loss: float, precision: str) -> int:
        """How many updates were skipped so far.

        Raises:
            TrainingError: NONFINITE_LIMIT or more in a row, the last of them at `step`.
        """
        in_a_row = int(self.in_a_row)
        if in_a_row < NONFINITE_LIMIT:
            return int(self.skipped)
        way_out = (
            "try --mixed_precision bf16 or no"
            if precision == "fp16"
            else "in a new --output_dir, since that is another run: lower --learning_rate (and "
            "--muon_learning_rate), or clip harder with --max_grad_norm; --from this folder begins "
            "with its last pipeline, if it has one"
        )
        raise TrainingError(
            f"the gradients of steps {step - in_a_row + 1} to {step} are not finite (loss "
            f"{loss:g}, mixed precision {precision}): these updates were skipped, the weights are "
            f"those of step {step - in_a_row}. What helps, {way_out}"
        )


NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
"""Words of allocators of torch, CUDA and MPS, and of cuBLAS and cuDNN."""


@contextmanager
def explained_failures(no_memory: str, again: str = "the same command again") -> Iterator[None]:
    """Turn a lack of memory, and the loss of another process, into one line: TrainingError.

    Args:
        no_memory: What to say of a lack of memory, and to do about it.
        again: What goes on from the last checkpoint.
    """
    try:
        yield
    except TrainingError:
        raise
    except MemoryError as error:
        raise TrainingError(no_memory) from error
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in NO_MEMORY):
            raise TrainingError(no_memory) from error
        lost = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
        if isinstance(error, dist.DistError) or any(sign in text for sign in lost):
            raise TrainingError(
                f"another process of this run died; its own message says why. From the last "
                f"checkpoint {again} goes on ({' '.join(text.split())[:200]})"
            ) from error
        raise


TOO_LARGE = (
    "out of memory before the first step: the network, its averages or the images do not fit. Try "
    "--data_on_device no, fewer --ema_profiles, a smaller --preset or --resolution, or free what "
    "else is in the device's memory"
)


def out_of_memory(train_batch_size: int, accumulation: int) -> str:
    """What to do about a lack of memory, in the order of what it costs."""
    halved = (
        f"--train_batch_size {train_batch_size // 2} --gradient_accumulation_steps "
        f"{accumulation * 2} (the same training, half the activations), "
        if train_batch_size % 2 == 0
        else ""
    )
    return (
        f"out of memory with {train_batch_size} images per device and micro-step. Try {halved}"
        "--mixed_precision bf16, or --gradient_checkpointing (14 % less measured, a sixth slower)"
    )
