"""The bound over a set of images: how well a model codes it, and what calibrates its sampling.

`evaluate` and `calibrate` share one pass, over any number of processes: each adds up the sums of
its images, and the sums are added.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
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
from .card import dataset_of, write_card
from .checkpoint import write_text
from .config import TrainingConfig
from .data import ImageSet, check_sizes, decode_all, to_network
from .devices import on_main, start_processes
from .errors import InputError
from .inversion import noise_of_timestep
from .likelihood import (
    BoundSums,
    RateDistortion,
    Strata,
    bits_per_dim,
    noise_for,
    rate_distortion,
    vlb_terms,
)
from .pipeline import DDPMPipeline, save_image_grid
from .results import Result, add_results, read_record
from .run import in_turn
from .sampling import load_pipeline
from .sources import find_held_out_split, open_dataset

STRIP_IMAGES = 8
STRIP_TIMES = (1.0, 0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.05, 0.0)
"""Timesteps, in shares of T, whose x_0_hat the strips show (Fig. 6)."""

SHARED_IMAGES, SHARED_SAMPLES, SHARED_STEPS, SHARED_TIMES = 2, 3, 25, (0.9, 0.75, 0.5, 0.25)
"""Of the picture after Fig. 7: images, samples of each, steps from pure noise, and the timesteps
that the samples share, in shares of T."""

TABLE_TIMES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.0)
"""Timesteps, in shares of T, of the printed table (Table 4)."""


class Evaluation(NamedTuple):
    """What `evaluate` measured.

    Attributes:
        bits_per_dim: The bound's mean over the images.
        standard_error: Of it, over images, with the noise and the timesteps of each.
        interval: 95 %, bits_per_dim +- 1.96 standard errors.
        rate_bpd, distortion_bpd: Its two parts: all but L_0, and L_0.
        distortion_rmse: Of the last x_0_hat, on the scale of 0 to 255.
        num_images: Images measured.
        curve: Rate and distortion along the reverse process.
        output_dir: Where results.json, rate_distortion.json and .png, reconstructions.png and
            shared_latents.png are; None where there was no folder to write to.
    """

    bits_per_dim: float
    standard_error: float
    interval: tuple[float, float]
    rate_bpd: float
    distortion_bpd: float
    distortion_rmse: float
    num_images: int
    curve: RateDistortion
    output_dir: Path | None


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


def evaluate(
    pipeline: str,
    dataset_name: str,
    *,
    split: str | None = None,
    num_images: int | None = None,
    timesteps: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    fit: bool = False,
    strip_timesteps: Sequence[int] | None = None,
    output: str | Path | None = None,
    **columns: str | None,
) -> Evaluation:
    """Eqs. (5), (13): the bound on the negative log-likelihood of a set, in bits per dimension.

    Args:
        pipeline: Hub id, or folder of a run.
        dataset_name: The images, as `TrainingConfig.dataset_name`.
        split: Of the data set; its test or validation split when not given, or else `train`.
        num_images: So many images spread over it; all when not given.
        timesteps: So many timesteps an image, drawn from shares of [0, T), in place of all T: an
            unbiased estimate, whose standard error says what that costs.
        batch_size: Images at once.
        seed: Of the noise, and of the timesteps.
        fit: Resize, crop and convert the images as training does; without it they have to be of
            the network's size and channels.
        strip_timesteps: Of the reconstructions; nine over the chain when not given.
        output: Folder to write to; the pipeline's own when not given.
        columns: dataset_config_name, image_column, label_column and cache_dir, as in
            `TrainingConfig`.

    Raises:
        InputError: a pipeline or a set that cannot be loaded, images that do not fit the network,
            or a number out of range.
    """
    _check_numbers(batch_size, seed, num_images)
    config, pipe = _prepare(pipeline, dataset_name, split or "train", columns)
    if split is None:
        held_out = in_turn(PartialState(), partial(find_held_out_split, config))
        config.split = held_out or config.split
    _ = pipe.process.analytic  # statistics that cannot be sampled with are said now
    strata = Strata.split(len(pipe.process.beta), timesteps)
    shown = _strip_timesteps(len(pipe.process.beta), strip_timesteps)
    images = in_turn(PartialState(), partial(_load, config, pipe, num_images, fit))
    folder = on_main(partial(_folder, pipeline, output))
    sums = _measure(pipe, images, strata, batch_size, seed, "Measuring the bound")
    result = _evaluation(sums, rate_distortion(sums, strata), folder)

    def write() -> None:
        trained = read_record(Path(pipeline))
        about = _about(pipe, config, result, strata, seed)
        about["split"] = _split_name(config, split)
        _write(folder, result, about, None if trained is None else trained.step)
        _write_reconstructions(folder / "reconstructions.png", pipe, images, shown, seed)
        _write_shared_latents(folder / "shared_latents.png", pipe, images, seed)
        _renew_card(folder)

    if folder:
        on_main(write)
    return result


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
    _check_numbers(batch_size, seed, num_images)
    config, pipe = _prepare(pipeline, dataset_name, split or "train", columns)
    forget(pipe.scheduler)
    scheduler = pipe.process
    num_timesteps = len(scheduler.beta)
    check_steps(steps, num_timesteps)
    count = min(100, num_timesteps) if timesteps is None else timesteps
    strata = Strata.split(num_timesteps, count, power=1)
    if output is None and not Path(pipeline).is_dir():
        raise InputError(f"{pipeline!r} is not a folder: name one for the result with output")
    images = in_turn(PartialState(), partial(_load, config, pipe, num_images, fit))
    _check_visits(len(images), strata)
    folder = on_main(partial(_folder, pipeline, output))
    sums = _measure(pipe, images, strata, batch_size, seed, "Calibrating")
    estimate, around = estimate_mean_square_eps(sums), estimate_x_0_variance(sums)
    store(
        scheduler,
        estimate,
        x_0_variance=around,
        steps=steps,
        dataset=Path(dataset_name).name if Path(dataset_name).exists() else dataset_name,
        split=_split_name(config, split),
        num_images=sums.num_images,
        seed=seed,
    )
    pipe.scheduler.register_to_config(_ddpm_hf=scheduler.extras)

    def write() -> None:
        _save(pipe, folder, in_place=output is None)
        _renew_card(folder)

    on_main(write)
    largest = float(torch.maximum(estimate.standard_error, around.standard_error).max())
    return Calibrated(folder, sums.num_images, largest, scheduler.analytic["timesteps"])


# What is asked for, before anything is measured


def _check_numbers(batch_size: int, seed: int, num_images: int | None) -> None:
    """Raise InputError for numbers out of range."""
    numbers = {"batch_size": (batch_size, 1), "seed": (seed, 0), "num_images": (num_images, 1)}
    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}; got {value}")


def _check_visits(num_images: int, strata: Strata) -> None:
    """Raise InputError where a timestep cannot be visited twice, as its error asks for."""
    largest = int(strata.size.max())
    if num_images < 2 * largest:
        raise InputError(
            f"every timestep needs two images or more, and {num_images} images at "
            f"{len(strata.size)} timesteps each leave some with less: use {2 * largest} images or "
            "more, or more timesteps of each"
        )


def _strip_timesteps(num_timesteps: int, wanted: Sequence[int] | None) -> list[int]:
    """The timesteps of the reconstructions, as asked for or by STRIP_TIMES, descending."""
    if wanted is None:
        return [round(share * (num_timesteps - 1)) for share in STRIP_TIMES]
    if not wanted or not all(0 <= t < num_timesteps for t in wanted):
        raise InputError(
            f"strip_timesteps must be timesteps from 0 to {num_timesteps - 1}; got {list(wanted)}"
        )
    return sorted(set(wanted), reverse=True)


def _split_name(config: TrainingConfig, asked: str | None) -> str:
    """The split to name beside a number; a single file has one, which `datasets` calls train."""
    return "all" if asked is None and Path(config.dataset_name).is_file() else config.split


# The pipeline, the images, and the pass over them


def _prepare(
    pipeline: str, dataset_name: str, split: str, columns: dict[str, Any]
) -> tuple[TrainingConfig, DDPMPipeline]:
    """The pipeline on this process's device, and the settings that load images for it."""
    allowed = ("dataset_config_name", "image_column", "label_column", "cache_dir")
    for name in columns:
        if name not in allowed:
            raise InputError(f"{name} is no setting of the images: {', '.join(allowed)} are")
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
    processes = start_processes(config)
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


def _load(
    config: TrainingConfig, pipe: DDPMPipeline, num_images: int | None, fit: bool
) -> ImageSet:
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


def _measure(
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
                x_0 = to_network(centred(images, positions)).to(processes.device)
                network = _network(pipe, images.labels(positions), bar.update)
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


def centred(images: ImageSet, positions: np.ndarray) -> torch.Tensor:
    """Images cropped at their centre, not flipped, (B, C, H, W)."""
    return images.gather(positions, np.full((len(positions), 3), 0.5), False)


def _network(
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


def _evaluation(sums: BoundSums, curve: RateDistortion, folder: Path | None) -> Evaluation:
    """What follows from the sums over all images."""
    bpd, error, rate = sums.total_bpd, sums.standard_error, float(curve.rate_bpd[-1])
    return Evaluation(
        bits_per_dim=bpd,
        standard_error=error,
        interval=(bpd - 1.96 * error, bpd + 1.96 * error),
        rate_bpd=rate,
        distortion_bpd=bpd - rate,
        distortion_rmse=float(curve.distortion_rmse[-1]),
        num_images=sums.num_images,
        curve=curve,
        output_dir=folder,
    )


def _save(pipe: DDPMPipeline, folder: Path, *, in_place: bool) -> None:
    """Write the scheduler's configuration alone, in one piece, or the whole pipeline."""
    if in_place:
        path = folder / "scheduler" / "scheduler_config.json"
        write_text(path, pipe.scheduler.to_json_string())
    else:
        pipe.save_pretrained(folder)


def _folder(pipeline: str, output: str | Path | None) -> Path | None:
    """Where to write: `output`, or the pipeline's own folder, or nowhere for one of the Hub."""
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        return Path(output)
    return Path(pipeline) if Path(pipeline).is_dir() else None


def _about(
    pipe: DDPMPipeline,
    config: TrainingConfig,
    result: Evaluation,
    strata: Strata,
    seed: int,
) -> dict[str, Any]:
    """What belongs to each number: on which images, and how."""
    total, used = len(pipe.process.beta), len(strata.size)
    which = (
        f"all {total} timesteps" if used == total else f"{used} of {total} timesteps, stratified"
    )
    name = config.dataset_name
    named = dataset_of({"dataset_name": name})["name"]
    return dict(
        dataset=Path(name).name if Path(name).exists() else named,
        split=config.split,
        num_images=result.num_images,
        protocol=f"variational bound, {which}, {pipe.process.config.variance_type}",
        seed=seed,
    )


def _renew_card(folder: Path) -> None:
    """Let the card say what is new, where a pipeline has one."""
    if (folder / "README.md").is_file() and (folder / "model_index.json").is_file():
        write_card(folder)


def _write(folder: Path, result: Evaluation, about: dict[str, Any], step: int | None) -> None:
    """results.json, rate_distortion.json and .png; `step` is how long the model was trained."""
    error = None if math.isnan(result.standard_error) else result.standard_error
    of = about | {"step": step}
    rows = [
        Result("bits_per_dim", result.bits_per_dim, "bits/dim", **of, standard_error=error),
        Result("rate", result.rate_bpd, "bits/dim", **of),
        Result("distortion", result.distortion_bpd, "bits/dim", **of),
        Result("distortion_rmse", result.distortion_rmse, "grey levels of 255", **of),
    ]
    add_results(folder, rows)
    columns = {name: column.tolist() for name, column in result.curve._asdict().items()}
    write_text(folder / "rate_distortion.json", json.dumps(about | columns, indent=2) + "\n")
    plot_rate_distortion(result.curve, folder / "rate_distortion.png")


def table(curve: RateDistortion) -> str:
    """Table 4: rate and distortion at some timesteps, from the noise on."""
    last = float(curve.t[0])
    rows = [(curve.t - share * last).abs().argmin().item() for share in TABLE_TIMES]
    lines = [f"{'t':>7}  {'rate, bits/dim':>15}  {'RMSE of 255':>12}"]
    for row in dict.fromkeys(rows):
        t, rate, rmse = (float(column[row]) for column in curve)
        lines.append(f"{t:7g}  {rate:15.5f}  {rmse:12.2f}")
    return "\n".join(lines)


def plot_rate_distortion(curve: RateDistortion, path: Path) -> None:
    """Fig. 5: distortion and rate along the reverse process, and one against the other."""
    from matplotlib.figure import Figure

    t, rate, rmse = (column.numpy() for column in curve)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    distortion, bits, both = figure.subplots(1, 3)
    distortion.plot(t.max() - t, rmse)
    distortion.set(xlabel="reverse steps done", ylabel="distortion (RMSE, 0 to 255)")
    bits.plot(t.max() - t, rate)
    bits.set(xlabel="reverse steps done", ylabel="rate (bits/dim)")
    both.plot(rate, rmse)
    both.set(xlabel="rate (bits/dim)", ylabel="distortion (RMSE, 0 to 255)")
    for axes in (distortion, bits, both):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _strip_images(
    pipe: DDPMPipeline, images: ImageSet, count: int
) -> tuple[torch.Tensor, np.ndarray, np.ndarray | None]:
    """At most `count` images over the set, (B, C, H, W), their positions and classes."""
    positions = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    x_0 = to_network(centred(images, positions)).to(pipe.device)
    return x_0, positions, images.labels(positions)


def _write_reconstructions(
    path: Path, pipe: DDPMPipeline, images: ImageSet, timesteps: list[int], seed: int
) -> None:
    """Fig. 6: a row an image, x_0_hat from x_t with ever less noise, and the image itself."""
    x_0, positions, labels = _strip_images(pipe, images, STRIP_IMAGES)
    times = [torch.full((len(x_0),), t) for t in timesteps]
    noise = noise_for(seed, positions, x_0.shape[1:])
    terms = vlb_terms(_network(pipe, labels), pipe.process, x_0, times, noise)
    strips = torch.stack([*(term.x_0_hat for term in terms), x_0], 1)
    save_image_grid(strips.flatten(0, 1), path, columns=strips.shape[1])


def _write_shared_latents(path: Path, pipe: DDPMPipeline, images: ImageSet, seed: int) -> None:
    """Fig. 7: a row an image; for ever less noise, samples that share x_t, and the image itself."""
    x_0, positions, labels = _strip_images(pipe, images, SHARED_IMAGES)
    noise = noise_for(seed, positions, x_0.shape[1:])
    rows = []
    for row, image in enumerate(x_0.split(1)):
        for share in SHARED_TIMES:
            t = round(share * (len(pipe.process.beta) - 1))
            level = noise_of_timestep(pipe.process, t)
            eps = noise(torch.full((len(x_0),), t))[row : row + 1].to(image)
            samples = pipe.denoise_image(
                image + level / 127.5 * eps,
                level,
                num_images=SHARED_SAMPLES,
                num_inference_steps=SHARED_STEPS,
                generator=torch.Generator().manual_seed(seed),
                class_label=None if labels is None else int(labels[row]),
                output_type="pt",
            )
            rows.append(samples.images * 2 - 1)
        rows.append(image.cpu())
    columns = len(SHARED_TIMES) * SHARED_SAMPLES + 1
    save_image_grid(torch.cat(rows), path, columns=columns)
