"""The model that training starts from (`--from`): what its files say of the settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .access import explained_hub
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


def read_origin(name: str) -> dict[str, Any]:
    """Settings of training that a model has: its recipe, its network and its process.

    Args:
        name: Id of a repository on the Hub, of any pipeline with a UNet2DModel, or a folder.

    Returns:
        What its config.json says if it was trained by this package; the network and the process as
        the pipeline has them.

    Raises:
        InputError: there is no such pipeline, or training has no word for its process.
    """
    unet, process = (
        _read(name, "unet/config.json"),
        _read(name, "scheduler/scheduler_config.json"),
    )
    if unet is None or process is None:
        raise InputError(
            f"{name!r} holds no pipeline to start from: it has no unet or no scheduler"
        )
    recipe = _read(name, "config.json") or {}
    settings = {key: value for key, value in recipe.items() if value is not None}
    settings = settings if "snr_gamma" in settings else {}
    return settings | {
        "model_config_name_or_path": name,
        "resolution": _resolution(unet.get("sample_size")),
        "image_mode": "L" if unet.get("in_channels") == 1 else "RGB",
        "class_conditional": unet.get("num_class_embeds") is not None,
        **_process(name, process),
    }


def _read(name: str, file: str) -> dict[str, Any] | None:
    """A JSON object in a folder or a repository; None where there is no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        if Path(name).is_dir():
            path = Path(name) / file
        else:
            with explained_hub(name, "start from"):
                try:
                    path = Path(hf_hub_download(name, file))
                except EntryNotFoundError:
                    return None
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {file} of {name!r}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} of {name!r} must hold a JSON object; got {found!r:.80}")
    return found


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
