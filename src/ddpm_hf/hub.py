"""The model card that a trained model gets, from the template `model_card.md`."""

from dataclasses import asdict
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from . import __version__
from .config import EMBEDDED, TrainingConfig

TAGS = ["unconditional-image-generation", "ddpm", "ddpm_hf"]


def card_template() -> Path:
    """The template: in an installed package beside this file, in a checkout at its top."""
    inside = Path(__file__).parent / "model_card.md"
    return inside if inside.is_file() else Path(__file__).parents[2] / "model_card.md"


def write_card(
    config: TrainingConfig,
    *,
    step: int,
    loss: float | None,
    parameters: int,
    channels: int,
    num_images: int | None,
    global_batch_size: int,
) -> Path:
    """Write README.md, the model card, into the folder of a run.

    Args:
        config: The run's settings.
        step: Optimiser steps done.
        loss: The last training loss that was logged, if it is known.
        parameters: Parameters of the network.
        channels: 1 for grey, 3 for RGB.
        num_images: Images in the training set, if that is known.
        global_batch_size: Images per optimiser step.
    """
    name, embedded = config.dataset_name, config.dataset_name == EMBEDDED
    on_hub = bool(name) and not embedded and name.count("/") == 1 and not Path(name).exists()
    height, width = config.image_size
    data_name = "Fashion-MNIST (MIT licence, Zalando SE)" if embedded else "a local image set"
    card = ModelCard.from_template(
        ModelCardData(
            library_name="diffusers",
            pipeline_tag="unconditional-image-generation",
            license="mit" if embedded else None,
            datasets=[name] if on_hub else None,
            tags=TAGS,
        ),
        template_path=str(card_template()),
        model_name=config.run_dir.resolve().name,
        repo=config.run_dir.resolve().name,
        version=__version__,
        settings=asdict(config),
        data_name=f"[{name}](https://huggingface.co/datasets/{name})" if on_hub else data_name,
        height=height,
        width=width,
        channels=channels,
        parameters=parameters,
        num_images=num_images,
        step=step,
        global_batch_size=global_batch_size,
        loss=loss,
    )
    path = config.run_dir / "README.md"
    card.save(path)
    return path
