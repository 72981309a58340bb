"""`evaluate`: how well a model codes a set of images, and the files that show it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState

from .bound import (
    check_numbers,
    load,
    measure,
    network_of,
    output_folder,
    prepare,
    renew_card,
    split_name,
)
from .card import dataset_of
from .checkpoint import write_text
from .config import TrainingConfig
from .devices import in_turn, on_main
from .errors import InputError
from .images import ImageSet, to_network
from .inversion import noise_of_timestep
from .likelihood import BoundSums, RateDistortion, Strata, noise_for, rate_distortion, vlb_terms
from .pictures import save_image_grid
from .pipeline import DDPMPipeline
from .results import Result, add_results, read_record, read_results
from .sources import find_held_out_split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRIP_IMAGES = 8
STRIP_TIMES = (1.0, 0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.05, 0.0)
"""Timesteps, in shares of T, whose x_0_hat the strips show."""

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
        columns: dataset_config_name, image_column, label_column, cache_dir, corrupt_images and
            background, as in `TrainingConfig`; the background is that of the run when not given.

    Raises:
        InputError: a pipeline or a set that cannot be loaded, images that do not fit the network,
            or a number out of range.
    """
    check_numbers(batch_size, seed, num_images)
    config, pipe = prepare(pipeline, dataset_name, split or "train", columns)
    if split is None:
        held_out = in_turn(PartialState(), partial(find_held_out_split, config))
        config.split = held_out or config.split
    _ = pipe.process.analytic  # statistics that cannot be sampled with are said now
    strata = Strata.split(len(pipe.process.beta), timesteps)
    shown = _strip_timesteps(len(pipe.process.beta), strip_timesteps)
    images = in_turn(PartialState(), partial(load, config, pipe, num_images, fit))
    folder = on_main(partial(output_folder, pipeline, output))
    trained = read_record(Path(pipeline))
    if folder:
        read_results(folder)  # what cannot be read is said before the measurement
    sums = measure(pipe, images, strata, batch_size, seed, "Measuring the bound")
    result = _evaluation(sums, rate_distortion(sums, strata), folder)

    def write() -> None:
        about = _about(pipe, config, result, strata, seed, fit)
        about["split"] = split_name(config, split)
        step = None if trained is None else trained.step
        try:
            _write(folder, result, about, step, len(pipe.process.beta))
            _write_reconstructions(folder / "reconstructions.png", pipe, images, shown, seed)
            _write_shared_latents(folder / "shared_latents.png", pipe, images, seed)
            renew_card(folder)
        except OSError as error:
            raise InputError(
                f"cannot write into {folder}: {error}. Measured: {result.bits_per_dim:.4f} "
                f"bits/dim, standard error {result.standard_error:.4f}, rate {result.rate_bpd:.4f}"
            ) from error

    if folder:
        on_main(write)
    return result


def _strip_timesteps(num_timesteps: int, wanted: Sequence[int] | None) -> list[int]:
    """The timesteps of the reconstructions, as asked for or by STRIP_TIMES, descending."""
    if wanted is None:
        return [round(share * (num_timesteps - 1)) for share in STRIP_TIMES]
    whole = all(isinstance(t, Integral) for t in wanted)
    if not wanted or not whole or not all(0 <= t < num_timesteps for t in wanted):
        raise InputError(
            f"strip_timesteps must be timesteps from 0 to {num_timesteps - 1}; got {list(wanted)}"
        )
    return sorted(set(wanted), reverse=True)


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


# What is written


def _about(
    pipe: DDPMPipeline,
    config: TrainingConfig,
    result: Evaluation,
    strata: Strata,
    seed: int,
    fit: bool,
) -> dict[str, Any]:
    """What belongs to each number: on which images, and how."""
    total, used = len(pipe.process.beta), len(strata.size)
    which = (
        f"all {total} timesteps" if used == total else f"{used} of {total} timesteps, stratified"
    )
    how = [f"variational bound, {which}", pipe.process.config.variance_type]
    if config.dataset_config_name:
        how.append(f"configuration {config.dataset_config_name}")
    if config.label_column:
        how.append(f"given the {config.label_column}")
    if fit:
        how.append("images resized to fit")
    if config.background != "white":
        how.append(f"transparent images on {config.background}")
    name = config.dataset_name
    named = dataset_of({"dataset_name": name})["name"]
    return dict(
        dataset=Path(name).name if Path(name).exists() else named,
        split=config.split,
        num_images=result.num_images,
        protocol=", ".join(how),
        seed=seed,
    )


def _write(
    folder: Path, result: Evaluation, about: dict[str, Any], step: int | None, num_timesteps: int
) -> None:
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
    figure = plot_rate_distortion(result.curve, num_timesteps)
    figure.savefig(folder / "rate_distortion.png", dpi=120)


def table(curve: RateDistortion) -> str:
    """Table 4: rate and distortion at some timesteps, from the noise on."""
    last = float(curve.t[0])
    rows = [(curve.t - share * last).abs().argmin().item() for share in TABLE_TIMES]
    lines = [f"{'t':>7}  {'rate, bits/dim':>15}  {'RMSE of 255':>12}"]
    for row in dict.fromkeys(rows):
        t, rate, rmse = (float(column[row]) for column in curve)
        lines.append(f"{t:7g}  {rate:15.5f}  {rmse:12.2f}")
    return "\n".join(lines)


def plot_rate_distortion(curve: RateDistortion, num_timesteps: int) -> Figure:
    """Fig. 5: distortion and rate along the T reverse steps, and one against the other."""
    from matplotlib.figure import Figure

    t, rate, rmse = (column.numpy() for column in curve)
    done = num_timesteps - 1 - t
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    distortion, bits, both = figure.subplots(1, 3)
    distortion.plot(done, rmse)
    distortion.set(xlabel="reverse steps done", ylabel="distortion (RMSE, 0 to 255)")
    bits.plot(done, rate)
    bits.set(xlabel="reverse steps done", ylabel="rate (bits/dim)")
    both.plot(rate, rmse)
    both.set(xlabel="rate (bits/dim)", ylabel="distortion (RMSE, 0 to 255)")
    for axes in (distortion, bits, both):
        axes.grid(alpha=0.3)
    return figure


def _strip_images(
    pipe: DDPMPipeline, images: ImageSet, count: int
) -> tuple[torch.Tensor, np.ndarray, np.ndarray | None]:
    """At most `count` images over the set, (B, C, H, W), their positions and classes."""
    positions = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    x_0 = to_network(images.centred(positions)).to(pipe.device)
    return x_0, positions, images.labels(positions)


def _write_reconstructions(
    path: Path, pipe: DDPMPipeline, images: ImageSet, timesteps: list[int], seed: int
) -> None:
    """Like Fig. 6, of real images: x_0_hat from x_t with ever less noise, and the image."""
    x_0, positions, labels = _strip_images(pipe, images, STRIP_IMAGES)
    times = [torch.full((len(x_0),), t) for t in timesteps]
    noise = noise_for(seed, positions, x_0.shape[1:])
    terms = vlb_terms(network_of(pipe, labels), pipe.process, x_0, times, noise)
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
                num_inference_steps=min(SHARED_STEPS, len(pipe.process.beta)),
                generator=torch.Generator().manual_seed(seed),
                class_label=None if labels is None else int(labels[row]),
                output_type="pt",
            )
            rows.append(samples.images.cpu() * 2 - 1)
        rows.append(image.cpu())
    columns = len(SHARED_TIMES) * SHARED_SAMPLES + 1
    save_image_grid(torch.cat(rows), path, columns=columns)
