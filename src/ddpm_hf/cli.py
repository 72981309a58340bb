"""`ddpm-hf train | sample | push | ...`: each verb a few lines over a Python call.

With `--json` standard output is one JSON object, the call's result or `{"error": ...}`, and all
else goes to standard error. Exit codes: 0 done; 1 training failed, and 2 input that its user can
mend, said in one line; 75 stopped by a signal with the state saved; 130 interrupted.
"""

import argparse
import json
import math
import os
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from .errors import (
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    InputError,
    Stopped,
    TrainingError,
    check_choice,
    did_you_mean,
)


def train_command(argv: list[str], prog: str = "ddpm-hf train") -> Any:
    """Train; the flags are the fields of TrainingConfig."""
    from .commandline import parse_command

    use_token(argv)
    config, command = parse_command(argv, prog)
    if int(os.environ.get("RANK", 0)) == 0:
        for line in command.explain(config):
            print(line, file=sys.stderr)
    if command.dry_run:
        print(json.dumps(asdict(config), indent=2))
        return config
    from .training import train

    return train(config)


def use_token(argv: list[str]) -> None:
    """Let the calls of this process have the value of --hub_token, and nobody else.

    Before anything is read from the Hub, and before trackers store the command line.
    """
    for i, word in enumerate(argv):
        flag, _, value = word.partition("=")
        value = value or "".join(argv[i + 1 : i + 2])
        if flag in ("--hub_token", "--hub-token") and value:
            os.environ["HF_TOKEN"] = value
            sys.argv = [word.replace(value, "***") for word in sys.argv]


def sample_command(argv: list[str]) -> Any:
    """Sample images from a trained pipeline."""
    parser = _sample_parser()
    args = parser.parse_args(argv)
    if args.output is None and args.grid is None:
        parser.error("name what to write: --output, --grid or both")
    from .sampling import load_pipeline, sample_to

    pipe = load_pipeline(args.pipeline, args.scheduler)
    all_steps = pipe.scheduler.config.num_train_timesteps
    ancestral = type(pipe.scheduler).__name__ == "DDPMScheduler" and args.eta is None
    ancestral = ancestral and args.solver_order == 1
    default, given = all_steps if ancestral else min(50, all_steps), args.num_inference_steps
    num_inference_steps = default if given is None else given
    sample_to(
        args.output,
        pipe,
        args.num_images,
        batch_size=args.batch_size,
        seed=args.seed,
        num_inference_steps=num_inference_steps,
        class_label=args.class_label,
        guidance_scale=args.guidance_scale,
        eta=args.eta,
        analytic=None if args.analytic is None else args.analytic == "yes",
        solver_order=args.solver_order,
        grid=args.grid,
    )
    print("\n".join(f"Wrote {path}" for path in (args.output, args.grid) if path))
    return vars(args) | {"num_inference_steps": num_inference_steps}


def _sample_parser() -> "_Parser":
    """The flags of `ddpm-hf sample`."""
    parser = _Parser("ddpm-hf sample", description=sample_command.__doc__)
    add = parser.add_argument
    add("pipeline", metavar="REPO_OR_FOLDER", help="Hub id, or folder of a run.")
    add("--num_images", type=int, default=64, help="How many images (default: %(default)s).")
    add("--batch_size", type=int, default=64, help="How many at once (default: %(default)s).")
    add(
        "--seed",
        type=int,
        default=0,
        help="Image i is drawn from (seed, i) (default: %(default)s).",
    )
    add("--num_inference_steps", type=int, help="Denoising steps (default: all for ddpm, else 50).")
    add("--scheduler", help="ddpm, ddim, dpm++, unipc, euler, heun or pndm (default: as saved).")
    add("--class_label", help="Class, by name or number (default: all of them in turn).")
    add(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="1 + w in classifier-free guidance (default: %(default)s, off).",
    )
    add("--eta", type=float, help="DDIM with so much of DDPM's noise, 0 to 1, under ddpm.")
    add(
        "--analytic",
        choices=("yes", "no"),
        help="The variance of `ddpm-hf calibrate` (default: where it is there and --eta is not).",
    )
    add(
        "--solver_order",
        type=int,
        default=1,
        choices=(1, 2),
        help="2 for DDIM of second order, under ddpm: for few steps (default: %(default)s).",
    )
    add("--output", help="Folder for PNGs, or a .npy or .npz file.")
    add("--grid", help="Picture of the first 64 images.")
    return parser


def evaluate_command(argv: list[str]) -> Any:
    """Measure a trained pipeline on images: bits per dimension, rate and distortion."""
    parser = _image_parser("ddpm-hf evaluate", evaluate_command.__doc__)
    add = parser.add_argument
    add("--nll", action="store_true", help="Negative log-likelihood, by the variational bound.")
    add("--num_images", type=int, help="So many images spread over the split (default: all).")
    add("--timesteps", type=int, help="So many timesteps an image, an estimate (default: all).")
    add(
        "--strip_timesteps",
        type=int,
        nargs="+",
        metavar="T",
        help="Timesteps of the reconstructions (default: nine over the chain).",
    )
    args = vars(parser.parse_args(argv))
    if not args.pop("nll"):
        parser.error("name what to measure: --nll")
    from .evaluation import evaluate, table

    result = evaluate(**args)
    if int(os.environ.get("RANK", 0)) == 0:
        print(table(result.curve))
        low, high = result.interval
        within = "no interval" if math.isnan(low) else f"95 % within {low:.4f} to {high:.4f}"
        print(
            f"Bits/dim: {result.bits_per_dim:.4f}, {within}, images: {result.num_images}\n"
            f"Rate {result.rate_bpd:.4f} + distortion {result.distortion_bpd:.4f} bits/dim, RMSE "
            f"{result.distortion_rmse:.2f} of 255"
        )
        if result.output_dir:
            print(f"Wrote results.json, rate_distortion and reconstructions: {result.output_dir}")
    return result


UNDER_DDPM = ", but under --scheduler ddpm only: the pipeline was saved with another scheduler"


def calibrate_command(argv: list[str]) -> Any:
    """Measure what optimal variances and timesteps need; sampling in few steps then uses them."""
    parser = _image_parser("ddpm-hf calibrate", calibrate_command.__doc__)
    add = parser.add_argument
    add("--num_images", type=int, default=2000, help="Images measured (default: %(default)s).")
    add("--timesteps", type=int, help="Timesteps of each (default: 100, or all if fewer).")
    add(
        "--steps",
        type=int,
        nargs="+",
        default=[],
        metavar="K",
        help="Store optimal timesteps for so many steps (default: none; they are spaced evenly).",
    )
    args = vars(parser.parse_args(argv))
    from .bound import calibrate
    from .card import stock_timesteps
    from .loading import component_folder, read_json

    result = calibrate(**args)
    if int(os.environ.get("RANK", 0)) == 0:
        print(
            f"Calibrated {result.output_dir}, images: {result.num_images}, standard error of "
            f"E|eps_hat|^2 / D and of E|x_0 - x_0_hat|^2 / D: at most {result.standard_error:.1e}"
        )
        for count, chain in result.timesteps.items():
            print(
                f"{count} steps with that variance now take the timesteps optimal for the bound "
                "(on Fashion-MNIST even ones looked better); in plain diffusers by these lines:"
            )
            print(stock_timesteps(chain))
        where = component_folder(result.output_dir, "scheduler") / "scheduler_config.json"
        own = read_json(where).get("_class_name") == "DDPMScheduler"
        print(
            f"Fewer steps than trained now take the optimal variance{'' if own else UNDER_DDPM}. "
            "What measured best in ten, on Fashion-MNIST: ddpm-hf sample "
            f"{result.output_dir}{'' if own else ' --scheduler ddpm'} --solver_order 2 "
            "--num_inference_steps 10 --grid grid.png"
        )
    return result


def _image_parser(prog: str, description: str | None) -> "_Parser":
    """Flags of the verbs that measure a pipeline on images."""
    parser = _Parser(prog, description=description)
    add = parser.add_argument
    add("pipeline", metavar="REPO_OR_FOLDER", help="Hub id, or folder of a run.")
    add("--dataset_name", required=True, help="Images: Hub id, folder, parquet file, `embedded`.")
    add("--dataset_config_name", help="Configuration of the data set, if it has several.")
    add("--split", help="Of the data set (default: test or validation to evaluate, else train).")
    add("--image_column", help="Column with the images; found by its type when not given.")
    add("--label_column", help="Column with the classes, for a class-conditional network.")
    add("--cache_dir", help="Where `datasets` keeps downloads and decoded images.")
    add("--batch_size", type=int, default=64, help="Images at once (default: %(default)s).")
    add("--seed", type=int, default=0, help="Of noise and timesteps (default: %(default)s).")
    add("--fit", action="store_true", help="Resize, crop and convert images as training does.")
    add("--background", help="Colour behind transparent images (default: the run's, or white).")
    add(
        "--corrupt_images",
        choices=["raise", "skip"],
        default="raise",
        help="What to do about files that cannot be decoded (default: %(default)s).",
    )
    add("--output", help="Folder to write to (default: that of the pipeline).")
    return parser


def ema_command(argv: list[str]) -> Any:
    """Average the weights of a run over another length, after training."""
    parser = _Parser("ddpm-hf ema", description=ema_command.__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="Folder of a run trained with --ema_profiles.")
    add("--length", type=float, required=True, help="Relative length (sigma_rel), below 0.288.")
    add("--step", type=int, help="Stored step that the average ends at (default: the last).")
    add("--output", required=True, help="Folder of the new pipeline.")
    args = parser.parse_args(argv)
    from .ema import post_hoc

    made = post_hoc(**vars(args))
    print(f"Wrote {args.output}: step {made.step}, from {made.num_snapshots} snapshots")
    if made.error > 0.05:
        print(f"Warning: they meet this length to {made.error:.0%} only; store more of them")
    told = {"step": made.step, "num_snapshots": made.num_snapshots, "error": made.error}
    return {"output": args.output} | told


def push_command(argv: list[str]) -> Any:
    """Push a trained pipeline, its card and its recipe to the Hub, as one commit."""
    parser = _Parser("ddpm-hf push", description=push_command.__doc__)
    add = parser.add_argument
    add("folder", metavar="RUN_OR_FOLDER", help="Folder of a run, or of any saved pipeline.")
    add("--repo", required=True, help="organisation/name, or a name in your own account.")
    add("--private", action="store_true", default=None, help="Make it a private one.")
    add("--revision", help="Branch, made if it is not there (default: main).")
    add("--tag", help="Tag to put on the commit.")
    add("--create_pr", action="store_true", help="Open a pull request instead of committing.")
    add("--message", help="Of the commit.")
    add("--license", help="Of the weights, for the card, like mit.")
    args = parser.parse_args(argv)
    from .hub import push_to_hub

    pushed = push_to_hub(**vars(args))
    print(f"Pushed {args.folder}: {pushed.url}")
    return pushed


CONVERT_FLAGS = (
    ("family", str, "improved-diffusion, guided-diffusion, pesser or pytorch-ddpm (default: shown "
     "by the weights' names)."),
    ("weights", str, "ema or model, of a file that has both (default: ema)."),
    ("resolution", int, "Side of the images."),
    ("num_heads", int, "Attention heads at every level (OpenAI; default: 4)."),
    ("num_head_channels", int, "Or the channels of one head (guided-diffusion)."),
    ("ddpm_num_steps", int, "T (default: 1000)."),
    ("ddpm_beta_schedule", str, "linear or cosine (OpenAI; default: linear)."),
    ("beta_start", float, "Start of the linear schedule (not OpenAI; default: 1e-4)."),
    ("beta_end", float, "Its end (default: 0.02)."),
    ("prediction_type", str, "epsilon, sample or v_prediction (default: epsilon)."),
    ("variance_type", str, "fixed_small or fixed_large (default: as the family publishes it)."),
)  # fmt: skip


def convert_command(argv: list[str]) -> Any:
    """Make a pipeline from a checkpoint of another trainer."""
    parser = _Parser("ddpm-hf convert", description=convert_command.__doc__)
    add = parser.add_argument
    add("file", metavar="FILE", help=".pt, .ckpt or .safetensors; no code in it is run.")
    add("output", metavar="OUT", help="Folder of the new pipeline.")
    for name, kind, text in CONVERT_FLAGS:
        add(f"--{name}", type=kind, help=text)
    add("--new_attention_order", action="store_true", default=None, help="guided-diffusion's flag.")
    add(
        "--rescale_timesteps",
        action=argparse.BooleanOptionalAction,
        help="OpenAI's flag (default: yes for improved-diffusion, no for guided-diffusion).",
    )
    args = parser.parse_args(argv)
    from .convert import convert

    made = convert(**vars(args))
    which = f", its {made.weights} weights" if made.weights else ""
    print(f"Wrote {made.folder}: {made.family}{which}, {made.parameters:,} parameters")
    assumed = ", ".join(f"{name} {value}" for name, value in made.assumed.items())
    print(f"Not given, so as the weights show or {made.family} publishes it: {assumed}")
    return made


class _Parser(argparse.ArgumentParser):
    """Errors are InputError, one line; no abbreviated flags."""

    def __init__(self, prog: str, **options) -> None:
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str):
        _, unknown, words = message.partition("unrecognized arguments: ")
        known = [flag for action in self._actions for flag in action.option_strings]
        near = did_you_mean(words.split()[0].split("=")[0], known) if unknown else ""
        raise InputError(message + ("." + (near or " --help lists all flags.") if unknown else ""))


VERBS = {
    "train": train_command,
    "sample": sample_command,
    "evaluate": evaluate_command,
    "calibrate": calibrate_command,
    "ema": ema_command,
    "push": push_command,
    "convert": convert_command,
}


def share_cores() -> None:
    """Let threads that wait for each other sleep sooner; before torch is loaded, which reads it.

    By default they spin for milliseconds, and one other busy process on the machine makes training
    on a CPU ten times slower (docs/log.md).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def plain(value: Any) -> Any:
    """A result as JSON has it: objects with named fields, paths as text."""
    if is_dataclass(value) or hasattr(value, "_asdict"):
        value = asdict(value) if is_dataclass(value) else value._asdict()
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no such numbers
    return str(value) if isinstance(value, Path) else value


def run(command, argv: list[str], name: str) -> int:
    """Run a command; an error that has its words becomes one line and an exit code."""
    share_cores()
    asks_help = bool({"-h", "--help"} & set(argv))
    as_json, output = "--json" in argv and not asks_help, sys.stdout
    argv = [word for word in argv if word != "--json"]

    def tell(answer: Any) -> None:
        if as_json and int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(answer), file=output)

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        try:
            answer, code = plain(command(argv)), 0
        except Stopped as stopped:
            answer, code = {"error": f"stopped by {stopped}"}, stopped.code
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            answer, code = {"error": "interrupted"}, EXIT_INTERRUPTED
        except Exception as error:
            from .access import scrubbed

            code = _exit_code(error)
            if code is None:
                tell({"error": scrubbed(repr(error))})
                raise
            line = scrubbed(str(error))
            print(f"{name}: error: {line}", file=sys.stderr)
            answer = {"error": line}
    tell(answer)
    return code


def _exit_code(error: Exception) -> int | None:
    """That of an error which has its words; None for one that shows a traceback."""
    if isinstance(error, TrainingError):
        return EXIT_FAILED
    of_a_file = isinstance(error, OSError) and error.filename is not None  # of the user's
    return EXIT_INPUT if isinstance(error, InputError) or of_a_file else None


def main(argv: list[str] | None = None) -> int:
    """Entry point of `ddpm-hf`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "Usage: ddpm-hf VERB ...\n\n"
            + "\n".join(f"  {verb:10}{f.__doc__}" for verb, f in VERBS.items())
        )
        print("\n`ddpm-hf VERB --help` lists its flags; with --json it prints its result as JSON.")
        return 0
    return run(_verb, argv, "ddpm-hf")


def _verb(argv: list[str]) -> Any:
    if not argv:
        raise InputError(f"name a verb: {', '.join(VERBS)}")
    check_choice("verb", argv[0], VERBS)
    return VERBS[argv[0]](argv[1:])
