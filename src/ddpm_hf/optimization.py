"""Optimiser: which parameters learn how."""

import torch
from torch import Tensor

from .config import TrainingConfig


def build_optimizer(unet: torch.nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Adam, AdamW, or Muon on the hidden convolutions and AdamW on the rest (Jordan et al. 2024).

    Adam and AdamW are torch's fused ones where the device has them. Muon's iterations run in bf16
    on a GPU and in fp32 on a CPU.
    """
    device = next(unet.parameters()).device.type
    betas = (config.adam_beta1, config.adam_beta2)
    adamw = dict(
        lr=config.learning_rate,
        betas=betas,
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    if config.optimizer != "muon":
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        return kind(unet.parameters(), **adamw, fused=device in ("cpu", "cuda"))
    from pytorch_optimizer import Muon

    hidden, rest = [], []
    for name, parameter in unet.named_parameters():
        is_hidden = parameter.ndim == 4 and not name.startswith(("conv_in.", "conv_out."))
        (hidden if is_hidden else rest).append(parameter)
    muon = dict(lr=config.muon_learning_rate, momentum=config.muon_momentum)
    optimizer = Muon(
        [dict(params=hidden, use_muon=True, **muon), dict(params=rest, use_muon=False, **adamw)]
    )
    if device == "cpu":
        optimizer._orthogonalize = orthogonalize_in_fp32
    optimizer.defaults.setdefault("lr", config.learning_rate)  # the polynomial schedule reads it
    return optimizer


def orthogonalize_in_fp32(group: dict, updates: list[Tensor]) -> list[Tensor]:
    """Muon's Newton-Schulz iterations, in place of the library's own in bf16.

    On a CPU without bf16 instructions those took 40 % of a step of the default job: docs/log.md.

    Args:
        group: The optimiser's parameter group.
        updates: Momentum of kernels of one shape, each (C_out, C_in, H, W).

    Returns:
        The nearest semi-orthogonal matrices, (C_out, C_in H W).
    """
    from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5

    matrices = torch.stack([update.flatten(1) for update in updates]).float()
    return list(
        zero_power_via_newton_schulz_5(
            matrices,
            num_steps=group["ns_steps"],
            weights=group["ns_coeffs"],
            dtype=torch.float32,
        )
    )
