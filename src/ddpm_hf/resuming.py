"""The folder of a run, opened and gone on in; its state, saved and restored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor

from .checkpoint import (
    CONFIG,
    Checkpoint,
    clear_leftovers,
    clear_run,
    compare_runs,
    find_latest,
    join_optimizer,
    list_checkpoints,
    load_checkpoint,
    lock_folder,
    rotate,
    set_aside,
    shard_like,
    split_optimizer,
    verify,
    whole,
    write_text,
)
from .checkpoint import save_checkpoint as write_checkpoint
from .devices import on_main
from .ema import drop_snapshots, save_snapshot
from .errors import InputError, Stopped, TrainingError
from .images import to_network
from .origin import KEPT, keep_origin
from .pictures import save_image_grid
from .publishing import finish_pushes, publish_checkpoint
from .run import Run, same_command, settings_of
from .stopping import UpdateGuard
from .streaming import merge_states
from .uploads import STOP_WAIT


def open_folder(run: Run) -> int:
    """Make the folder of a run, or go on in it: returns the number of steps done already.

    Raises:
        InputError: the folder holds something else, or a run with another identity.
    """
    accelerator, config = run.accelerator, run.config
    fingerprint = run.stream.images.fingerprint()
    if len(set(gather_object([fingerprint]))) > 1:
        raise InputError(
            "the processes have different images: every machine needs the same image set"
        )
    settings = settings_of(config) | {
        "global_batch_size": run.plan.global_batch_size,
        "data_fingerprint": fingerprint,
    }
    if not config.starts_afresh:
        for line in compare_runs(run.directory, settings):
            accelerator.print(line)

    def lock() -> None:
        run.lock = lock_folder(run.directory)

    of_main(run, lock)
    if config.starts_afresh and accelerator.is_main_process:
        clear_run(run.directory)
    accelerator.wait_for_everyone()
    folder = of_main(run, partial(choose_checkpoint, run))
    if folder is not None:
        check_seen(run, folder)
    step = restore(run, load_checkpoint(folder)) if folder else 0
    accelerator.wait_for_everyone()
    of_main(run, partial(tidy_folder, run, step, settings))
    check_seen(run, run.directory / CONFIG)
    of_main(run, partial(run.log.open, step, settings))
    return step


def of_main(run: Run, act: Callable[[], Any]) -> Any:
    """What `act` gives on the main process, on every process.

    Raises:
        InputError: it could not be done, on every process, so that none waits for it.
    """

    def explained() -> Any:
        try:
            return act()
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read or write {run.directory}: {error}") from error

    return on_main(explained)


def tidy_folder(run: Run, step: int, settings: dict[str, Any]) -> None:
    """Make the folder, drop what lies beyond `step`, and write the settings and a first batch."""
    for name in set_aside(run.directory, step):
        run.accelerator.print(f"Renamed {name} to aside-{name}: this run goes on before it")
    run.directory.mkdir(parents=True, exist_ok=True)
    clear_leftovers(run.directory)
    for average in run.power_averages:
        drop_snapshots(run.directory, average.optimization_step)
    # First what says that the folder is a run's: without it a start after a kill is refused.
    write_text(run.directory / CONFIG, json.dumps(settings, indent=2) + "\n")
    if run.config.init_from and not (run.directory / KEPT).is_dir():
        keep_origin(run.config.init_from, run.directory)
    if step == 0:
        # The rows of this process: a stream opens the lanes of what is drawn.
        batch = to_network(run.stream.batch(0, slice(min(64, run.plan.per_device))).images)
        save_image_grid(batch, run.directory / "samples" / "first_batch.png")


def check_seen(run: Run, path: Path) -> None:
    """Raise InputError on every process if one of them does not see what the first one wrote."""
    sees = torch.tensor([path.exists()], device=run.accelerator.device)
    if not run.accelerator.gather(sees).all():
        raise InputError(
            f"not every process sees {path}: output_dir must be on a disk that all machines share"
        )


def choose_checkpoint(run: Run) -> Path | None:
    """The checkpoint to go on from, if any.

    Raises:
        InputError: no such checkpoint, a damaged one, or none where a run was finished.
    """
    wanted = run.config.resume_from_checkpoint
    if wanted and wanted != "latest":
        folder = run.directory / Path(wanted).name
        elsewhere = wanted != folder.name and Path(wanted).resolve() != folder.resolve()
        if elsewhere or folder not in list_checkpoints(run.directory):
            raise InputError(
                f"resume_from_checkpoint {wanted!r} is no checkpoint of this run, which has "
                f"{', '.join(path.name for path in list_checkpoints(run.directory)) or 'none'}"
            )
        verify(folder)
        return folder
    folder, passed_over = find_latest(run.directory)
    for line in passed_over:
        run.accelerator.print(f"{line}; using the one before it")
    if folder is None and (run.directory / "README.md").is_file():
        raise InputError(
            f"the run in {run.directory} was finished, and its checkpoints are gone: there is "
            "nothing to go on from. Start afresh with --overwrite_output_dir"
        )
    if wanted and folder is None:
        run.accelerator.print(f"No checkpoint in {run.directory} yet: starting at step 0")
    return folder


def restore(run: Run, checkpoint: Checkpoint) -> int:
    """Bring a run to where a checkpoint was written; returns its step."""
    parameters = dict(run.accelerator.unwrap_model(run.unet).named_parameters())
    with torch.no_grad():
        for name, saved in checkpoint.tensors["unet"].items():
            parameters[name].copy_(shard_like(saved, parameters[name]))
    state = join_optimizer(checkpoint.tensors.get("optimizer", {}), checkpoint.state["optimizer"])
    order = [p for group in run.optimizer.param_groups for p in group["params"]]
    for index, entries in state["state"].items():
        entries |= {key: shard_like(value, order[index]) for key, value in entries.items()}
    run.optimizer.load_state_dict(state)
    schedule = run.lr_scheduler
    schedule.load_state_dict(checkpoint.state["lr_scheduler"])
    # The horizon may have changed since: take the rate that this run's schedule has here.
    bases = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [base * factor(schedule.last_epoch) for base, factor in bases]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for name, average in run.averages.items():
        average.load(checkpoint.tensors[name], checkpoint.state["ema_steps"][name])
    if run.timestep_history:
        run.timestep_history.load_state_dict(checkpoint.tensors["timestep_history"])
    if run.accelerator.scaler is not None and "scaler" in checkpoint.state:
        run.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    run.stream.load_state(checkpoint.state["stream"])
    run.log.logged_step = checkpoint.state.get("logged_step", checkpoint.step)
    if "losses" in checkpoint.tensors:  # older ones have none
        run.log.window.load(checkpoint.tensors["losses"]["since_log"], run.accelerator)
    run.guard = UpdateGuard(run.accelerator.device, checkpoint.state["skipped_updates"])
    run.saved_step = checkpoint.step
    run.accelerator.print(
        f"Going on from checkpoint-{checkpoint.step}, {checkpoint.step} of {run.total_steps} "
        "steps done"
    )
    return checkpoint.step


def state_of(run: Run, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What a checkpoint holds: (tensors by group, JSON), on the processes that save.

    Every process has to ask.
    """
    stream = merge_states(gather_object([run.stream.state(step)]))
    losses = run.log.window.state(run.accelerator)
    if not run.saves:
        return {}, {}
    unet = run.accelerator.unwrap_model(run.unet)
    optimizer, rest = split_optimizer(run.optimizer.optimizer)
    # On the CPU one by one: sharded tensors would not fit on a device whole.
    tensors = {
        group: {name: whole(tensor.detach()).cpu() for name, tensor in named.items()}
        for group, named in {"unet": dict(unet.named_parameters()), "optimizer": optimizer}.items()
    }
    tensors["losses"] = {"since_log": losses}
    tensors |= {name: average.named_tensors() for name, average in run.averages.items()}
    if run.timestep_history:
        tensors["timestep_history"] = run.timestep_history.state_dict()
    state = {
        "optimizer": rest,
        "lr_scheduler": run.lr_scheduler.state_dict(),
        "ema_steps": {name: a.optimization_step for name, a in run.averages.items()},
        "skipped_updates": int(run.guard.skipped),
        "logged_step": run.log.logged_step,
        "stream": stream,
    }
    if run.accelerator.scaler is not None:
        state["scaler"] = run.accelerator.scaler.state_dict()
    return tensors, state


def save_checkpoint(run: Run, step: int) -> bool:
    """Write and rotate checkpoints; every process waits. False where it could not be written.

    A full disk is said, and the run goes on: the checkpoints before this one stand.
    """
    if step == run.saved_step:
        return True
    run.accelerator.wait_for_everyone()
    tensors, state = state_of(run, step)
    saved = True
    if run.accelerator.is_main_process:
        try:
            write_checkpoint(run.directory, step, tensors, state)
        except OSError as error:
            saved = False
            run.log.say(
                f"Warning: checkpoint-{step} could not be saved, those before it stand, and "
                f"training goes on ({error})"
            )
        if saved:
            with run.log.spared("the checkpoint could not be made ready to push"):
                publish_checkpoint(run, step)
            with run.log.spared("old checkpoints could not be deleted"):
                rotate(run.directory, run.config.checkpoints_total_limit)
    (saved,) = broadcast_object_list([saved])
    run.saved_step = step if saved else run.saved_step
    return saved


def save_snapshots(run: Run, step: int) -> None:
    """Store the power averages, for averages of other lengths after training."""
    for average in run.power_averages if run.saves else []:
        tensors = average.named_tensors()
        if run.accelerator.is_main_process:
            with run.log.spared(f"the snapshot of step {step} could not be saved"):
                save_snapshot(run.directory, average, tensors)


@contextmanager
def last_pushes(run: Run) -> Iterator[None]:
    """Wait a while for the pushes of a run that fails, as `stop` does."""
    try:
        yield
    except (InputError, TrainingError):
        finish_pushes(run, STOP_WAIT)
        raise


def stop(run: Run, reason: str, step: int) -> None:
    """Save the state and end the run.

    Raises:
        Stopped: always, but
        TrainingError: where the state could not be saved.
    """
    saved = save_checkpoint(run, step)
    if run.config.streaming:
        run.report_faults()
    finish_pushes(run, STOP_WAIT)
    run.close()
    if not saved:
        raise TrainingError(
            f"stopped by {reason} after step {step}, whose checkpoint could not be saved"
        )
    run.accelerator.print(
        f"Stopped by {reason} after step {step} of {run.total_steps}, which is saved: "
        f"{same_command(run.config)} goes on",
        flush=True,
    )
    raise Stopped(reason)
