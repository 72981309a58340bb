"""What `encode`, `decode` and `denoise_image` miss: images by number of steps, and noise by its level.

    python benchmarks/inversion.py --pipeline out/fashion-quick --images embedded --output inversion

Reconstruction: the root mean square, over all pixels, of decode(encode(image)) - image, in grey levels of
255; with 1 iteration a step, the plain inversion, and with those of the default. Noise: the ratio of the
level that `denoise_image` estimates to that of the noise which was added, its mean and standard deviation
over the images; for float images, and for bytes, whose noise is cut off at black and white.
The images are spread over the set's test or validation split, or over all of it where it has neither, and
should not have been trained on. Writes benchmarks/results/OUTPUT.json, a row a measurement, as each ends.
"""  # noqa: E501

import argparse
import inspect
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import save_report, start_report
from sampling import identity
from torch import Tensor

from ddpm_hf import DDPMPipeline, TrainingConfig
from ddpm_hf.data import load_images
from ddpm_hf.images import to_network
from ddpm_hf.sampling import load_pipeline
from ddpm_hf.sources import find_held_out_split

BATCH = 50
ITERATIONS = inspect.signature(DDPMPipeline.encode).parameters["iterations"].default


def held_out(pipe: DDPMPipeline, name: str, count: int) -> tuple[Tensor, str]:
    """So many images of a set, (B, C, H, W) in [-1, 1], and the split that they are of."""
    channels, height, width = pipe.image_shape
    config = TrainingConfig(
        dataset_name=name,
        resolution=f"{height}x{width}",
        image_mode={1: "L", 3: "RGB"}[channels],
        center_crop=True,
        optimizer="adamw",
        logger="none",
    )
    config = replace(config, split=find_held_out_split(config) or "train")
    images = load_images(config)
    places = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    return to_network(images.centred(places)), config.split


def reconstruction(pipe: DDPMPipeline, images: Tensor, steps: int, iterations: int) -> dict:
    """A row: how far decoding misses the images that were encoded."""
    squares = 0.0
    for x_0 in images.split(BATCH):
        latents = pipe.encode(x_0, steps, iterations=iterations)
        missed = pipe.decode(latents, steps).cpu() - x_0
        squares += float((missed.double() ** 2).sum())
    rmse = 127.5 * (squares / images.numel()) ** 0.5
    row = {"what": "reconstruction", "steps": steps, "iterations": iterations}
    return row | {"rmse": round(rmse, 3)}


def noise_level(pipe: DDPMPipeline, images: Tensor, level: float, pixels: str) -> dict:
    """A row: how the estimated noise compares with what was added."""
    ratios = []
    for i, x_0 in enumerate(images.split(1)):
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(i))
        noisy = x_0 + level / 127.5 * eps
        if pixels == "uint8":
            noisy = ((noisy + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        # The level is known before the image is sampled: one step is enough.
        made = pipe.denoise_image(noisy, num_inference_steps=1, output_type="pt")
        ratios.append(made.noise_level / level)
    row = {"what": "noise", "noise_level": level, "pixels": pixels}
    return row | {
        "mean_ratio": round(float(np.mean(ratios)), 3),
        "std_ratio": round(float(np.std(ratios)), 3),
    }


def rows(pipe: DDPMPipeline, images: Tensor, steps: list[int], levels: list[float]) -> Iterator:
    """Every measurement, one after the other."""
    for count in steps:
        for iterations in (1, ITERATIONS):
            yield reconstruction(pipe, images, count, iterations)
    for level in levels:
        for pixels in ("float", "uint8"):
            yield noise_level(pipe, images, level, pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", required=True, help="Folder of a pipeline without classes.")
    parser.add_argument("--images", default="embedded", help="A parquet file, or `embedded`.")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="*", default=[10, 25, 50, 100, 250])
    parser.add_argument("--noise_levels", type=float, nargs="*", default=[5, 10, 25, 50, 100])
    parser.add_argument("--output", required=True, help="Name of the file in results/.")
    args = parser.parse_args()
    pipe = load_pipeline(args.pipeline)
    if pipe.num_classes:
        parser.error("choose a pipeline without classes")
    pipe.set_progress_bar_config(disable=True)
    images, split = held_out(pipe, args.images, args.num_images)
    args.num_images = len(images)
    paths = [Path(name) for name in (args.pipeline, args.images) if Path(name).exists()]
    report = start_report("what inversion misses, and estimates of noise", *paths)
    report |= identity(args) | {
        "images": Path(args.images).name,
        "split": split,
        "calibrated": pipe.process.analytic is not None,
    }
    started = time.perf_counter()
    for row in rows(pipe, images, args.steps, args.noise_levels):
        row["seconds"] = round(time.perf_counter() - started, 1)
        report["rows"].append(row)
        save_report(report, args.output)
        print(json.dumps(row), flush=True)
        started = time.perf_counter()


if __name__ == "__main__":
    main()
