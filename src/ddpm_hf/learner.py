"""What learns: the network, its first weights, the optimiser and the schedule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from torch import Tensor

from .checkpoint import list_checkpoints
from .config import OF_SPEED, TrainingConfig
from .devices import BatchPlan, in_turn, wants_fsdp
from .errors import InputError
from .images import ImageSet
from .optimization import build_optimizer
from .origin import KEPT
from .pipeline import DDPMPipeline
from .presets import build_unet
from .probe import LAYOUTS, agree, choose_speed
from .scheduler import DDPMScheduler
from .streaming import StreamedImages


def build_network(config: TrainingConfig, images: ImageSet | StreamedImages) -> UNet2DModel:
    """The network that the settings and the images ask for.

    Raises:
        InputError: as `build_unet`, or its learned time embedding has fewer rows than the chain.
    """
    kept = config.run_dir / KEPT  # of an origin that may be gone
    goes_on = config.init_from and kept.is_dir() and not config.starts_afresh
    unet = build_unet(
        config.preset,
        model_config=str(kept) if goes_on else config.model_config_name_or_path,
        resolution=config.image_size,
        image_channels=images.channels,
        dropout=config.dropout,
        num_classes=images.num_classes,
        null_class=config.class_dropout_prob > 0,
        learned_variance=config.variance_type == "learned_range",
    )
    rows = unet.config.num_train_timesteps
    if unet.config.time_embedding_type == "learned" and config.ddpm_num_steps > rows:
        raise InputError(
            f"ddpm_num_steps must be at most {rows}, the rows of the learned time embedding of "
            f"{config.model_config_name_or_path!r}; got {config.ddpm_num_steps}"
        )
    return unet


def start_weights(
    config: TrainingConfig, processes: PartialState, scheduler: DDPMScheduler
) -> dict[str, Tensor] | None:
    """The weights of the pipeline to start from; None where the seed's or a checkpoint's count.

    Raises:
        InputError: the process that the settings name is not the one that they were trained with,
            or the folder to be deleted is that of the pipeline itself.
    """
    afresh = config.starts_afresh
    if not config.init_from or (list_checkpoints(config.run_dir) and not afresh):
        return None
    if afresh and Path(config.init_from).resolve() == config.run_dir.resolve():
        raise InputError(
            f"overwrite_output_dir would delete the model that training starts from, in "
            f"{config.init_from}: name another --output_dir"
        )
    origin = in_turn(processes, partial(DDPMPipeline.from_pretrained, config.init_from))
    theirs, ours = DDPMScheduler.from_config(origin.scheduler.config), scheduler
    words = ("prediction_type", "num_train_timesteps")
    same = all(theirs.config[word] == ours.config[word] for word in words)
    if not same or not torch.allclose(theirs.alphas_cumprod, ours.alphas_cumprod, atol=1e-6):
        raise InputError(
            f"{config.init_from!r} was trained with another process: it predicts "
            f"{theirs.config.prediction_type!r} in {theirs.config.num_train_timesteps} timesteps, "
            f"{theirs.config.beta_schedule!r}. Leave out the flags that change it; a schedule with "
            "its own range of betas has no flag"
        )
    return origin.unet.state_dict()


def settle_speed(
    config: TrainingConfig,
    before: dict[str, Any] | None,
    network: Callable[[], UNet2DModel],
    plan: BatchPlan,
    total_steps: int,
) -> None:
    """Decide the settings that are `auto`: as the run began, or by the probe; in `config`.

    Args:
        config: Changed in place.
        before: The settings that the run was started with.
        network: Builds the network.
        plan: How the processes share a batch.
        total_steps: Optimiser steps of the run.
    """
    for name in OF_SPEED:
        if getattr(config, name) == "auto" and before:
            setattr(config, name, before.get(name, "auto"))
    state = PartialState()
    if wants_fsdp():
        config.memory_format = "contiguous"  # torch shards no other weights
        if state.device.type == "cpu":  # where no wrapper of accelerate's casts
            config.mixed_precision = "no"
    with torch.device("meta"):
        unet_config = dict(network().config)
    num_images = plan.per_device * plan.accumulation * total_steps
    speed = agree(
        partial(
            choose_speed,
            unet_config,
            config,
            state.device,
            batch_size=plan.per_device,
            num_images=num_images,
        )
    )
    if speed.measured:
        state.print(speed.describe())
    config.mixed_precision, config.memory_format = speed.mixed_precision, speed.memory_format
    config.compile = "yes" if speed.compile else "no"


class Learner(NamedTuple):
    """What learns: the network, wrapped for its processes, the optimiser, the schedule."""

    unet: torch.nn.Module
    optimizer: Any
    lr_scheduler: Any


def build_learner(
    config: TrainingConfig,
    network: Callable[[], UNet2DModel],
    accelerator: Accelerator,
    total_steps: int,
    weights: dict[str, Tensor] | None = None,
) -> Learner:
    """The network with the seed's weights, as the settings of speed and memory ask for it.

    `weights` takes the place of the seed's.

    Raises:
        InputError: they are those of another network.
    """
    torch.manual_seed(config.seed)
    unet = network()
    if weights is not None:
        load_weights(unet, weights, config.init_from)
    unet.to(accelerator.device, memory_format=LAYOUTS[config.memory_format])
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.compile == "yes":
        unet.compile()
    optimizer = build_optimizer(unet, config)
    # Neither the data nor the schedule is prepared: accelerate would replay epoch 0 and tick once
    # per process.
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
    )
    return Learner(*prepare(accelerator, unet, optimizer), lr_scheduler)


def load_weights(unet: UNet2DModel, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights into a network. Raises InputError where they are those of another one."""
    own = unet.state_dict()
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if wrong:
        raise InputError(
            f"the weights of {source!r} do not fit this network, in {wrong[0]!r} and "
            f"{len(wrong) - 1} more: the number of classes or channels, or the variance, is another"
        )
    unet.load_state_dict(weights)


def prepare(
    accelerator: Accelerator, unet: UNet2DModel, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, Any]:
    """Accelerate's wrappers; on a CPU, where it ignores FSDP, torch's own sharding."""
    if not wants_fsdp():
        return accelerator.prepare(unet, optimizer)
    if accelerator.device.type != "cpu":
        if not accelerator.is_fsdp2:
            raise InputError(
                f"FSDP2 was asked for, and accelerate runs {accelerator.distributed_type.value}: "
                "set distributed_type: FSDP in the launcher's file"
            )
        return accelerator.prepare(unet, optimizer)
    from torch.distributed.fsdp import fully_shard

    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        fully_shard(block)
    fully_shard(unet)
    optimizer.param_groups[0]["params"] = list(unet.parameters())
    return unet, accelerator.prepare(optimizer)
