"""The bound over a set of images: the pass that `evaluate` and `calibrate` share; and `calibrate`.

Every process adds up the sums of its images, and the sums are added.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .calibration import (
    check_steps,
    estimate_mean_square_eps,
    estimate_x_0_variance,
    forget,
    store,
)
from .card import read_config, write_card
from .checkpoint import CONFIG, write_text
from .config import TrainingConfig
from .data import check_sizes, decode_all
from .devices import in_turn, on_main, start_processes
from .errors import InputError, check_choice, check_whole
from .hub import files_beside
from .images import ImageSet, to_network
from .likelihood import BoundSums, Strata, bits_per_dim, noise_for
from .loading import component_folder
from .pipeline import DDPMPipeline
from .sampling import load_pipeline
from .sources import open_dataset


class Calibrated(NamedTuple):
    """What `calibrate` left.

    Attributes:
        output_dir: The calibrated pipeline.
        num_images: Images measured.
        standard_error: The largest over the timesteps, of E|eps_hat|**2 / D and of
            E|x_0 - x_0_hat|**2 / D.
        timesteps: The optimal timesteps stored, descending, by their number.
    """

    output_dir: Path
    num_images: int
    standard_error: float
    timesteps: dict[str, list[int]]


def calibrate(
    pipeline: str,
    dataset_name: str,
    *,
    split: str | None = None,
    num_images: int = 2000,
    timesteps: int | None = None,
    steps: Sequence[int] = (),
    batch_size: int = 64,
    seed: int = 0,
    fit: bool = False,
    output: str | Path | None = None,
    **columns: str | None,
) -> Calibrated:
    """Bao et al. 2022: measure what optimal variances need, and store it with the scheduler.

    Sampling in fewer steps than T then takes the optimal variance, and for the K in `steps` the
    optimal timesteps too. No weight changes.

    Args:
        timesteps: So many timesteps of each image: a timestep is measured on timesteps *
            num_images / T images, spread over the set; 100, or all of fewer, when not given.
        steps: The K whose optimal timesteps are stored.
        output: Folder of the calibrated pipeline; a local folder is calibrated in place when not
            given.
        pipeline, dataset_name, num_images, batch_size, seed, fit, columns: As in `evaluate`.
        split: Of the data set; `train` when not given.

    Raises:
        InputError: as in `evaluate`; or a pipeline of the Hub without `output`.
    """
    check_numbers(batch_size, seed, num_images)
    config, pipe = prepare(pipeline, dataset_name, split or "train", columns)
    forget(pipe.scheduler)
    scheduler = pipe.process
    num_timesteps = len(scheduler.beta)
    check_steps(steps, num_timesteps)
    count = min(100, num_timesteps) if timesteps is None else timesteps
    strata = Strata.split(num_timesteps, count, power=1)
    if output is None and not Path(pipeline).is_dir():
        raise InputError(f"{pipeline!r} is not a folder: name one for the result with output")
    images = in_turn(PartialState(), partial(load, config, pipe, num_images, fit))
    _check_visits(len(images), strata, seed)
    folder = on_main(partial(output_folder, pipeline, output))
    sums = measure(pipe, images, strata, batch_size, seed, "Calibrating")
    estimate, around = estimate_mean_square_eps(sums), estimate_x_0_variance(sums)
    store(
        scheduler,
        estimate,
        x_0_variance=around,
        steps=steps,
        dataset=Path(dataset_name).name if Path(dataset_name).exists() else dataset_name,
        split=split_name(config, split),
        num_images=sums.num_images,
        seed=seed,
    )
    pipe.scheduler.register_to_config(_ddpm_hf=scheduler.extras)

    def write() -> None:
        if output is None:
            where = component_folder(folder, "scheduler")
            write_text(where / "scheduler_config.json", pipe.scheduler.to_json_string())
        else:
            _save_beside(pipe, Path(pipeline), folder)
        renew_card(folder)

    on_main(write)
    largest = float(torch.maximum(estimate.standard_error, around.standard_error).max())
    return Calibrated(folder, sums.num_images, largest, scheduler.analytic["timesteps"])


# What is asked for, before anything is measured


def check_numbers(batch_size: int, seed: int, num_images: int | None) -> None:
    """Raise InputError for what are no whole numbers, or out of range."""
    check_whole("batch_size", batch_size)
    check_whole("seed", seed, 0)
    if num_images is not None:
        check_whole("num_images", num_images)


def _check_visits(num_images: int, strata: Strata, seed: int) -> None:
    """Raise InputError where a timestep is not visited twice, as its error asks for."""

    def enough(count: int) -> bool:
        drawn = strata.draw(seed, np.arange(count)).flatten()
        visits = torch.bincount(drawn, minlength=int(strata.size.sum()))
        return bool(visits.min() >= 2)

    largest = int(strata.size.max())
    if num_images >= 4 * largest or enough(num_images):  # evenly drawn: 3 are enough
        return
    wanted = next(count for count in range(2 * largest, 5 * largest) if enough(count))
    raise InputError(
        f"every timestep needs two images or more, and {num_images} images at "
        f"{len(strata.size)} timesteps each leave some with less: use num_images of {wanted} or "
        "more, or more timesteps"
    )


# The pipeline, the images, and the pass over them


def prepare(
    pipeline: str, dataset_name: str, split: str, columns: dict[str, Any]
) -> tuple[TrainingConfig, DDPMPipeline]:
    """The pipeline on this process's device, and the settings that load images for it."""
    allowed = (
        "dataset_config_name", "image_column", "label_column", "cache_dir", "background",
        "corrupt_images",
    )  # fmt: skip
    for name in columns:
        if name not in allowed:
            raise InputError(f"{name} is no setting of the images: {', '.join(allowed)} are")
    if columns.get("background") is None:
        trained = read_config(Path(pipeline) / CONFIG) or {}
        columns = columns | {"background": trained.get("background", "white")}
    check_choice("corrupt_images", columns.setdefault("corrupt_images", "raise"), ["raise", "skip"])
    # Processes first: they choose the device.
    config = TrainingConfig(
        dataset_name=dataset_name,
        split=split,
        model_config_name_or_path=pipeline,
        class_conditional=columns.get("label_column") is not None,
        center_crop=True,
        optimizer="adamw",
        logger="none",
        **columns,
    )
    processes = start_processes(config, anew=False)
    pipe = in_turn(processes, partial(load_pipeline, pipeline)).to(processes.device)
    pipe.set_progress_bar_config(disable=True)
    channels, height, width = pipe.image_shape
    if channels not in (1, 3):
        raise InputError(
            f"the bound is of grey or RGB images; this network has {channels} channels"
        )
    config.resolution = f"{height}x{width}"
    if columns.get("label_column") and not pipe.num_classes:
        raise InputError(
            f"label_column={columns['label_column']!r} has no effect: {pipeline!r} has no classes"
        )
    config.class_conditional = pipe.unet.config.num_class_embeds is not None
    return config, pipe


def load(config: TrainingConfig, pipe: DDPMPipeline, num_images: int | None, fit: bool) -> ImageSet:
    """The images to measure on. Raises InputError for those that do not fit the network."""
    source = open_dataset(config)
    if num_images is not None and num_images < len(source):
        source = source.select(np.linspace(0, len(source) - 1, num_images).round().astype(int))
    channels = pipe.image_shape[0]
    if fit:
        config.image_mode = {1: "L", 3: "RGB"}[channels]
    else:
        check_sizes(source, config)
    images = decode_all(source, config)
    if images.channels != channels:
        kinds = {1: "grey", 3: "RGB"}
        raise InputError(
            f"the images are {kinds[images.channels]} and the network's are {kinds[channels]}: "
            "choose another set, or convert them with --fit"
        )
    if images.deep:
        raise InputError("the images have more than 8 bits; the bound is that of 256 grey levels")
    names = pipe.scheduler.config.get("_ddpm_hf", {}).get("class_names")
    if images.num_classes is not None:
        known = pipe.num_classes
        if images.num_classes > known or (names and images.class_names not in (None, list(names))):
            raise InputError(
                f"the set's classes are {images.class_names or images.num_classes}, and the "
                f"network's are {names or known}: name another column with --label_column"
            )
    return images


def measure(
    pipe: DDPMPipeline, images: ImageSet, strata: Strata, batch_size: int, seed: int, what: str
) -> BoundSums:
    """The sums over all images, each process its share of the batches; the same on every one.

    Raises:
        InputError: that of any process, on every process, so that none waits for it.
    """
    processes, problem = PartialState(), None
    sums = BoundSums.zeros(len(pipe.process.beta))
    firsts = range(0, len(images), batch_size)[processes.process_index :: processes.num_processes]
    hidden = not processes.is_main_process
    try:
        with tqdm(total=len(firsts) * len(strata.size), desc=what, disable=hidden) as bar:
            for first in firsts:
                positions = np.arange(first, min(first + batch_size, len(images)))
                x_0 = to_network(images.centred(positions)).to(processes.device)
                network = network_of(pipe, images.labels(positions), bar.update)
                noise, t = noise_for(seed, positions, x_0.shape[1:]), strata.draw(seed, positions)
                bound = bits_per_dim(network, pipe.process, x_0, noise, strata=strata, t=t)
                sums.add(bound)
                bar.set_postfix_str(f"{sums.total_bpd:.4f} bits/dim")
    except InputError as error:
        problem = error
    found = gather_object([problem or sums])
    for error in found:
        if isinstance(error, InputError):
            raise error
    return sum(found[1:], found[0])


def network_of(
    pipe: DDPMPipeline, labels: np.ndarray | None, tick: Callable[[], Any] = lambda: None
) -> Callable:
    """The pipeline's network as a function of (x_t, t), for images of these classes."""
    known = {}
    if labels is not None:
        known["class_labels"] = torch.from_numpy(labels).to(pipe.device)

    def network(x_t: torch.Tensor, t: torch.Tensor) -> Any:
        tick()
        return pipe.unet(x_t, t, **known)

    return network


# What is written


def _save_beside(pipe: DDPMPipeline, origin: Path, folder: Path) -> None:
    """Save a pipeline into another folder, with what is known of it where it was loaded from."""
    pipe.save_pretrained(folder)
    for path in [*files_beside(origin), *origin.glob("README.md")]:
        target = folder / path.relative_to(origin)
        if not target.exists():  # a person's card, or what was measured before
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def output_folder(pipeline: str, output: str | Path | None) -> Path | None:
    """Where to write: `output`, or the pipeline's own folder, or nowhere for one of the Hub.

    Raises:
        InputError: `output` is a file, or another pipeline's folder, or nothing can be written.
    """
    if output is not None and Path(output).is_file():
        raise InputError(f"output {output} is a file: name a folder")
    elsewhere = output is not None and Path(output).resolve() != Path(pipeline).resolve()
    if elsewhere and (Path(output) / "model_index.json").is_file():
        raise InputError(f"output {output} holds another pipeline: name another folder")
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
    elif not Path(pipeline).is_dir():
        return None
    folder = Path(pipeline if output is None else output)
    try:
        with TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(
            f"cannot write into {folder} ({error.strerror}): name another folder as output"
        ) from error


def split_name(config: TrainingConfig, asked: str | None) -> str:
    """The split to name beside a number; a single file has one, which `datasets` calls train."""
    return "all" if asked is None and Path(config.dataset_name).is_file() else config.split


def renew_card(folder: Path) -> None:
    """Let the card say what is new, where a pipeline has one."""
    if (folder / "README.md").is_file() and (folder / "model_index.json").is_file():
        write_card(folder)
