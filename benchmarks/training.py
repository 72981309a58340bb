"""Speed of training: images/s of our loop against diffusers' own, in turn in one process.

    GOMP_SPINCOUNT=10000 python benchmarks/training.py --preset cifar10 --batch_size 16 --compile \
        --memory --output training-cpu
    python benchmarks/training.py --preset cifar10 --batch_size 128 --compile --memory \
        --output training-gpu-128        # and with 512

Stock is `common.stock_steps` in fp32. Ours is `ddpm_hf.train` itself, on the images in this package at
the preset's size: its loss function stops the clock now and then and lets stock do as many steps. So
both see the same machine within seconds, and the ratio of a round is one of neighbours. Medians over the
rounds, the first of which is not counted. MFU is against the largest matrix product's speed on this
device in the row's precision. Peak memory is that of a process of its own.
Writes benchmarks/results/OUTPUT.json, a row a variant, as each is measured.
"""  # noqa: E501

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from accelerate.state import AcceleratorState
from common import EnoughError, save_report, start_report, stock_ema, stock_steps
from diffusers import UNet2DModel

from ddpm_hf import TrainingConfig, train
from ddpm_hf.checkpoint import CONFIG
from ddpm_hf.data import ImageStream, load_images
from ddpm_hf.devices import set_threads
from ddpm_hf.images import to_network
from ddpm_hf.losses import simple_loss
from ddpm_hf.presets import PRESETS, unet_config
from ddpm_hf.probe import computes_bf16, count_flops, peak_flops

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
PINNED = dict(mixed_precision="no", memory_format="contiguous", compile="no")
AUTO = dict.fromkeys(PINNED, "auto")
OURS = {
    "ours, fp32": PINNED,
    "ours, fp32, gradient checkpointing": PINNED | dict(gradient_checkpointing=True),
    "ours, fp32, compiled": PINNED | dict(compile="yes"),
    "ours, bf16": PINNED | dict(mixed_precision="bf16"),
    "ours, bf16, channels_last": PINNED
    | dict(mixed_precision="bf16", memory_format="channels_last"),
    "ours, bf16, compiled": PINNED | dict(mixed_precision="bf16", compile="yes"),
    "ours, bf16, channels_last, compiled": dict(
        mixed_precision="bf16", memory_format="channels_last", compile="yes"
    ),
    "ours, as probed": dict(AUTO, compile="no"),
    "ours, as probed, compiled if faster": AUTO,
}
STOCK = {"stock, fp32": "no", "stock, bf16": "bf16"}


def clock() -> float:
    """Seconds, when the device has done what it was given."""
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def timed(steps: Iterator[float], count: int) -> float:
    """Seconds of so many steps."""
    started = clock()
    for _ in range(count):
        next(steps)
    return clock() - started


def settings_of_run(args: argparse.Namespace, **settings) -> TrainingConfig:
    """Stock's recipe on the images in this package, without checkpoints and pictures."""
    return TrainingConfig.from_recipe(
        "diffusers-unconditional",
        preset=args.preset,
        dataset_name="embedded",
        image_mode="RGB" if args.channels == 3 else "L",
        resolution=args.resolution,
        train_batch_size=args.batch_size,
        max_train_steps=100_000,
        checkpointing_steps=100_000,
        use_ema=True,
        save_images_epochs=0,
        save_model_epochs=0,
        logger="none",
        **settings,
    )


def start_stock(args: argparse.Namespace, mixed_precision: str) -> Iterator[float]:
    """Stock's training of the network, with diffusers' initialisation; one step is done."""
    AcceleratorState._reset_state(True)  # several precisions in one process
    unet = UNet2DModel(**unet_config(args.preset, image_channels=args.channels))
    images = ImageStream(load_images(settings_of_run(args)), 0, 16 * args.batch_size, flip=False)
    steps = stock_steps(
        unet,
        stock_ema(unet),
        to_network(images.batch(0).images),
        batch_size=args.batch_size,
        total_steps=100_000,
        mixed_precision=mixed_precision,
    )
    next(steps)
    return steps


def run_ours(settings: dict, args: argparse.Namespace, boundary: Callable[[], None]) -> dict:
    """Train with `boundary` called before every args.steps-th step, until it raises EnoughError.

    Returns what the settings of speed were resolved to.
    """
    calls = 0

    def loss_fn(*arguments):
        nonlocal calls
        if calls % args.steps == 0:
            boundary()
        calls += 1
        return simple_loss(*arguments)

    with tempfile.TemporaryDirectory() as folder:
        config = settings_of_run(args, output_dir=f"{folder}/run", **settings)
        with suppress(EnoughError):
            train(config, loss_fn)
        resolved = json.loads((Path(folder) / "run" / CONFIG).read_text())
    return {name: resolved[name] for name in PINNED}


def time_ours(
    settings: dict, stock: Iterator[float], args: argparse.Namespace
) -> tuple[list[tuple[float, float]], dict]:
    """(our seconds, stock's) of each round, and the resolved settings."""
    rounds: list[tuple[float, float]] = []
    resumed = None

    def boundary() -> None:
        nonlocal resumed
        if resumed is not None:
            ours = clock() - resumed
            rounds.append((ours, timed(stock, args.steps)))
        if len(rounds) > args.rounds:
            raise EnoughError
        resumed = clock()

    return rounds, run_ours(settings, args, boundary)


def measure(variant: str, stock: Iterator[float], args: argparse.Namespace) -> dict:
    """A row: speeds and ratios of a variant against stock in fp32."""
    if variant in OURS:
        rounds, settings = time_ours(OURS[variant], stock, args)
    else:
        settings = PINNED | dict(mixed_precision=STOCK[variant])
        steps = start_stock(args, STOCK[variant])
        rounds = [
            (timed(steps, args.steps), timed(stock, args.steps)) for _ in range(args.rounds + 1)
        ]
    seconds, stock_seconds = zip(*rounds[1:], strict=True)
    images = args.steps * args.batch_size
    speed = images / median(seconds)
    return {
        "variant": variant,
        "settings": settings,
        "images_per_second": round(speed, 2),
        "stock_images_per_second": round(images / median(stock_seconds), 2),
        "ratio": round(median(s / o for o, s in rounds[1:]), 3),
        "ratios": [round(s / o, 3) for o, s in rounds[1:]],
    }


def peak_memory(variant: str, args: argparse.Namespace) -> int:
    """Bytes at the peak of three steps, by this whole process: on CUDA of its tensors."""
    left = iter(range(3))

    def boundary() -> None:
        if next(left, None) is None:
            raise EnoughError

    if variant in OURS:
        args.steps = 1
        run_ours(OURS[variant], args, boundary)
    else:
        timed(start_stock(args, STOCK[variant]), 2)
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage: a process begins with the peak of the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def variants(compiled: bool) -> list[str]:
    """What this device can run, stock in fp32 first: against itself, it shows the noise."""
    return [
        name
        for name in [*STOCK, *OURS]
        if (compiled or "compiled" not in name) and ("bf16" not in name or computes_bf16(DEVICE))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="Measure compiled variants too.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="Steps of each side a round.")
    parser.add_argument("--memory", action="store_true", help="Measure peak memory too.")
    parser.add_argument("--variant", action="append", help="Measure this one; default: all.")
    parser.add_argument("--peak", action="store_true", help="Print --variant's peak memory only.")
    parser.add_argument("--output", default="training", help="Name of the file in results/.")
    args = parser.parse_args()
    args.resolution = PRESETS[args.preset].settings["resolution"]
    set_threads("auto")
    if args.peak:
        print(peak_memory(args.variant[-1], args))
        return
    precisions = ["no", "bf16"] if computes_bf16(DEVICE) else ["no"]
    peaks = {precision: peak_flops(DEVICE, precision) for precision in precisions}
    network = unet_config(args.preset, image_channels=args.channels)
    flops = count_flops(network)
    report = start_report(f"training, preset {args.preset}, batch {args.batch_size}") | {
        "flops_per_image": flops,
        "peak_flops": {name: round(peak) for name, peak in peaks.items()},
    }
    stock = start_stock(args, "no")
    for variant in args.variant or variants(args.compile):
        row = measure(variant, stock, args)
        peak = peaks[row["settings"]["mixed_precision"]]
        row["mfu"] = round(row["images_per_second"] * flops / peak, 3)
        if args.memory:
            command = [sys.executable, *sys.argv, "--peak", "--variant", variant]
            printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            row["peak_bytes"] = int(printed.split()[-1])
        report["rows"].append(row)
        save_report(report, args.output)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
