"""DDPMPipeline: one denoising loop for every diffusers scheduler."""

import copy
import errno
import inspect
import shutil
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import diffusers
import numpy as np
import torch
from diffusers import ImagePipelineOutput, UNet2DModel
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from .arguments import (
    ClassLabels,
    check_generators,
    check_latents,
    check_output_type,
    check_variance,
    class_numbers,
)
from .calibration import forget
from .chain import set_chain
from .checkpoint import write_text
from .errors import InputError, check_whole
from .functional import like, mix_seed
from .hub import CONFIGURATIONS, files_beside, origin_files, push_to_hub, without_path
from .inversion import (
    Images,
    cut_off,
    estimate_timestep,
    invert_ddim,
    noise_of_timestep,
    noised_as,
    read_images,
    read_noisy_image,
    timestep_of_noise,
)
from .loading import prepare, told_in_one_line
from .multistep import SecondOrder
from .scheduler import DDPMScheduler
from .uploads import freeze

logger = logging.get_logger(__name__)


KNOWS_VARIANCE = diffusers.DDPMParallelScheduler
"""A scheduler of diffusers that reads a learned variance, of images of any channels."""


def seeded_generators(seed: int, numbers: Iterable[int]) -> list[torch.Generator]:
    """A generator per image, of (seed, number); on the CPU: every device draws the same."""
    return [torch.Generator().manual_seed(mix_seed(seed, number)) for number in numbers]


class Denoised(NamedTuple):
    """Samples of the clean image behind a noisy one.

    Attributes:
        images: PIL images, or as `output_type` says.
        noise_level: Standard deviation of the noise that was taken out, in grey levels of 255.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    noise_level: float


class DenoisingStep(NamedTuple):
    """One reverse step: the timestep it left, x_s after it, the clean image predicted before."""

    t: int | float
    x_s: Tensor
    x_0_hat: Tensor


class DDPMPipeline(diffusers.DDPMPipeline):
    """`diffusers.DDPMPipeline` for any image shape, precision and diffusers scheduler.

    What it saves opens with plain diffusers. Images stay float32 through the whole chain whatever
    the network's precision, and a scheduler that takes no generator can be swapped in. `denoise`
    gives every step.

    Args:
        unet: The network.
        scheduler: Any diffusers scheduler; a plain `diffusers.DDPMScheduler` becomes this
            package's.
    """

    _revision: str | None = None
    """Of the repository that it was loaded from."""

    def __init__(self, unet: UNet2DModel, scheduler) -> None:
        if type(scheduler) is diffusers.DDPMScheduler:
            scheduler = DDPMScheduler.from_config(scheduler.config)
        if isinstance(scheduler, DDPMScheduler):
            _ = scheduler.extras  # refuses what a newer version wrote
        super().__init__(unet=unet, scheduler=scheduler)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a pipeline from a folder or the Hub, after a check of all that it consists of.

        The weights are safetensors where there are any; a repo that has only a .bin loads with a
        warning, tensors only. No code of a repo is run.

        Args:
            pretrained_model_name_or_path: A folder, or a name on the Hub.
            kwargs: As in diffusers: revision, token, cache_dir, local_files_only, force_download,
                variant, dtype, use_safetensors; unet or scheduler to take in place of the saved.

        Raises:
            InputError: it is not there or may not be read, it is damaged or not a DDPM pipeline, or
                it asks for code or for more memory than its files hold.
        """
        name = str(pretrained_model_name_or_path)
        with told_in_one_line(name, kwargs.get("token")):
            folder, options = prepare(cls, name, kwargs)
            pipe = super().from_pretrained(str(folder), **options)
        # A folder whole, so that from elsewhere it is no id on the Hub.
        pipe.register_to_config(
            _name_or_path=str(Path(name).absolute()) if Path(name).is_dir() else name
        )
        pipe._revision = kwargs.get("revision")
        if "unet" in kwargs:
            if "scheduler" not in kwargs and forget(pipe.scheduler):
                logger.warning(
                    f"the calibration of {name} is that of its own network, and is left out for "
                    "the one given: ddpm-hf calibrate measures it"
                )
        else:
            pipe.unet._loaded_from = pipe.name_or_path, pipe._revision
        return pipe

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        size = self.unet.config.sample_size
        if size is None:
            raise InputError(
                "the network's configuration has no sample_size: set it, "
                "pipe.unet.register_to_config(sample_size=32)"
            )
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs,
    ) -> None:
        """Save to a folder, as diffusers does, in safetensors only; push it too if asked to.

        Raises:
            InputError: safe_serialization=False; or as `push_to_hub`, to which `kwargs` go.
            OSError: it could not be written.
        """
        if not safe_serialization:
            raise InputError("safe_serialization must be True: pickles run code when they load")
        options = dict(max_shard_size=max_shard_size, use_flashpack=use_flashpack)
        try:
            super().save_pretrained(save_directory, variant=variant, **options)
        except SafetensorError as error:  # its word for a disk that is full
            raise OSError(errno.EIO, str(error), str(save_directory)) from error
        _forget_where_it_was(Path(save_directory))
        if push_to_hub:
            repo = kwargs.pop("repo_id", Path(save_directory).resolve().name)
            self.push_to_hub(repo, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Push the pipeline and its card as one commit; the arguments are those of diffusers.

        What is known of a pipeline where it was loaded from, its card, recipe and results, goes
        with it, unless its network was exchanged for another. `hub.push_to_hub` has more choices.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            InputError: as `hub.push_to_hub`; a subfolder, which no pipeline can be loaded from; a
                variant, which would be the only weights there.
        """
        if subfolder or variant:
            raise InputError("a pipeline is pushed whole: leave out subfolder and variant")
        with TemporaryDirectory() as folder:
            origin, place = None, (self.name_or_path, self._revision)
            if getattr(self.unet, "_loaded_from", None) == place:
                origin = origin_files(self.name_or_path, token, self._revision)
            if origin is not None:
                beside = files_beside(origin)
                if repo_id == self.name_or_path:  # the card there may be newer
                    beside = [path for path in beside if path.name != "README.md"]
                freeze(origin, beside, Path(folder))
            self.save_pretrained(folder, safe_serialization=safe_serialization)
            pushed = push_to_hub(
                folder,
                repo_id,
                private=private,
                create_pr=create_pr,
                message=commit_message,
                token=token,
            )
        return pushed.url

    @property
    def num_classes(self) -> int:
        """Classes of a class-conditional network, the null class not counted; else 0.

        Networks of other trainers have no null class.
        """
        extras = self.scheduler.config.get("_ddpm_hf", {})
        null = extras.get("null_class", bool(extras))
        return (self.unet.config.num_class_embeds or int(null)) - int(null)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        eta: float | None = None,
        analytic: bool | None = None,
        solver_order: int = 1,
    ) -> ImagePipelineOutput | tuple:
        """Algorithm 2: sample images.

        Args:
            batch_size: Number of images.
            generator: One for the batch, or a list with one per image: then image i does not depend
                on the others.
            num_inference_steps: Denoising steps, at most the number of trained timesteps.
            output_type: `pil`; `np` or None, (B, H, W, C) float32 in [0, 1]; or `pt`,
                (B, C, H, W).
            return_dict: False returns (images,).
            class_labels: For a class-conditional network: one class for all images, or one each,
                (B,); a number, or a name if the scheduler's configuration has them.
            guidance_scale: 1 + w in classifier-free guidance (Ho & Salimans 2022); 1.0 is off.
            latents: The noise to start from, (B, C, H, W), in place of a draw. To get back images
                that `encode` took, use `decode`, which steps as it did.
            eta: DDIM with so much of DDPM's noise, 0 to 1, on this package's scheduler; None is
                DDPM.
            analytic: Sample with the variance of `ddpm-hf calibrate`. Without it DDPM does, where
                the model is calibrated and a step is left out, and DDIM does not.
            solver_order: 2 is DDIM (eta = 0) of second order, the best in few steps, see multistep;
                with the calibrated variance where the model has it and `analytic` is not False:
                that did good in 5 and 10 steps, and harm from 25 on.

        Raises:
            ValueError: unknown output type.
            InputError: batch_size < 1, num_inference_steps out of range, a list of generators of
                another length; classes, latents, eta, analytic or solver_order that do not fit.
        """
        check_output_type(output_type)
        steps = self.denoise(
            batch_size,
            generator=generator,
            num_inference_steps=num_inference_steps,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            latents=latents,
            eta=eta,
            analytic=analytic,
            solver_order=solver_order,
        )
        images = self._finish(steps, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _finish(self, steps: Iterator["DenoisingStep"], output_type: str | None):
        """The images that the last of some steps leaves, as `output_type` says."""
        for last in steps:  # noqa: B007  the last step is the result
            pass
        _check_finite(last.x_s)
        images = (last.x_s / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return images

    @torch.no_grad()
    def denoise(
        self,
        batch_size: int = 1,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        eta: float | None = None,
        analytic: bool | None = None,
        solver_order: int = 1,
    ) -> Iterator[DenoisingStep]:
        """The reverse process, step by step; the last x_s is the image, in [-1, 1].

        x_0_hat is computed from the network's output, guided if so, whatever the scheduler, and
        clipped as the scheduler's configuration says, also for those of diffusers that do not clip.
        Arguments: those of `__call__`.

        Raises:
            InputError: batch_size < 1, num_inference_steps out of range, a list of generators of
                another length; classes, latents, eta, analytic or solver_order that do not fit.
        """
        if type(self.scheduler) is diffusers.DDPMScheduler:
            self.scheduler = DDPMScheduler.from_config(self.scheduler.config)
        check_whole("batch_size", batch_size)
        check_generators(generator, "batch_size", batch_size)
        check_variance(self.scheduler, eta, analytic, solver_order)
        device, shape = self._execution_device, (batch_size, *self.image_shape)
        labels = self._class_numbers(class_labels, batch_size, guidance_scale, device)
        if latents is not None:
            check_latents(latents, self.image_shape, batch_size)
        ours = isinstance(self.scheduler, DDPMScheduler)
        ancestral = ours and eta is None and solver_order == 1
        calibrated = ours and self.scheduler.analytic is not None
        optimal = calibrated and ancestral if analytic is None else analytic
        # Optimal timesteps are so for the optimal variance, a step by one prediction.
        set_chain(
            self.scheduler,
            self.process,
            num_inference_steps,
            device,
            optimal=bool(optimal) and solver_order == 1,
            whole=self.unet.config.time_embedding_type == "learned",
        )
        if ancestral and not optimal:
            self._warn_of_large_variance(num_inference_steps)
        # Of this chain alone: the pipeline may sample another while this one is stepped through.
        scheduler = copy.copy(self.scheduler)
        x_t = (
            self._draw(shape, generator, device) if latents is None else latents.float().to(device)
        )
        x_t = x_t * float(scheduler.init_noise_sigma)
        solver = None
        if solver_order == 2:
            fewer = calibrated and num_inference_steps < len(scheduler.beta)
            noisy = fewer if analytic is None else analytic
            solver = SecondOrder(scheduler, analytic=noisy)
        yield from self._reverse(
            scheduler,
            x_t,
            generator,
            labels,
            guidance_scale,
            solver,
            eta=eta,
            analytic=analytic,
        )

    def _reverse(
        self,
        scheduler,
        x_t: Tensor,
        generator,
        labels: Tensor | None,
        guidance_scale=1.0,
        solver: SecondOrder | None = None,
        **variance,
    ) -> Iterator[DenoisingStep]:
        """The steps from x_t, (B, C, H, W), along a scheduler's timesteps."""
        process = scheduler if isinstance(scheduler, DDPMScheduler) else self.process
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        asked = {name: value for name, value in variance.items() if value is not None}
        for t in self.progress_bar(scheduler.timesteps):
            x_in = scheduler.scale_model_input(x_t, t)
            output = self._guided(x_in.to(self.unet.dtype), t, labels, guidance_scale)
            x_0_hat = process.predict_x_0(output, x_in, t.item())
            if solver is not None:
                x_t, _ = solver.step(output, x_t, t, generator)
            elif asked:
                x_t, _ = process.reverse_step(output, x_t, t, generator, **asked)
            else:
                # diffusers' own schedulers know no learned variance, or one of RGB images only.
                if process is not scheduler and not isinstance(scheduler, KNOWS_VARIANCE):
                    output, _ = process.split_output(output, x_t.shape[1])
                x_t = scheduler.step(output, t, x_t, **options).prev_sample
            yield DenoisingStep(t.item(), x_t, x_0_hat)

    # From images back

    @torch.no_grad()
    def encode(
        self,
        images: Images,
        num_inference_steps: int = 100,
        *,
        class_labels: ClassLabels | None = None,
        iterations: int = 5,
    ) -> Tensor:
        """The noise that DDIM makes of these images: `decode` inverts it, to a small error.

        Each step is solved by fixed-point iteration; `iterations` = 1 is the plain inversion. On
        garments and in 50 steps, decoding missed them by 0.75 of 255 grey levels (root mean
        square), and after the plain inversion by 12. In 10 steps it missed them by 18 and more:
        `benchmarks/inversion.py`.

        Args:
            images: PIL images of the network's mode, L or RGB; or a tensor (B, C, H, W) or an array
                (B, H, W, C), uint8, or float in [-1, 1]. Floats that all lie in [0, 1], as a
                pipeline's own with output_type `np` or `pt`, are not rescaled, and warned about.
            num_inference_steps: Timesteps, evenly spaced from T - 1 to 0.
            class_labels: As in `__call__`.
            iterations: Evaluations of the network a step.

        Returns:
            (B, C, H, W) float32, close to standard normal.

        Raises:
            InputError: images that do not fit the network or their range, or a bad number.
        """
        check_whole("iterations", iterations)
        x_0 = read_images(images, self.image_shape).to(self._execution_device)
        timesteps = self._even_timesteps(num_inference_steps)
        labels = self._class_numbers(class_labels, len(x_0), 1.0, x_0.device)
        predict, process = self._predictor(labels), self.process
        latents = invert_ddim(predict, process, x_0, timesteps, iterations=iterations)
        _check_finite(latents)
        return latents

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        num_inference_steps: int = 100,
        *,
        class_labels: ClassLabels | None = None,
    ) -> Tensor:
        """The images that DDIM makes of this noise, float32 (B, C, H, W), in [-1, 1] or near it.

        Deterministic, on `encode`'s timesteps, and without clipping, which could not be undone.
        Arguments: those of `encode`.

        Raises:
            InputError: latents of another shape, or not finite, or a bad number.
        """
        check_latents(latents, self.image_shape)
        process, timesteps = self.process, self._even_timesteps(num_inference_steps)
        x = latents.float().to(self._execution_device)
        predict = self._predictor(self._class_numbers(class_labels, len(x), 1.0, x.device))
        for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
            x_0_hat = process.to_x_0(predict(x, torch.tensor(t)), x, t)
            x = process.ddim_mean(x_0_hat, x, t, s)
        _check_finite(x)
        return x

    @torch.no_grad()
    def denoise_image(
        self,
        image: Images,
        noise_level: float | None = None,
        *,
        num_images: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 100,
        class_label: int | str | None = None,
        output_type: str | None = "pil",
    ) -> Denoised:
        """Sohl-Dickstein et al. 2015, section 2.5: samples of the clean image behind a noisy one.

        The image is taken for x_t at the timestep that has its noise, and the reverse process runs
        from there. Pixels at the very ends of an image that nowhere goes beyond black and white,
        as any of bytes, may have lost noise there: it is drawn anew.

        Args:
            image: One image as in `encode`. Floats are noise on a clean image in [-1, 1]: they may
                lie six of its deviations beyond, at noise_level 20 in [-1.94, 1.94], and in
                [-13, 13] where no level is given.
            noise_level: Standard deviation of its Gaussian noise, in grey levels of 255; estimated
                by the network when not given: on garments some 7 % too low at 50 and 14 % at 10,
                and 25 % too low where noise was cut off (`benchmarks/inversion.py`).
            num_images: Samples.
            generator: One, or one for each sample.
            num_inference_steps: Steps from pure noise, 1 to T; from less noise there are fewer.
            class_label: Of a class-conditional network: one for all samples.
            output_type: As in `__call__`.

        Raises:
            InputError: an image that does not fit the network or its range, noise beyond what it
                knows, a bad number, several classes, or a list of generators of another length.
        """
        check_output_type(output_type)
        process = self.process
        check_whole("num_images", num_images)
        check_whole("num_inference_steps", num_inference_steps, 1, len(process.beta))
        check_generators(generator, "num_images", num_images)
        if class_label is not None and not isinstance(class_label, (Integral, str)):
            raise InputError(
                "class_label is one for all samples of an image, a number or a name; got "
                f"{class_label!r}"
            )
        t = None if noise_level is None else timestep_of_noise(process, noise_level)
        y = read_noisy_image(image, self.image_shape, noise_level).to(self._execution_device)
        labels = self._class_numbers(class_label, num_images, 1.0, y.device)
        if t is None:
            one = labels if labels is None else labels[:1]
            t = estimate_timestep(self._predictor(one), process, y)
        scheduler = copy.copy(process)
        steps = max(1, round(num_inference_steps * (t + 1) / len(process.beta)))
        timesteps = torch.linspace(t, 0, steps).round().long().unique().flip(0)
        # The class's own: a person may have given the pipeline's one other timesteps.
        DDPMScheduler.set_timesteps(scheduler, timesteps=timesteps.tolist())
        x_t = like(process.alpha_bar_at(t).sqrt(), y) * y.expand(num_images, -1, -1, -1)
        if cut_off(y).any():
            eps = self._draw(x_t.shape, generator, y.device)
            x_t, _ = noised_as(self._predictor(labels), process, y, torch.tensor(t), eps)
        # The trained variance is for steps t -> t - 1. For longer ones it is the calibrated one, or
        # that of the type, but for fixed_large: DDIM with eta 1 is fixed_small.
        if len(timesteps) == t + 1:
            variance = dict(analytic=False)
        elif process.analytic is None and process.config.variance_type.startswith("fixed_large"):
            variance = dict(eta=1.0)
        else:
            variance = {}
        steps = self._reverse(scheduler, x_t, generator, labels, **variance)
        images = self._finish(steps, output_type)
        return Denoised(images, noise_of_timestep(process, t))

    def _predictor(self, labels: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """(x_t, t) -> the network's prediction without variance channels, float32 (B, C, H, W).

        labels: (B,), or (1,) for any number of images.
        """
        process = self.process

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            of = labels if labels is None else labels.expand(len(x_t))
            output = self._guided(x_t.to(self.unet.dtype), t.to(x_t.device), of, 1.0)
            return process.split_output(output, x_t.shape[1])[0]

        return predict

    def _even_timesteps(self, num_inference_steps: int) -> list[int]:
        """Evenly spaced timesteps from T - 1 to 0, descending. Raises InputError."""
        trained = self.scheduler.config.num_train_timesteps
        check_whole("num_inference_steps", num_inference_steps, 2, trained)
        chain = torch.linspace(trained - 1, 0, num_inference_steps, dtype=torch.float64)
        return chain.round().long().tolist()

    # The network, and what belongs to a call

    def _guided(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Ho & Salimans 2022, eq. (6): (1 + w) prediction(class) - w prediction(null class).

        Both come from one call of the network. It means the same for eps, x_0 and v, each of which
        is linear in the others at a given x_t. A learned variance is that of the class.

        Args:
            x_t: Noised images, (B, C, H, W).
            t: The timestep.
            labels: Classes, (B,); None for an unconditional network.
            guidance_scale: 1 + w.

        Returns:
            The network's output, float32, (B, C, H, W) or (B, 2C, H, W).
        """
        if labels is None:
            return self.unet(x_t, t).sample.float()
        if guidance_scale == 1:
            return self.unet(x_t, t, class_labels=labels).sample.float()
        null = torch.full_like(labels, self.unet.config.num_class_embeds - 1)
        both = self.unet(torch.cat([x_t, x_t]), t, class_labels=torch.cat([labels, null])).sample
        (of_class, variance), (of_null, _) = (
            output.tensor_split([x_t.shape[1]], dim=1) for output in both.float().chunk(2)
        )
        return torch.cat([of_null + guidance_scale * (of_class - of_null), variance], dim=1)

    def _class_numbers(
        self,
        class_labels: ClassLabels | None,
        batch_size: int,
        guidance_scale: float,
        device: torch.device,
    ) -> Tensor | None:
        """Classes as numbers, (B,); None for an unconditional network. Raises InputError."""
        numbers = class_numbers(
            class_labels,
            batch_size,
            guidance_scale,
            num_embeds=self.unet.config.num_class_embeds,
            num_classes=self.num_classes,
            names=self.scheduler.config.get("_ddpm_hf", {}).get("class_names", []),
        )
        return None if numbers is None else torch.tensor(numbers, device=device)

    @property
    def process(self) -> DDPMScheduler:
        """The diffusion process that the scheduler samples from, as this package's scheduler."""
        if isinstance(self.scheduler, DDPMScheduler):
            return self.scheduler
        config = dict(self.scheduler.config)
        config.pop("_use_default_values", None)  # a default of theirs is no default of ours
        # DPM-Solver's default is None.
        config["variance_type"] = config.get("variance_type") or "fixed_small"
        return DDPMScheduler.from_config(config)

    def _warn_of_large_variance(self, num_inference_steps: int) -> None:
        """Warn where each step would add the noise of the whole way to the next timestep."""
        trained = self.scheduler.config.num_train_timesteps
        large = self.scheduler.config.variance_type.startswith("fixed_large")
        if large and num_inference_steps < trained:
            logger.warning(
                f"variance_type='fixed_large' is for all {trained} steps; with fewer, as now, "
                "the samples will be noisy. Use DDIM or another solver, or pipe.scheduler = "
                "DDPMScheduler.from_config(pipe.scheduler.config, variance_type='fixed_small')"
            )

    def _draw(self, shape: tuple[int, ...], generator, device: torch.device) -> Tensor:
        """Standard normal float32 noise; without a generator MPS takes the CPU's, as stock does."""
        first = generator[0] if isinstance(generator, list) else generator
        on_cpu = device.type == "mps" and first is None
        where = torch.device("cpu") if on_cpu else device
        return randn_tensor(shape, generator, where, torch.float32).to(device)


def _check_finite(images: Tensor) -> None:
    """Raise InputError for what a network made that is no number."""
    if not bool(images.isfinite().all()):
        raise InputError(
            "the network's output is not finite: its weights are broken, or its precision is too "
            "low"
        )


def save_whole(pipe: DDPMPipeline, output: str | Path) -> None:
    """Save a pipeline into a new or empty folder, whole or not at all.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    place = Path(output).absolute()
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipe.save_pretrained(partial)
        if place.is_dir():  # it may be the current one, which is not to be another's afterwards
            for path in partial.iterdir():
                path.replace(place / path.name)
        else:
            partial.replace(place)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _forget_where_it_was(folder: Path) -> None:
    """Take the path that diffusers notes out of a saved pipeline."""
    for name in CONFIGURATIONS:
        if (text := without_path(folder / name)) is not None:
            write_text(folder / name, text)
