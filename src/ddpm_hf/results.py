"""What is known of a model in numbers: results.json and training.json, read by its card."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import typing
from collections.abc import Container
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from . import __version__
from .checkpoint import write_text
from .errors import InputError

RESULTS, TRAINING = "results.json", "training.json"


@cache
def hardware() -> str:
    """The GPU's name, or the processor's and how many of its cores this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{cores} cores of {names[0] if names else platform.processor() or platform.machine()}"


@cache
def code_version() -> str:
    """The commit of this code where it runs from a checkout, or else its version."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not (root / "src" / "ddpm_hf").is_dir():
        return f"ddpm_hf {__version__}"
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        said = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # no git here
        return f"ddpm_hf {__version__}"
    return said.stdout.strip() or f"ddpm_hf {__version__}"


@dataclass(frozen=True)
class Result:
    """One number that was measured of a model, and all that one needs to measure it again.

    Attributes:
        metric: Its name, like `bits_per_dim`.
        value: A finite number.
        unit: Of the value and its standard error.
        dataset, split: The images that it was measured on; a Hub id where the set is there.
        num_images: How many of them, or how many were sampled.
        protocol: How, in words.
        seed: Of everything random in it.
        standard_error: Where it is known.
        step: Optimiser steps that the model had done, where that is known: a card shows no
            measurement of older weights.
        commit, hardware: What measured it.

    Raises:
        InputError: a value that is not finite.
    """

    metric: str
    value: float
    unit: str
    dataset: str
    split: str
    num_images: int
    protocol: str
    seed: int
    standard_error: float | None = None
    step: int | None = None
    commit: str = field(default_factory=code_version)
    hardware: str = field(default_factory=hardware)

    def __post_init__(self) -> None:
        for name in ("value", "standard_error"):
            number = getattr(self, name)
            if number is not None:
                object.__setattr__(self, name, float(number))  # no numpy scalar reaches a file
        for number in (self.value, self.standard_error or 0.0):
            if not math.isfinite(number):
                raise InputError(f"the {self.metric} of a model must be finite; got {number}")

    @property
    def identity(self) -> tuple:
        """What makes it the same measurement: a second one takes the place of the first."""
        return self.metric, self.dataset, self.split, self.num_images, self.protocol, self.seed


@dataclass(frozen=True)
class TrainingRecord:
    """How a model was trained, beside its settings (config.json).

    Attributes:
        step: Optimiser steps done.
        global_batch_size: Images per optimiser step.
        num_images: Images in the training set; None of a stream.
        num_processes: Devices that trained together.
        seconds: Time spent training, over all starts of the run.
        energy_kwh: An estimate over all starts: time x devices x their power, without cooling,
            memory and idle hosts.
        parameters: Of the network.
        loss_by_timestep: Last loss in each share of the timesteps, by what it was measured on.
        hardware, version, commit: What trained it last.
        finished: Whether the run came to its end, everything written.
    """

    step: int
    global_batch_size: int
    num_images: int | None
    num_processes: int
    seconds: float
    energy_kwh: float
    parameters: int
    loss_by_timestep: dict[str, dict[str, float]] = field(default_factory=dict)
    version: str = __version__
    commit: str = field(default_factory=code_version)
    hardware: str = field(default_factory=hardware)
    finished: bool = False

    @property
    def images_seen(self) -> int:
        """Images that went through the network in training, each visit counted."""
        return self.step * self.global_batch_size


def read_results(folder: Path) -> list[Result]:
    """The rows of a folder's results.json; none where there is no such file.

    Raises:
        InputError: the file holds something else.
    """
    rows = _read_json(folder / RESULTS, missing=[])
    if not isinstance(rows, list):
        raise InputError(f"{folder / RESULTS} must hold a list of rows; got {rows!r:.80}")
    return [_parse(Result, row, folder / RESULTS) for row in rows]


def add_results(folder: Path, results: list[Result], *, replacing: Container[str] = ()) -> None:
    """Write rows into a folder's results.json; the same measurement made again is replaced.

    Args:
        folder: Of the model.
        results: The new rows.
        replacing: Metrics of which all rows that stand there go.

    Raises:
        InputError: the file holds something else.
    """
    new = {result.identity: result for result in results}
    found = [row for row in read_results(folder) if row.metric not in replacing]
    kept = [row for row in found if row.identity not in new]
    rows = [asdict(row) for row in [*kept, *new.values()]]
    write_text(folder / RESULTS, json.dumps(rows, indent=2) + "\n")


def read_record(folder: Path) -> TrainingRecord | None:
    """The folder's training.json; None where a model was not trained by this package.

    Raises:
        InputError: the file holds something else.
    """
    found = _read_json(folder / TRAINING)
    return None if found is None else _parse(TrainingRecord, found, folder / TRAINING)


def write_record(folder: Path, record: TrainingRecord) -> None:
    """Write a folder's training.json, without losses that are not finite."""
    losses = {}
    for kind, by_share in record.loss_by_timestep.items():
        if finite := {share: loss for share, loss in by_share.items() if math.isfinite(loss)}:
            losses[kind] = finite
    found = asdict(record) | {"loss_by_timestep": losses}
    write_text(folder / TRAINING, json.dumps(found, indent=2, allow_nan=False) + "\n")


def _read_json(path: Path, *, missing: Any = None) -> Any:
    """A JSON file; `missing` where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return missing
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _parse(kind: type, row: Any, path: Path) -> Any:
    """A row of a file as one of the classes above; what a newer version wrote beside is left."""
    if isinstance(row, dict):
        known = {f.name: row[f.name] for f in fields(kind) if f.name in row}
        types = typing.get_type_hints(kind)
        for name, value in known.items():
            hint = dict if typing.get_origin(types[name]) is dict else types[name]
            whole = isinstance(value, int) and isinstance(1.0, hint)  # JSON has one kind of number
            of_losses = hint is not dict or all(isinstance(row, dict) for row in value.values())
            if not ((isinstance(value, hint) and of_losses) or whole):
                raise InputError(f"{name} in {path} must be {types[name]}; got {value!r:.80}")
        try:
            return kind(**known)
        except (TypeError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
    raise InputError(f"{path} must hold objects of {kind.__name__}; got {row!r}")
