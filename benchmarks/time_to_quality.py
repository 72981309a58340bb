"""Time to quality: FD over seconds of training, stock's recipe and ours, on one machine in turn.

    GOMP_SPINCOUNT=10000 python benchmarks/time_to_quality.py --yardstick YARDSTICK.py \
        --images fashion_mnist_train.parquet --stock_sampler 150

Every point is a run of its own, whose learning rate falls over just that time: a rate that was meant
to fall over 480 seconds would make either recipe look bad at 60. The number of steps is the budget
times the speed of a trial just before it, which also settles what is `auto` in our settings. The
seconds in a row are measured, of the run itself, from its first step to its last: no setup (images,
network), no checkpoint, no sampling. The budgets of both are taken in turn, the short ones first, so
that a machine that slows down slows both down.

Both train a U-Net (32, 64, 64) of one layer a block and 1.1M parameters on 28x28 grey garments: stock's
with diffusers' defaults, ours the preset `fashion-quick`, whose choices are part of the recipe
(--stock_network fashion-quick lets stock train ours). Samples are 1,000 images by DDIM in 20 evaluations, of
the averaged weights; --stock_sampler N adds, for stock's longest run, N images by its own 1000-step
sampler and N by DDIM, to be compared with each other: 1,000 by 1,000 steps would take more than an hour.
Writes benchmarks/results/OUTPUT.json, a row a run, as each run ends.
"""  # noqa: E501

import argparse
import json
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from common import (
    NUM_IMAGES,
    EnoughError,
    load_yardstick,
    measure_quality,
    save_report,
    start_report,
    stock_ema,
    stock_steps,
)
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_hf import TrainingConfig, train
from ddpm_hf.checkpoint import CONFIG
from ddpm_hf.data import ImageStream, load_images
from ddpm_hf.devices import set_threads
from ddpm_hf.images import to_network
from ddpm_hf.presets import unet_config
from ddpm_hf.sampling import load_pipeline
from ddpm_hf.training import objective

TRIAL_STEPS, TRIAL_HORIZON = 60, 20_000
"""Steps of the run that tells how many fit into a budget, of which the first ten do not count; and
as how long a run it starts: long enough to probe what is `auto`, too short to compile."""
PLAIN = ("no", "contiguous", "no")
SPEED = ("mixed_precision", "memory_format", "compile")
STOCK_BATCH = 16


def settings_of(text: str) -> dict[str, str]:
    """'a=1 b=2' -> {"a": "1", "b": "2"}."""
    return dict(pair.split("=", 1) for pair in text.split())


class StepClock:
    """Seconds of the steps of a run, without what comes before, between and after."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def step_begins(self) -> None:
        """Called as each step begins."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.starts.append(time.perf_counter())

    def seconds(self, first: int = 0) -> float:
        """From step `first` to the end of the last, which is taken to be as long as the mean."""
        counted = len(self.starts) - 1 - first
        return (self.starts[-1] - self.starts[first]) * (counted + 1) / counted

    def steps_per_second(self) -> float:
        """Without the first ten, which warm up."""
        return (len(self.starts) - 10) / self.seconds(first=10)


def stock_network(name: str) -> UNet2DModel:
    """(32, 64, 64) channels with diffusers' defaults, or the network of a preset of ours."""
    if name != "stock":
        return UNet2DModel(**unet_config(name, image_channels=1))
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def train_stock(num_steps: int, args: argparse.Namespace) -> tuple[DDPMPipeline, StepClock]:
    """Stock's pipeline with averaged weights after so many steps."""
    AcceleratorState._reset_state(True)  # ours may have left another precision
    torch.manual_seed(args.seed)
    unet = stock_network(args.stock_network)
    ema = stock_ema(unet)
    images = load_images(ours(args))
    everything = ImageStream(images, 0, len(images), flip=False).batch(0).images
    steps = stock_steps(
        unet, ema, to_network(everything), batch_size=STOCK_BATCH, total_steps=num_steps
    )
    clock = StepClock()
    for _ in range(num_steps):
        clock.step_begins()
        next(steps)
    ema.copy_to(unet.parameters())
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    return DDPMPipeline(unet.eval(), scheduler), clock


def ours(args: argparse.Namespace, **settings) -> TrainingConfig:
    """Our recipe on the whole image set."""
    quiet = dict(checkpointing_steps=10**9, save_images_epochs=0, save_model_epochs=0)
    return TrainingConfig.from_recipe(
        args.recipe,
        **dict(dataset_name=str(args.images), seed=args.seed, logger="none", eval_batch_size=1)
        | quiet
        | settings_of(args.settings)
        | settings,
    )


def train_ours(config: TrainingConfig, last_step: int | None = None) -> StepClock:
    """Train; until `last_step`, if given, and then without a pipeline."""
    clock, loss = StepClock(), objective(config)

    def loss_fn(*arguments):
        if len(clock.starts) == last_step:
            raise EnoughError
        clock.step_begins()
        return loss(*arguments)

    with suppress(EnoughError):
        train(config, loss_fn)
    return clock


def measure(recipe: str, budget: float, args: argparse.Namespace) -> list[dict]:
    """Rows of a run of `stock` or `ours` that takes about `budget` seconds: one a sampler."""
    with tempfile.TemporaryDirectory() as folder:
        if recipe == "stock":
            batch_size, speed = STOCK_BATCH, dict(zip(SPEED, PLAIN, strict=True))
            _, trial = train_stock(TRIAL_STEPS, args)
            num_steps = round(budget * trial.steps_per_second())
            pipe, clock = train_stock(num_steps, args)
            pipe.save_pretrained(f"{folder}/run")
        else:
            config = ours(args, max_train_steps=TRIAL_HORIZON, output_dir=f"{folder}/trial")
            trial = train_ours(config, last_step=TRIAL_STEPS)
            num_steps = round(budget * trial.steps_per_second())
            resolved = json.loads((config.run_dir / CONFIG).read_text())
            batch_size, speed = config.train_batch_size, {name: resolved[name] for name in SPEED}
            run = dict(max_train_steps=num_steps, output_dir=f"{folder}/run")
            clock = train_ours(ours(args, **speed, **run))
        row = {
            "recipe": recipe,
            "budget_seconds": budget,
            "train_seconds": round(clock.seconds(), 1),
            "images_seen": num_steps * batch_size,
            "seconds_per_image": round(clock.seconds() / num_steps / batch_size, 6),
            "settings": speed,
        }
        pipe = load_pipeline(f"{folder}/run")
        ddim = ("DDIM, 20 steps, trailing", DDIMScheduler, 20)
        samplers = [(*ddim, NUM_IMAGES["fashion"])]
        if recipe == "stock" and args.stock_sampler and budget == max(args.stock_seconds):
            samplers.append((*ddim, args.stock_sampler))
            samplers.append(("stock's DDPM, 1000 steps", DDPMScheduler, 1000, args.stock_sampler))
        rows = []
        for name, scheduler, evaluations, count in samplers:
            # Of 1000 steps trailing are the same as any other.
            pipe.scheduler = scheduler.from_config(
                pipe.scheduler.config, timestep_spacing="trailing"
            )
            started = time.perf_counter()
            quality = measure_quality(
                pipe, args.yardstick, "fashion", num_inference_steps=evaluations, num_images=count
            )
            sampled = {"sampler": name, "num_images": count}
            seconds = {"sampling_seconds": round(time.perf_counter() - started, 1)}
            rows.append(row | sampled | seconds | quality)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--yardstick", type=Path, required=True, help="Path of yardstick.py.")
    parser.add_argument("--images", type=Path, required=True, help="Parquet file of the images.")
    parser.add_argument("--recipe", default="fashion-quick", help="Our recipe.")
    parser.add_argument("--settings", default="", help="Settings of ours, 'name=value ...'.")
    parser.add_argument("--stock_network", default="stock", help="`stock`, or a preset of ours.")
    parser.add_argument("--stock_seconds", type=float, nargs="*", default=[240, 480])
    parser.add_argument("--our_seconds", type=float, nargs="*", default=[16, 32, 60, 120, 240, 480])
    parser.add_argument("--stock_sampler", type=int, default=0, help="See above; 150: 15 minutes.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="time-to-quality", help="File in results/.")
    args = parser.parse_args()
    load_yardstick(args.yardstick, "fashion")  # what it lacks shows before the training
    set_threads("auto")
    report = start_report(
        f"FD over training time, Fashion-MNIST 28x28, {NUM_IMAGES['fashion']} images",
        args.yardstick,
        args.images,
    ) | {"seed": args.seed}
    budgets = [("stock", s) for s in args.stock_seconds] + [("ours", s) for s in args.our_seconds]
    for recipe, budget in sorted(budgets, key=lambda pair: pair[1]):
        for row in measure(recipe, budget, args):
            report["rows"].append(row)
            save_report(report, args.output)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
