"""Draw every picture of docs/theory.md, with this package and the garments inside it.

    accelerate launch train_accelerate.py                                   # out/fashion-quick
    ddpm-hf calibrate out/fashion-quick --dataset_name embedded
    python docs/figures.py out/fashion-quick --output docs/images

Minutes on two CPU cores. The pictures of the reverse process are those of the model given, whose images
have to be grey and 28x28; those in docs/images are of the model that benchmarks/sampling.py compares samplers on.
"""  # noqa: E501

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ddpm_hf import DDPMPipeline, TrainingConfig, build_scheduler
from ddpm_hf.data import load_images
from ddpm_hf.evaluation import plot_rate_distortion
from ddpm_hf.images import to_network
from ddpm_hf.likelihood import (
    BoundSums,
    Strata,
    bits_per_dim,
    noise_for,
    rate_distortion,
    vlb_terms,
)
from ddpm_hf.sampling import load_pipeline
from ddpm_hf.scheduler import DDPMScheduler

SCHEDULES = ("linear", "cosine", "sigmoid", "laplace")
STEPS = 25
"""Of the short chain whose variances are drawn."""
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
MEASURED = {"2,000 images": "sampling.json", "500 images": "sampling-500.json"}
"""FD of so many images: of other numbers it is another."""
SAMPLERS = {
    "fixed_large": "ancestral, fixed_large",
    "fixed_small": "ancestral, fixed_small",
    "ddim": "DDIM",
    "dpm++": "DPM-Solver++ (2M)",
    "unipc": "UniPC",
    "analytic-ddpm": "ancestral, optimal variance",
    "analytic-ddim": "DDIM, optimal variance",
    "analytic-second-order": "second order, optimal variance",
}


def garments(count: int) -> Tensor:
    """So many embedded images, spread over the set, (B, 1, 28, 28) in [-1, 1]."""
    images = load_images(TrainingConfig.from_recipe("fashion-quick"))
    return to_network(images.centred(np.linspace(0, len(images) - 1, count).astype(int)))


def new_axes(columns: int, **labels: str) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side, with a grid and common labels."""
    figure = Figure(figsize=(4 * columns, 3), layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set(**labels)
    return figure, panels


def draw_strips(path: Path, rows: dict[str, Tensor], titles: list[str]) -> None:
    """Rows of images, each (K, 1, H, W) in [-1, 1], named at the left and titled above."""
    size = (0.85 * len(titles) + 1.2, 0.85 * len(rows) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image[0].cpu(), cmap="gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)


def forward(path: Path) -> None:
    """Eq. (4): one garment at ever larger t, under two schedules, with the same noise."""
    times = [-1, 50, 100, 200, 300, 450, 600, 750, 999]
    x_0 = garments(12)[:1].expand(len(times), -1, -1, -1)
    eps = torch.randn(1, *x_0.shape[1:], generator=seeded(0))
    rows = {
        name: build_scheduler(ddpm_beta_schedule=name).q_sample(
            x_0, eps.expand_as(x_0), torch.tensor(times)
        )
        for name in ("linear", "cosine")
    }
    draw_strips(path, rows, ["x_0", *(f"t = {t}" for t in times[1:])])


def schedules(path: Path) -> None:
    """alpha_bar and the signal-to-noise ratio of the schedules."""
    figure, (signal, snr) = new_axes(2, xlabel="t")
    for name in SCHEDULES:
        alpha_bar = build_scheduler(ddpm_beta_schedule=name).alpha_bar[1:]
        signal.plot(alpha_bar, label=name)
        snr.plot((alpha_bar / (1 - alpha_bar)).log10(), label=name)
    signal.set(ylabel="alpha_bar")
    snr.set(ylabel="log10 SNR(t)", ylim=(-5, 4.5))
    signal.legend()
    figure.savefig(path, dpi=110)


def parametrisations(path: Path) -> None:
    """How an error of the network's output becomes one of x_0_hat, by what it predicts."""
    figure, panels = new_axes(2, xlabel="t", ylabel="error of x_0_hat / of the output")
    for axes, name in zip(panels, ("linear", "cosine"), strict=True):
        t = torch.arange(1000)
        for kind in ("epsilon", "v_prediction", "sample"):
            scheduler = build_scheduler(ddpm_beta_schedule=name, prediction_type=kind)
            zero = torch.zeros(1000, 1, 1, 1)
            axes.plot(scheduler.to_x_0(zero + 1, zero, t).abs().flatten(), label=kind)
        axes.set(title=name, yscale="log", ylim=(5e-3, 3e2))
    panels[0].legend()
    figure.savefig(path, dpi=110)


def variances(path: Path, scheduler: DDPMScheduler) -> None:
    """beta-tilde over beta, and what the choices of variance are in a short chain."""
    figure, (ratio, short) = new_axes(2, xlabel="t")
    t = torch.arange(1, 1000)
    for gap in (1, 10, 40):
        steps = t[gap - 1 :]
        large = 1 - scheduler.alpha_bar_at(steps) / scheduler.alpha_bar_at(steps - gap)
        small = scheduler.posterior_log_variance(steps, steps - gap).exp()
        ratio.plot(steps, (small / large).sqrt(), label=f"t - s = {gap}")
    ratio.set(ylabel="sqrt(beta-tilde / beta)", xscale="log")
    ratio.legend()
    stride = 1000 // STEPS
    t = torch.arange(999, stride - 1, -stride)
    s = t - stride
    choices = {
        "fixed_large": (1 - scheduler.alpha_bar_at(t) / scheduler.alpha_bar_at(s)).sqrt(),
        "optimal": scheduler.analytic_variance(t, s).sqrt(),
        "fixed_small": (scheduler.posterior_log_variance(t, s) / 2).exp(),
    }
    for name, deviation in choices.items():
        short.plot(t, deviation, marker=".", label=name)
    short.set(ylabel="standard deviation", title=f"of a step, K = {STEPS}", yscale="log")
    short.legend()
    figure.savefig(path, dpi=110)


def reverse(path: Path, pipe: DDPMPipeline) -> None:
    """Algorithm 2: x_t and x_0_hat along a chain of 100 steps."""
    shown = (0, 30, 50, 60, 70, 80, 88, 95, 99)
    steps = list(pipe.denoise(generator=seeded(6), num_inference_steps=100))
    chosen = [steps[i] for i in shown]
    rows = {
        "x_s": torch.cat([step.x_s for step in chosen]),
        "x_0_hat": torch.cat([step.x_0_hat for step in chosen]),
    }
    draw_strips(path, rows, [f"t = {step.t}" for step in chosen])


def denoising(path: Path, pipe: DDPMPipeline) -> None:
    """Sohl-Dickstein et al. 2015, section 2.5: images behind noisy ones, of unknown noise."""
    clean = garments(9)
    noisy = clean + 0.5 * torch.randn(clean.shape, generator=seeded(1))
    draws = [
        pipe.denoise_image(image, num_images=2, output_type="pt", generator=seeded(2)).images
        for image in noisy.split(1)
    ]
    one, another = torch.stack(draws, 1) * 2 - 1
    rows = {"image": clean, "noisy": noisy, "one draw": one, "another": another}
    draw_strips(path, rows, [""] * len(clean))


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def bound(folder: Path, pipe: DDPMPipeline, count: int, timesteps: int) -> None:
    """Eqs. (5), (14), Fig. 5: errors and terms of the bound by t, and rate and distortion."""
    x_0 = garments(count)
    scheduler, positions = pipe.process, np.arange(count)
    strata = Strata.split(len(scheduler.beta), timesteps, power=2)
    measured = bits_per_dim(
        pipe.unet,
        scheduler,
        x_0.to(pipe.device),
        noise_for(0, positions, x_0.shape[1:]),
        strata=strata,
        t=strata.draw(0, positions),
    )
    t = (strata.first + (strata.size - 1) / 2)[1:]
    figure, (errors, terms) = new_axes(2, xlabel="t", yscale="log")
    errors.plot(t, measured.eps_mse.mean(0)[1:], label="of eps")
    errors.plot(t, measured.x_0_mse.mean(0)[1:], label="of x_0")
    errors.set(ylabel="mean squared error")
    errors.legend()
    terms.plot(t, measured.vb_bpd.mean(0)[1:])
    terms.set(ylabel="term of the bound, bits/dim", xscale="log")
    figure.savefig(folder / "loss.png", dpi=110)
    sums = BoundSums.zeros(len(scheduler.beta))
    sums.add(measured)
    figure = plot_rate_distortion(rate_distortion(sums, strata), len(scheduler.beta))
    figure.savefig(folder / "rate_distortion.png", dpi=120)


def reconstructions(path: Path, pipe: DDPMPipeline) -> None:
    """Like Fig. 6, of real images: x_0_hat from x_t, for the noise of ever smaller t."""
    x_0 = garments(4)
    last = len(pipe.process.beta) - 1
    times = [round(share * last) for share in (1.0, 0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.05)]
    noise = noise_for(0, range(len(x_0)), x_0.shape[1:])
    each = (torch.full((len(x_0),), t) for t in times)
    terms = vlb_terms(pipe.unet, pipe.process, x_0.to(pipe.device), each, noise)
    strips = torch.stack([*(term.x_0_hat for term in terms), x_0.to(pipe.device)], 1)
    rows = {str(i + 1): strip for i, strip in enumerate(strips)}
    draw_strips(path, rows, [*(f"t = {t}" for t in times), "x_0"])


def samplers(path: Path) -> None:
    """FD by sampler and number of steps, as benchmarks/sampling.py measured them."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(MEASURED), sharey=True)
    for axes, (of, file) in zip(panels, MEASURED.items(), strict=True):
        measured = [
            row
            for row in json.loads((RESULTS / file).read_text())["rows"]
            if row["timesteps"] == "uniform"
        ]
        for name, label in SAMPLERS.items():
            rows = sorted((r["steps"], r["fd"]) for r in measured if r["sampler"] == name)
            axes.plot(*zip(*rows, strict=True), marker=".", label=label)
        axes.set(xscale="log", yscale="log", xlabel="network evaluations an image", title=of)
        steps, levels = sorted({row["steps"] for row in measured}), (1, 2, 5, 10, 20)
        axes.set_xticks(steps, map(str, steps))
        axes.set_yticks(levels, map(str, levels))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("FD")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", help="A calibrated pipeline of grey 28x28 images.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--num_images", type=int, default=128, help="For the bound.")
    parser.add_argument("--timesteps", type=int, default=100, help="Of each image, for the bound.")
    args = parser.parse_args()
    pipe = load_pipeline(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    if pipe.image_shape != (1, 28, 28):
        parser.error(f"the embedded images are grey, 28x28; {args.pipeline} is not of such images")
    if pipe.process.analytic is None:
        parser.error(
            f"calibrate it first: ddpm-hf calibrate {args.pipeline} --dataset_name embedded"
        )
    # Evenly spaced timesteps, whichever are stored.
    analytic = {**pipe.process.analytic, "timesteps": {}}
    pipe.scheduler.register_to_config(_ddpm_hf={**pipe.process.extras, "analytic": analytic})
    args.output.mkdir(parents=True, exist_ok=True)
    forward(args.output / "forward.png")
    schedules(args.output / "schedules.png")
    parametrisations(args.output / "parametrisations.png")
    variances(args.output / "variances.png", pipe.process)
    reverse(args.output / "reverse.png", pipe)
    denoising(args.output / "denoising.png", pipe)
    bound(args.output, pipe, args.num_images, args.timesteps)
    reconstructions(args.output / "reconstructions.png", pipe)
    samplers(args.output / "samplers.png")


if __name__ == "__main__":
    main()
