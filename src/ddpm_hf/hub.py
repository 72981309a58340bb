"""Pushing to the Hub: a pipeline in one commit, a checkpoint into a private repository of its own.

What leaves this machine is a list, not what happens to lie in a folder: weights as safetensors,
configurations, the card and its pictures, the recipe and the results. Checkpoints leave by
`push_checkpoint` only, logs not at all, tokens never.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)

from .access import explained_hub, warn_insecure_endpoint
from .card import MARK, read_config, render_card
from .checkpoint import (
    CONFIG,
    IDENTITY,
    METRICS,
    NAME,
    list_checkpoints,
    read_settings,
    step_of,
    verify,
)
from .config import OF_THIS_MACHINE, TrainingConfig
from .errors import InputError
from .results import RESULTS, TRAINING
from .uploads import may_pass

PUBLIC = (
    "model_index.json",
    "unet/*.json",
    "unet/*.safetensors",
    "scheduler/scheduler_config.json",
    "samples/grid.png",
    "loss_curve.png",
    RESULTS,
    TRAINING,
)
"""What a push takes from a folder, beside the card and the recipe, which it writes itself."""

PATHS = ("dataset_name", "train_data_dir", "model_config_name_or_path", "init_from", "recipe")
"""Settings that may be paths: of a path only the last name leaves this machine."""


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

    Whatever else stands in the repository's `unet` and `scheduler` goes in the same commit, so that
    no old weights lie beside the new ones. A card there that a person has edited stays.

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
            not fit; nothing has been pushed then.
    """
    folder = Path(folder)
    if create_pr and tag:
        raise InputError("a pull request has no commit to tag yet: leave out tag or create_pr")
    check_pipeline(folder)
    api = HfApi(token=token)
    with explained_hub(repo, "push to", token=token):
        repo = prepare_repo(api, repo, private=private)
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        if tag is not None:
            _free_tag(api, repo, tag, move_tag)
        there = api.list_repo_files(repo, revision=revision)
        commit = api.create_commit(
            repo,
            [
                *files_of(folder),
                *_card(api, folder, repo, revision, license, there),
                *_stale(folder, there),
            ],
            commit_message=message or _message(folder),
            revision=revision,
            create_pr=create_pr,
        )
        if tag is not None:
            api.create_tag(repo, tag=tag, revision=commit.oid)
    return Pushed(repo, commit.pr_url or commit.commit_url, commit.oid, tag)


def check_pipeline(folder: Path) -> None:
    """Raise InputError unless a folder holds a pipeline with safetensors."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name a run or a saved pipeline")
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} holds no pipeline yet (no model_index.json): train it first")
    if not any((folder / "unet").glob("*.safetensors")):
        raise InputError(
            f"{folder}/unet has no safetensors, and no other weights are pushed: load it with "
            "DDPMPipeline.from_pretrained and save it again"
        )


def files_to_push(folder: Path) -> list[Path]:
    """The files of a folder that a push is made from: a card only where a person wrote it."""
    files = [path for pattern in (*PUBLIC, CONFIG) for path in sorted(folder.glob(pattern))]
    card = folder / "README.md"
    return [*files, card] if card.is_file() and MARK not in card.read_text() else files


def open_hub(config: TrainingConfig) -> list[str]:
    """What a run does on the Hub before it begins: make its repositories, fetch its checkpoint.

    Returns:
        Lines for the user.

    Raises:
        InputError: a repository that this run may not write to or read from. One that cannot be
            reached now is a line: training need not wait for it.
    """
    lines = []
    wanted = config.resume_from_checkpoint
    if wanted and is_repo(wanted):
        lines.append(fetch_checkpoint(wanted, config.run_dir))
    repos = {config.hub_repo: config.hub_private_repo or None} if config.push_to_hub else {}
    if config.push_checkpoints:
        repos[checkpoint_repo(config.hub_repo)] = True
    for repo, private in repos.items():
        try:
            with explained_hub(repo, "push to"):
                prepare_repo(HfApi(), repo, private=private)
        except InputError as error:
            if not may_pass(error):
                raise
            lines.append(f"Warning: {error}; training begins, pushes will try again")
    return lines


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
        if path.name != "README.md" and path != folder / CONFIG:
            yield CommitOperationAdd(path.relative_to(folder).as_posix(), path)
    settings = read_config(folder / CONFIG)
    if settings and "dataset_name" in settings:
        text = json.dumps(public_settings(settings), indent=2) + "\n"
        yield CommitOperationAdd(CONFIG, text.encode())


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings without what only concerns the machine that it ran on."""
    kept = {key: value for key, value in settings.items() if key not in OF_THIS_MACHINE}
    for key in PATHS:
        value = kept.get(key)
        if isinstance(value, str) and _is_path(value):
            kept[key] = Path(value).name
    return kept


def _is_path(name: str) -> bool:
    """Whether a name is a place on this disk, not an id on the Hub or a word of ours."""
    return Path(name).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)


def _card(
    api: HfApi, folder: Path, repo: str, revision: str | None, license: str | None, there: list[str]
) -> Iterator[CommitOperationAdd]:
    """The card to upload: a person's from the folder, or ours unless a person edited it there."""
    local = folder / "README.md"
    if local.is_file() and MARK not in local.read_text():
        yield CommitOperationAdd("README.md", local)
        return
    if "README.md" in there:
        remote = hf_hub_download(repo, "README.md", revision=revision, token=api.token)
        text = Path(remote).read_text()
        if text.strip() and MARK not in text:
            return
    text = render_card(folder, repo, license=license)
    yield CommitOperationAdd("README.md", text.encode())


def _stale(folder: Path, there: list[str]) -> Iterator[CommitOperationDelete]:
    """Files of a pipeline in the repository that the new one does not have."""
    for name in there:
        if name.startswith(("unet/", "scheduler/")) and not (folder / name).is_file():
            yield CommitOperationDelete(name)


def _free_tag(api: HfApi, repo: str, tag: str, move: bool) -> None:
    """Make sure that a tag can be put. Raises InputError where it stands and may not move."""
    if tag not in {ref.name for ref in api.list_repo_refs(repo).tags}:
        return
    if not move:
        raise InputError(f"{repo} has a tag {tag!r} already: choose another; nothing was pushed")
    api.delete_tag(repo, tag=tag)


def _message(folder: Path) -> str:
    """What a commit says of itself."""
    record = read_config(folder / TRAINING)
    return f"Model after {record['step']:,} steps" if record else "Model"


# Checkpoints, for machines that may be taken away


def checkpoint_repo(repo: str) -> str:
    """Where the checkpoints of a model's run are kept."""
    return f"{repo}-checkpoints"


def push_checkpoint(
    run_dir: Path, checkpoint: Path, repo: str, *, token: str | None = None
) -> Pushed:
    """Keep one checkpoint of a run, whole, in a private repository, in place of the one before.

    With it go the run's settings, curves and snapshots of averages: all that another machine needs
    to go on bit for bit. The history is squashed, so that the repository does not grow.

    Args:
        run_dir: Folder with the run's settings and curves.
        checkpoint: The checkpoint's folder.
        repo: `organisation/name` of the repository.
        token: As in `push_to_hub`.

    Raises:
        InputError: as `push_to_hub`, or a repository that is not private.
    """
    api = HfApi(token=token)
    files = [path for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".json")]
    files += (run_dir / "ema").glob("*.safetensors")
    files += [path for name in (CONFIG, METRICS) if (path := run_dir / name).is_file()]
    adds = {
        f"{checkpoint.name}/{path.name}"
        if path.parent == checkpoint
        else path.relative_to(run_dir).as_posix(): path
        for path in files
    }
    note = (
        "---\nlibrary_name: diffusers\ntags:\n- ddpm_hf\n---\n\n"
        f"The newest checkpoint of a run of ddpm_hf, to go on from on another machine:\n"
        f"`ddpm-hf train --resume_from_checkpoint {repo}` beside the other flags. No model.\n"
    )
    with explained_hub(repo, "push a checkpoint to", token=token):
        repo = prepare_repo(api, repo, private=True)
        there = api.list_repo_files(repo)
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, path) for name, path in adds.items()),
                CommitOperationAdd("README.md", note.encode()),
                *(
                    CommitOperationDelete(name)
                    for name in there
                    if NAME.match(name) and name not in adds
                ),
            ],
            commit_message=checkpoint.name,
        )
        api.super_squash_history(repo, commit_message=checkpoint.name)
    return Pushed(repo, commit.commit_url, commit.oid)


def is_repo(name: str) -> bool:
    """Whether a name is that of a repository: `organisation/name`, and nothing on this disk."""
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return False
    return NAME.fullmatch(name.split("/")[1]) is None


def fetch_checkpoint(repo: str, run_dir: Path, *, token: str | None = None) -> str:
    """Bring the checkpoint of a repository into a run's folder; returns a line about it.

    A checkpoint of this run that is there and as new stays, and nothing is fetched.

    Raises:
        InputError: no such repository, no checkpoint in it, or a damaged one.
    """
    with explained_hub(repo, "resume from", token=token):
        names = HfApi(token=token).list_repo_files(repo)
        steps = [int(found[1]) for name in names if (found := NAME.match(name))]
        if not steps:
            raise InputError(f"{repo} holds no checkpoint: it needs one made by --push_checkpoints")
        wanted = f"checkpoint-{max(steps)}"
        if (here := list_checkpoints(run_dir)) and step_of(here[-1]) >= max(steps):
            return f"{here[-1].name} here is as new as {wanted} of {repo}: going on from it"
        partial = run_dir / ".fetched.partial"
        try:
            snapshot_download(
                repo,
                token=token,
                local_dir=partial,
                allow_patterns=[
                    f"{wanted}/*.safetensors",
                    f"{wanted}/*.json",
                    "ema/*.safetensors",
                    CONFIG,
                    METRICS,
                ],
            )
            verify(partial / wanted)
            _check_same_run(repo, read_settings(partial), run_dir)
            _move_in(partial, run_dir, wanted)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return f"Fetched {wanted} from {repo}"


def _check_same_run(repo: str, fetched: dict[str, Any] | None, run_dir: Path) -> None:
    """Raise InputError unless a repository's run is that of a folder, or the folder is free."""
    if fetched is None:
        raise InputError(f"{repo} holds no settings of a run: its {CONFIG} is missing")
    here = read_settings(run_dir) or fetched
    clashes = [key for key in IDENTITY if here.get(key) != fetched.get(key)]
    if clashes:
        raise InputError(
            f"the run in {run_dir} is another one than that of {repo}: they differ in "
            f"{', '.join(clashes)}. Name another --output_dir"
        )


def _move_in(fetched: Path, run_dir: Path, wanted: str) -> None:
    """Put a fetched checkpoint, and what belongs to it, into the folder of a run."""
    for path in (fetched / "ema").glob("*.safetensors"):
        (run_dir / "ema").mkdir(exist_ok=True)
        path.replace(run_dir / "ema" / path.name)
    for name in (METRICS, CONFIG):
        if (fetched / name).is_file() and not (name == CONFIG and (run_dir / name).is_file()):
            (fetched / name).replace(run_dir / name)
    (fetched / wanted).rename(run_dir / wanted)


def dataset_license(name: str) -> str | None:
    """The licence that an image set on the Hub states, if it is there and states one."""
    try:
        with explained_hub(name, "look up", repo_type="dataset"):
            data = HfApi().dataset_info(name).card_data
    except InputError:
        return None
    stated = data.get("license") if data else None
    return ", ".join(stated) if isinstance(stated, list) else stated
