"""Recipes: settings of a run in YAML files, those of this package and a user's own."""

import re
from pathlib import Path
from typing import Any

from .errors import InputError, did_you_mean

RECIPES = Path(__file__).parent / "recipes"
OF_THIS_MACHINE = (
    "output_dir", "logging_dir", "cache_dir", "overwrite_output_dir", "resume_from_checkpoint",
    "cpu_threads", "data_on_device", "dataloader_num_workers", "push_to_hub", "push_steps",
    "push_checkpoints", "hub_model_id", "hub_private_repo",
)  # fmt: skip
"""Settings that are no part of a recipe: neither a push nor `--recipe config.json` takes them."""

RECORDS = ("recipe", "trained_variance", "data_fingerprint")
"""What a run's config.json says beside its settings."""

WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)$")


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The settings in a recipe file of this package, by name, or in any YAML file, by path.

    Numbers are decimal: 032 and 1:30, which YAML 1.1 takes for 26 and 90, are text. In a .json
    file, which `--dry_run` or a run wrote, null is what was left out, and `recipe` a record. Of a
    run's config.json, pushed or not, nothing counts that concerns that run and its machine alone.

    Raises:
        InputError: no such recipe, or a file that is no mapping of settings.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, WHOLE if tag.endswith(":int") else form) for tag, form in known]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    path = RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name)
    if not path.is_file():
        raise InputError(
            f"recipe {name!r} is neither a file nor one of {', '.join(recipe_names())}."
            f"{did_you_mean(name, recipe_names())}"
        )
    try:
        settings = yaml.load(path.read_text("utf-8"), Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"recipe {path} is no valid YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(settings, dict):
        raise InputError(
            f"recipe {path} must hold `setting: value` lines; got {type(settings).__name__}"
        )
    if path.suffix == ".json":
        of_a_run = "data_fingerprint" in settings
        left_out = {*RECORDS, *OF_THIS_MACHINE} if of_a_run else {"recipe"}
        return {k: v for k, v in settings.items() if k not in left_out and v is not None}
    if "recipe" in settings:
        raise InputError(f"recipe {path} names another recipe; copy what it needs instead")
    return settings


def is_path(name: str) -> bool:
    """Whether a name is a place on a disk, not an id on the Hub or a word of ours."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is None
