"""The model that training starts from (`--from`): what its files say of the settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .access import explained_hub, warn_insecure_endpoint
from .errors import InputError

OF_ORIGIN = (
    "model_config_name_or_path",
    "resolution",
    "image_mode",
    "class_conditional",
    "ddpm_num_steps",
    "ddpm_beta_schedule",
    "prediction_type",
    "variance_type",
)
"""What a model decides about the run that starts from it; flags may say otherwise."""

VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
"""Stock's words of the variance, and the setting that each stands for."""

UNET, SCHEDULER, RECIPE = "unet/config.json", "scheduler/scheduler_config.json", "config.json"
FLAT_SCHEDULER = "scheduler_config.json"

KEPT = "origin"
"""Folder in that of a run with these files, so that it goes on when its origin is gone."""


def read_origin(name: str) -> dict[str, dict[str, Any]]:
    """The configurations of a pipeline: its network's, its process's, and its recipe.

    Args:
        name: Id of a repository on the Hub, or a folder, of any pipeline with a UNet2DModel.

    Returns:
        By the names of their files in a pipeline; the recipe is empty where there is none.

    Raises:
        InputError: there is no such pipeline, or one that cannot be read.
    """
    from .loading import check_scheduler

    try:
        folder = _folder(name)
        root = _read(folder / RECIPE)
        # Old repositories, like google/ddpm-cifar10-32, have all files at their root.
        flat = (root or {}).get("_class_name") == "UNet2DModel"
        unet = root if flat else _read(folder / UNET)
        process = _read(folder / (FLAT_SCHEDULER if flat else SCHEDULER))
        if unet is None or process is None:
            raise ValueError("it holds no pipeline: it has no unet or no scheduler")
        check_scheduler("DDPMScheduler", process)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot start from {name!r}: {error}") from error
    recipe = root if root and not flat and "snr_gamma" in root else {}
    return {UNET: unet, SCHEDULER: process, RECIPE: recipe}


def keep_origin(name: str, run_dir: Path) -> None:
    """Write the configurations of an origin into the folder of the run that starts from it.

    Raises:
        InputError: as `read_origin`.
        OSError: it could not be written.
    """
    partial_folder = run_dir / f".{KEPT}.partial"  # what a kill leaves, a run clears
    for file, found in read_origin(name).items():
        path = partial_folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    partial_folder.rename(run_dir / KEPT)


def find_kept_origin(
    name: str, output_dir: str | None, recipe: str, *, afresh: bool = False
) -> tuple[Path | None, str]:
    """What a run that started from a model keeps of it, so that it goes on when that is gone.

    Args:
        name: Of the model.
        output_dir, recipe: Which say where the run is.
        afresh: Whether the run in the folder will be deleted.

    Returns:
        The folder in that of the run, None before its first start, and the model's name as it was
        then: a folder's whole path, or an id.
    """
    full = str(Path(name).absolute())
    run_dir = Path(output_dir or default_folder(recipe))
    try:
        before = json.loads((run_dir / "config.json").read_text()).get("init_from")
    except (OSError, ValueError, AttributeError):
        before = None
    if before in (name, full) and (run_dir / KEPT).is_dir() and not afresh:
        return run_dir / KEPT, before
    return None, full if Path(name).is_dir() else name


def default_folder(recipe: str) -> Path:
    """The folder of a run where none is named: out/NAME of its recipe, or of a recipe's file."""
    path = Path(recipe)
    return Path("out") / (path.stem if path.suffix in (".yaml", ".yml", ".json") else path.name)


def settings_of_origin(name: str, source: str | Path | None = None) -> dict[str, Any]:
    """Settings of training that a model has: its recipe, and its network and process for sure.

    Args:
        name: As for `read_origin`.
        source: Where to read it, by default there; a run has a copy of its own.

    Raises:
        InputError: as `read_origin`, or training has no word for the process.
    """
    found = read_origin(str(source or name))
    unet, recipe = found[UNET], found[RECIPE]
    return {key: value for key, value in recipe.items() if value is not None} | {
        "model_config_name_or_path": name,
        "resolution": _resolution(unet.get("sample_size")),
        "image_mode": "L" if unet.get("in_channels") == 1 else "RGB",
        "class_conditional": unet.get("num_class_embeds") is not None,
        **_process(name, found[SCHEDULER]),
    }


def _folder(name: str) -> Path:
    """A folder, or that in the cache with the configurations of a repository, all of one commit.

    Raises:
        InputError: no such repository, or no connection and too little in the cache.
    """
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name)
    warn_insecure_endpoint()
    with explained_hub(name, "start from", or_folder=True):
        files = [UNET, SCHEDULER, RECIPE, FLAT_SCHEDULER]
        return Path(snapshot_download(name, allow_patterns=files))


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file.

    Raises:
        ValueError: what is in the file is no object of settings.
    """
    from .loading import read_json

    return read_json(path) if path.is_file() else None


def _resolution(sample_size: Any) -> str:
    """The setting for a UNet2DModel's sample_size; of a network without one the default's."""
    if isinstance(sample_size, (list, tuple)):
        return "x".join(map(str, sample_size))
    return str(sample_size or 64)


def _process(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a scheduler's configuration; whether they mean the same is checked later."""
    variance = config.get("variance_type") or "fixed_small"
    if variance not in VARIANCES:
        raise InputError(f"{name!r} has the variance {variance!r}, which training has no word for")
    schedule = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        schedule = config.get("_ddpm_hf", {}).get("beta_schedule")
        if schedule is None:
            raise InputError(f"{name!r} has a table of betas, which training has no word for")
    return {
        "ddpm_num_steps": config.get("num_train_timesteps", 1000),
        "ddpm_beta_schedule": schedule,
        "prediction_type": config.get("prediction_type", "epsilon"),
        "variance_type": VARIANCES[variance],
    }
