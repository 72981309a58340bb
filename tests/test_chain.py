"""The timesteps that a scheduler samples along, whatever diffusers' rounding makes of them."""

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import DDPMPipeline, DDPMScheduler, build_scheduler
from ddpm_hf.chain import check_scheduler, set_chain
from ddpm_hf.errors import InputError

from .conftest import SWAPS

CPU = torch.device("cpu")


@pytest.fixture
def process():
    return build_scheduler(prediction_type="epsilon", ddpm_beta_schedule="linear")


def swapped(process, name, **changes):
    return getattr(diffusers, name).from_config(process.config, **changes)


def chain_of(scheduler, process, steps, **options):
    set_chain(scheduler, process, steps, CPU, **dict(optimal=False, whole=False) | options)
    return scheduler.timesteps


# One timestep too many: of 1,000 timesteps for 62 numbers of steps, 61 is the least


@pytest.mark.parametrize("name", [None, *SWAPS, "SASolverScheduler", "DDIMParallelScheduler"])
def test_as_many_steps_as_asked_for(process, name):
    scheduler = swapped(process, name) if name else process
    timesteps = chain_of(scheduler, process, 61)
    assert timesteps.min() >= 0
    assert len(timesteps.unique()) == 61 + (name == "PNDMScheduler") * 3  # halfway ones at first
    if (sigmas := getattr(scheduler, "sigmas", None)) is not None:
        assert len(sigmas) == len(timesteps) + 1
        assert sigmas[-1] < sigmas[-2]  # the clean image's


@pytest.mark.parametrize("name", [name for name in SWAPS if name != "PNDMScheduler"])
def test_61_steps_land_on_the_data(tiny_unet, process, name):
    """Of an exact network: DDIM took the noisiest entry of its table for the step from -1."""
    pipe = DDPMPipeline(tiny_unet, swapped(process, name))
    pipe.set_progress_bar_config(disable=True)

    def exact(x_t, t, **_):
        a = process.alpha_bar_at(t).float()
        return UNet2DOutput(sample=(x_t - a.sqrt() * 0.5) / (1 - a).sqrt())

    pipe.unet.forward = exact
    images = pipe(2, torch.Generator().manual_seed(0), 61, output_type="pt").images
    # 0.5 of [-1, 1]; float32 x_t divided by sqrt(alpha_bar_T) = 6e-3
    torch.testing.assert_close(images, torch.full_like(images, 0.75), atol=5e-3, rtol=0)


def test_a_chain_that_cannot_be_put_right_is_refused(process):
    with pytest.raises(InputError, match="KDPM2DiscreteScheduler makes a timestep -1 of 61 steps"):
        chain_of(swapped(process, "KDPM2DiscreteScheduler"), process, 61)


@pytest.mark.parametrize("name", [None, "DDIMScheduler"])
def test_an_offset_beyond_the_last_timestep_is_refused(process, name):
    changes = dict(steps_offset=1, timestep_spacing="leading")
    scheduler = swapped(process, name or "DDPMScheduler", **changes)
    scheduler = scheduler if name else DDPMScheduler.from_config(scheduler.config)
    with pytest.raises(InputError, match="steps_offset=1 leads to timestep 1000 of 1000"):
        chain_of(scheduler, process, 1000)


def test_a_table_of_timesteps_has_whole_ones_only(process):
    heun = swapped(process, "HeunDiscreteScheduler")
    with pytest.raises(InputError, match="this network knows whole ones only"):
        chain_of(heun, process, 7, whole=True)
    assert len(chain_of(swapped(process, "DDIMScheduler"), process, 7, whole=True)) == 7


# What is warned about


@pytest.fixture
def said(caplog):
    diffusers.utils.logging.enable_propagation()
    return lambda: caplog.text


@pytest.mark.parametrize(
    ("name", "steps", "spacing", "warned"),
    [
        ("DDIMScheduler", 600, "trailing", True),
        ("PNDMScheduler", 150, "linspace", True),
        ("DDIMScheduler", 500, "trailing", False),
        ("DDIMScheduler", 30, "trailing", False),  # 33 of 33.3
        ("DDIMScheduler", 600, "leading", False),  # timesteps of that stride, too
        ("UniPCMultistepScheduler", 600, "trailing", False),
        (None, 600, "trailing", False),
    ],
)
def test_steps_shorter_than_timesteps_are_apart_are_warned_about(
    process, said, name, steps, spacing, warned
):
    scheduler = swapped(process, name, timestep_spacing=spacing) if name else process
    chain_of(scheduler, process, steps)
    assert (f"goes {1000 // steps} timesteps a step" in said()) is warned
    assert ("eta=0.0" in said()) is warned


def test_one_step_of_even_spacing_starts_at_the_clean_end(process, said):
    euler = swapped(process, "EulerDiscreteScheduler", timestep_spacing="linspace")
    chain_of(euler, process, 1)
    assert "timestep_spacing='linspace' starts 1 steps at timestep 0 of 1000" in said()


# Which schedulers


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_schedulers_of_other_models_are_refused(process, name):
    with pytest.raises(InputError, match=f"{name} samples from another kind of model than a DDPM"):
        check_scheduler(getattr(diffusers, name)(), process)


@pytest.mark.parametrize(
    ("name", "knows"), [("HeunDiscreteScheduler", False), ("PNDMScheduler", False),
                        ("DDIMScheduler", True), ("UniPCMultistepScheduler", True),
                        ("DPMSolverMultistepScheduler", True), ("EulerDiscreteScheduler", True)]
)  # fmt: skip
def test_a_scheduler_that_does_not_know_pure_noise_is_refused(name, knows):
    process = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler = swapped(process, name)
    if knows:
        return check_scheduler(scheduler, process)
    with pytest.raises(InputError, match=f"{name} has another noise schedule than the network"):
        check_scheduler(scheduler, process)
