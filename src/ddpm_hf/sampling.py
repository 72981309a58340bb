"""Many images from a pipeline into PNGs or one array file, with memory that does not grow."""

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .errors import InputError, check_choice, check_whole
from .pictures import save_image_grid
from .pipeline import DDPMPipeline, seeded_generators
from .scheduler import DDPMScheduler

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
"""Words of `--scheduler`, and the class of diffusers that each means (for ddpm it is this
package's).
"""


ARRAYS = (".npy", ".npz")
"""Endings of an output that is one file."""


def load_pipeline(repo_or_folder: str, scheduler: str | None = None) -> DDPMPipeline:
    """A pipeline from the Hub or a folder, on the fastest device, with the named scheduler.

    Raises:
        InputError: it cannot be loaded, or an unknown scheduler.
    """
    if scheduler is not None:
        check_choice("scheduler", scheduler, SCHEDULERS)
    pipe = DDPMPipeline.from_pretrained(repo_or_folder)
    if scheduler == "ddpm" and not isinstance(pipe.scheduler, DDPMScheduler):
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    elif scheduler not in (None, "ddpm"):
        config, table = pipe.scheduler.config, {}
        if config.get("beta_schedule") in ("sigmoid", "laplace"):  # words of DDPM's scheduler only
            table = {"trained_betas": pipe.process.beta.tolist()}
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(config, **table)
    if torch.cuda.is_available():
        return pipe.to("cuda")
    return pipe.to("mps") if torch.backends.mps.is_available() else pipe


def sample_batches(
    pipe: DDPMPipeline,
    num_images: int,
    *,
    batch_size: int,
    seed: int,
    num_inference_steps: int,
    class_label: int | str | None = None,
    guidance_scale: float = 1.0,
    eta: float | None = None,
    analytic: bool | None = None,
    solver_order: int = 1,
) -> Iterator[np.ndarray]:
    """Images in batches, uint8 (B, H, W, C); image i is drawn from (seed, i) in any batch.

    Of a class-conditional network all images have the class that is named; without one image i has
    class i, modulo their number.
    """
    for first in range(0, num_images, batch_size):
        numbers = range(first, min(first + batch_size, num_images))
        labels = class_label
        if labels is None and pipe.num_classes:
            labels = [number % pipe.num_classes for number in numbers]
        images = pipe(
            len(numbers),
            seeded_generators(seed, numbers),
            num_inference_steps,
            output_type="np",
            class_labels=labels,
            guidance_scale=guidance_scale,
            eta=eta,
            analytic=analytic,
            solver_order=solver_order,
        ).images
        yield (images * 255).round().astype(np.uint8)


def sample_to(
    output: str | Path | None,
    pipe: DDPMPipeline,
    num_images: int,
    *,
    batch_size: int = 64,
    seed: int = 0,
    num_inference_steps: int = 1000,
    class_label: int | str | None = None,
    guidance_scale: float = 1.0,
    eta: float | None = None,
    analytic: bool | None = None,
    solver_order: int = 1,
    grid: str | Path | None = None,
) -> None:
    """Sample images into `output` as they come, and the first 64 of them into one picture.

    Args:
        output: A folder for PNGs, or a file ending in .npy or .npz (key `arr_0`): uint8 (N, H, W),
            (N, H, W, 3).
        pipe: The pipeline.
        num_images: How many.
        batch_size: How many at once.
        seed: Image i is drawn from (seed, i).
        num_inference_steps: Denoising steps.
        class_label: One class, number or name, for all images of a class-conditional network; all
            classes in turn when not given.
        guidance_scale: 1 + w in classifier-free guidance; 1.0 is off.
        eta, analytic, solver_order: DDIM, the calibrated variance, and second order, as in
            `DDPMPipeline.__call__`.
        grid: File of the picture.

    Raises:
        InputError: nothing to write to, a number below 1, a class that the network does not have,
            or an output that exists already or cannot be written.
    """
    _check(pipe, output, num_images, batch_size, seed, num_inference_steps, grid)
    channels, height, width = pipe.image_shape
    shape = (num_images, height, width) if channels == 1 else (num_images, height, width, channels)
    writer = None
    shown: list[Image.Image] = []
    its_bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=num_images, unit="image", desc="Sampling") as bar, ExitStack() as unfinished:
        unfinished.callback(pipe.set_progress_bar_config, **its_bar)
        for images in sample_batches(
            pipe,
            num_images,
            batch_size=batch_size,
            seed=seed,
            num_inference_steps=num_inference_steps,
            class_label=class_label,
            guidance_scale=guidance_scale,
            eta=eta,
            analytic=analytic,
            solver_order=solver_order,
        ):
            images = images[..., 0] if channels == 1 else images
            shown += [Image.fromarray(image) for image in images[: 64 - len(shown)]]
            if output is not None:
                # Only now: what the pipeline refuses leaves nothing behind.
                if writer is None:
                    writer = _Writer(Path(output), shape)
                    unfinished.callback(writer.discard)
                writer.write(images)
            bar.update(len(images))
        if writer:
            writer.close()
    if grid is not None:
        save_image_grid(shown, grid)


def _check(pipe, output, num_images, batch_size, seed, num_inference_steps, grid) -> None:
    """Raise InputError for what `sample_to` cannot do, before it does anything."""
    if output is None and grid is None:
        raise InputError("name what to write: output, grid or both")
    trained = pipe.scheduler.config.num_train_timesteps
    check_whole("num_images", num_images)
    check_whole("batch_size", batch_size)
    check_whole("seed", seed, 0)
    check_whole("num_inference_steps", num_inference_steps, 1, trained)
    for path in (output, grid):
        if path is None:
            continue
        nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
        if not nearest.is_dir():
            raise InputError(f"{path} cannot be written, {nearest} is a file: name another place")
        if not Path(path).exists():
            continue
        a_folder = path is output and not _is_array(Path(path)) and Path(path).is_dir()
        if not a_folder or any(Path(path).iterdir()):
            raise InputError(f"{path} exists already: name another file or an empty folder")
    kinds = Image.registered_extensions()  # what Pillow reads, some of which it writes
    if output is not None and Path(output).suffix.lower() in kinds:
        raise InputError(f"output must be a folder, .npy or .npz, and grid a picture; got {output}")
    if grid is not None and kinds.get(Path(grid).suffix.lower()) not in Image.SAVE:
        raise InputError(f"grid must end like a picture, for example .png; got {str(grid)!r}")


def _is_array(output: Path) -> bool:
    """Whether an output is one file, not a folder of PNGs."""
    return output.suffix.lower() in ARRAYS


class _Writer:
    """Images one batch after another into PNGs, .npy or .npz."""

    def __init__(self, output: Path, shape: tuple[int, ...]) -> None:
        self.output, self.done, self.array = output, 0, None
        self.digits = len(str(shape[0] - 1))
        if not _is_array(output):
            output.mkdir(parents=True, exist_ok=True)
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        self.partial = output.with_name(f".{output.name}.partial")
        self.packed = output.with_name(f".{output.name}.zip")
        self.array = np.lib.format.open_memmap(self.partial, mode="w+", dtype=np.uint8, shape=shape)

    def write(self, images: np.ndarray) -> None:
        if self.array is None:
            for i, image in enumerate(images, self.done):
                Image.fromarray(image).save(self.output / f"{i:0{self.digits}}.png")
        else:
            self.array[self.done : self.done + len(images)] = images
        self.done += len(images)

    def close(self) -> None:
        if self.array is None:
            return
        self.array.flush()
        if self.output.suffix.lower() == ".npz":
            with zipfile.ZipFile(self.packed, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(self.partial, "arr_0.npy")
            self.packed.replace(self.output)
        else:
            self.partial.replace(self.output)

    def discard(self) -> None:
        """Leave no unfinished array behind; PNGs are whole, and stay."""
        if self.array is not None:
            self.partial.unlink(missing_ok=True)
            self.packed.unlink(missing_ok=True)
