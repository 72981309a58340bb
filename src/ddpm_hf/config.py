"""TrainingConfig: every setting of a run, its default and reason, and how the layers combine.

Layers, the later wins: defaults < preset < recipe file < flags (`resolve`). Imports neither torch
nor diffusers: `--help` is instant.
"""

import typing
from contextlib import suppress
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from .errors import InputError, check_choice, did_you_mean
from .origin import OF_ORIGIN, default_folder, find_kept_origin, settings_of_origin
from .presets import BETA_SCHEDULES, DEFAULT_PROCESS, PRESETS, beta_range, unet_config
from .recipe import OF_THIS_MACHINE, is_path, read_recipe

OF_SPEED = ("mixed_precision", "memory_format", "compile")
"""Settings that a probe of this machine decides."""

OF_IMAGES = (
    "dataset_name", "dataset_config_name", "train_data_dir", "split", "image_column", "label_column"
)  # fmt: skip
"""Settings that say which images to train on: those of a recipe go where others are named."""

OF_READING = ("streaming", "held_out", "corrupt_images", "data_on_device", "dataloader_num_workers")
"""Settings of how a model's own images were read."""

PATHS = ("dataset_name", "train_data_dir", "model_config_name_or_path", "init_from", "recipe")
"""Settings that may be paths."""

OF_ADAM = ("learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
"""Settings of Adam and AdamW; under Muon those of a few weights only."""

EMBEDDED = "embedded"
"""`--dataset_name embedded`: the 6,000 images of Fashion-MNIST inside this package."""

SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files of an image set written by `save_to_disk`: of one split, of several."""

LR_SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
)  # fmt: skip

INFINITY = float("inf")
_ANY, _COUNT, _FRACTION = (0, INFINITY), (1, INFINITY), (0, 1)
MAY_BE_EMPTY = ("ema_profiles", "resume_from_checkpoint")

RANGES: dict[str, tuple[float, float]] = {
    "dataloader_num_workers": _ANY,
    "ddpm_num_steps": (2, INFINITY),
    "snr_gamma": _ANY,
    "dropout": _FRACTION,
    "train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "num_epochs": _COUNT,
    "max_train_steps": _COUNT,
    "learning_rate": _ANY,
    "muon_learning_rate": _ANY,
    "muon_momentum": (0, 0.9999),
    "lr_warmup_steps": _ANY,
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.999999),
    "adam_weight_decay": _ANY,
    "adam_epsilon": _ANY,
    "max_grad_norm": _ANY,
    "ema_inv_gamma": (1e-9, INFINITY),
    "ema_power": _ANY,
    "ema_max_decay": _FRACTION,
    "ema_min_decay": _FRACTION,
    "seed": (0, 2**63 - 1),
    "checkpointing_steps": _COUNT,
    "checkpoints_total_limit": _ANY,
    "save_images_epochs": _ANY,
    "save_model_epochs": _ANY,
    "eval_batch_size": _COUNT,
    "ddpm_num_inference_steps": _COUNT,
    "logging_steps": _COUNT,
    "global_batch_size": _COUNT,
    "class_dropout_prob": _FRACTION,
    "held_out": (0, 0.5),
    "held_out_steps": _COUNT,
    "ema_update_every": _COUNT,
    "ema_snapshot_steps": _COUNT,
    "save_images_steps": _COUNT,
    "push_steps": _COUNT,
}
"""Smallest and largest value of every number."""


def arg(default: Any, help: str, **more) -> Any:
    """A field with a default and the text that `--help` shows."""
    return field(default=default, metadata={"help": help, **more})


@dataclass
class TrainingConfig:
    """All settings of `ddpm_hf.train`, named as in diffusers' train_unconditional.py if there.

    The defaults are the recipe `default`: what measured best for a user's own images (docs/log.md
    holds the numbers). `preset` brings its network alone; its process comes with it by
    `from_recipe`, as on the command line.

    Raises:
        InputError: a number out of range, or settings that exclude each other.
    """

    # What to train
    recipe: str = arg(
        "default",
        "Name of a recipe in ddpm_hf/recipes, or the path of a YAML file with these settings.",
    )
    preset: str = arg(
        "auto", "Network and process: a row of ddpm_hf.PRESETS. `auto` is sized by --resolution."
    )
    model_config_name_or_path: str | None = arg(
        None,
        "Configuration of a UNet2DModel, a Hub id or a folder, in place of the preset's network.",
    )
    init_from: str | None = arg(
        None,
        "Start from the weights of this pipeline, a Hub id or a folder, with its recipe, network "
        "and process; `--from` for short.",
        aliases=["--from"],
    )

    # Images
    dataset_name: str | None = arg(
        None,
        "Image set: a Hub id, a local folder or parquet file that `datasets` can load, or "
        "`embedded` for the "
        "Fashion-MNIST images in this package.",
    )
    dataset_config_name: str | None = arg(None, "Configuration of the data set, if it has several.")
    train_data_dir: str | None = arg(
        None, "A folder of images, searched with its sub-folders; ignored beside --dataset_name."
    )
    split: str = arg(
        "train", "Split of the data set, for example `train`, `train+test` or `train[:1000]`."
    )
    image_column: str | None = arg(
        None, "Column with the images; found by its type when not given."
    )
    cache_dir: str | None = arg(None, "Where `datasets` keeps downloads and decoded images.")
    resolution: str = arg(
        "64", "Size of the training images: `64`, or height x width as in `32x48`."
    )
    center_crop: bool = arg(
        False, "Crop the centre of an image; the default is a random crop, new at every visit."
    )
    random_flip: bool = arg(False, "Flip images left to right at random.")
    image_mode: Literal["auto", "L", "RGB"] = arg(
        "auto",
        "Train on grey (L) or colour (RGB) images; auto is RGB as soon as one file is of a colour "
        "mode, as many files of grey pictures are.",
    )
    background: str = arg("white", "Colour put behind transparent images: a name or #rrggbb.")
    corrupt_images: Literal["raise", "skip"] = arg(
        "raise",
        "What to do about files that cannot be decoded: stop and name them, or name, count and "
        "skip them.",
    )
    dataloader_num_workers: int = arg(
        0,
        "Processes that decode the images, once, before training; 0: this one. Under --streaming "
        "threads that decode as they are needed.",
    )
    data_on_device: Literal["auto", "yes", "no"] = arg(
        "auto",
        "Keep all images in the device's memory; auto: on a GPU, where they take at most a fifth "
        "of what is free.",
    )
    streaming: bool = arg(
        False,
        "Read the images as they are needed instead of decoding all of them first: for sets larger "
        "than the disk. Needs --max_train_steps.",
    )
    held_out: float = arg(
        0.0,
        "Measure the loss on images not trained on: the set's test or validation split, or else "
        "this fraction of it; 0 is off.",
    )
    held_out_steps: int = arg(500, "Measure the held-out loss every so many optimiser steps.")

    # Classes
    class_conditional: bool = arg(False, "Train on the classes of the images too.")
    label_column: str | None = arg(
        None, "Column with the classes; found by its type when not given."
    )
    class_dropout_prob: float = arg(
        0.1,
        "How often a class is hidden in training, which classifier-free guidance needs (Ho & "
        "Salimans 2022); 0 trains a network without it.",
    )

    # Process and objective. v-prediction with the cosine schedule stays stable under every sampler
    # and few steps.
    ddpm_num_steps: int = arg(DEFAULT_PROCESS["ddpm_num_steps"], "T, the number of noise levels.")
    ddpm_beta_schedule: Literal[BETA_SCHEDULES] = arg(  # type: ignore[valid-type]
        DEFAULT_PROCESS["ddpm_beta_schedule"],
        "Noise schedule; linear ones are rescaled when T is not 1000.",
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = arg(
        DEFAULT_PROCESS["prediction_type"],
        "What the network predicts: the noise, the clean image, or v.",
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = arg(
        DEFAULT_PROCESS["variance_type"],
        "Variance of the reverse steps; fixed_large (Ho et al.) is for 1000 steps only, "
        "learned_range (Nichol & Dhariwal 2021) doubles the output channels.",
    )
    loss: Literal["simple", "hybrid", "vlb"] = arg(
        "simple",
        "simple: the error of the prediction; vlb: the variational bound; hybrid: both, the bound "
        "for the learned variance only.",
    )
    snr_gamma: float = arg(
        5.0,
        "Weight the error by min(SNR, gamma), Hang et al. 2023; 0 is the plain L_simple. Better at "
        "equal time. Without effect on --loss vlb.",
    )
    timestep_sampler: Literal["stratified", "uniform", "loss_second_moment"] = arg(
        "stratified",
        "Timesteps of a batch: one in each equal share of [0, T); independent; or more where the "
        "loss is large (Nichol & Dhariwal 2021, for --loss vlb). Stratified gives a steadier loss.",
    )
    dropout: float | None = arg(
        None,
        "Dropout in the residual blocks, 0.1 in the paper's CIFAR-10; the network's own when not "
        "given.",
    )

    # Optimisation
    train_batch_size: int = arg(32, "Images per device and micro-step.")
    gradient_accumulation_steps: int = arg(1, "Micro-steps per optimiser step.")
    global_batch_size: int | None = arg(
        None,
        "Images per optimiser step over all devices; the accumulation follows from it and "
        "--train_batch_size, then an upper limit.",
    )
    num_epochs: int = arg(
        100, "Passes over the images; without effect when --max_train_steps is given."
    )
    max_train_steps: int | None = arg(
        None, "Optimiser steps; overrides --num_epochs, which overrides those of a recipe."
    )
    optimizer: Literal["adam", "adamw", "muon"] = arg(
        "muon",
        "adam, adamw, or muon: orthogonalised momentum on the convolutions, AdamW on the rest.",
    )
    learning_rate: float = arg(1e-3, "Learning rate of Adam and AdamW.")
    muon_learning_rate: float = arg(
        0.02, "Learning rate of the convolutions under --optimizer muon."
    )
    muon_momentum: float = arg(
        0.95, "Nesterov momentum of the convolutions under --optimizer muon."
    )
    lr_scheduler: Literal[LR_SCHEDULERS] = arg(  # type: ignore[valid-type]
        "cosine", "Learning-rate schedule over all optimiser steps, as diffusers names them."
    )
    lr_warmup_steps: int = arg(100, "Optimiser steps of linear warm-up.")
    adam_beta1: float = arg(0.9, "AdamW's beta1, as in the paper.")
    adam_beta2: float = arg(0.999, "AdamW's beta2.")
    adam_weight_decay: float = arg(0.0, "Weight decay; AdamW with 0 is Adam, as in the paper.")
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = arg(1.0, "Clip the gradient of all parameters to this norm; 0 is off.")
    use_ema: bool = arg(
        True,
        "Average the weights over training and save the average, which samples far better.",
    )
    ema_inv_gamma: float = arg(1.0, "EMA warm-up: decay = 1 - (1 + step / inv_gamma) ** -power.")
    ema_power: float = arg(0.75, "EMA warm-up, see above.")
    ema_max_decay: float = arg(0.9999, "Largest EMA decay.")
    ema_min_decay: float = arg(
        0.0, "Smallest EMA decay; equal to --ema_max_decay it is constant from step 1 (Ho)."
    )
    ema_update_every: int = arg(
        1, "Update the averages every so many steps, by as many steps' decay at once."
    )
    ema_profiles: str = arg(
        "",
        "Relative lengths of further averages, like `0.05,0.10`, stored as snapshots from which "
        "`ddpm-hf ema` makes any length after training (Karras et al. 2024).",
    )
    ema_snapshot_steps: int = arg(500, "Store a snapshot of --ema_profiles every so many steps.")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = arg(
        "auto",
        "Precision of the network; auto: what a short probe finds fastest, bf16 or no. All other "
        "maths is float32.",
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = arg(
        "auto", "Layout of the images in memory; auto: what the probe finds fastest."
    )
    compile: Literal["auto", "yes", "no"] = arg(
        "auto", "torch.compile the network; auto: in long runs, where the probe finds it faster."
    )
    gradient_checkpointing: bool = arg(
        False, "Recompute activations in the backward pass: less memory, slower steps."
    )
    seed: int = arg(0, "Seed of the weights, data order, crops, flips, timesteps and noise.")
    cpu_threads: str = arg(
        "auto", "Threads for computing on a CPU; auto: cores / processes on this machine."
    )

    # Output
    output_dir: str | None = arg(None, "Folder of the run; out/<recipe> when not given.")
    overwrite_output_dir: bool = arg(
        False, "Start afresh: delete the run that stands in --output_dir."
    )
    resume_from_checkpoint: str | None = arg(
        None, "`latest`, or a checkpoint's folder. The same command run again continues by itself."
    )
    checkpointing_steps: int = arg(500, "Save the state of training every so many optimiser steps.")
    checkpoints_total_limit: int | None = arg(2, "Keep so many checkpoints, the newest; 0: all.")
    save_images_epochs: int = arg(
        10, "Save a grid of samples every so many epochs, and at the end; 0: at the end."
    )
    save_images_steps: int | None = arg(
        None, "Save a grid of samples every so many optimiser steps; overrides the epochs."
    )
    save_model_epochs: int = arg(
        10, "Save the pipeline every so many epochs, and at the end; 0: at the end."
    )
    eval_batch_size: int = arg(16, "Images in a grid of samples.")
    ddpm_num_inference_steps: int | None = arg(
        None, "Denoising steps of the sampled grids; 100 when not given."
    )
    logger: Literal["tensorboard", "wandb", "trackio", "none"] = arg(
        "tensorboard", "Where the curves are logged."
    )
    logging_dir: str = arg("logs", "Folder of the logs, relative to --output_dir.")
    push_to_hub: bool = arg(
        False,
        "Push the pipeline to the Hub whenever it is saved, in the background, and at the end.",
    )
    push_steps: int | None = arg(
        None, "Also push it every so many optimiser steps, tagged `step-<number>`."
    )
    push_checkpoints: bool = arg(
        False,
        "Keep the newest checkpoint in a private repository, <hub_model_id>-checkpoints, for "
        "machines that may be taken away.",
    )
    hub_model_id: str | None = arg(
        None, "Name of the repository on the Hub; that of the output folder when not given."
    )
    hub_private_repo: bool = arg(False, "Make that repository a private one.")
    license: str | None = arg(
        None, "Licence of the weights, for the model card, like `mit` or `cc-by-4.0`."
    )
    logging_steps: int = arg(10, "Log the loss every so many optimiser steps, as their mean.")

    def __post_init__(self) -> None:
        self._check_types()
        check_choice("preset", self.preset, PRESETS)
        if self.recipe != "default":
            raise InputError(
                f"recipe={self.recipe!r} alone changes no setting: use "
                f"TrainingConfig.from_recipe({self.recipe!r}, ...)"
            )
        if self.ddpm_num_inference_steps is None:
            self.ddpm_num_inference_steps = min(100, self.ddpm_num_steps)
        self._check_ranges()
        if self.model_config_name_or_path is None:
            unet_config(self.preset, resolution=self.image_size)
        if self.ddpm_beta_schedule == "squaredcos_cap_v2":
            self.ddpm_beta_schedule = "cosine"  # one schedule, one word
        beta_range(self.ddpm_beta_schedule, self.ddpm_num_steps)
        self._check_combinations()

    def _check_types(self) -> None:
        """Convert what is meant (Path to text, 64 to "64", 1 to 1.0); refuse what cannot be."""
        for name, hint in typing.get_type_hints(type(self)).items():
            setattr(self, name, _of_type(name, getattr(self, name), hint))

    def _check_combinations(self) -> None:
        """Raise InputError for settings that exclude each other, or are no words of ours."""
        if self.init_from and not self.model_config_name_or_path:
            raise InputError(
                "init_from alone takes neither recipe nor network from a model: use "
                f"TrainingConfig.from_model({self.init_from!r}, ...)"
            )
        if self.lr_scheduler == "polynomial" and self.learning_rate <= 1e-7:
            raise InputError(
                f"lr_scheduler polynomial ends at 1e-7; learning_rate {self.learning_rate} is below"
            )
        if self.push_steps and not self.push_to_hub:
            raise InputError("push_steps has no effect without --push_to_hub: add it")
        learned = self.variance_type == "learned_range"
        if learned and self.loss == "simple":
            raise InputError(
                "variance_type learned_range is not trained by the simple loss: add --loss hybrid"
            )
        if self.loss == "hybrid" and not learned:
            raise InputError(
                "loss hybrid adds the bound for a learned variance only: add --variance_type "
                "learned_range, or choose --loss vlb or simple"
            )
        if self.streaming and self.max_train_steps is None:
            raise InputError("streaming does not know how long an epoch is: set --max_train_steps")
        if self.streaming and self.data_on_device == "yes":
            raise InputError("data_on_device yes needs all images at hand: leave out --streaming")
        if self.label_column and not self.class_conditional:
            raise InputError("label_column has no effect without --class_conditional: add it")
        self.ema_lengths  # noqa: B018  raises for what is no list of lengths
        threads = self.cpu_threads
        if threads != "auto" and not (threads.isdecimal() and int(threads) > 0):
            raise InputError(f"cpu_threads must be auto or a number of threads; got {threads!r}")
        if self.ema_min_decay > self.ema_max_decay:
            raise InputError(
                f"ema_min_decay must not exceed ema_max_decay; got {self.ema_min_decay} and "
                f"{self.ema_max_decay}"
            )

    def _check_ranges(self) -> None:
        """Raise InputError for the first number out of range."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and (value == INFINITY or not low <= value <= high):
                limit = f"between {low} and {high}" if high < INFINITY else f"at least {low}"
                limit += " and finite" * (value == INFINITY)
                raise InputError(f"{name} must be {limit}; got {value}")
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise InputError(
                f"ddpm_num_inference_steps must be at most ddpm_num_steps={self.ddpm_num_steps}; "
                f"got {self.ddpm_num_inference_steps}"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the training images."""
        sides = str(self.resolution).lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise InputError(
                f"resolution must be a number or HEIGHTxWIDTH, like 64 or 32x48; got "
                f"{self.resolution!r}"
            )
        return int(sides[0]), int(sides[-1])

    @property
    def ema_lengths(self) -> list[float]:
        """Relative lengths (sigma_rel) of --ema_profiles."""
        try:
            lengths = [float(word) for word in self.ema_profiles.split(",") if word.strip()]
        except ValueError:
            lengths = [INFINITY]
        # Karras et al. 2024, eq. (126): a power profile has a relative length below 12 ** -0.5.
        if not all(0 < length < 12**-0.5 for length in lengths) or (
            lengths and len(set(lengths)) < max(2, len(lengths))
        ):
            raise InputError(
                "ema_profiles must be two or more relative lengths between 0 and 0.288, all "
                f"different, like 0.05,0.10; got {self.ema_profiles!r}"
            )
        return lengths

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir or default_folder(self.recipe))

    @property
    def starts_afresh(self) -> bool:
        """Whether to delete the run that stands in the folder."""
        return self.overwrite_output_dir and not self.resume_from_checkpoint

    @property
    def hub_repo(self) -> str:
        """Name of the repository on the Hub."""
        return self.hub_model_id or self.run_dir.resolve().name

    @classmethod
    def from_recipe(cls, recipe: str, **settings) -> "TrainingConfig":
        """A recipe, by name or path, with some settings changed; types are checked as for flags.

        Raises:
            InputError: an unknown recipe or setting, or a value of the wrong type.
        """
        return resolve({**settings, "recipe": str(recipe)}, "from_recipe")

    @classmethod
    def from_model(cls, name: str, **settings) -> "TrainingConfig":
        """What `--from` does: start from a model, with its recipe and some settings changed.

        How the new model samples (clipping, spacing of the timesteps) is this package's default.

        Args:
            name: Id of a repository on the Hub, or a folder.
            settings: As in `from_recipe`; `recipe` takes the place of the model's own.

        Raises:
            InputError: as `from_recipe`, or no model of that name.
        """
        return resolve({**settings, "init_from": str(name)}, "from_model")


def is_saved(name: str | None) -> bool:
    """Whether an image set is a folder written by `save_to_disk`."""
    return name is not None and any((Path(name) / file).is_file() for file in SAVED)


def field_names() -> list[str]:
    """Names of all settings."""
    return [f.name for f in fields(TrainingConfig)]


def _of_type(name: str, value: Any, hint: Any) -> Any:
    """A value in the type of its setting, where it is meant so. Raises InputError if it is not."""
    if typing.get_origin(hint) is Literal:
        check_choice(name, value, typing.get_args(hint))
        return value
    kind = next(kind for kind in (bool, int, float, str) if hint in (kind, kind | None))
    if value is None and hint == kind | None:
        return None
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    number = isinstance(value, Real) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: whole or (number and float(value).is_integer()),
        float: number,
        str: isinstance(value, (str, Path)) or whole,
    }
    if not fits[kind]:
        raise InputError(f"{name} must be of type {kind.__name__}; got {value!r}")
    if value == "" and name not in MAY_BE_EMPTY:
        raise InputError(f"{name} is empty: give it a value, or leave it out")
    return kind(value)


def resolve(given: dict[str, Any], source: str) -> TrainingConfig:
    """Settings on top of the layers below: defaults < preset < recipe file < given.

    Without a recipe, `default` applies where an image set is named, and `fashion-quick` where
    nothing is.

    Args:
        given: Settings; `recipe` is the name or path of a recipe, `init_from` that of a model.
        source: Where they come from, for errors.

    Raises:
        InputError: an unknown recipe or setting, or a value that does not fit.
    """
    given = _layer(given, source)
    names_data = bool({"dataset_name", "train_data_dir"} & given.keys())
    asked, origin = given.get("recipe"), given.get("init_from")
    recipe = asked or ("default" if names_data else "fashion-quick")
    settings = read_recipe(recipe) if asked or not origin else {}
    if origin:
        recipe = asked or f"from-{Path(origin).name}"
        both = settings | given
        afresh = both.get("overwrite_output_dir") and not both.get("resume_from_checkpoint")
        kept, origin = find_kept_origin(origin, both.get("output_dir"), recipe, afresh=bool(afresh))
        settings = recipe_of_origin(origin, kept, settings)
        given["init_from"] = origin
    if names_data:  # the user's images, not those of the recipe or the model
        for name in (*OF_IMAGES, *(OF_READING if origin and not asked else ())):
            settings.pop(name, None)
    if "num_epochs" in given and "max_train_steps" not in given:
        settings.pop("max_train_steps", None)  # it would leave the epochs without effect
    preset = given.get("preset") or str(settings.get("preset", "auto"))
    check_choice("preset", preset, PRESETS)
    below = _layer(PRESETS[preset].settings, f"preset {preset}")
    below |= _layer(settings, f"recipe {recipe}")
    config = TrainingConfig(**below | given | {"recipe": "default"})
    config.recipe = recipe  # the constructor takes none: its settings are in the layers
    return config


def _layer(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """Settings by name, with what YAML reads in its own way as it is meant: 1e-4, yes and no.

    Raises:
        InputError: an unknown setting, with the nearest known one, or a value that is not single.
    """
    hints, meant = typing.get_type_hints(TrainingConfig), {}
    for name, value in settings.items():
        if name not in hints:
            raise InputError(
                f"{source}: unknown setting {name!r}.{did_you_mean(name, field_names())}"
            )
        if value is None or isinstance(value, (dict, list, tuple)):
            raise InputError(
                f"{source}: {name} must be a number, text, true or false; got {value!r}"
            )
        kinds = {hints[name], *typing.get_args(hints[name])}
        if isinstance(value, bool) and "no" in kinds:
            value = "yes" if value else "no"
        if isinstance(value, str) and kinds & {int, float}:
            value = _number(value)
        meant[name] = value
    return meant


def _number(text: str) -> int | float | str:
    """A number in text, a whole one to its last digit; other text as it is."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def recipe_of_origin(name: str, source: Path | None, recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe for going on from a model: `recipe` or the model's own, its network and process.

    What it says of its machine, and settings that this version does not know, are left out; of a
    model on the Hub also paths, which are no places here.

    Raises:
        InputError: as `settings_of_origin`.
    """
    left_out = {*OF_THIS_MACHINE, *OF_SPEED, "recipe", "init_from", "license"}
    found, own = settings_of_origin(name, source), set(field_names()) - left_out
    kept = {key: value for key, value in found.items() if key in own}
    if not is_path(name):
        for key in ("dataset_name", "train_data_dir"):
            if is_path(str(kept.get(key, ""))):
                kept.pop(key, None)
    process = {key: kept[key] for key in OF_ORIGIN}
    return (recipe or kept) | process
