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
import tempfile
import time
from pathlib import Path

from common import NUM_IMAGES, load_yardstick, measure_quality, save_report, start_report

from ddpm_hf import TrainingConfig, train
from ddpm_hf.sampling import load_pipeline


def measure(recipe: str, settings: dict, yardstick: Path, images: str) -> dict:
    """Train once and measure: a row of the results."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig.from_recipe(recipe, output_dir=f"{folder}/run", **settings)
        started = time.perf_counter()
        result = train(config)
        seconds = time.perf_counter() - started
        pipe = load_pipeline(str(result.output_dir), "ddim")
        quality = measure_quality(pipe, yardstick, images)
    return quality | {
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
    load_yardstick(args.yardstick, args.images)  # what it lacks shows before the training
    report = start_report(
        f"recipe {args.recipe}, {NUM_IMAGES[args.images]} images, DDIM, 20 steps, trailing",
        args.yardstick,
    ) | {"num_images": NUM_IMAGES[args.images], "common": args.common}
    for run in args.run:
        settings = settings_of(args.common) | settings_of(run)
        row = {"run": run, **measure(args.recipe, settings, args.yardstick, args.images)}
        report["rows"].append(row)
        save_report(report, args.output)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
