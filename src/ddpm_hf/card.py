"""The model card: the template `model_card.md` filled from the files of a folder.

The folder is all that a card is made from, so that the card that training writes, the one that
`ddpm-hf push` uploads and the one after an evaluation say the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .checkpoint import CONFIG, write_text
from .config import EMBEDDED, OF_THIS_MACHINE, PATHS, TrainingConfig, field_names
from .errors import InputError
from .recipe import is_path
from .results import Result, read_record, read_results
from .scheduler import DDPMScheduler, check_extras

TAGS = ["unconditional-image-generation", "ddpm", "ddpm_hf"]
TASK = "unconditional-image-generation"

MARK = "<!-- Written by ddpm_hf, anew at every push: delete this line to keep your own text -->"
"""A card without it was written, or edited, by a person, and is left alone."""

EMBEDDED_NAME = "Fashion-MNIST, from the ddpm_hf package (MIT licence, Zalando SE)"
PROCESS_DEFAULTS = {
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "beta_schedule": "linear",
}
"""What diffusers' DDPMScheduler takes where a configuration is silent."""

SPECIAL = re.compile(r"([\\`*_\[\]|<>&~$@]|:(?=//)|(?<=www)\.)")


def card_template() -> Path:
    """The template: in an installed package beside this file, in a checkout at its top."""
    inside = Path(__file__).parent / "model_card.md"
    return inside if inside.is_file() else Path(__file__).parents[2] / "model_card.md"


def escape(text: object) -> str:
    """Text of any origin as Markdown that shows just this text, in one line."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """Text of any origin as Markdown code, in one line."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if "`" in line else ""
    return f"{fence}{padding}{line}{padding}{fence}".replace("|", "\\|")


def write_card(folder: Path) -> Path:
    """Write README.md, the card, into a folder, unless a person has written one.

    Raises:
        InputError: there is no pipeline in the folder.
        OSError: it could not be written.
    """
    path = folder / "README.md"
    if not is_own(path):
        write_text(path, render_card(folder))
    return path


def is_own(card: Path) -> bool:
    """Whether a README.md is there that a person wrote: without our mark, in any encoding."""
    return card.is_file() and MARK not in card.read_text("utf-8", errors="replace")


def render_card(
    folder: Path,
    repo: str | None = None,
    *,
    license: str | None = None,
    data_license: str | None = None,
) -> str:
    """The card of the pipeline in a folder.

    Args:
        folder: A pipeline, with the files of its run beside it where it has one.
        repo: Where people will load it from; a path to be filled in when not given.
        license: Of the weights; by default that of the settings, or of the embedded images.
        data_license: Of the training images, as their page on the Hub states it.

    Raises:
        InputError: there is no pipeline in the folder, or a file in it that cannot be read.
    """
    unet = read_config(folder / "unet" / CONFIG)
    process = read_config(folder / "scheduler" / "scheduler_config.json")
    if unet is None or process is None:
        raise InputError(f"{folder} holds no pipeline: it has no unet or no scheduler")
    process = PROCESS_DEFAULTS | {key: value for key, value in process.items() if value is not None}
    settings = read_config(folder / CONFIG) or {}
    # What a run does not say yet is as it was then, the default.
    settings = public_settings(asdict(TrainingConfig()) | settings) if is_run(settings) else {}
    record, extras = read_record(folder), process.get("_ddpm_hf", {})
    try:
        check_extras(extras)
        if "analytic" in extras:
            _ = DDPMScheduler.from_config(process).analytic
        timesteps = int(process["num_train_timesteps"])
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot read the scheduler of {folder}: {error}") from error
    step = record.step if record else None
    results = [row for row in read_results(folder) if row.step in (None, step)]
    name, data, base = (repo or folder.resolve().name), dataset_of(settings), base_model(settings)
    model_name = name.split("/")[-1]
    card = ModelCard.from_template(
        metadata(model_name, settings, results, license),
        template_path=str(card_template()),
        mark=MARK,
        escape=escape,
        code=code,
        model_name=model_name,
        repo=json.dumps(repo or f"path/to/{name}"),
        size=size_name(unet.get("sample_size")),
        channels=unet.get("in_channels", 3),
        conditional=unet.get("num_class_embeds") is not None,
        class_names=extras.get("class_names", []),
        null_class=extras.get("null_class", bool(extras)),
        process=process,
        schedule=schedule_name(process, extras),
        timesteps=timesteps,
        settings={key: escape(value) for key, value in settings.items()},
        recipe=settings.get("recipe"),
        weighted=settings.get("snr_gamma") and settings.get("loss") != "vlb",
        averaged=settings.get("use_ema"),
        base_model=base,
        record=record,
        data=data,
        data_license=data["license"] or data_license,
        results=results,
        has_grid=(folder / "samples" / "grid.png").is_file(),
        analytic=extras.get("analytic"),
        stock_timesteps=stock_timesteps,
        has_rate_distortion=(folder / "rate_distortion.png").is_file()
        and any(row.metric == "rate" for row in results),
        has_curve=(folder / "loss_curve.png").is_file(),
    )
    return str(card)


def metadata(
    name: str, settings: dict[str, Any], results: list[Result], license: str | None
) -> ModelCardData:
    """The head of a card, which the Hub reads."""
    data = dataset_of(settings)
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        license=license or settings.get("license") or data["license"],
        datasets=[data["id"]] if data["id"] else None,
        base_model=base_model(settings),
        tags=TAGS,
        model_name=name,
        eval_results=[eval_result(row) for row in results] or None,
    )


def read_config(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none.

    Raises:
        InputError: something else is in it.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a JSON object; got {type(found).__name__}")
    return found


def located(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which a path is a whole one, so that it is no id on the Hub from elsewhere."""

    def whole(value: Any) -> Any:
        is_here = isinstance(value, str) and value != EMBEDDED and Path(value).exists()
        return str(Path(value).absolute()) if is_here else value

    return settings | {key: whole(settings.get(key)) for key in PATHS}


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings without what only concerns its machine; of a path only the last name.

    What is no setting of ours stays where it is: nobody knows what it says.
    """
    public = {*field_names(), "trained_variance", "data_fingerprint"} - set(OF_THIS_MACHINE)
    kept = {key: value for key, value in settings.items() if key in public}
    for key in PATHS:
        if isinstance(value := kept.get(key), str) and is_path(value):
            kept[key] = f"./{Path(value).name}"
    return kept


def is_run(settings: dict[str, Any]) -> bool:
    """Whether a config.json is that of a run of ours, and no other trainer's."""
    return "snr_gamma" in settings


def dataset_of(settings: dict[str, Any]) -> dict[str, str | None]:
    """What a card may say about the training images: a path on a disk is not named.

    Returns:
        `id` on the Hub if it is there, `name` in plain text, `text` as Markdown, `license`.
    """
    if settings.get("dataset_name") == EMBEDDED:
        embedded = {"name": "Fashion-MNIST (embedded)", "text": EMBEDDED_NAME}
        return {"id": None, "license": "mit", **embedded}
    if name := hub_dataset(settings):
        url = f"https://huggingface.co/datasets/{name}"
        return {"id": name, "name": name, "text": f"[{escape(name)}]({url})", "license": None}
    local = "a local image set"
    return {"id": None, "name": local, "text": local, "license": None}


def hub_dataset(settings: dict[str, Any]) -> str | None:
    """The id on the Hub of the training images; None of others."""
    name = settings.get("dataset_name")
    return None if not isinstance(name, str) or name == EMBEDDED or is_path(name) else name or None


def base_model(settings: dict[str, Any]) -> str | None:
    """The id on the Hub of the model that training started from; a local folder is not named."""
    name = settings.get("init_from")
    return None if not name or is_path(name) else name


def size_name(sample_size: Any) -> str:
    """A UNet2DModel's sample_size in words."""
    if isinstance(sample_size, list):
        return "x".join(str(int(side)) for side in sample_size)
    return f"{int(sample_size)}x{int(sample_size)}" if sample_size else "any size of"


def stock_timesteps(chain: Sequence[int]) -> str:
    """The two lines that have a pipeline of plain diffusers sample these timesteps.

    Its DDPM, and its DPM-Solver++ and Euler, take a list; the pipeline gives none.
    """
    return (
        f"timesteps = {[int(t) for t in chain]}\n"
        "pipe.scheduler.set_timesteps = lambda *_, s=pipe.scheduler, **__: "
        "type(s).set_timesteps(s, timesteps=timesteps)"
    )


def schedule_name(process: dict[str, Any], extras: dict[str, Any]) -> str:
    """The noise schedule in our words."""
    if process.get("trained_betas") is not None:
        return extras.get("beta_schedule", "given as a table")
    word = process.get("beta_schedule", "linear")
    return "cosine" if word == "squaredcos_cap_v2" else word


def eval_result(row: Result) -> EvalResult:
    """A row of results.json as the Hub's model-index has it."""
    return EvalResult(
        task_type=TASK,
        dataset_type=row.dataset,
        dataset_name=row.dataset,
        dataset_split=row.split,
        metric_type=row.metric,
        metric_name=f"{row.metric} ({row.unit})",
        metric_value=row.value,
        metric_args={
            "num_images": row.num_images,
            "protocol": row.protocol,
            "seed": row.seed,
            "standard_error": row.standard_error,
            "commit": row.commit,
            "hardware": row.hardware,
        },
    )
