"""The diffusion process: q, its posterior, and the reverse step p (Ho et al. 2020, eqs. 2-12).

Notation. `t` is 0-based: t = 0 is the paper's t = 1. A reverse step goes from t to any s < t, and s
= -1 is the clean image, so `alpha_bar` has T + 1 entries of which the first, alpha_bar_at(-1), is
1. Tables are float64 on the CPU (MPS has no float64, and a look-up by a CPU timestep never waits
for a device); images are float32.
"""

import functools
import math
from typing import NamedTuple

import diffusers
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput, rescale_zero_terminal_snr
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .errors import InputError, check_choice, check_whole
from .functional import Gaussian, like, make_betas

VARIANCE_TYPES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
FORMAT = 1  # of the extras under `_ddpm_hf`

Timestep = int | Tensor
"""One timestep for the whole batch, or one per image: (B,) integers."""


def check_extras(extras: object) -> None:
    """Raise ValueError for a `_ddpm_hf` that is newer than this version, or not of this package."""
    number = extras.get("format", FORMAT) if isinstance(extras, dict) else None
    if not isinstance(number, int):
        raise ValueError(f"_ddpm_hf must be an object with a format number; got {extras!r:.100}")
    if number > FORMAT:
        raise ValueError(
            f"this scheduler was saved by a newer ddpm_hf (format {number}, this one reads up to "
            f"{FORMAT}): pip install --upgrade ddpm_hf"
        )
    names = extras.get("class_names", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"class_names in _ddpm_hf must be a list of names; got {names!r:.100}")


class ReverseStep(NamedTuple):
    """p_theta(x_s | x_t), and the network's guess of the clean image that it was built from."""

    distribution: Gaussian
    x_0_hat: Tensor


class DDPMScheduler(diffusers.DDPMScheduler):
    """`diffusers.DDPMScheduler`, exact: float64 tables, any step t -> s, every variance word.

    A drop-in subclass: the same configuration, signatures and class name, so what it saves opens
    without ddpm_hf. What stock has no key for stands under `config._ddpm_hf`, which stock carries
    along unread.

    It differs from stock, on purpose and with a test each, in this: the last step adds no noise
    whatever its timestep; coefficients are float64 until they meet the image, also for
    half-precision images; `fixed_large_log` means fixed_large, not NaN; an unknown variance,
    prediction type or spacing raises ValueError.

    Args: those of `diffusers.DDPMScheduler`.
    """

    # wraps: diffusers reads the constructor's signature to know which configuration keys are ours.
    @functools.wraps(diffusers.DDPMScheduler.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # A pipeline records a component's module on disk; naming stock's opens our repos where we
        # are not installed.
        self.__module__ = "diffusers"
        config = self.config
        check_choice("variance_type", config.variance_type, VARIANCE_TYPES)
        check_choice("prediction_type", config.prediction_type, PREDICTION_TYPES)
        check_choice("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
        if config.trained_betas is not None:
            beta = torch.tensor(config.trained_betas, dtype=torch.float64)
        else:
            beta = make_betas(
                config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end
            )
        if config.rescale_betas_zero_snr:
            beta = rescale_zero_terminal_snr(beta)
        self._checked_analytic = None
        self.beta = beta
        self.alpha = 1 - beta
        self.alpha_bar = torch.cat([beta.new_ones(1), self.alpha.cumprod(0)])
        self._check_betas(beta)

    def _check_betas(self, beta: Tensor) -> None:
        """Raise ValueError for a schedule that is no diffusion process."""
        if len(beta) != self.config.num_train_timesteps or len(beta) < 2:
            raise ValueError(
                f"a schedule needs num_train_timesteps >= 2 betas; got {len(beta)} betas and "
                f"num_train_timesteps={self.config.num_train_timesteps}"
            )
        if not (bool((beta > 0).all()) and bool((beta <= 1).all())):
            raise ValueError(
                f"every beta must be in (0, 1]; got values from {beta.min().item()} to "
                f"{beta.max().item()}"
            )
        if not bool((self.alpha_bar[:-1] > 0).all()):
            first = int((self.alpha_bar == 0).nonzero()[0]) - 1
            raise ValueError(
                "only the last timestep may be pure noise, alpha_bar = 0, since no step leads back "
                f"from one to another; with these betas timestep {first} of {len(beta)} is"
            )
        infinite = not bool(self.alpha_bar[-1].rsqrt().float().isfinite())
        if infinite and self.config.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type='epsilon' cannot recover the image from pure noise, "
                "alpha_bar = 0, which rescale_betas_zero_snr makes; use 'v_prediction' or 'sample'"
            )

    # What stock has no key for

    @property
    def extras(self) -> dict:
        """The private part of the configuration, `_ddpm_hf`; empty where stock wrote it.

        Raises:
            ValueError: it was written in a format newer than this version knows, or not by us.
        """
        extras = self.config.get("_ddpm_hf", {})
        check_extras(extras)
        return extras

    @property
    def analytic(self) -> dict | None:
        """What `calibration.store` measured, as it is on disk; None where nothing was.

        Raises:
            InputError: it was measured with another noise schedule than this, or is damaged.
        """
        found = self.extras.get("analytic")
        if found is not None and found is not self._checked_analytic:
            self._check_analytic(found)
            self._checked_analytic = found
        return found

    def _check_analytic(self, found: dict) -> None:
        """Raise InputError for statistics that are not what `calibration.store` writes."""
        again = "calibrate the model again with `ddpm-hf calibrate`"
        try:
            columns = [found["mean_square_eps"], found.get("x_0_variance", [])]
            eps, around = (torch.tensor(column, dtype=torch.float64) for column in columns)
            total, levels = float(found["alpha_bar_sum"]), float(found["clip_pixels"])
            chains = [
                (int(count), torch.tensor(chain, dtype=torch.int64))
                for count, chain in found["timesteps"].items()
            ]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"the stored statistics of the calibration are damaged ({error!r}): {again}"
            ) from error
        num_timesteps = len(self.beta)
        if len(eps) != num_timesteps or not math.isclose(total, self.alpha_bar.sum()):
            raise InputError(
                f"the stored statistics are those of {len(eps)} timesteps of another noise "
                f"schedule than this scheduler's: {again}, or go back to the schedule that it was "
                "trained with"
            )
        sound = bool(eps.isfinite().all()) and 0 < levels < math.inf
        if "x_0_variance" in found:
            sound &= len(around) == num_timesteps and bool(((around >= 0) & (around <= 1)).all())
        for count, chain in chains:
            sound &= len(chain) == count > 1 and bool((chain.diff() < 0).all())
            sound = sound and int(chain[-1]) >= 0 and int(chain[0]) < num_timesteps
        if not sound:
            raise InputError(
                "the stored statistics of the calibration are damaged (numbers out of range, or "
                f"timesteps that are no descending list of so many): {again}"
            )

    # Forward process q

    def alpha_bar_at(self, t: Timestep | float) -> Tensor:
        """alpha_bar_t as float64 on the CPU, () or (B,); t = -1 is the clean image, alpha_bar = 1.

        A float t lies between two timesteps (Euler and Heun step there): the noise level
        sqrt(1 / alpha_bar - 1) is interpolated linearly, as diffusers does.

        Raises:
            ValueError: a timestep that does not exist.
        """
        t = torch.as_tensor(t, device="cpu")
        if bool((t < -1).any()) or bool((t >= len(self.beta)).any()):
            raise ValueError(
                f"timesteps must be in [-1, {len(self.beta) - 1}], -1 for the clean image; got "
                f"{t.tolist()}"
            )
        if not t.is_floating_point():
            return self.alpha_bar[t + 1]
        low, high = self.alpha_bar[t.floor().long() + 1], self.alpha_bar[t.ceil().long() + 1]
        fraction = t.double() - t.double().floor()
        sigma = (1 / low - 1).sqrt().lerp((1 / high - 1).sqrt(), fraction)
        # Where alpha_bar is 0 the noise level is infinite, and interpolating it is no number.
        return torch.where(fraction == 0, low, torch.where(high == 0, high, 1 / (1 + sigma**2)))

    def q_sample(self, x_0: Tensor, eps: Tensor, t: Timestep) -> Tensor:
        """Eq. (4): x_t ~ q(x_t | x_0), the image with all the noise of t steps at once.

        Args:
            x_0: Clean images, (B, C, H, W) in [-1, 1].
            eps: Standard normal noise, (B, C, H, W).
            t: Timesteps, (B,).
        """
        alpha_bar = self.alpha_bar_at(t)
        return like(alpha_bar.sqrt(), x_0) * x_0 + like((1 - alpha_bar).sqrt(), x_0) * eps

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Timestep, s: Timestep) -> Gaussian:
        """Eqs. (6)-(7): q(x_s | x_t, x_0), what every reverse step is trained to match.

        Args:
            x_0, x_t: Clean and noised images, (B, C, H, W) in [-1, 1].
            t, s: Timesteps, (B,), s < t; the paper has s = t - 1.
        """
        alpha_bar_t, alpha_bar_s = self.alpha_bar_at(t), self.alpha_bar_at(s)
        alpha = alpha_bar_t / alpha_bar_s
        beta = 1 - alpha
        coef_x_0 = alpha_bar_s.sqrt() * beta / (1 - alpha_bar_t)
        coef_x_t = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        mean = like(coef_x_0, x_0) * x_0 + like(coef_x_t, x_t) * x_t
        return Gaussian(mean, like(self.posterior_log_variance(t, s), x_t))

    def posterior_log_variance(self, t: Timestep, s: Timestep) -> Tensor:
        """Eq. (7): log beta-tilde of the step t -> s, (B,) float64, floored at that of 1 -> 0.

        The exact variance at s = -1 is 0. Ho et al.'s code puts posterior_variance[1] in its place,
        for a finite decoder likelihood.
        """
        variance = self._posterior_variance(t, s)
        return torch.where(variance > 0, variance, self._posterior_variance(1, 0)).log()

    def _posterior_variance(self, t: Timestep, s: Timestep) -> Tensor:
        if bool((torch.as_tensor(s).cpu() >= torch.as_tensor(t).cpu()).any()):
            raise ValueError(f"a reverse step goes from t to s < t; got t={t} and s={s}")
        alpha_bar_t, alpha_bar_s = self.alpha_bar_at(t), self.alpha_bar_at(s)
        return (1 - alpha_bar_t / alpha_bar_s) * (1 - alpha_bar_s) / (1 - alpha_bar_t)

    # Reverse process p

    def target(self, x_0: Tensor, eps: Tensor, t: Timestep) -> Tensor:
        """What the network is trained to say: eps, x_0 or v (Salimans & Ho 2022).

        Args:
            x_0, eps: Clean images in [-1, 1] and the noise added to them, (B, C, H, W).
            t: Timesteps, (B,).
        """
        match self.config.prediction_type:
            case "epsilon":
                return eps
            case "sample":
                return x_0
            case _:
                alpha_bar = self.alpha_bar_at(t)
                return like(alpha_bar.sqrt(), x_0) * eps - like((1 - alpha_bar).sqrt(), x_0) * x_0

    def to_x_0(self, output: Tensor, x_t: Tensor, t: Timestep | float) -> Tensor:
        """Eq. (15): the clean image that the output stands for, unclipped. Inverts `target`.

        Args:
            output: The network's prediction, without variance channels, (B, C, H, W).
            x_t: Noised images, (B, C, H, W).
            t: Timesteps, one or (B,).
        """
        alpha_bar = self.alpha_bar_at(t)
        match self.config.prediction_type:
            case "epsilon":
                return (
                    like(alpha_bar.rsqrt(), x_t) * x_t
                    - like((1 / alpha_bar - 1).sqrt(), x_t) * output
                )
            case "sample":
                return output.to(torch.promote_types(output.dtype, torch.float32))
            case _:
                return (
                    like(alpha_bar.sqrt(), x_t) * x_t - like((1 - alpha_bar).sqrt(), x_t) * output
                )

    def to_eps(self, x_0: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """Eq. (4) solved for the noise that leads from x_0 to x_t; all (B, C, H, W)."""
        alpha_bar = self.alpha_bar_at(t)
        return (x_t - like(alpha_bar.sqrt(), x_t) * x_0) / like((1 - alpha_bar).sqrt(), x_t)

    def clip_x_0(self, x_0_hat: Tensor) -> Tensor:
        """The configured clip of a predicted image: dynamic thresholding, a range, or none.

        x_0_hat and the result: (B, C, H, W).
        """
        if self.config.thresholding:
            return self._threshold_sample(x_0_hat)
        if self.config.clip_sample:
            return x_0_hat.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x_0_hat

    def split_output(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """The network's output as (prediction, variance channels or None); both (B, C, H, W).

        Raises:
            InputError: the number of channels does not fit `variance_type`.
        """
        learned = self.config.variance_type in ("learned", "learned_range")
        if output.shape[1] != channels * (2 if learned else 1):
            raise InputError(
                f"variance_type={self.config.variance_type!r} needs a network with out_channels="
                f"{channels * (2 if learned else 1)} for images of {channels} channels; got "
                f"{output.shape[1]}"
            )
        return output.split(channels, dim=1) if learned else (output, None)

    def predict_x_0(
        self, output: Tensor, x_t: Tensor, t: Timestep | float, *, clip: bool = True
    ) -> Tensor:
        """Eq. (15): `to_x_0` of a network's whole output, (B, C, H, W). Arguments: see `p_step`."""
        prediction, _ = self.split_output(output, x_t.shape[1])
        x_0_hat = self.to_x_0(prediction, x_t, t)
        return self.clip_x_0(x_0_hat) if clip else x_0_hat

    def reverse_log_variance(
        self,
        t: Timestep,
        s: Timestep,
        model_variance: Tensor | None = None,
        *,
        analytic: bool | None = None,
    ) -> Tensor:
        """Section 3.2: the log-variance of p(x_s | x_t), always a logarithm, for any s < t.

        fixed_small is beta-tilde, the exact variance for data of one point; fixed_large is beta,
        that for N(0, I). learned_range interpolates between the two logarithms (Nichol & Dhariwal
        2021, eq. 15). Of a calibrated model the steps of a sub-chain take `analytic_variance`.

        Args:
            t, s: Timesteps, (B,).
            model_variance: The network's variance channels, (B, C, H, W), for the learned types.
            analytic: Whether the step takes the calibrated variance. Without it that depends on the
                step: a longer one than t -> t - 1, of a calibrated model, does.

        Returns:
            (B,) float64 on the CPU, (B, C, H, W) where a variance is learned.

        Raises:
            ValueError: a learned type without `model_variance`.
            InputError: `analytic` for a model that is not calibrated.
        """
        if analytic:
            return self.analytic_variance(t, s).log()
        log_variance = self._log_variance_of_type(t, s, model_variance)
        longer = torch.as_tensor(t, device="cpu") - torch.as_tensor(s, device="cpu") > 1
        if analytic is not None or not bool(longer.any()) or self.analytic is None:
            return log_variance
        optimal = self.analytic_variance(t, s).log()
        if log_variance.ndim > 1:
            longer, optimal = like(longer, log_variance).bool(), like(optimal, log_variance)
        return torch.where(longer, optimal, log_variance)

    def _log_variance_of_type(
        self, t: Timestep, s: Timestep, model_variance: Tensor | None
    ) -> Tensor:
        """`reverse_log_variance` as `variance_type` has it."""
        variance_type = self.config.variance_type
        if variance_type in ("learned", "learned_range") and model_variance is None:
            raise ValueError(
                f"variance_type={variance_type!r} needs model_variance, the network's variance "
                f"channels"
            )
        small = self.posterior_log_variance(t, s)
        large = (1 - self.alpha_bar_at(t) / self.alpha_bar_at(s)).log()
        match variance_type.removesuffix("_log"):
            case "fixed_small":
                return small
            case "fixed_large":
                # As in Ho et al.'s code, timestep 0 takes beta-tilde's floor.
                return torch.where(torch.as_tensor(t, device="cpu") == 0, small, large)
            case "learned":  # diffusers' word: the channels are the variance itself
                return model_variance.float().clamp(min=1e-20).log()
            case _:
                fraction = (model_variance.float() + 1) / 2
                return fraction * like(large, fraction) + (1 - fraction) * like(small, fraction)

    def x_0_variance(self, mean_square_eps: Tensor) -> Tensor:
        """Bao et al. 2022, theorems 1 and 2: Var[x_0 | x_t] / D, as an exact network implies it.

        Args:
            mean_square_eps: E|eps_hat|**2 / D of every timestep, (T,).

        Returns:
            (T,) float64, at least 0, and at most 1, which it is for data in [-1, 1].
        """
        a = self.alpha_bar[1:]
        variance = ((1 / a - 1) * (1 - mean_square_eps)).clamp(0, 1)
        if a[-1] == 0:  # pure noise tells nothing, and almost pure noise hardly more
            variance[-1] = variance[-2]
        return variance

    def optimal_variance(
        self, t: Timestep, s: Timestep, x_0_variance: Tensor, *, eta: float = 1.0
    ) -> Tensor:
        """Bao et al. 2022, theorem 1: the variance of p(x_s | x_t) that the bound is least with.

        By the law of total variance: what q(x_s | x_t, x_0) has for a known image, and as much of
        what x_0 is away from x_0_hat as reaches x_s.

        Args:
            t, s: Timesteps, any shape, s < t.
            x_0_variance: Of x_0 around x_0_hat, at every timestep, (T,).
            eta: 1 for DDPM, 0 for DDIM: see `ddim_step`.

        Returns:
            float64 on the CPU, of the shape of t and s.
        """
        alpha_bar_t, alpha_bar_s = self.alpha_bar_at(t), self.alpha_bar_at(s)
        known = eta**2 * self._posterior_variance(t, s)
        ratio = alpha_bar_t / (1 - alpha_bar_t)
        coef_x_0 = alpha_bar_s.sqrt() - ((1 - alpha_bar_s - known).clamp(min=0) * ratio).sqrt()
        return known + coef_x_0**2 * x_0_variance[torch.as_tensor(t, device="cpu")]

    def analytic_variance(self, t: Timestep, s: Timestep, *, eta: float = 1.0) -> Tensor:
        """`optimal_variance` by the stored statistics, as it is sampled with: (B,) float64.

        The noise of the step to s = 0, which is seen in the image, is at most `clip_pixels` grey
        levels in the mean, as in their code; DDIM's at most one. At s = -1 it
        is at least beta-tilde's floor.

        Raises:
            InputError: the model is not calibrated, or with another noise schedule.
        """
        stored = self.analytic
        if stored is None:
            raise InputError(
                "the calibrated variance needs a calibrated model: run `ddpm-hf calibrate` first"
            )
        if "x_0_variance" in stored:
            x_0_variance = torch.tensor(stored["x_0_variance"], dtype=torch.float64)
        else:
            eps = torch.tensor(stored["mean_square_eps"], dtype=torch.float64)
            x_0_variance = self.x_0_variance(eps)
        variance = self.optimal_variance(t, s, x_0_variance, eta=eta)
        levels = stored["clip_pixels"] if eta == 1 else min(1.0, stored["clip_pixels"])
        # E|N(0, 1)| = sqrt(2 / pi), and a grey level is 2 / 255.
        most = levels * 2 / 255 * math.sqrt(math.pi / 2)
        s = torch.as_tensor(s, device="cpu")
        variance = torch.where(s == 0, variance.clamp(max=most**2), variance)
        return torch.where(s == -1, variance.clamp(min=self._posterior_variance(1, 0)), variance)

    def p_step(
        self,
        output: Tensor,
        x_t: Tensor,
        t: Timestep,
        s: Timestep,
        *,
        clip: bool = True,
        analytic: bool | None = None,
    ) -> ReverseStep:
        """Eqs. (1), (11): p_theta(x_s | x_t), the posterior with the predicted x_0_hat as x_0.

        The distribution is given for the last step (s = -1) too; sampling takes its mean there.

        Args:
            output: The network's answer, (B, C, H, W), or (B, 2C, H, W) with a learned variance.
            x_t: Noised images, (B, C, H, W).
            t, s: Timesteps, one or (B,), s < t.
            clip: Clip x_0_hat as configured; False, as in training, never does.
            analytic: See `reverse_log_variance`.

        Raises:
            ValueError: channels that do not fit `variance_type`, or timesteps that do not fit.
        """
        x_0_hat = self.predict_x_0(output, x_t, t, clip=clip)
        _, model_variance = self.split_output(output, x_t.shape[1])
        mean = self.q_posterior(x_0_hat, x_t, t, s).mean
        log_variance = self.reverse_log_variance(t, s, model_variance, analytic=analytic)
        return ReverseStep(Gaussian(mean, like(log_variance, x_t)), x_0_hat)

    def ddim_step(
        self,
        output: Tensor,
        x_t: Tensor,
        t: Timestep,
        s: Timestep,
        *,
        eta: float = 0.0,
        clip: bool = True,
        analytic: bool = False,
    ) -> ReverseStep:
        """Song et al. 2021 (DDIM), eqs. (12), (16): p(x_s | x_t), of eta**2 times beta-tilde.

        eta = 0 is deterministic, a log-variance of -inf, and eta = 1 is `p_step` with fixed_small.
        The noise is derived again from the clipped x_0_hat, as in OpenAI's code, so that the two
        stay consistent. With `analytic` it is Analytic-DDIM (Bao et al. 2022): the same mean, and
        the variance that is optimal for it.

        Args: those of `p_step`.
        """
        x_0_hat = self.predict_x_0(output, x_t, t, clip=clip)
        mean = self.ddim_mean(x_0_hat, x_t, t, s, eta=eta)
        variance = eta**2 * self._posterior_variance(t, s)
        if analytic:
            variance = self.analytic_variance(t, s, eta=eta)
        return ReverseStep(Gaussian(mean, like(variance.log(), x_t)), x_0_hat)

    def ddim_mean(
        self, x_0_hat: Tensor, x_t: Tensor, t: Timestep, s: Timestep, *, eta: float = 0.0
    ) -> Tensor:
        """Song et al. 2021 (DDIM), eq. (7): the mean of q(x_s | x_t, x_0) in their family of q.

        Arguments as in `ddim_step`; all images (B, C, H, W).
        """
        alpha_bar_s = self.alpha_bar_at(s)
        coef_eps = (1 - alpha_bar_s - eta**2 * self._posterior_variance(t, s)).clamp(min=0).sqrt()
        eps_hat = self.to_eps(x_0_hat, x_t, t)
        return like(alpha_bar_s.sqrt(), x_t) * x_0_hat + like(coef_eps, x_t) * eps_hat

    # diffusers' names and signatures

    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: torch.IntTensor
    ) -> Tensor:
        """`q_sample` in diffusers' words; the result has the dtype of `original_samples`."""
        return self.q_sample(original_samples, noise, timesteps).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: torch.IntTensor) -> Tensor:
        """v of Salimans & Ho 2022 in diffusers' words; the result has the dtype of `sample`."""
        alpha_bar = self.alpha_bar_at(timesteps)
        velocity = (
            like(alpha_bar.sqrt(), sample) * noise - like((1 - alpha_bar).sqrt(), sample) * sample
        )
        return velocity.to(sample.dtype)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the sub-chain to sample: as many timesteps as asked for, or the list given.

        Of a calibrated model these are the optimal timesteps, where they are stored for that many.

        Raises:
            ValueError: neither or both are given, or they do not fit into the T trained timesteps.
        """
        stored = (self.analytic or {}).get("timesteps", {}).get(str(num_inference_steps))
        if stored is not None and timesteps is None:
            num_inference_steps, timesteps = None, stored
        self._set_chain(num_inference_steps, device, timesteps)

    def set_even_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """`set_timesteps` with evenly spaced ones also where optimal ones are stored.

        Raises:
            ValueError: there are not as many among the T trained timesteps.
        """
        self._set_chain(num_inference_steps, device, None)

    def _set_chain(
        self,
        num_inference_steps: int | None,
        device: str | torch.device | None,
        timesteps: list[int] | None,
    ) -> None:
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("pass either num_inference_steps or timesteps")
        if num_inference_steps is not None:
            check_whole("num_inference_steps", num_inference_steps)
        if timesteps is not None and not (
            len(timesteps) and all(int(t) == t and t >= 0 for t in timesteps)
        ):
            raise ValueError(
                f"timesteps must be a descending list of timesteps >= 0; got {timesteps}"
            )
        super().set_timesteps(num_inference_steps, device, timesteps)
        # Stock walks down by a float stride, whose rounding yields one timestep too many for some
        # counts; with steps_offset its first one may not exist.
        self.timesteps = self.timesteps[: num_inference_steps or len(timesteps)]
        if int(self.timesteps[0]) >= self.config.num_train_timesteps:
            raise InputError(
                f"steps_offset={self.config.steps_offset} leads to timestep "
                f"{int(self.timesteps[0])} of {self.config.num_train_timesteps}; use fewer steps"
            )

    def previous_timestep(self, timestep: Timestep) -> int:
        """The timestep after this one in the sub-chain; -1, the clean image, after the last.

        Raises:
            ValueError: the sub-chain does not contain `timestep`.
        """
        t = int(timestep)
        if not (self.custom_timesteps or self.num_inference_steps):
            return t - 1
        chain = [*self.timesteps.tolist(), -1]
        if t not in chain[:-1]:
            raise ValueError(
                f"timestep {t} is not in the sub-chain set by set_timesteps: {chain[:-1]}"
            )
        return chain[chain.index(t) + 1]

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """`reverse_step` in diffusers' words; the result has the dtype of `sample`."""
        x_s, x_0_hat = self.reverse_step(model_output, sample, timestep, generator)
        x_s, x_0_hat = x_s.to(sample.dtype), x_0_hat.to(sample.dtype)
        return DDPMSchedulerOutput(x_s, x_0_hat) if return_dict else (x_s, x_0_hat)

    def reverse_step(
        self,
        output: Tensor,
        x_t: Tensor,
        t: int | Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        eta: float | None = None,
        analytic: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Algorithm 2, lines 3-4: draw x_s ~ p(x_s | x_t); the last step takes the mean.

        Inside, everything is float32.

        Args:
            output, x_t: See `p_step`.
            t: The timestep; s is the next one of the sub-chain.
            generator: One for the batch, or one per image.
            eta: Take `ddim_step` with it.
            analytic: Take the calibrated variance. Without it a sub-chain of a calibrated model
                does, unless by `eta`.

        Returns:
            x_s and x_0_hat, (B, C, H, W).
        """
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        s = self.previous_timestep(t)
        if eta is not None:
            p, x_0_hat = self.ddim_step(output, x_t, int(t), s, eta=eta, analytic=bool(analytic))
        else:
            if analytic is None:
                analytic = self.analytic is not None and len(self.timesteps) < len(self.beta)
            p, x_0_hat = self.p_step(output, x_t, int(t), s, analytic=analytic)
        if s < 0 or (eta == 0 and not analytic):
            return p.mean, x_0_hat
        eps = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
        return p.sample(eps), x_0_hat
