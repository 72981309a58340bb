"""One denoising loop for every scheduler, image shape and precision."""

import functools
import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler, build_scheduler
from ddpm_hf.calibration import Estimate, store
from ddpm_hf.errors import InputError
from ddpm_hf.pictures import image_grid, save_image_grid

from .conftest import SWAPS


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(tiny_unet):
    pipe = DDPMPipeline(tiny_unet, build_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def swap(pipe, name):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize("output_type", ["pil", "np", "numpy", "pt"])
def test_output_types(pipe, output_type):
    images = pipe(2, seeded(), 3, output_type=output_type).images
    if output_type == "pil":
        assert [(image.mode, image.size) for image in images] == [("L", (8, 8))] * 2
    elif output_type == "pt":
        assert images.shape == (2, 1, 8, 8)
    else:
        assert images.shape == (2, 8, 8, 1)
        assert images.dtype == np.float32
        assert images.min() >= 0
        assert images.max() <= 1
    assert type(pipe(1, seeded(), 2, output_type=output_type, return_dict=False)) is tuple


@pytest.mark.parametrize("name", SWAPS)
@pytest.mark.parametrize("preset", ["auto", "cifar10"])
def test_any_diffusers_scheduler_samples(tiny_unet, name, preset):
    pipe = swap(DDPMPipeline(tiny_unet, build_scheduler(preset)), name)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, seeded(), 5, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()


@pytest.mark.parametrize(
    "name", ["UniPCMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler"]
)
def test_three_schedulers_that_stocks_pipeline_cannot_use(pipe, name):
    """Stock passes a generator to every `step`."""
    stock = diffusers.DDPMPipeline(pipe.unet, swap(pipe, name).scheduler)
    stock.set_progress_bar_config(disable=True)
    with pytest.raises(TypeError, match="generator"):
        stock(1, seeded(), 5)
    assert len(pipe(1, seeded(), 5).images) == 1


def test_pndm_says_how_many_steps_it_needs(pipe):
    with pytest.raises(ValueError, match="PNDM needs num_inference_steps >= 4; got 3"):
        swap(pipe, "PNDMScheduler")(1, seeded(), 3)


def test_pndm_and_a_network_that_predicts_the_image(tiny_unet):
    pipe = DDPMPipeline(tiny_unet, build_scheduler(prediction_type="sample"))
    with pytest.raises(InputError, match="PNDM needs a network that predicts epsilon or v; this "):
        swap(pipe, "PNDMScheduler")(1, seeded(), 5)


def test_a_network_that_does_not_say_its_size(pipe):
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(InputError, match="configuration has no sample_size: set it"):
        pipe(1, num_inference_steps=2)


def test_no_output_type_is_an_array_as_in_stock(pipe):
    made = pipe(1, seeded(), 2, output_type=None).images
    assert np.array_equal(made, pipe(1, seeded(), 2, output_type="np").images)


def test_no_path_of_this_machine_is_saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "first")
    again = DDPMPipeline.from_pretrained(tmp_path / "first")
    assert again.name_or_path == str(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    saved = [path.read_text() for path in (tmp_path / "second").rglob("*.json")]
    assert len(saved) == 3
    assert not [text for text in saved if str(tmp_path) in text]
    diffusers.DDPMPipeline.from_pretrained(tmp_path / "second")


def test_classes_named_by_numbers_are_meant_by_their_names(tiny_unet):
    unet = diffusers.UNet2DModel.from_config(tiny_unet.config, num_class_embeds=4)
    pipe = DDPMPipeline(unet, build_scheduler(class_names=["1", "10", "2"]))
    numbers = pipe._class_numbers(["1", "2", 1, "10", "0"], 5, 1.0, torch.device("cpu"))
    assert numbers.tolist() == [0, 2, 1, 1, 0]  # "0" is no name
    with pytest.raises(InputError, match="class_labels must be 0 to 3"):
        pipe(1, num_inference_steps=2, class_labels="\u00b2")


@pytest.mark.parametrize("name", [None, "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_where_stock_samples_too_the_images_are_the_same(tiny_unet, name):
    scheduler = build_scheduler()
    ours, stock = DDPMPipeline(tiny_unet, scheduler), None
    if name:
        stock_scheduler = getattr(diffusers, name).from_config(scheduler.config)
        ours = swap(ours, name)
    else:
        stock_scheduler = diffusers.DDPMScheduler.from_config(scheduler.config)
    stock = diffusers.DDPMPipeline(tiny_unet, stock_scheduler)
    for p in (ours, stock):
        p.set_progress_bar_config(disable=True)
    a, b = (p(2, seeded(), 10, output_type="np").images for p in (ours, stock))
    # stock's tables are float32; v-prediction with the cosine schedule does not amplify their error
    np.testing.assert_allclose(a, b, atol=1e-4)


def exact_unet(process, mean):
    """The optimal noise prediction for data that is one point: x_0_hat is `mean` at every step."""

    def forward(x_t, t):
        alpha_bar = float(process.alpha_bar_at(t.item()))
        eps_hat = (x_t - alpha_bar**0.5 * mean) / (1 - alpha_bar) ** 0.5
        return UNet2DOutput(sample=eps_hat)

    return forward


@pytest.mark.parametrize("name", [None, *SWAPS])
def test_every_scheduler_lands_on_the_data(tiny_unet, name):
    """x_0_hat is exact at every step, also at the float timesteps of Euler and Heun."""
    process = build_scheduler(prediction_type="epsilon", ddpm_beta_schedule="linear")
    pipe = DDPMPipeline(tiny_unet, process)
    pipe = swap(pipe, name) if name else pipe
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.forward = exact_unet(process, 0.5)
    steps = list(pipe.denoise(2, generator=seeded(), num_inference_steps=8))
    for step in steps:
        # float32 x_t divided by sqrt(alpha_bar_T) = 6e-3; Euler's own sigmas are float32
        torch.testing.assert_close(
            step.x_0_hat, torch.full_like(step.x_0_hat, 0.5), atol=5e-3, rtol=0
        )
    if name != "PNDMScheduler":  # its Runge-Kutta start mixes timesteps
        torch.testing.assert_close(
            steps[-1].x_s, torch.full_like(steps[-1].x_s, 0.5), atol=5e-3, rtol=0
        )


@pytest.mark.parametrize("name", [None, "DDIMScheduler", "EulerDiscreteScheduler"])
def test_x_0_hat_is_the_schedulers_own_where_it_tells(pipe, name, monkeypatch):
    pipe = swap(pipe, name) if name else pipe
    reported, step = [], type(pipe.scheduler).step

    @functools.wraps(step)
    def spy(*arguments, **options):
        reported.append(step(*arguments, **options))
        return reported[-1]

    monkeypatch.setattr(type(pipe.scheduler), "step", spy)
    ours = [x_0_hat for _, _, x_0_hat in pipe.denoise(2, generator=seeded(), num_inference_steps=6)]
    for x_0_hat, output in zip(ours, reported, strict=True):
        theirs = output.pred_original_sample.clamp(-1, 1)  # Euler does not clip
        torch.testing.assert_close(x_0_hat, theirs, atol=2e-4, rtol=0)  # float32 sigmas


def test_denoise_gives_every_step_and_the_last_is_the_image(pipe):
    steps = list(pipe.denoise(2, generator=seeded(), num_inference_steps=4))
    assert [step.t for step in steps] == [999, 749, 499, 249]
    image = pipe(2, seeded(), 4, output_type="pt").images
    torch.testing.assert_close((steps[-1].x_s / 2 + 0.5).clamp(0, 1), image)


def test_the_last_image_is_the_mean_whatever_its_timestep(tiny_unet):
    """Trap 2: with trailing spacing and fixed_large stock adds noise of deviation ~.5 to the final
    image.
    """
    scheduler = build_scheduler("cifar10")
    pipe = DDPMPipeline(tiny_unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    last = list(pipe.denoise(1, generator=seeded(), num_inference_steps=10))[-1]
    assert torch.equal(last.x_s, last.x_0_hat)  # at s = -1 the posterior mean is x_0_hat itself


def test_with_a_generator_per_image_an_image_does_not_depend_on_the_batch(pipe):
    """Pitfall 4.19."""
    four = pipe(4, [seeded(i) for i in range(4)], 5, output_type="np").images
    two = pipe(2, [seeded(i) for i in (1, 3)], 5, output_type="np").images
    # float32 convolutions round differently in batches of another size
    np.testing.assert_allclose(four[[1, 3]], two, atol=1e-5)


def test_one_generator_is_reproducible(pipe):
    a, b, c = (pipe(2, seeded(s), 3, output_type="np").images for s in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_sample_to_pil(pipe, dtype):
    """Stock: TypeError, numpy has no bfloat16; and its state is rounded at each of 1,000 steps
    (4.13).
    """
    pipe.to(dtype)
    assert [image.mode for image in pipe(2, seeded(), 3).images] == ["L", "L"]
    assert all(step.x_s.dtype == torch.float32 for step in pipe.denoise(1, num_inference_steps=3))
    if dtype == torch.bfloat16:
        stock = diffusers.DDPMPipeline(pipe.unet, diffusers.DDPMScheduler())
        stock.set_progress_bar_config(disable=True)
        with pytest.raises(TypeError, match="BFloat16"):
            stock(1, seeded(), 2)


def test_dtype_at_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16
    assert len(loaded(1, seeded(), 2).images) == 1


def test_rectangular_images(tiny_unet):
    tiny_unet.register_to_config(sample_size=[8, 16])
    images = DDPMPipeline(tiny_unet, build_scheduler())(2, seeded(), 2).images
    assert images[0].size == (16, 8)


@pytest.mark.parametrize("name", [None, "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_learned_variance_samples_with_every_scheduler(tiny_unet, name):
    torch.manual_seed(0)
    learned = diffusers.UNet2DModel.from_config({**tiny_unet.config, "out_channels": 2})
    pipe = DDPMPipeline(
        learned, DDPMScheduler(variance_type="learned_range", timestep_spacing="trailing")
    )
    pipe = swap(pipe, name) if name else pipe
    assert pipe(2, seeded(), 4, output_type="pt").images.isfinite().all()


def test_another_trainers_classes_are_all_classes(tiny_unet):
    """Guidance away from the last class would be away from a real one."""
    pipe = conditional(tiny_unet, diffusers.DDPMScheduler())
    assert pipe.num_classes == 3
    assert sample(pipe, class_labels=[0, 2]).isfinite().all()
    noise = torch.full((1000,), 0.9, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(InputError, match="trained without a null class, which guidance needs"):
            sample(pipe, class_labels=0, guidance_scale=2.0)
        store(pipe.scheduler, Estimate(noise, noise))  # what `calibrate` adds says nothing else
    assert pipe.num_classes == 3


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDPMParallelScheduler"])
def test_a_learned_variance_reaches_ddpm_assigned_later(tiny_unet, name):
    torch.manual_seed(0)
    learned = diffusers.UNet2DModel.from_config({**tiny_unet.config, "out_channels": 2})
    config = dict(variance_type="learned_range", timestep_spacing="trailing")
    pipe = DDPMPipeline(learned, DDPMScheduler(**config))
    pipe.set_progress_bar_config(disable=True)
    ours = sample(pipe)
    pipe.scheduler = getattr(diffusers, name)(**config)
    theirs = sample(pipe)
    if name == "DDPMScheduler":
        assert type(pipe.scheduler) is DDPMScheduler
        assert torch.equal(ours, theirs)
    assert theirs.isfinite().all()


@pytest.mark.parametrize("name", [None, *SWAPS])
def test_another_sampling_meanwhile_changes_nothing(pipe, name):
    """A preview while the steps of a chain are looked at."""
    pipe = swap(pipe, name) if name else pipe
    alone = [x_s for _, x_s, _ in pipe.denoise(1, generator=seeded(), num_inference_steps=6)]
    steps = []
    for step in pipe.denoise(1, generator=seeded(), num_inference_steps=6):
        steps.append(step.x_s)
        if len(steps) == 3:
            pipe(1, seeded(1), 9)
    assert len(steps) == len(alone)
    assert all(map(torch.equal, steps, alone))


def test_a_network_that_is_exchanged_loses_the_calibration_of_the_old(
    pipe, tiny_unet, tmp_path, caplog
):
    diffusers.utils.logging.enable_propagation()
    ones = torch.full((1000,), 0.9, dtype=torch.float64)
    store(pipe.scheduler, Estimate(ones, ones))
    pipe.save_pretrained(tmp_path)
    assert DDPMPipeline.from_pretrained(tmp_path).scheduler.analytic is not None
    assert "calibration" not in caplog.text
    assert DDPMPipeline.from_pretrained(tmp_path, unet=tiny_unet).scheduler.analytic is None
    assert "is that of its own network, and is left out for the one given" in caplog.text
    both = DDPMPipeline.from_pretrained(tmp_path, unet=tiny_unet, scheduler=pipe.scheduler)
    assert both.scheduler.analytic is not None


def test_a_stock_scheduler_is_upgraded_and_any_other_is_left(tiny_unet):
    stock = diffusers.DDPMScheduler(variance_type="fixed_large")
    upgraded = DDPMPipeline(tiny_unet, stock).scheduler
    assert type(upgraded) is DDPMScheduler
    assert upgraded.config.timestep_spacing == "leading"
    assert upgraded.config.variance_type == "fixed_large"
    ddim = diffusers.DDIMScheduler()
    assert DDPMPipeline(tiny_unet, ddim).scheduler is ddim


def test_leading_spacing_that_misses_the_noise_is_warned_about(tiny_unet, caplog):
    """Pitfall 4.2: 600 of 1,000 leading steps start at timestep 599; 3 at 666, 10 at 900."""
    diffusers.utils.logging.enable_propagation()
    pipe = DDPMPipeline(tiny_unet, diffusers.DDPMScheduler())
    pipe.unet.forward = lambda x, *_, **__: UNet2DOutput(sample=x)  # many steps
    pipe.set_progress_bar_config(disable=True)
    for steps, warned in ((1, "0"), (3, "666"), (10, ""), (600, "599"), (999, ""), (1000, "")):
        caplog.clear()
        pipe(1, seeded(), steps)
        assert bool(warned) is ("starts" in caplog.text), steps
        assert f"steps at timestep {warned}" in caplog.text or not warned
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    caplog.clear()
    pipe(1, seeded(), 3)
    assert not caplog.text


@pytest.mark.parametrize(("name", "steps", "warned"), [
    (None, 10, True), (None, 20, False), ("DDIMScheduler", 10, False)
])  # fmt: skip
def test_fixed_large_with_fewer_steps_is_warned_about(tiny_unet, caplog, name, steps, warned):
    """Pitfall 4.5: FID 3 at 1,000 steps, 233 at 10."""
    pipe = DDPMPipeline(tiny_unet, build_scheduler("cifar10", ddpm_num_steps=21))
    pipe = swap(pipe, name) if name else pipe
    pipe.set_progress_bar_config(disable=True)
    diffusers.utils.logging.enable_propagation()
    pipe(1, seeded(), min(steps + (steps == 20), 21))
    assert ("fixed_large" in caplog.text) is warned


def test_a_progress_bar_is_shown(tiny_unet, capsys):
    DDPMPipeline(tiny_unet, build_scheduler())(1, seeded(), 3)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(output_type="jpeg"), "output_type must be one of pil, np, numpy, pt; got 'jpeg'"),
        (dict(batch_size=0), "batch_size must be a whole number at least 1; got 0"),
        (dict(batch_size=2.0), "batch_size must be a whole number at least 1; got 2.0"),
        (dict(num_inference_steps=0), "must be a whole number between 1 and 1000; got 0"),
        (dict(num_inference_steps=1001), "must be a whole number between 1 and 1000; got 1001"),
        (dict(num_inference_steps="5"), "must be a whole number between 1 and 1000; got '5'"),
        (dict(batch_size=True), "batch_size must be a whole number at least 1; got True"),
        (dict(batch_size=3, generator=[seeded()] * 2), "one generator per image: got 2"),
        (dict(generator=5), "generator must be a torch.Generator, or a list .*; got 5"),
        (dict(generator=[1]), r"generator must be a torch.Generator, or a list .*; got \[1\]"),
        (dict(guidance_scale="3"), "guidance_scale must be a finite number, .*; got '3'"),
        (dict(guidance_scale=float("nan")), "guidance_scale must be a finite number, .*; got nan"),
        (dict(eta="1"), r"eta must be between 0 \(DDIM\) and 1 \(DDPM\); got '1'"),
    ],
)
def test_bad_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


# Classes and guidance


@pytest.fixture
def class_pipe(tiny_unet):
    """Two classes, cat and dog, and the null class."""
    return conditional(tiny_unet, build_scheduler(class_names=["cat", "dog"]))


def conditional(tiny_unet, scheduler, **changes):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel.from_config(tiny_unet.config, num_class_embeds=3, **changes)
    pipe = DDPMPipeline(unet.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **arguments):
    return pipe(2, seeded(), 3, output_type="pt", **arguments).images


@pytest.mark.parametrize(
    "labels",
    [[0, 1], ["cat", "dog"], ["cat", 1], torch.tensor([0, 1]), np.array([0, 1]), (0, np.int64(1))],
)
def test_a_class_for_each_image_is_a_number_or_a_name(class_pipe, labels):
    images = sample(class_pipe, class_labels=labels)
    assert torch.equal(images, sample(class_pipe, class_labels=[0, 1]))
    assert not torch.equal(images, sample(class_pipe, class_labels=[1, 1]))


@pytest.mark.parametrize("label", [1, "dog", torch.tensor(1), np.int64(1)])
def test_one_class_is_for_all_images(class_pipe, label):
    images = sample(class_pipe, class_labels=label)
    assert torch.equal(images, sample(class_pipe, class_labels=[1, 1]))


def test_names_are_known_under_another_scheduler_too(class_pipe):
    pipe = swap(class_pipe, "DDIMScheduler")
    assert torch.equal(sample(pipe, class_labels="dog"), sample(pipe, class_labels=1))


def test_guidance_is_off_by_default_and_costs_no_second_evaluation(class_pipe):
    sizes, forward = [], class_pipe.unet.forward

    def spy(x_t, t, class_labels):
        sizes.append(len(x_t))
        return forward(x_t, t, class_labels=class_labels)

    class_pipe.unet.forward = spy
    off = sample(class_pipe, class_labels=1)
    assert torch.equal(off, sample(class_pipe, class_labels=1, guidance_scale=1.0))
    assert sizes == [2] * 6
    assert not torch.equal(off, sample(class_pipe, class_labels=1, guidance_scale=3.0))
    assert sizes == [2] * 6 + [4] * 3  # class and null class in one call


def test_guidance_of_0_is_the_null_class(class_pipe):
    images = sample(class_pipe, class_labels=0, guidance_scale=0.0)
    null = sample(class_pipe, class_labels=2)
    # Batches of 4 and of 2 round differently in float32.
    torch.testing.assert_close(images, null, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_guidance_extrapolates_from_the_null_class_through_the_class(tiny_unet, prediction_type):
    """x_0_hat is guided too: linear in the output, whatever it stands for."""
    scheduler = DDPMScheduler(
        timestep_spacing="trailing", prediction_type=prediction_type, clip_sample=False
    )
    scheduler.register_to_config(_ddpm_hf={"format": 1})  # of ours: the last class is the null one
    pipe = conditional(tiny_unet, scheduler)

    def first(label, scale):
        steps = pipe.denoise(
            2, generator=seeded(), num_inference_steps=4, class_labels=label, guidance_scale=scale
        )
        return next(steps)

    of_class, of_null, guided = first([0, 1], 1.0), first(2, 1.0), first([0, 1], 2.5)
    for name in ("x_0_hat", "x_s"):
        a, b, c = (getattr(step, name).double() for step in (of_class, of_null, guided))
        # float32: 1e-6 of an x_0_hat of size 200 where alpha_bar is 4e-5.
        torch.testing.assert_close(c, b + 2.5 * (a - b), atol=1e-3, rtol=1e-5)


def test_a_guided_learned_variance_is_that_of_the_class(tiny_unet):
    scheduler = build_scheduler(variance_type="learned_range")
    pipe = conditional(tiny_unet, scheduler, out_channels=2)
    x_t, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(500), torch.tensor([0, 1])
    with torch.no_grad():
        of_class = pipe.unet(x_t, t, class_labels=labels).sample
        of_null = pipe.unet(x_t, t, class_labels=torch.tensor([2, 2])).sample
        guided = pipe._guided(x_t, t, labels, 2.0)
    # Batches of 4 and of 2 round differently in float32.
    torch.testing.assert_close(guided[:, 1], of_class[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(guided[:, 0], 2 * of_class[:, 0] - of_null[:, 0], atol=1e-5, rtol=0)
    assert sample(pipe, class_labels=0, guidance_scale=2.0).isfinite().all()


@pytest.mark.parametrize("name", SWAPS)
def test_guidance_works_with_any_diffusers_scheduler(class_pipe, name):
    images = swap(class_pipe, name)(
        2, seeded(), 5, output_type="pt", class_labels="cat", guidance_scale=2.0
    ).images
    assert images.isfinite().all()


def test_a_half_precision_network_is_guided_in_float32(class_pipe):
    class_pipe.to(torch.bfloat16)
    x_t, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(500), torch.tensor([0, 1])
    with torch.no_grad():
        assert class_pipe._guided(x_t.bfloat16(), t, labels, 2.0).dtype == torch.float32


def test_a_class_conditional_pipeline_is_saved_and_loaded_with_its_names(class_pipe, tmp_path):
    class_pipe.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, class_labels="dog"), sample(class_pipe, class_labels=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "class-conditional: pass class_labels, 0 to 2 .* or one of 'cat'"),
        (dict(class_labels=3), "class_labels must be 0 to 2 .*; got 3"),
        (dict(class_labels=[0, -1]), "class_labels must be 0 to 2 .*; got -1"),
        (dict(class_labels="cow"), "class_labels must be 0 to 2 .* 'cat', 'dog'; got 'cow'"),
        (dict(class_labels=torch.tensor([0.0, 1.0])), "class_labels must be 0 to 2 .*; got 0.0"),
        (dict(class_labels=[0]), "or one each: got 1 class_labels for batch_size=2"),
    ],
)
def test_classes_that_do_not_fit_are_refused(class_pipe, arguments, message):
    with pytest.raises(InputError, match=message):
        sample(class_pipe, **arguments)


@pytest.mark.parametrize("arguments", [dict(class_labels=0), dict(guidance_scale=2.0)])
def test_an_unconditional_network_refuses_classes_and_guidance(pipe, arguments):
    with pytest.raises(InputError, match="unconditional: leave out class_labels and guidance"):
        sample(pipe, **arguments)


def test_stocks_parameters_come_first_and_are_unchanged():
    theirs = inspect.signature(diffusers.DDPMPipeline.__call__).parameters
    ours = inspect.signature(DDPMPipeline.__call__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)


# Offload, and pictures


def test_model_offload_hooks_are_freed(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    pipe(1, seeded(), 2)
    assert freed == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [None, *SWAPS])
def test_cuda_with_offload(pipe, name):
    pipe = swap(pipe, name) if name else pipe
    pipe.enable_model_cpu_offload()
    assert len(pipe(2, torch.Generator("cuda").manual_seed(0), 5).images) == 2


@pytest.mark.parametrize(("count", "size"), [(1, (60, 60)), (5, (176, 118))])
def test_grid_shape(count, size):
    assert image_grid([Image.new("L", (8, 8))] * count).size == size


def test_grid_of_colour_images_from_a_tensor(tmp_path):
    path = save_image_grid(torch.full((2, 3, 64, 64), 1.0), tmp_path / "new" / "grid.png")
    with Image.open(path) as grid:
        assert (grid.mode, grid.size) == ("RGB", (134, 68))


# The variance of a call


def calibrated(pipe):
    """The pipeline with the statistics of a network that knows nothing of the noise."""
    num_timesteps = len(pipe.scheduler.beta)
    value = torch.linspace(0.5, 0.99, num_timesteps, dtype=torch.float64)
    store(pipe.scheduler, Estimate(value, torch.zeros(num_timesteps)))
    return pipe


def images_of(pipe, num_inference_steps=6, **options):
    return pipe(2, seeded(), num_inference_steps, output_type="pt", **options).images


def test_eta_is_ddim_and_at_one_ddpm(pipe):
    ddim = images_of(pipe, eta=0.0)
    stock = swap(DDPMPipeline(pipe.unet, pipe.scheduler), "DDIMScheduler")
    stock.set_progress_bar_config(disable=True)
    # Theirs keeps the noise that the unclipped image had, and walks in equal strides: unclipped and
    # where T is a multiple of the steps the two are the same.
    for unclipped in (pipe, stock):
        unclipped.scheduler.register_to_config(clip_sample=False)
    ours, theirs = images_of(pipe, 10, eta=0.0), images_of(stock, 10)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # stock's tables are float32
    pipe.scheduler.register_to_config(clip_sample=True)
    assert torch.equal(ddim, images_of(pipe, eta=0.0))
    torch.testing.assert_close(images_of(pipe, eta=1.0), images_of(pipe), rtol=0, atol=1e-5)
    assert not torch.equal(images_of(pipe, eta=0.5), ddim)


def test_a_calibrated_variance_can_be_left_out_and_ddim_asks_for_it(pipe):
    plain, plain_ddim = images_of(pipe), images_of(pipe, eta=0.0)
    calibrated(pipe)
    assert torch.equal(images_of(pipe, analytic=False), plain)
    assert torch.equal(images_of(pipe, analytic=True), images_of(pipe))
    assert not torch.equal(images_of(pipe), plain)
    assert torch.equal(images_of(pipe, eta=0.0), plain_ddim)
    assert not torch.equal(images_of(pipe, eta=0.0, analytic=True), plain_ddim)


def test_a_calibrated_fixed_large_is_not_warned_about(pipe, tiny_unet, caplog):
    logger = diffusers.utils.logging.get_logger("ddpm_hf.pipeline")
    pipe = DDPMPipeline(tiny_unet, build_scheduler("cifar10"))
    pipe.set_progress_bar_config(disable=True)
    logger.addHandler(caplog.handler)
    try:
        images_of(pipe, eta=0.0)
        images_of(calibrated(pipe))
        assert not caplog.messages
        images_of(pipe, analytic=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert "variance_type='fixed_large' is for all 1000 steps" in caplog.messages[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(eta=1.5), r"eta must be between 0 \(DDIM\) and 1 \(DDPM\); got 1.5"),
        (dict(analytic=True), "analytic needs a calibrated model: run `ddpm-hf calibrate`"),
        (dict(eta=0.0, analytic=True), "analytic needs a calibrated model"),
    ],
)
def test_a_variance_that_cannot_be_is_refused(pipe, options, message):
    with pytest.raises(InputError, match=message):
        images_of(pipe, **options)


def test_other_schedulers_have_no_eta(pipe):
    with pytest.raises(InputError, match="the pipeline's is DDIMScheduler: leave them out"):
        images_of(swap(pipe, "DDIMScheduler"), eta=0.0)


def test_pictures_in_rows_of_a_number():
    tiles = [Image.new("L", (56, 56))] * 6
    assert image_grid(tiles, columns=3).size == (3 * 58 + 2, 2 * 58 + 2)
    assert image_grid(tiles, columns=6).size == (6 * 58 + 2, 58 + 2)
