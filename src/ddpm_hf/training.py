"""train(config): the loop, read top to bottom.

A step is one optimiser step on one global batch. Everything random in it is a function of (seed,
step) or of (seed, position of the image in the stream): see data.py and `Run.draw`. Only dropout
also depends on the rank.
"""

import time
from functools import partial

from .config import TrainingConfig
from .losses import LossFunction, min_snr_loss, simple_loss
from .run import LossWindow, Run, TrainingResult


def train(
    config: TrainingConfig | None = None, loss_fn: LossFunction | None = None
) -> TrainingResult:
    """Train a DDPM: Algorithm 1 of Ho et al. 2020; goes on where an earlier call stopped.

    Args:
        config: The settings; without any, the recipe `fashion-quick`.
        loss_fn: The objective, one loss per image: see losses.py. Without any, `simple_loss`, or
            `min_snr_loss` where `snr_gamma` is set.

    Raises:
        InputError: settings, images or a folder that do not fit together; nothing has been
            overwritten then.
    """
    config = config or TrainingConfig.from_recipe("fashion-quick")
    loss_fn = loss_fn or objective(config)
    run = Run.build(config)
    first_step = run.open_folder()
    accelerator = run.accelerator
    losses, started = LossWindow(accelerator), time.perf_counter()

    with run.progress_bar(first_step) as bar:
        for step in range(first_step, run.total_steps):
            run.unet.train()
            for micro in range(config.gradient_accumulation_steps):
                with accelerator.accumulate(run.unet):
                    # Algorithm 1, lines 2-4: an image, a timestep, noise
                    x_0, eps, t = run.draw(step, micro)
                    loss = loss_fn(run.unet, run.scheduler, x_0, eps, t).mean()
                    losses.add(loss)
                    # line 5: a gradient step
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and config.max_grad_norm:
                        accelerator.clip_grad_norm_(run.unet.parameters(), config.max_grad_norm)
                    run.optimizer.step()
                    run.optimizer.zero_grad()
            if not accelerator.optimizer_step_was_skipped:  # as fp16 does after an overflow
                run.lr_scheduler.step()
                if run.ema:
                    run.ema.step(run.unet.parameters())

            done = step + 1
            bar.update()
            if done % config.logging_steps == 0 or done == run.total_steps:
                seconds = time.perf_counter() - started
                speed = (done - first_step) * run.global_batch_size / seconds
                run.log(done, losses.mean(), speed, bar)
            if done % config.checkpointing_steps == 0 or done == run.total_steps:
                run.save_checkpoint(done)
            if run.epoch_ended(done, config.save_images_epochs):
                run.save_samples(run.directory / "samples" / f"step-{done}.png")
            if run.epoch_ended(done, config.save_model_epochs):
                run.save_pipeline()
    return run.finish(max(first_step, run.total_steps), losses.last)


def objective(config: TrainingConfig) -> LossFunction:
    """The loss that the settings name."""
    return partial(min_snr_loss, gamma=config.snr_gamma) if config.snr_gamma else simple_loss
