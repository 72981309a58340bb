"""The newest checkpoint of a run on the Hub, for machines that may be taken away."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    snapshot_download,
)

from .access import endpoint, explained_hub, warn_insecure_endpoint
from .card import located
from .checkpoint import (
    CONFIG,
    IDENTITY,
    METRICS,
    NAME,
    damage,
    list_checkpoints,
    read_settings,
    step_of,
    verify,
)
from .config import PATHS, TrainingConfig
from .errors import InputError
from .hub import Pushed, prepare_repo
from .origin import KEPT
from .uploads import may_pass


def open_hub(config: TrainingConfig, *, afresh: bool) -> list[str]:
    """What a run does on the Hub before it begins: make its repositories, fetch its checkpoint.

    Args:
        config: The settings.
        afresh: Leave a checkpoint that stands there alone; the run's own will replace it.

    Returns:
        Lines for the user.

    Raises:
        InputError: a repository that this run may not write to or read from, or a checkpoint of
            another run. A Hub that cannot be reached now is a line where this run only pushes.
    """
    lines, wanted = [], config.resume_from_checkpoint or ""
    private = config.hub_private_repo or None
    repos = {config.hub_repo: private} if config.push_to_hub else {}
    if config.push_checkpoints:
        repos[checkpoint_repo(config.hub_repo)] = True
    for name, private in repos.items():
        try:
            with explained_hub(name, "push to"):
                repo = prepare_repo(HfApi(), name, private=private)
            if name == checkpoint_repo(config.hub_repo) and not afresh:
                # The same command again goes on, on a new machine too.
                lines.append(fetch_checkpoint(repo, config, needed=False))
                wanted = "" if wanted in (name, repo) else wanted
        except InputError as error:
            if not may_pass(error):
                raise
            lines.append(f"Warning: {error}; training begins, pushes will try again")
    if is_repo(wanted):
        lines.append(fetch_checkpoint(wanted, config))
    return [line for line in lines if line]


def checkpoint_repo(repo: str) -> str:
    """Where the checkpoints of a model's run are kept."""
    return f"{repo}-checkpoints"


def push_checkpoint(
    run_dir: Path, checkpoint: Path, repo: str, *, afresh: bool = False, token: str | None = None
) -> Pushed:
    """Keep one checkpoint of a run, whole, in a private repository, in place of the one before.

    With it go the run's settings, curves and snapshots of averages: all that another machine needs
    to go on bit for bit. The history is squashed, so that the repository does not grow.

    Args:
        run_dir: Folder with the run's settings and curves.
        checkpoint: The checkpoint's folder.
        repo: `organisation/name` of the repository.
        afresh: Also in place of a later checkpoint.
        token: As in `push_to_hub`.

    Returns:
        The address of the branch, which stays, and the commit's hash until the next push.

    Raises:
        InputError: as `push_to_hub`, a repository that is not private, or that has a later
            checkpoint: the run began while the Hub could not be reached.
    """
    api = HfApi(token=token)
    files = [path for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".json")]
    files += [*run_dir.glob("ema/*.safetensors"), *run_dir.glob(f"{KEPT}/**/*.json")]
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
        latest = newest_step(there)
        if latest is not None and latest > step_of(checkpoint) and not afresh:
            raise InputError(
                f"{repo} has a later one, checkpoint-{latest}, which stays: stop this run and give "
                "the same command again in an empty folder to go on from it, or start afresh with "
                "--overwrite_output_dir"
            )
        api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, path) for name, path in adds.items()),
                CommitOperationAdd("README.md", note.encode()),
                *(
                    CommitOperationDelete(name)
                    for name in there
                    if (NAME.match(name) or name.startswith("ema/")) and name not in adds
                ),
            ],
            commit_message=checkpoint.name,
        )
        api.super_squash_history(repo, commit_message=checkpoint.name)
        # Squashing gives the commit another hash, and the next push one more.
        commit = api.model_info(repo).sha
    return Pushed(repo, f"{endpoint()}/{repo}/tree/main", commit)


def newest_step(names: list[str]) -> int | None:
    """The step of the newest checkpoint among the files of a repository."""
    return max((int(found[1]) for name in names if (found := NAME.match(name))), default=None)


def is_repo(name: str) -> bool:
    """Whether a name is that of a repository: `organisation/name`, and nothing on this disk."""
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return False
    return NAME.fullmatch(name.split("/")[1]) is None


def fetch_checkpoint(repo: str, config: TrainingConfig, *, needed: bool = True) -> str:
    """Bring the checkpoint of a repository into a run's folder; returns a line about it.

    A whole checkpoint of this run that is there and as new stays, and nothing is fetched.

    Args:
        repo: The repository that `push_checkpoint` wrote.
        config: The run's settings: its folder, and what makes it the run that it is.
        needed: Whether a repository without a checkpoint is an error.

    Raises:
        InputError: no such repository, a damaged checkpoint, or one of another run.
        OSError: it could not be written.
    """
    warn_insecure_endpoint()
    run_dir = config.run_dir
    with explained_hub(repo, "resume from"):
        latest = newest_step(HfApi().list_repo_files(repo))
        if latest is None and needed:
            raise InputError(f"{repo} holds no checkpoint: it needs one made by --push_checkpoints")
        if latest is None:
            return ""
        wanted = f"checkpoint-{latest}"
        here = [path for path in list_checkpoints(run_dir) if damage(path) is None]
        if here and step_of(here[-1]) >= latest:
            return f"{here[-1].name} here is as new as {wanted} of {repo}: going on from it"
        partial = run_dir / ".fetched.partial"
        try:
            snapshot_download(
                repo,
                local_dir=partial,
                allow_patterns=[
                    f"{wanted}/*.safetensors",
                    f"{wanted}/*.json",
                    "ema/*.safetensors",
                    f"{KEPT}/*.json",
                    CONFIG,
                    METRICS,
                ],
            )
            verify(partial / wanted)
            _check_same_run(repo, read_settings(partial), config)
            _move_in(partial, run_dir, wanted)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if run_dir.is_dir() and not any(run_dir.iterdir()):
                run_dir.rmdir()
    return f"Fetched {wanted} from {repo}"


def _check_same_run(repo: str, fetched: dict[str, Any] | None, config: TrainingConfig) -> None:
    """Raise InputError unless the run in a repository is the one that the settings describe."""
    if fetched is None:
        raise InputError(f"{repo} holds no settings of a run: its {CONFIG} is missing")
    here = located(asdict(config))
    # The images and the batch are compared when they are known.
    names = [key for key in IDENTITY if key in here and key != "global_batch_size"]
    clashes = [f"{key} is {fetched.get(key)!r} there" for key in names
               if key not in PATHS and here[key] != fetched.get(key)]  # fmt: skip
    if clashes:
        raise InputError(
            f"{repo} holds a checkpoint of another run: {'; '.join(clashes)}. Name another "
            "--hub_model_id, or replace it by this run with --overwrite_output_dir"
        )


def _move_in(fetched: Path, run_dir: Path, wanted: str) -> None:
    """Put a fetched checkpoint, and what belongs to it, into the folder of a run.

    First the settings, without which the folder of a killed process is taken for no run's.
    """
    for name in (CONFIG, METRICS):
        if (fetched / name).is_file() and not (name == CONFIG and (run_dir / name).is_file()):
            (fetched / name).replace(run_dir / name)
    for path in [*fetched.glob("ema/*.safetensors"), *fetched.glob(f"{KEPT}/**/*.json")]:
        target = run_dir / path.relative_to(fetched)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(run_dir / wanted, ignore_errors=True)  # a damaged one
    (fetched / wanted).rename(run_dir / wanted)
