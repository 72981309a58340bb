"""The model card: the template `model_card.md` filled from the files of a folder.

The folder is all that a card is made from, so that the card that training writes, the one that
`ddpm-hf push` uploads and the one after an evaluation say the same.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import __version__
from .checkpoint import CONFIG, write_text
from .config import EMBEDDED
from .errors import InputError
from .results import Result, read_record, read_results

TAGS = ["unconditional-image-generation", "ddpm", "ddpm_hf"]
TASK = "unconditional-image-generation"

MARK = "<!-- Written by ddpm_hf, anew at every push: delete this line to keep your own text -->"
"""A card without it was written, or edited, by a person, and is left alone."""

EMBEDDED_NAME = "Fashion-MNIST, from the ddpm_hf package (MIT licence, Zalando SE)"
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
    if not (path.is_file() and MARK not in path.read_text()):
        write_text(path, render_card(folder))
    return path


def render_card(folder: Path, repo: str | None = None, *, license: str | None = None) -> str:
    """The card of the pipeline in a folder.

    Args:
        folder: A pipeline, with the files of its run beside it where it has one.
        repo: Where people will load it from; by default the folder's name.
        license: Of the weights; by default that of the settings, or of the embedded images.

    Raises:
        InputError: there is no pipeline in the folder, or a file in it that cannot be read.
    """
    unet, process = (
        read_config(folder / "unet" / CONFIG),
        read_config(folder / "scheduler" / "scheduler_config.json"),
    )
    if unet is None or process is None:
        raise InputError(f"{folder} holds no pipeline: it has no unet or no scheduler")
    settings = read_config(folder / CONFIG)
    record, results = read_record(folder), read_results(folder)
    repo, extras = repo or folder.resolve().name, process.get("_ddpm_hf", {})
    settings = settings if settings and "dataset_name" in settings else None
    data = dataset_of(settings or {})
    size = unet["sample_size"]
    card = ModelCard.from_template(
        ModelCardData(
            library_name="diffusers",
            pipeline_tag=TASK,
            license=license or (settings or {}).get("license") or data["license"],
            datasets=[data["id"]] if data["id"] else None,
            base_model=base_model(settings or {}),
            tags=TAGS,
            model_name=repo.split("/")[-1],
            eval_results=[eval_result(row) for row in results] or None,
        ),
        template_path=str(card_template()),
        mark=MARK,
        escape=escape,
        code=code,
        model_name=repo.split("/")[-1],
        repo=json.dumps(repo),
        version=__version__,
        size=f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size)),
        channels=unet["in_channels"],
        conditional=unet.get("num_class_embeds") is not None,
        class_names=extras.get("class_names", []),
        null_class=extras.get("null_class", True),
        process=process,
        schedule=schedule_name(process, extras),
        timesteps=process["num_train_timesteps"],
        settings=settings,
        base_model=base_model(settings or {}),
        record=record,
        data=data,
        results=results,
        has_grid=(folder / "samples" / "grid.png").is_file(),
        has_curve=(folder / "loss_curve.png").is_file(),
    )
    return str(card)


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


def dataset_of(settings: dict[str, Any]) -> dict[str, str | None]:
    """What a card may say about the training images: a path on a disk is not named.

    Returns:
        `id` on the Hub if it is there, `name` in plain text, `text` as Markdown, `license`.
    """
    name = settings.get("dataset_name") or ""
    if name == EMBEDDED:
        embedded = {"name": "Fashion-MNIST (embedded)", "text": EMBEDDED_NAME}
        return {"id": None, "license": "mit", **embedded}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists():
        url = f"https://huggingface.co/datasets/{name}"
        return {"id": name, "name": name, "text": f"[{escape(name)}]({url})", "license": None}
    local = "a local image set"
    return {"id": None, "name": local, "text": local, "license": None}


def base_model(settings: dict[str, Any]) -> str | None:
    """The Hub's id of the model that training started from; a local folder is not named."""
    name = settings.get("init_from") or ""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


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
