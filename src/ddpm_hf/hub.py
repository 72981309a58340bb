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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
    MARK,
    PATHS,
    hub_dataset,
    located,
    public_settings,
    read_config,
    render_card,
)
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
from .config import TrainingConfig
from .errors import InputError
from .origin import KEPT
from .results import RESULTS, TRAINING
from .uploads import may_pass

PUBLIC = (
    "model_index.json",
    "unet/*.json",
    "unet/*.safetensors",
    "scheduler/scheduler_config.json",
    "samples/grid.png",
    "loss_curve.png",
    "rate_distortion.png",
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
    weights or numbers lie beside the new ones. A card there that a person has edited stays.

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
            not fit. No file has been pushed then; a repository may have been made, empty.
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
        there = api.list_repo_files(repo, revision=revision)
        adds = list(files_of(folder))
        if own := _own_card(api, folder, repo, revision, there):
            adds += own
        else:
            adds.append(CommitOperationAdd("README.md", card(repo=repo).encode()))
        commit = api.create_commit(
            repo,
            [*adds, *_stale({add.path_in_repo for add in adds}, there)],
            commit_message=message or _message(folder),
            revision=revision,
            create_pr=create_pr,
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
    return [*files, card] if card.is_file() and MARK not in card.read_text() else files


def origin_files(name: str | None, token: str | None = None) -> Path | None:
    """A folder with what lies beside a pipeline where it was loaded from, if that is known."""
    if not name or Path(name).is_dir():
        return Path(name) if name and (Path(name) / "model_index.json").is_file() else None
    beside = [pattern for pattern in (*PUBLIC, CONFIG, "README.md") if "/*" not in pattern]
    with explained_hub(name, "load the card of", token=token):
        return Path(snapshot_download(name, token=token, allow_patterns=beside))


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


def _own_card(
    api: HfApi, folder: Path, repo: str, revision: str | None, there: list[str]
) -> list[CommitOperationAdd]:
    """A person's own card: that of the folder, or the one that stands there; else nothing."""
    local = folder / "README.md"
    if local.is_file() and MARK not in local.read_text():
        return [CommitOperationAdd("README.md", local)]
    if "README.md" not in there:
        return []
    remote = Path(hf_hub_download(repo, "README.md", revision=revision, token=api.token))
    text = remote.read_text()
    return [CommitOperationAdd("README.md", remote)] if text.strip() and MARK not in text else []


def _stale(pushed: set[str], there: list[str]) -> Iterator[CommitOperationDelete]:
    """What a repository has of another pipeline than the one that is pushed."""
    for name in there:
        ours = name.startswith(("unet/", "scheduler/")) or name in (*PUBLIC, CONFIG)
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


# Checkpoints, for machines that may be taken away


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
        commit = api.create_commit(
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
    return Pushed(repo, commit.commit_url, commit.oid)


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
    """Put a fetched checkpoint, and what belongs to it, into the folder of a run."""
    for path in [*fetched.glob("ema/*.safetensors"), *fetched.glob(f"{KEPT}/**/*.json")]:
        target = run_dir / path.relative_to(fetched)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    for name in (METRICS, CONFIG):
        if (fetched / name).is_file() and not (name == CONFIG and (run_dir / name).is_file()):
            (fetched / name).replace(run_dir / name)
    shutil.rmtree(run_dir / wanted, ignore_errors=True)  # a damaged one
    (fetched / wanted).rename(run_dir / wanted)


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
