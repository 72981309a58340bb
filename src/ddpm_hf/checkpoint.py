"""The folder of a run, and checkpoints in it: safetensors and JSON, whole or not there at all.

What exact resume means here. Parameters, averages, optimiser and learning-rate state are in the
checkpoint; everything random is a function of (seed, position), and dropout of (seed, step, rank),
so the only random state is the step number. A run continued from step k on the same machine, on one
process or on two as before, is bit-equal to one that never stopped, on a CPU (kernels of GPUs add
up in any order), and starts at once: no image is decoded to be skipped. Three or more sum their
gradients in the order of DDP's buckets, which the first step of a start has otherwise: equal up to
the order of summation. On another process count the global batch stays, and with it the images,
crops, flips, timesteps and noise; parameters then differ by the order of summation, and by
dropout's masks.

`checkpoint-<step>` is written under another name, flushed to disk, listed with a checksum per file
in manifest.json, and then renamed: whoever finds the name finds a whole checkpoint. No pickle is
written or read.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, optim

from .config import TrainingConfig
from .errors import InputError

CONFIG, METRICS, MANIFEST = "config.json", "metrics.jsonl", "manifest.json"
LOCK, LOCK_SECONDS = ".lock", 10
"""A file in the folder of a run, and how long the next start waits for one that is ending."""

NAME = re.compile(r"checkpoint-(\d+)")
LEFTOVER = re.compile(
    r"\.(checkpoint-\d+|fetched|origin|pipeline|push-[\w.-]+|[\w.-]+\.(json|jsonl|md|safetensors))"
    r"\.(partial|replaced)"
)
EVALUATED = (
    "rate_distortion.json", "rate_distortion.png", "reconstructions.png", "shared_latents.png"
)  # fmt: skip
"""Files of an evaluation, beside its rows in results.json: they name no step of the model."""

FORMAT = 1
"""Of a checkpoint; a newer one is refused."""

IDENTITY = (
    "preset",
    "model_config_name_or_path",
    "init_from",
    "resolution",
    "image_mode",
    "background",
    "center_crop",
    "random_flip",
    "streaming",
    "held_out",
    "class_conditional",
    "class_dropout_prob",
    "dropout",
    "ddpm_num_steps",
    "ddpm_beta_schedule",
    "prediction_type",
    "trained_variance",
    "loss",
    "snr_gamma",
    "timestep_sampler",
    "optimizer",
    "learning_rate",
    "muon_learning_rate",
    "muon_momentum",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "use_ema",
    "ema_profiles",
    "ema_update_every",
    "seed",
    "global_batch_size",
    "data_fingerprint",
)
"""What makes a run the run that it is: it may not change between two starts in the same folder."""


class Checkpoint(NamedTuple):
    """A checkpoint read back: `tensors[group][name]` and the JSON state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    run_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> Path:
    """Write `checkpoint-<step>` atomically; one that stands there already is replaced.

    Args:
        run_dir: Folder of the run.
        step: Optimiser steps done.
        tensors: Groups of named tensors, one safetensors file each.
        state: Whatever else resuming needs, as JSON.

    Raises:
        OSError: it could not be written, as on a full disk; earlier checkpoints are untouched and
            no partial one remains.
    """
    final = run_dir / f"checkpoint-{step}"
    partial, replaced = run_dir / f".{final.name}.partial", run_dir / f".{final.name}.replaced"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for group, named in tensors.items():
            write_tensors(partial / f"{group}.safetensors", named)
        (partial / "state.json").write_text(json.dumps(state, indent=2))
        sums = {path.name: checksum(path) for path in sorted(partial.iterdir())}
        manifest = {"format": FORMAT, "step": step, "sha256": sums}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for path in [*partial.iterdir(), partial]:
            flush(path)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        flush(run_dir)
    finally:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
    return final


def write_tensors(
    path: Path, named: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors, on any device, as a safetensors file.

    Raises:
        OSError: it could not be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    try:
        save_file(contiguous, path, metadata=metadata)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"cannot write {path}: {' '.join(str(error).split())}") from error


def leftovers(run_dir: Path) -> list[Path]:
    """What a process that was killed while it saved has left behind: hidden, and named by us."""
    there = [*run_dir.glob(".*"), *run_dir.glob("ema/.*")]
    return [path for path in there if LEFTOVER.fullmatch(path.name)]


def clear_leftovers(run_dir: Path) -> None:
    """Delete what a process that was killed while it saved has left behind."""
    for path in leftovers(run_dir):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a file in one piece: whoever reads it finds the old text or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [
        path for path in run_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(NAME.fullmatch(folder.name)[1])


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sums, _ = dict(manifest["sha256"]), int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    if not {"state.json", "unet.safetensors"} <= sums.keys():
        return f"its {MANIFEST} lists no network or no state"
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if checksum(folder / name) != expected:
            return f"{name} has changed since it was written"
    return None


def verify(folder: Path) -> None:
    """Raise InputError for a checkpoint that is damaged, or written in a newer format."""
    check_format(folder)
    wrong = damage(folder)
    if wrong:
        raise InputError(f"checkpoint {folder} is damaged: {wrong}")


def check_format(folder: Path) -> None:
    """Raise InputError for a checkpoint in a newer format; one that is damaged may pass."""
    try:
        written = int(json.loads((folder / MANIFEST).read_text()).get("format", 1))
    except (OSError, ValueError, TypeError, AttributeError):
        return
    if written > FORMAT:
        raise InputError(
            f"checkpoint {folder} was written by a newer ddpm_hf (format {written}, this one reads "
            f"up to {FORMAT}): pip install --upgrade ddpm_hf"
        )


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint that `verify` found whole."""
    # Cloned: safetensors maps the file, which rotation will delete.
    tensors = {
        path.stem: {name: tensor.clone() for name, tensor in load_file(path).items()}
        for path in folder.glob("*.safetensors")
    }
    step = json.loads((folder / MANIFEST).read_text())["step"]
    return Checkpoint(step, tensors, json.loads((folder / "state.json").read_text()))


def find_latest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None; and what is wrong with newer ones, passed over.

    Raises:
        InputError: there are checkpoints, and none is whole; or one has a newer format.
    """
    passed_over = []
    for folder in reversed(list_checkpoints(run_dir)):
        check_format(folder)
        wrong = damage(folder)
        if wrong is None:
            return folder, passed_over
        passed_over.append(f"checkpoint {folder} is damaged: {wrong}")
    if passed_over:
        raise InputError(
            f"no checkpoint in {run_dir} is whole: {'; '.join(passed_over)}. Bring one back, or "
            "start afresh with --overwrite_output_dir"
        )
    return None, []


def set_aside(run_dir: Path, step: int) -> list[str]:
    """Rename checkpoints beyond `step`, damaged or to be done again, out of the way of rotation."""
    moved = [folder for folder in list_checkpoints(run_dir) if step_of(folder) > step]
    for folder in moved:
        aside = folder.with_name(f"aside-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return [folder.name for folder in moved]


def rotate(run_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; without one, None or 0, keep all."""
    if limit:
        for folder in list_checkpoints(run_dir)[:-limit]:
            shutil.rmtree(folder)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP shards, gathered on every process that asks; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(saved: Any, parameter: Tensor) -> Any:
    """The inverse of `whole`: a saved tensor where and as `parameter` is; other values as they are.

    Only a tensor of the parameter's shape is sharded with it.
    """
    if not isinstance(saved, Tensor) or saved.shape != parameter.shape:
        return saved
    if not hasattr(parameter, "full_tensor"):
        # In the parameter's layout: torch's fused Adam on a CPU walks through memory and ignores
        # strides.
        return torch.empty_like(parameter, dtype=saved.dtype).copy_(saved)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        saved.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def split_optimizer(optimizer: optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as (named tensors, JSON): `3.exp_avg` is parameter 3's."""
    state = optimizer.state_dict()
    tensors, rest = {}, {"param_groups": state["param_groups"], "state": {}}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                rest["state"].setdefault(str(index), {})[key] = value
    return tensors, rest


def join_optimizer(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_optimizer`: what `load_state_dict` takes."""
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in rest["state"].items()
    }
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    groups = [
        {key: _as_saved(value) if key != "params" else value for key, value in group.items()}
        for group in rest["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def _as_saved(value: Any) -> Any:
    """JSON has no tuples: numbers in a row (betas, coefficients) become one again."""
    if not isinstance(value, list):
        return value
    items = [_as_saved(item) for item in value]
    return items if any(isinstance(item, tuple) for item in items) else tuple(items)


# The folder around the checkpoints


def read_settings(directory: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder; None where there is no run of ours."""
    try:
        settings = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and "data_fingerprint" in settings else None


def check_folder(directory: Path) -> None:
    """Raise InputError if a folder holds something, and that is no run of ours."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output_dir {directory} is a file: name a folder")
    there = set(directory.iterdir()) if directory.exists() else set()
    if there - {directory / LOCK, *leftovers(directory)} and read_settings(directory) is None:
        raise InputError(
            f"output_dir {directory} is not empty and holds no run of ddpm_hf: name another folder"
        )


def lock_folder(directory: Path) -> FileLock:
    """Make the folder of a run, and let no other process train in it while this one holds the lock.

    Raises:
        InputError: one does, and has not ended within LOCK_SECONDS.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise InputError(
            f"another process trains in {directory}: wait for its end, or name another --output_dir"
        ) from error
    return lock


def unlock_folder(lock: FileLock) -> None:
    """Let other processes train in the folder, and leave no file of the lock."""
    with suppress(OSError):  # Windows deletes no open file
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def compare_runs(directory: Path, settings: dict[str, Any]) -> list[str]:
    """Compare settings with those of the run in a folder; a line per harmless difference.

    Raises:
        InputError: the run there has another identity.
    """
    before = read_settings(directory)
    if before is None:
        return []
    before = asdict(TrainingConfig()) | before  # a setting that is newer than the run
    different = {
        key: (before.get(key), value) for key, value in settings.items() if before.get(key) != value
    }
    clashes = [
        f"{key} was {a!r}, now {b!r}" for key, (a, b) in different.items() if key in IDENTITY
    ]
    if clashes:
        raise InputError(
            f"the run in {directory} is another one: {'; '.join(clashes)}. Name another "
            "--output_dir, or start afresh with --overwrite_output_dir"
        )
    control = ("overwrite_output_dir", "resume_from_checkpoint")
    return [
        f"Changed: {key} was {a!r}, now {b!r}"
        for key, (a, b) in different.items()
        if key not in control
    ]


def clear_run(directory: Path) -> None:
    """Delete a run's own files and nothing else, the one that names it a run at last."""
    settings = read_settings(directory)
    if settings is None:
        return
    folders = ["unet", "scheduler", "samples", "ema", "origin"]
    logs = Path(settings["logging_dir"])
    if logs.parts and not logs.is_absolute() and ".." not in logs.parts:  # inside the run's folder
        folders.append(logs)
    ours = re.compile(r"(aside-)?checkpoint-\d+")
    folders += [path.name for path in directory.iterdir() if ours.fullmatch(path.name)]
    clear_leftovers(directory)
    for name in folders:
        shutil.rmtree(directory / name, ignore_errors=True)
    made = ("model_index.json", "README.md", "loss_curve.png", "results.json", "training.json")
    for name in (*made, *EVALUATED, METRICS, CONFIG):
        (directory / name).unlink(missing_ok=True)


def keep_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps that were lost with a stop and will be done again."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    if text.encode() != path.read_bytes():
        write_text(path, text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics; a line that a kill or a full disk cut is left out."""
    rows = []
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
