"""The command line of training: its flags, and what they resolve to."""

import argparse
import typing
from dataclasses import dataclass, field, fields

from .config import OF_ADAM, TrainingConfig, arg, field_names, resolve
from .errors import InputError, did_you_mean
from .recipe import recipe_names


@dataclass
class CommandLine:
    """Flags that are no settings of a run: what one call does, and words of diffusers' script."""

    dry_run: bool = arg(False, "Print the resolved configuration and stop.")
    hub_token: str | None = arg(
        None,
        "Used for the calls of this process and never stored. Other users of this machine can read "
        "it in the list of processes: `hf auth login` is safer.",
    )
    local_rank: int = arg(-1, "Without effect: launchers tell each process its rank.")
    enable_xformers_memory_efficient_attention: bool = arg(
        False, "Without effect: PyTorch's own attention is memory-efficient."
    )
    preserve_input_precision: bool = arg(
        False, "Without effect: grey images of 16 or 32 bits always keep their precision."
    )

    given: frozenset[str] = field(default=frozenset(), init=False)
    """Names of all flags on the command line."""

    def explain(self, config: TrainingConfig) -> list[str]:
        """A line for each flag given that has another effect than in diffusers' script."""
        lines = [
            f"--{f.name}: {f.metadata['help']}"
            for f in fields(self)
            if f.name not in ("dry_run", "given") and getattr(self, f.name) != f.default
        ]
        of_adam = [name for name in OF_ADAM if name in self.given]
        chosen = {"optimizer", "muon_learning_rate"} & self.given
        if of_adam and config.optimizer == "muon" and not chosen:
            lines.append(
                f"--{', --'.join(of_adam)}: not for the hidden convolutions, which Muon trains "
                f"with --muon_learning_rate {config.muon_learning_rate}; --optimizer adamw is "
                "diffusers' optimiser for all"
            )
        if config.hub_model_id and not (config.push_to_hub or config.push_checkpoints):
            lines.append("--hub_model_id: without effect, since nothing is pushed")
        if config.hub_private_repo and not config.push_to_hub:
            lines.append("--hub_private_repo: without effect without --push_to_hub")
        if config.dataset_name and config.train_data_dir:
            lines.append("--train_data_dir: ignored, since --dataset_name is given")
        if config.overwrite_output_dir and config.resume_from_checkpoint:
            lines.append("--overwrite_output_dir: ignored beside --resume_from_checkpoint")
        return lines


def make_parser(prog: str):
    """The parser of all flags; its errors are InputError, one line each."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> typing.NoReturn:
            raise InputError(message)

    return Parser(
        [TrainingConfig, CommandLine],
        allow_abbrev=False,
        prog=prog,
        description="Train a denoising diffusion model of images. Without flags: minutes on the "
        f"embedded Fashion-MNIST images. Recipes: {', '.join(recipe_names())}.",
    )


def parse_config(argv: list[str]) -> TrainingConfig:
    """Resolve command-line words into a configuration: see `parse_command`."""
    return parse_command(argv)[0]


def parse_command(
    argv: list[str], prog: str = "train_accelerate.py"
) -> tuple[TrainingConfig, CommandLine]:
    """Resolve command-line words: see `config.resolve` for the layers below them.

    Raises:
        InputError: an unknown flag, recipe or setting, or a value that does not fit.
        SystemExit: `--help`.
    """
    of_call = {f.name for f in fields(CommandLine) if f.init}
    absent = object()
    nothing = argparse.Namespace(**dict.fromkeys([*field_names(), *of_call], absent))
    found, unknown = make_parser(prog).parse_known_args(argv, nothing)
    if unknown:
        flag = unknown[0].split("=")[0].lstrip("-")
        raise InputError(f"unknown flag {unknown[0]!r}.{did_you_mean(flag, field_names())}")
    given = {name: value for name, value in vars(found).items() if value is not absent}
    command = CommandLine(**{name: given[name] for name in of_call & given.keys()})
    command.given = frozenset(given)
    settings = {name: value for name, value in given.items() if name not in of_call}
    return resolve(settings, "the command line"), command
