"""Optimiser: which parameters learn how."""

import torch

from .config import TrainingConfig


def build_optimizer(unet: torch.nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Adam, AdamW, or Muon on the hidden convolutions and AdamW on the rest (Jordan et al. 2024).

    Adam and AdamW are torch's fused ones where the device has them.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    adamw = dict(
        lr=config.learning_rate,
        betas=betas,
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    if config.optimizer != "muon":
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        device = next(unet.parameters()).device.type
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
    optimizer.defaults.setdefault("lr", config.learning_rate)  # the polynomial schedule reads it
    return optimizer
