"""Train, measure, sample and share denoising diffusion models of images in the Hugging Face
ecosystem.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .bound import calibrate
    from .config import TrainingConfig
    from .evaluation import evaluate
    from .hub import push_to_hub
    from .pipeline import DDPMPipeline
    from .presets import PRESETS, build_scheduler, build_unet
    from .scheduler import DDPMScheduler
    from .training import train

# Name -> module: resolved on first use, so that `import ddpm_hf` costs nothing.
_WHERE = {
    "DDPMPipeline": "pipeline",
    "DDPMScheduler": "scheduler",
    "PRESETS": "presets",
    "TrainingConfig": "config",
    "build_scheduler": "presets",
    "build_unet": "presets",
    "push_to_hub": "hub",
    "calibrate": "bound",
    "evaluate": "evaluation",
    "train": "training",
}

__all__ = [
    "DDPMPipeline",
    "DDPMScheduler",
    "PRESETS",
    "TrainingConfig",
    "build_scheduler",
    "build_unet",
    "push_to_hub",
    "calibrate",
    "evaluate",
    "train",
]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
