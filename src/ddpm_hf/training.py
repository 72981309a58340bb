"""train(config): the loop, read top to bottom.

A step is one optimiser step on one global batch. Everything random in it is a function of (seed,
step) or of (seed, position of the image in the stream): see data.py and `Run.draw`. Only dropout
also depends on the rank.
"""

from functools import partial

from .config import TrainingConfig
from .losses import LossFunction, hybrid_loss, min_snr_loss, simple_loss, vlb_loss
from .outputs import (
    TrainingResult,
    finish,
    measure_held_out,
    save_left_out,
    save_pipeline,
    save_samples,
)
from .resuming import last_pushes, open_folder, save_checkpoint, save_snapshots, stop
from .run import Run, same_command
from .stopping import TOO_LARGE, explained_failures, out_of_memory


def train(
    config: TrainingConfig | None = None, loss_fn: LossFunction | None = None
) -> TrainingResult:
    """Train a DDPM: Algorithm 1 of Ho et al. 2020; goes on where an earlier call stopped.

    Args:
        config: The settings; without any, the recipe `fashion-quick`.
        loss_fn: The objective, one loss per image: see losses.py. Without any, the one that the
            settings name.

    Raises:
        InputError: settings, images or a folder that do not fit together; nothing has been
            overwritten then. Or a disk that is full when the folder is begun or the pipeline
            written, or a streamed image that cannot be decoded: the checkpoints stand.
        TrainingError: the run cannot go on: no memory, gradients that are not finite, or a process
            that died. Its checkpoints stand.
        Stopped: a signal came (SIGTERM, SIGINT, SIGUSR1), or the launcher died; the state is saved.
    """
    config = config or TrainingConfig.from_recipe("fashion-quick")
    loss_fn = loss_fn or objective(config)
    with explained_failures(TOO_LARGE):
        run = Run.build(config)
    config, accelerator = run.config, run.accelerator
    no_memory = out_of_memory(run.plan.per_device, run.plan.accumulation)
    failures = explained_failures(no_memory, same_command(config))
    with run.stop, run.held(), last_pushes(run), failures:
        step = open_folder(run)
        save_left_out(run, step)
        run.log.start(step)
        run.unet.train()
        while step < run.total_steps:
            for micro in range(run.plan.accumulation):
                with accelerator.accumulate(run.unet):
                    # Algorithm 1, lines 2-4: an image, a timestep, noise
                    draw = run.draw(step, micro)
                    losses = loss_fn(
                        run.network(draw.labels), run.scheduler, draw.x_0, draw.eps, draw.t
                    )
                    # line 5: a gradient step
                    accelerator.backward(run.mean_loss(losses, draw))
            run.update()
            step += 1

            last = step == run.total_steps
            if run.log.tick(step):
                run.log_step(step)
            if run.held_out and (step % config.held_out_steps == 0 or last):
                measure_held_out(run, step)
            if step % config.ema_snapshot_steps == 0 or last:
                save_snapshots(run, step)
            if step % config.checkpointing_steps == 0 or last:
                save_checkpoint(run, step)
            if run.samples_due(step):
                save_samples(run, step, run.grid_path(step))
            if run.pipeline_due(step):
                save_pipeline(run, step)
            if reason := run.stop.agreed():
                stop(run, reason, step)
        return finish(run, step)


def objective(config: TrainingConfig) -> LossFunction:
    """The loss that the settings name."""
    gamma = config.snr_gamma or None
    match config.loss:
        case "vlb":
            return vlb_loss
        case "hybrid":
            return partial(hybrid_loss, gamma=gamma)
        case _:
            return partial(min_snr_loss, gamma=gamma) if gamma else simple_loss
