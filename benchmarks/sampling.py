"""Quality by sampler and number of steps, from one checkpoint: FD by the yardstick.

    ddpm-hf train --recipe fashion-quick --dataset_name fashion_mnist_train.parquet --max_train_steps 3000 \
        --memory_format channels_last --output_dir out/fashion
    ddpm-hf calibrate out/fashion --dataset_name fashion_mnist_train.parquet --num_images 1000 --timesteps 60 \
        --steps 5 10 25 50 100
    python benchmarks/sampling.py --yardstick YARDSTICK.py --pipeline out/fashion --compile --output sampling \
        --steps 5 10 25 50 100
    python benchmarks/sampling.py --yardstick YARDSTICK.py --pipeline out/fashion --compile --output sampling-500 \
        --num_images 500 --steps 25 50 100
    python benchmarks/sampling.py --yardstick YARDSTICK.py --pipeline out/fashion --compile --output sampling-500 \
        --num_images 500 --steps 1000 --samplers fixed_small fixed_large

Every sampler gets the same noise to start from. Uniform timesteps are evenly spaced, trailing; optimal ones
are those that the calibration stored for that many steps. dpm++ (2M) and unipc are diffusers' own; ddim is
this package's, with the noise derived again from the clipped image, and ddim-stock diffusers'.
analytic-second-order takes unipc's steps and adds the calibrated noise.
Writes benchmarks/results/OUTPUT.json, a row a sampler and number of steps, as each ends; the same command
again goes on with those that are missing.
"""  # noqa: E501

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from common import HERE, NUM_IMAGES, measure_quality, save_report, start_report

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.sampling import load_pipeline

BATCH = 50
"""Images at once. From 64 on diffusers' upsampling undoes channels_last."""


class Sampler(NamedTuple):
    """A scheduler's class, settings of its configuration, options of the call, and whether it is
    measured with optimal timesteps too."""

    scheduler: type
    settings: dict[str, Any] = {}
    options: dict[str, Any] = {}
    optimal_too: bool = True


SAMPLERS = {
    "fixed_small": Sampler(
        DDPMScheduler, {"variance_type": "fixed_small"}, {"analytic": False}, False
    ),
    "fixed_large": Sampler(
        DDPMScheduler, {"variance_type": "fixed_large"}, {"analytic": False}, False
    ),
    "analytic-ddpm": Sampler(DDPMScheduler, options={"analytic": True}),
    "ddim": Sampler(DDPMScheduler, options={"eta": 0.0}),
    "analytic-ddim": Sampler(DDPMScheduler, options={"eta": 0.0, "analytic": True}),
    "analytic-second-order": Sampler(DDPMScheduler, options={"solver_order": 2, "analytic": True}),
    "ddim-stock": Sampler(diffusers.DDIMScheduler, optimal_too=False),
    "dpm++": Sampler(diffusers.DPMSolverMultistepScheduler),
    "dpm++-sde": Sampler(
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
        optimal_too=False,
    ),
    "deis": Sampler(diffusers.DEISMultistepScheduler, optimal_too=False),
    "euler": Sampler(diffusers.EulerDiscreteScheduler, optimal_too=False),
    "pndm": Sampler(diffusers.PNDMScheduler, optimal_too=False),
    "unipc": Sampler(diffusers.UniPCMultistepScheduler, optimal_too=False),
}


MAIN = [
    "fixed_small",
    "fixed_large",
    "analytic-ddpm",
    "ddim",
    "analytic-ddim",
    "analytic-second-order",
    "dpm++",
    "unipc",
]


def with_sampler(pipe: DDPMPipeline, sampler: Sampler, timesteps: list[int] | None) -> DDPMPipeline:
    """The pipeline with a sampler, and with given timesteps or evenly spaced ones."""
    extras = dict(pipe.process.extras)
    extras["analytic"] = {**extras["analytic"], "timesteps": {}}
    scheduler = sampler.scheduler.from_config(pipe.scheduler.config, **sampler.settings)
    scheduler.register_to_config(_ddpm_hf=extras)
    if timesteps is not None:
        set_timesteps = type(scheduler).set_timesteps

        def given(*_, device: Any = None, **__) -> None:
            set_timesteps(scheduler, timesteps=timesteps, device=device)

        scheduler.set_timesteps = scheduler.set_even_timesteps = given
    return DDPMPipeline(pipe.unet, scheduler)


def rows(args: argparse.Namespace, stored: dict) -> Iterator[tuple[str, int, str, Any]]:
    """(sampler, K, word for its timesteps, the timesteps or None)."""
    for count in args.steps:
        for name in args.samplers:
            yield name, count, "uniform", None
            if args.uniform_only:
                continue
            if str(count) in stored and SAMPLERS[name].optimal_too:
                yield name, count, "optimal", list(stored[str(count)])


def identity(args: argparse.Namespace) -> dict[str, str | int]:
    """What all rows of a file have in common: number of images, weights, calibration."""
    folder, digests = Path(args.pipeline), {}
    for name in ("unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
    return {"num_images": args.num_images, "sha256": digests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--yardstick", type=Path, required=True, help="Path of yardstick.py.")
    parser.add_argument("--pipeline", required=True, help="Folder of a calibrated pipeline.")
    parser.add_argument("--images", choices=NUM_IMAGES, default="fashion")
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 25, 50, 100])
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=MAIN)
    parser.add_argument("--uniform_only", action="store_true", help="No optimal timesteps.")
    parser.add_argument("--compile", action="store_true", help="A minute, then faster sampling.")
    parser.add_argument("--output", required=True, help="Name of the file in results/.")
    args = parser.parse_args()
    pipe = load_pipeline(args.pipeline)
    stored = pipe.process.analytic
    if stored is None:
        parser.error("calibrate the pipeline first: ddpm-hf calibrate")
    pipe.unet.to(memory_format=torch.channels_last)
    if args.compile:
        pipe.unet.compile()
    report = start_report(
        f"samplers from one checkpoint, {args.num_images} images",
        args.yardstick,
        Path(args.pipeline),
    )
    report |= identity(args)
    path = HERE / "results" / f"{args.output}.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        if any(earlier[name] != value for name, value in identity(args).items()):
            parser.error(f"{path.name} is of another number of images or another model")
        report = earlier
    done = {(row["sampler"], row["steps"], row["timesteps"]) for row in report["rows"]}
    for name, count, word, timesteps in rows(args, stored["timesteps"]):
        if (name, count, word) in done:
            continue
        sampler = SAMPLERS[name]
        started = time.perf_counter()
        quality = measure_quality(
            with_sampler(pipe, sampler, timesteps).to(pipe.device),
            args.yardstick,
            args.images,
            num_inference_steps=count,
            num_images=args.num_images,
            batch_size=BATCH,
            **sampler.options,
        )
        row = {"sampler": name, "steps": count, "timesteps": word, **quality}
        row["seconds"] = round(time.perf_counter() - started, 1)
        report["rows"].append(row)
        save_report(report, args.output)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
