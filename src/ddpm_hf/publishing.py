"""What a run pushes to the Hub while it trains, from copies that training cannot change."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

from .checkpoint import CONFIG, METRICS
from .hub import Pushed, files_to_push, push_to_hub
from .origin import KEPT
from .remote import checkpoint_repo, push_checkpoint
from .run import Run
from .uploads import LAST_WAIT, freeze


def publish_pipeline(run: Run, step: int, *, milestone: bool) -> None:
    """Push the pipeline in the run's folder, in the background; the main process does.

    Args:
        run: The run.
        step: Optimiser steps done.
        milestone: Tag it `step-<step>`.
    """
    if run.pushes is None or not run.config.push_to_hub:
        return
    with run.log.spared(f"the model of step {step} could not be made ready to push"):
        _push_pipeline(run, step, milestone)


def _push_pipeline(run: Run, step: int, milestone: bool) -> None:
    """Copy what is to be pushed, and let it be pushed. Raises OSError: it could not be copied."""
    folder = run.directory
    frozen = freeze(folder, files_to_push(folder), folder / f".push-{step}.partial")
    grid = frozen / "samples" / "grid.png"
    named = {path: re.fullmatch(r"step-(\d+)", path.stem) for path in folder.glob("samples/*.png")}
    grids = {int(name[1]): path for path, name in named.items() if name and int(name[1]) <= step}
    if grids and not grid.is_file():  # that of the end comes later
        grid.parent.mkdir(exist_ok=True)
        shutil.copyfile(grids[max(grids)], grid)
    push = partial(
        push_to_hub,
        frozen,
        run.config.hub_repo,
        private=run.config.hub_private_repo or None,
        tag=f"step-{step}" if milestone else None,
        move_tag=True,
        license=run.config.license,
    )
    # A milestone waits for its turn; of other pushes the newest is enough.
    kind = f"step-{step}" if milestone and step != run.total_steps else "model"
    run.pushes.submit(kind, f"the model of step {step}", push, partial(_delete, frozen))


def publish_checkpoint(run: Run, step: int) -> None:
    """Push a checkpoint of the run, in the background; the main process does."""
    if run.pushes is None or not run.config.push_checkpoints:
        return
    folder, name = run.directory, f"checkpoint-{step}"
    files = [*(folder / name).iterdir(), *folder.glob("ema/*.safetensors")]
    files += folder.glob(f"{KEPT}/**/*.json")
    files += [folder / file for file in (CONFIG, METRICS) if (folder / file).is_file()]
    frozen = freeze(folder, files, folder / f".push-{name}.partial")
    push = partial(
        push_checkpoint,
        frozen,
        frozen / name,
        checkpoint_repo(run.config.hub_repo),
        afresh=run.config.starts_afresh,
    )
    run.pushes.submit("checkpoint", name, push, partial(_delete, frozen))


def finish_pushes(run: Run, seconds: float = LAST_WAIT) -> Pushed | None:
    """Wait for the last pushes, say what became of them; that of the model, if it was pushed.

    Nothing is pushed after.
    """
    pushes, run.pushes = run.pushes, None
    if pushes is None:
        return None
    if pushes.busy:
        run.accelerator.print(f"Waiting for the Hub, {seconds:.0f} seconds at most", flush=True)
    pushes.close(seconds, lambda: bool(run.stop.noted))
    for kind in {"model", "checkpoint"} & pushes.done.keys():
        run.accelerator.print(f"Pushed:     {pushes.done[kind].url}")
    failed = dict(pushes.failed)  # a push that hangs may still end
    for problem in failed.values():
        run.accelerator.print(f"Not pushed: {problem}")
    if "model" in failed:
        run.accelerator.print(
            f"Push it with: ddpm-hf push {run.directory} --repo {run.config.hub_repo}"
        )
    return pushes.done.get("model")


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
