"""train(config): the loop, read top to bottom.

A step is one optimiser step on one global batch. Everything random in it is a function of (seed,
step) or of (seed, position of the image in the stream): see data.py and `Run.draw`. Only dropout
also depends on the rank.
"""

from functools import partial

from .config import TrainingConfig
from .losses import LossFunction, min_snr_loss, simple_loss
from .run import Run, TrainingResult
from .stopping import explained_failures


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
            overwritten then.
        TrainingError: the run cannot go on: no memory, gradients that are not finite, or a process
            that died. Its checkpoints stand.
        Stopped: a signal came (SIGTERM, SIGINT, SIGUSR1), or the launcher died; the state is saved.
    """
    config = config or TrainingConfig.from_recipe("fashion-quick")
    loss_fn = loss_fn or objective(config)
    run = Run.build(config)
    step = run.open_folder()
    with run.stop, explained_failures(run.plan.per_device, run.plan.accumulation):
        run.log.start(step)
        while step < run.total_steps:
            run.unet.train()
            for micro in range(run.plan.accumulation):
                with run.accelerator.accumulate(run.unet):
                    # Algorithm 1, lines 2-4: an image, a timestep, noise
                    x_0, eps, t = run.draw(step, micro)
                    losses = loss_fn(run.unet, run.scheduler, x_0, eps, t)
                    run.log.window.add(losses, t)
                    # line 5: a gradient step
                    run.accelerator.backward(losses.mean())
            run.update()
            step += 1

            if run.log.tick(step):
                run.log_step(step)
            if step % run.config.ema_snapshot_steps == 0 or step == run.total_steps:
                run.save_snapshots()
            if step % run.config.checkpointing_steps == 0 or step == run.total_steps:
                run.save_checkpoint(step)
            if run.samples_due(step):
                run.save_samples(step, run.directory / "samples" / f"step-{step}.png")
            if run.epoch_ended(step, run.config.save_model_epochs):
                run.save_pipeline()
            if reason := run.stop.agreed():
                raise run.stopped(reason, step)
        return run.finish(step)


def objective(config: TrainingConfig) -> LossFunction:
    """The loss that the settings name."""
    return partial(min_snr_loss, gamma=config.snr_gamma) if config.snr_gamma else simple_loss
