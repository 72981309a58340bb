"""Pushing a pipeline to the Hub, in one commit.

What leaves this machine is a list, not what happens to lie in a folder: weights as safetensors,
configurations, the card and its pictures, the recipe and the results. Checkpoints leave by
`remote.push_checkpoint` only, logs not at all, tokens never.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    errors,
    hf_hub_download,
    snapshot_download,
)

from .access import explained_hub, warn_insecure_endpoint
from .card import (
    hub_dataset,
    is_own,
    is_run,
    public_settings,
    read_config,
    render_card,
)
from .checkpoint import (
    CONFIG,
)
from .errors import InputError
from .results import RESULTS, TRAINING

logger = logging.getLogger(__name__)

CONFIGURATIONS = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
"""Where diffusers notes the path that a component was loaded from."""

FLAT = (
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "scheduler_config.json",
)
"""What lies at the top of a repository of diffusers' first releases."""

PUBLIC = (
    "model_index.json",
    "unet/*.json",
    "unet/*.safetensors",
    "scheduler/scheduler_config.json",
    "samples/grid.png",
    "loss_curve.png",
    "rate_distortion.png",
    "shared_latents.png",
    "rate_distortion.json",
    "reconstructions.png",
    RESULTS,
    TRAINING,
)
"""What a push takes from a folder, beside the card and the recipe, which it writes itself."""


class Pushed(NamedTuple):
    """What a push left on the Hub.

    Attributes:
        repo: Its id.
        url: Of the commit, or of the pull request.
        commit: Its hash.
        tag: The tag put on it, if one was asked for.
    """

    repo: str
    url: str
    commit: str
    tag: str | None = None


def push_to_hub(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    move_tag: bool = False,
    create_pr: bool = False,
    message: str | None = None,
    license: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Push the pipeline in a folder, with its card, recipe and results, as one commit.

    Whatever stands in the repository of another pipeline goes in the same commit, so that no old
    weights or numbers lie beside the new ones. A card there that a person has edited stays, unless
    the folder has one that a person has written.

    Args:
        folder: Of a run, or any folder that `save_pretrained` wrote.
        repo: `organisation/name`, or a name in your own account; made if it is not there.
        private: True makes it private, and refuses one that is public; None is the organisation's
            default.
        revision: A branch, made if it is not there.
        tag: Put on the commit.
        move_tag: Let a tag that stands elsewhere move; by default it is refused.
        create_pr: Open a pull request instead of committing.
        message: Of the commit.
        license: Of the weights, for the card, like `mit`.
        token: By default that of this machine (`hf auth login`, or HF_TOKEN).

    Raises:
        InputError: nothing to push, no token, no permission, or a name, tag or repository that does
            not fit; or somebody else pushed meanwhile. No file has been pushed then; a repository
            may have been made, empty.
    """
    folder = Path(folder)
    if create_pr and (tag or revision):
        raise InputError("a pull request is to main and has no commit to tag: leave out create_pr")
    check_pipeline(folder)
    for name, value in (("revision", revision), ("tag", tag)):
        if value is not None and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", value):
            raise InputError(f"{name} must be letters, digits, '.', '_' and '-'; got {value!r}")
    stated = dataset_license(hub_dataset(read_config(folder / CONFIG) or {}), token)
    card = partial(render_card, folder, license=license, data_license=stated)
    card()  # what cannot be read is said before anything is made on the Hub
    api = HfApi(token=token)
    with explained_hub(repo, "push to", token=token):
        repo = prepare_repo(api, repo, private=private)
        tag_stands = tag is not None and _tag_stands(api, repo, tag, move_tag)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        head = api.model_info(repo, revision=revision).sha
        there = api.list_repo_files(repo, revision=head)
        adds = list(files_of(folder))
        theirs = _card_there(api, repo, head, there)
        if own := next((path for path in (folder / "README.md", theirs) if _has_words(path)), None):
            adds.append(CommitOperationAdd("README.md", own))
        else:
            text = card(repo=repo, license=license or _license_there(theirs))
            adds.append(CommitOperationAdd("README.md", text.encode()))
        commit = api.create_commit(
            repo,
            [*adds, *_stale({add.path_in_repo for add in adds}, there)],
            commit_message=message or _message(folder),
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,  # refused where a person has edited the card meanwhile
        )
        if tag_stands:
            api.delete_tag(repo, tag=tag)
        if tag is not None:
            api.create_tag(repo, tag=tag, revision=commit.oid)
    return Pushed(repo, commit.pr_url or commit.commit_url, commit.oid, tag)


def check_pipeline(folder: Path) -> None:
    """Raise InputError unless a folder holds a pipeline with safetensors."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name a run or a saved pipeline")
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} holds no pipeline yet (no model_index.json): train it first")
    weights = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")
    if not any(weights.fullmatch(path.name) for path in (folder / "unet").glob("*")):
        raise InputError(
            f"{folder}/unet has no diffusion_pytorch_model.safetensors, and no other weights are "
            "pushed: load it with DDPMPipeline.from_pretrained and save it again"
        )


def files_to_push(folder: Path) -> list[Path]:
    """The files of a folder that a push is made from: a card only where a person wrote it."""
    files = [path for pattern in (*PUBLIC, CONFIG) for path in sorted(folder.glob(pattern))]
    card = folder / "README.md"
    return [*files, card] if is_own(card) else files


def files_beside(folder: Path) -> list[Path]:
    """What a push takes beside the components: recipe, results, pictures, a person's card."""
    return [path for path in files_to_push(folder) if path.parent.name not in ("unet", "scheduler")]


def origin_files(
    name: str | None, token: str | None = None, revision: str | None = None
) -> Path | None:
    """A folder with what lies beside a pipeline where it was loaded from, if that is known."""
    if not name or Path(name).is_dir():
        return Path(name) if name and (Path(name) / "model_index.json").is_file() else None
    if Path(name).is_absolute():
        logger.warning(f"{name} is gone: what lay there beside the pipeline is not pushed with it")
        return None
    beside = [pattern for pattern in (*PUBLIC, CONFIG, "README.md") if "/*" not in pattern]
    with explained_hub(name, "load the card of", token=token):
        found = snapshot_download(name, token=token, revision=revision, allow_patterns=beside)
        return Path(found)


def prepare_repo(api: HfApi, repo: str, *, private: bool | None) -> str:
    """Make a repository if it is not there; returns its full id.

    Raises:
        InputError: it should be private, and is not.
        Exception: those of huggingface_hub, for `explained_hub`.
    """
    warn_insecure_endpoint()
    repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo).private:
        raise InputError(
            f"{repo} is public, and should be private: change it in its settings on the Hub, or "
            "name another repository; nothing was pushed"
        )
    return repo


def files_of(folder: Path) -> Iterator[CommitOperationAdd]:
    """What to upload of a folder, but for its card."""
    for path in files_to_push(folder):
        name = path.relative_to(folder).as_posix()
        if name in CONFIGURATIONS and (text := without_path(path)) is not None:
            yield CommitOperationAdd(name, text.encode())
        elif name not in ("README.md", CONFIG):
            yield CommitOperationAdd(name, path)
    settings = read_config(folder / CONFIG)
    if settings and is_run(settings):
        text = json.dumps(public_settings(settings), indent=2) + "\n"
        yield CommitOperationAdd(CONFIG, text.encode())


def without_path(configuration: Path) -> str | None:
    """The text of a component's configuration without the path that it was loaded from.

    It concerns this machine only. None where there is none in it.
    """
    config = read_config(configuration)
    if config.pop("_name_or_path", None) is None:
        return None
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _card_there(api: HfApi, repo: str, head: str, there: list[str]) -> Path | None:
    """The card that stands in a repository."""
    if "README.md" not in there:
        return None
    return Path(hf_hub_download(repo, "README.md", revision=head, token=api.token))


def _has_words(card: Path | None) -> bool:
    """Whether a person wrote a card, and more of it than its head, as the Hub's form does."""
    if card is None or not is_own(card):
        return False
    text = card.read_text("utf-8", errors="replace")
    return bool(re.sub(r"\A---\s*\n(.*?\n)?---\s*(\n|\Z)", "", text, flags=re.DOTALL).strip())


def _license_there(card: Path | None) -> str | None:
    """The licence that a person chose, in a card that says no more."""
    if card is None or not is_own(card):
        return None
    text = card.read_text("utf-8", errors="replace")
    found = re.search(r"^license:[ \t]*([\"']?)([\w.-]+)\1[ \t]*$", text, re.MULTILINE)
    return found[2] if found else None


def _stale(pushed: set[str], there: list[str]) -> Iterator[CommitOperationDelete]:
    """What a repository has of another pipeline than the one that is pushed."""
    for name in there:
        ours = name.startswith(("unet/", "scheduler/")) or name in (*PUBLIC, *FLAT, CONFIG)
        if ours and name not in pushed:
            yield CommitOperationDelete(name)


def _tag_stands(api: HfApi, repo: str, tag: str, may_move: bool) -> bool:
    """Whether a tag is there already. Raises InputError where it may not move."""
    stands = tag in {ref.name for ref in api.list_repo_refs(repo).tags}
    if stands and not may_move:
        raise InputError(f"{repo} has a tag {tag!r} already: choose another; nothing was pushed")
    return stands


def _message(folder: Path) -> str:
    """What a commit says of itself."""
    record = read_config(folder / TRAINING)
    return f"Model after {record['step']:,} steps" if record else "Model"


def dataset_license(name: str | None, token: str | None = None) -> str | None:
    """The licence that an image set on the Hub states, if it is there and states one."""
    if name is None:
        return None
    try:
        data = HfApi(token=token).dataset_info(name, timeout=5).card_data
    except (errors.HTTPError, OSError, ValueError, KeyError):  # a card without it is one, too
        return None
    stated = data.get("license") if data else None
    return ", ".join(map(str, stated)) if isinstance(stated, list) else stated
