"""The command line of training: its flags, and what they resolve to."""

import argparse
import math
import typing
from dataclasses import dataclass, field, fields

from .config import EMBEDDED, OF_ADAM, TrainingConfig, arg, field_names, is_saved, resolve
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
        False,
        "Without effect: grey images of 16 bits and floats in [0, 1] keep their precision anyway.",
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
        unread = unread_settings(config)
        return lines + [
            f"--{name}: without effect, {unread[name]}" for name in unread if name in self.given
        ]


def unread_settings(config: TrainingConfig) -> dict[str, str]:
    """The settings that a run with these settings does not read, and why."""
    name = config.dataset_name
    no_configurations = not name or name == EMBEDDED or name.endswith(".parquet") or is_saved(name)
    pushes = config.push_to_hub or config.push_checkpoints
    no_average = "beside --use_ema false"
    no_epochs = "a stream has no epochs"
    reasons = {
        "dataset_config_name": no_configurations and "a folder or a file has no configurations",
        "train_data_dir": name and "since --dataset_name is given",
        "snr_gamma": config.loss == "vlb" and "the bound has weights of its own",
        "class_dropout_prob": not config.class_conditional and "without --class_conditional",
        "held_out_steps": not config.held_out and "without --held_out",
        "train_batch_size": config.train_batch_size > (config.global_batch_size or math.inf)
        and f"beyond the {config.global_batch_size} images of --global_batch_size",
        "gradient_accumulation_steps": config.global_batch_size
        and f"it follows from the global batch of {config.global_batch_size}",
        "num_epochs": config.max_train_steps and "beside --max_train_steps",
        "muon_learning_rate": config.optimizer != "muon" and "without --optimizer muon",
        "muon_momentum": config.optimizer != "muon" and "without --optimizer muon",
        "lr_warmup_steps": config.lr_scheduler == "constant" and "the rate is constant",
        "ema_inv_gamma": not config.use_ema and no_average,
        "ema_power": not config.use_ema and no_average,
        "ema_max_decay": not config.use_ema and no_average,
        "ema_min_decay": not config.use_ema and no_average,
        "ema_update_every": not (config.use_ema or config.ema_profiles) and no_average,
        "ema_snapshot_steps": not config.ema_profiles and "without --ema_profiles",
        "overwrite_output_dir": config.resume_from_checkpoint and "beside --resume_from_checkpoint",
        "logging_dir": config.logger != "tensorboard" and "only --logger tensorboard writes there",
        "save_images_epochs": (config.save_images_steps and "beside --save_images_steps")
        or (config.streaming and no_epochs),
        "save_model_epochs": config.streaming and no_epochs,
        "hub_model_id": not pushes and "nothing is pushed",
        "hub_private_repo": not config.push_to_hub and "without --push_to_hub",
    }
    return {name: why for name, why in reasons.items() if why}


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
        raise InputError(_explain_unknown(unknown[0].split("=")[0]))
    given = {name: value for name, value in vars(found).items() if value is not absent}
    command = CommandLine(**{name: given[name] for name in of_call & given.keys()})
    command.given = frozenset(given)
    settings = {name: value for name, value in given.items() if name not in of_call}
    return resolve(settings, "the command line"), command


def _explain_unknown(word: str) -> str:
    """What to do about a word that is no flag, and no value of one; of `--flag=value` the flag."""
    if not word.startswith("-"):
        return (
            f"{word!r} stands without a flag: images are named by --train_data_dir {word} or "
            f"--dataset_name {word}"
        )
    flags = [*field_names(), *(f.name for f in fields(CommandLine) if f.init), "from"]
    near = did_you_mean(word.lstrip("-"), flags, prefix="--")
    return f"unknown flag {word!r}.{near or ' --help lists all flags.'}"
