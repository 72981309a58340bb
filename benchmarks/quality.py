"""Quality and time of a training run: train, sample with 20 DDIM steps, measure FD by the yardstick.

The default job, three seeds:
    python benchmarks/quality.py --yardstick YARDSTICK.py --images fashion --output fashion-quick \
        --run seed=0 --run seed=1 --run seed=2
One change at a time from common settings:
    python benchmarks/quality.py --yardstick YARDSTICK.py --images emoji --output emoji --recipe default \
        --common "dataset_name=emoji.parquet max_train_steps=750" --run "" --run optimizer=muon

Writes benchmarks/results/OUTPUT.json, a row a run, as each run ends. FD is that of the yardstick, on
features of its own: it depends on the number of images, and is not comparable with published FID.
"""  # noqa: E501

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ddpm_hf import TrainingConfig, train
from ddpm_hf.sampling import load_pipeline, sample_to

HERE = Path(__file__).parent
NUM_IMAGES = {"fashion": 1000, "emoji": 946}


def hardware() -> str:
    """The processor's name and how many cores this process may use, or the GPU's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}"


def measure(recipe: str, settings: dict, yardstick: Path, images: str) -> dict:
    """Train once and measure: a row of the results."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig.from_recipe(recipe, output_dir=f"{folder}/run", **settings)
        started = time.perf_counter()
        result = train(config)
        seconds = time.perf_counter() - started
        samples = f"{folder}/samples.npy"
        pipe = load_pipeline(str(result.output_dir), "ddim")
        sample_to(samples, pipe, NUM_IMAGES[images], batch_size=250, num_inference_steps=20)
        command = [sys.executable, yardstick, "--set", images, "--images", samples]
        measured = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {
        "fd": round(measured["fd"], 3),
        "fd_floor": round(measured["fd_floor"], 3),
        "kid_x1000": round(measured["kid_x1000"], 2),
        "train_seconds": round(seconds),
        "images_seen": result.step * config.train_batch_size,
        "final_loss": round(result.loss, 5),
    }


def settings_of(text: str) -> dict[str, str]:
    """'a=1 b=2' -> {"a": "1", "b": "2"}."""
    return dict(pair.split("=", 1) for pair in text.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--yardstick", type=Path, required=True, help="Path of yardstick.py.")
    parser.add_argument("--images", choices=NUM_IMAGES, required=True)
    parser.add_argument("--recipe", default="fashion-quick")
    parser.add_argument("--common", default="", help="Settings of all runs, 'name=value ...'.")
    parser.add_argument("--run", action="append", required=True, help="Settings of one run.")
    parser.add_argument("--output", required=True, help="Name of the file in results/.")
    args = parser.parse_args()
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    report = {
        "what": f"recipe {args.recipe}, {NUM_IMAGES[args.images]} images, DDIM, 20 steps, trailing",
        "command": " ".join(sys.argv[1:]).replace(str(args.yardstick), "YARDSTICK.py"),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {"torch": torch.__version__},
        "num_images": NUM_IMAGES[args.images],
        "common": args.common,
        "rows": [],
    }
    for run in args.run:
        settings = settings_of(args.common) | settings_of(run)
        row = {"run": run, **measure(args.recipe, settings, args.yardstick, args.images)}
        report["rows"].append(row)
        (HERE / "results" / f"{args.output}.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
