"""Loading what others made: read as data, and checked before anything of it is built.

A repo is a stranger's. Of it are read JSON, and tensors by their names and shapes: no class outside
diffusers, no module, no code, no pickle that is more than tensors. What its configuration asks for
in memory is bounded by what its files hold: the network is first built without memory, on torch's
meta device, and must have the tensors of the weights file.

The other limits keep the checks themselves short. They are far above what is in use: schedules of
4,000 timesteps (Nichol & Dhariwal 2021), images of 1,024 pixels (Gu et al. 2023).
"""

import inspect
import json
import logging
import math
import os
import reprlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin, UNet2DModel
from huggingface_hub import errors, hf_hub_download, resolve_revision, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from .access import explained_hub, one_line, scrubbed, warn_insecure_endpoint
from .errors import InputError
from .scheduler import DDPMScheduler, check_extras

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model"

MAX_CONFIG_BYTES = 8_000_000  # MAX_TIMESTEPS betas of 25 characters, and room
MAX_TIMESTEPS = 100_000  # a float64 table of them is 1 MB
MAX_SIDE = 4096  # pixels; one RGB image of this size is 200 MB in float32
MAX_LEVELS, MAX_LAYERS = 16, 16  # of a network: on the meta device all of them take seconds

REFUSED = ("custom_pipeline", "custom_revision", "trust_remote_code", "use_flashpack", "use_onnx")
"""Arguments of diffusers' `from_pretrained` that run code of a repo or read other weights."""


@contextmanager
def told_in_one_line(name: str, token: str | bool | None) -> Iterator[None]:
    """Turn what cannot be loaded inside the block into InputError, one line."""
    action = "load a pipeline from"
    try:
        with explained_hub(name, action, token=token, or_folder=True):
            yield
    except InputError:
        raise
    except (OSError, TypeError, ValueError) as error:  # diffusers' own, of what it was given
        reason = scrubbed(one_line(error), token)
        raise InputError(f"cannot {action} {one_line(name)!r}: {reason}") from error


def prepare(pipeline: type, name: str, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of a pipeline, downloaded if it is on the Hub and checked, and how to load it.

    Args:
        pipeline: The class, for its `download`.
        name: A folder, or a name on the Hub.
        options: Those of `from_pretrained`.

    Returns:
        The folder, and the options for diffusers, with `use_safetensors` as the files need it.

    Raises:
        InputError, ValueError, OSError: an option that is not for us, a folder that cannot be
            trusted or is damaged, or what the Hub says.
    """
    options = dict(options)
    for refused in REFUSED:
        if options.pop(refused, None):
            raise InputError(
                f"leave out {refused}: {pipeline.__name__} loads data, from safetensors, and never "
                "runs code of a repo"
            )
    given = {"unet", "scheduler"} & options.keys()
    local = os.path.isdir(name)  # unlike Path, an empty name is none
    folder = Path(name) if local else _download(pipeline, name, given, options)
    options["use_safetensors"] = check_folder(
        folder,
        given=given,
        variant=options.get("variant"),
        use_safetensors=options.get("use_safetensors"),
    )
    return folder, options


def _download(pipeline: type, name: str, given: set[str], options: dict[str, Any]) -> Path:
    """The snapshot of a repo in the cache, with the requests that diffusers would make.

    Its index is looked at first: it says what else is downloaded.
    """
    validate_repo_id(name)
    warn_insecure_endpoint()
    where = {key: options.get(key) for key in ("cache_dir", "token")}
    revision, local = options.get("revision"), bool(options.get("local_files_only"))
    try:
        revision = resolve_revision(name, revision=revision, local_files_only=local, **where)
    except (errors.HTTPError, errors.RevisionResolutionError):
        # As diffusers does, what was loaded once is taken from the cache, whatever the Hub says.
        cached = try_to_load_from_cache(name, INDEX, where["cache_dir"], revision)
        if not isinstance(cached, str):
            raise
    else:
        path = hf_hub_download(name, INDEX, revision=revision, local_files_only=local, **where)
        check_index(read_json(Path(path)), given)
    return Path(pipeline.download(name, **options | {"revision": revision}))


def check_folder(
    folder: Path, *, given: Collection[str], variant: str | None, use_safetensors: bool | None
) -> bool:
    """Raise ValueError for a saved pipeline that is not safe, or not possible, to build.

    Args:
        folder: The pipeline's.
        given: Components that the caller passes, whose files are not read.
        variant: Weights other than the usual ones, such as fp16.
        use_safetensors: True for these only, False for .bin only, None for what there is.

    Returns:
        Whether the weights are safetensors.
    """
    index = read_json(folder / INDEX)
    check_index(index, given)
    for code in ("None.py", "unet/diffusers.py", "scheduler/diffusers.py"):
        if (folder / code).exists():  # where diffusers looks for classes before its own
            raise ValueError(f"it has {code}, which asks for code to be run: that is never done")
    if "scheduler" not in given:
        where = component_folder(folder, "scheduler")
        check_scheduler(index["scheduler"][1], read_json(where / "scheduler_config.json"))
    if "unet" in given:
        return True
    where = component_folder(folder, "unet")
    config = read_json(where / "config.json")
    weights = find_weights(where, variant, use_safetensors)
    check_unet(config, weights)
    safe = weights[0].suffix == ".safetensors"
    if not safe:
        logger.warning(
            f"{weights[0].name} is a pickle, of which only tensors are loaded. Convert it: "
            "pipe.save_pretrained(folder) or pipe.push_to_hub(repo) writes safetensors."
        )
    return safe


def component_folder(folder: Path, component: str) -> Path:
    """Old repos, such as google/ddpm-cifar10-32, have all files at the top."""
    return folder / component if (folder / component).is_dir() else folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size without NaN, which no setting can be."""
    if not path.is_file():
        raise ValueError(f"it has no {path.name}, which a saved pipeline has")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"its {path.name} has more than {MAX_CONFIG_BYTES:,} bytes")

    def constant(word: str) -> float:
        if word == "NaN":
            raise ValueError("NaN is no setting")
        return float(word)  # DPM-Solver's lambda_min_clipped is -Infinity

    try:
        value = json.loads(path.read_bytes(), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {path.name} cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"its {path.name} must be a JSON object; got {reprlib.repr(value)}")
    return value


def check_index(index: Mapping[str, Any], given: Collection[str]) -> None:
    """Raise ValueError unless the index names a U-Net and a scheduler of diffusers, only."""
    for key, value in index.items():
        plain = value is None or isinstance(value, str | int | float)
        if key == "_ignore_files" and isinstance(value, list):
            plain = all(isinstance(name, str) for name in value)
        if key.startswith("_") and not plain:
            raise ValueError(f"its {INDEX} has {key}={reprlib.repr(value)}, which asks for code")
        if not key.startswith("_") and key not in ("unet", "scheduler"):
            raise ValueError(
                f"its {INDEX} has {reprlib.repr(key)}: a DDPM pipeline is a unet and a scheduler, "
                "this is another"
            )
    if not (isinstance(name := index.get("_class_name"), str) and name.isidentifier()):
        raise ValueError(f"its {INDEX} must have the name of a class as _class_name")
    for component in ("unet", "scheduler"):
        if component in index or component not in given:
            _check_entry(component, index.get(component))


def _check_entry(component: str, entry: Any) -> None:
    match entry:
        case ["diffusers", str(name)] if name.isidentifier():
            if component == "unet" and name == "UNet2DModel":
                return
            if component == "scheduler" and name.endswith("Scheduler"):
                known = getattr(diffusers, name, None)
                if inspect.isclass(known) and issubclass(known, SchedulerMixin):
                    return
    wanted = "UNet2DModel" if component == "unet" else "one of its schedulers"
    raise ValueError(
        f'{component} in its {INDEX} must be ["diffusers", {wanted}]: nothing of another module is '
        f"loaded; got {reprlib.repr(entry)}"
    )


def check_scheduler(name: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless diffusers' scheduler `name` can be built, with betas in (0, 1]."""
    file = "scheduler_config.json"
    timesteps = config.get("num_train_timesteps", 1000)
    _check_integer(file, "num_train_timesteps", timesteps, MAX_TIMESTEPS)
    _check_private(file, config, "Scheduler")
    betas = config.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and len(betas) == timesteps):
        raise ValueError(
            f"trained_betas in its {file} must be num_train_timesteps={timesteps} numbers; got "
            f"{reprlib.repr(betas)}"
        )
    check_extras(config.get("_ddpm_hf", {}))
    kind = DDPMScheduler if name == "DDPMScheduler" else getattr(diffusers, name)
    built = _build(kind, config, file)
    betas = getattr(built, "betas", torch.ones(1))  # those of flow matching have none
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(
            f"every beta of the schedule in its {file} must be in (0, 1]; got values from "
            f"{betas.min().item()} to {betas.max().item()}"
        )


def check_unet(config: Mapping[str, Any], weights: list[Path]) -> None:
    """Raise ValueError unless the network of a configuration has the tensors of its weights."""
    file = "config.json"
    _check_private(file, config, "UNet2DModel")
    if config.get("quantization_config") is not None:
        raise ValueError(f"its {file} has a quantization_config, which is not supported")
    _check_integer(file, "layers_per_block", config.get("layers_per_block", 2), MAX_LAYERS)
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        value = config.get(key, [])
        if not (isinstance(value, list) and len(value) <= MAX_LEVELS):
            raise ValueError(
                f"{key} in its {file} must be a list of at most {MAX_LEVELS}; got "
                f"{reprlib.repr(value)}"
            )
    if (size := config.get("sample_size")) is not None:
        for side in size if isinstance(size, list) and len(size) == 2 else [size]:
            _check_integer(file, "sample_size", side, MAX_SIDE)
    with torch.device("meta"):
        network = _build(UNet2DModel, config, file)
    wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    found = {_name_now(k): shape for path in weights for k, shape in stored_shapes(path).items()}
    if missing := [key for key, shape in wanted.items() if found.get(key) != shape]:
        raise ValueError(
            f"its weights do not fit its {file}: {len(missing)} of {len(wanted)} tensors are "
            f"missing or of another size, first {missing[0]}, {wanted[missing[0]]} by {file} and "
            f"{found.get(missing[0])} in the file"
        )


def _name_now(key: str) -> str:
    """A tensor's name; that of attention before 2023 in today's words, as diffusers reads it."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    words = key.rsplit(".", 2)
    return ".".join([*words[:-2], *(old.get(word, word) for word in words[-2:])])


def _check_private(file: str, config: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError for keys of diffusers' own that would make it fail, or are of another."""
    name = config.get("_class_name", kind)
    if not (isinstance(name, str) and name.isidentifier() and name.endswith(kind)):
        raise ValueError(f"its {file} is of a {reprlib.repr(name)}, not of a {kind}")
    defaults = config.get("_use_default_values", [])
    if not (isinstance(defaults, list) and all(isinstance(key, str) for key in defaults)):
        raise ValueError(f"_use_default_values in its {file} must be a list of names")


def _check_integer(file: str, key: str, value: Any, high: int) -> None:
    if not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= high):
        raise ValueError(
            f"{key} in its {file} must be an integer between 1 and {high:,}; got "
            f"{reprlib.repr(value)}"
        )


def _build(kind: type, config: Mapping[str, Any], file: str) -> Any:
    """An object of a class of diffusers from the keys that it knows; ValueError for any failure."""
    known = inspect.signature(kind).parameters
    try:
        return kind(**{key: value for key, value in config.items() if key in known})
    except Exception as error:  # whatever a wrong type or size makes raise in another's code
        raise ValueError(
            f"no {kind.__name__} can be built from its {file}: {one_line(error)}"
        ) from error


def find_weights(where: Path, variant: str | None, use_safetensors: bool | None) -> list[Path]:
    """The files of a network's weights that diffusers would load: safetensors first."""
    name = f"{WEIGHTS}.{variant}" if variant else WEIGHTS
    shards = where / f"{WEIGHTS}.safetensors.index.json"
    if use_safetensors is not False:
        if shards.is_file() and not variant:
            return _shards(shards)
        if (path := where / f"{name}.safetensors").is_file():
            _refuse_shards(where, variant)
            return [path]
    if use_safetensors is not True and (path := where / f"{name}.bin").is_file():
        _refuse_shards(where, ".bin")
        return [path]
    wanted = {True: ".safetensors", False: ".bin", None: ".safetensors or .bin"}[use_safetensors]
    raise ValueError(f"it has no weights of the network: {name}{wanted}")


def _refuse_shards(where: Path, word: str | None) -> None:
    """diffusers would prefer these to the one file that is checked."""
    if word and (others := [path.name for path in where.glob("*index*.json") if word in path.name]):
        raise ValueError(f"its {others[0]} is not supported: save its weights in one file")


def _shards(index: Path) -> list[Path]:
    """The files that the weights are spread over, all of them beside their index."""
    value = read_json(index)
    shards = value.get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    for name in names:
        if not (isinstance(name, str) and Path(name).name == name and "\\" not in name):
            raise ValueError(f"its {index.name} names {reprlib.repr(name)}, outside its folder")
        if not (name.endswith(".safetensors") and (index.parent / name).is_file()):
            raise ValueError(f"its {index.name} names {name!r}, which is not there")
    if not names or not isinstance(value.get("metadata"), dict):
        raise ValueError(f"its {index.name} must have a metadata and a weight_map")
    return [index.parent / name for name in sorted(set(names))]


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a weights file, by name, without loading them.

    Raises:
        ValueError: a damaged file, more than tensors in it, or tensors larger than the file.
    """
    if path.suffix == ".safetensors":
        try:  # the header is checked against the length of the file
            with safe_open(path, "pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"its {path.name} is damaged: {one_line(error)}") from error
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch's own words would say how to run the code in it
        raise ValueError(
            f"its {path.name} is damaged, or a pickle of more than tensors, which could run code: "
            "it is not loaded"
        ) from error
    if not (
        isinstance(tensors, dict)
        and all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    ):
        raise ValueError(f"its {path.name} must hold tensors by name")
    # A view of few numbers may look large.
    if sum(math.prod(t.shape) * t.element_size() for t in tensors.values()) > path.stat().st_size:
        raise ValueError(f"its {path.name} holds less than its tensors pretend")
    return {str(key): tuple(tensor.shape) for key, tensor in tensors.items()}
