"""Quality and time of the default job: train it, sample 1,000 images with 20 DDIM steps, measure
FD.

    python benchmarks/fashion_quick.py --yardstick ../shared/yardstick/yardstick.py --seeds 0 1 2

Writes benchmarks/results/fashion-quick.json. FD is that of the yardstick, on its own features; it
depends on the number of images and is not comparable with published Inception FID.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ddpm_hf import TrainingConfig, train
from ddpm_hf.sampling import load_pipeline, sample_to

HERE = Path(__file__).parent


def hardware() -> str:
    """The processor's name and how many cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else platform.processor()}"
    )


def measure(seed: int, yardstick: Path, settings: dict) -> dict:
    """Train with one seed and measure: a row of the results."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig.from_recipe(
            "fashion-quick", seed=seed, output_dir=f"{folder}/run", **settings
        )
        started = time.perf_counter()
        result = train(config)
        seconds = time.perf_counter() - started
        sample_to(
            f"{folder}/samples.npy",
            load_pipeline(str(result.output_dir), "ddim"),
            1000,
            batch_size=250,
            seed=0,
            num_inference_steps=20,
        )
        command = [
            sys.executable,
            yardstick,
            "--set",
            "fashion",
            "--images",
            f"{folder}/samples.npy",
        ]
        row = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {
        "seed": seed,
        "fd": round(row["fd"], 3),
        "kid_x1000": round(row["kid_x1000"], 2),
        "train_seconds": round(seconds),
        "images_seen": result.step * config.train_batch_size,
        "final_loss": round(result.loss, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--yardstick", type=Path, required=True, help="Path of yardstick.py.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], help="Settings to change, as name=value.")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "fashion-quick.json")
    args = parser.parse_args()
    settings = dict(pair.split("=", 1) for pair in args.set)
    rows = [measure(seed, args.yardstick, settings) for seed in args.seeds]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    )
    report = {
        "what": "fashion-quick, 1,000 images, DDIM, 20 steps, trailing; FD by the frozen yardstick",
        "settings_changed": settings,
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "num_images": 1000,
        "rows": rows,
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
