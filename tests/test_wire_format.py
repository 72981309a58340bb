"""What is on disk: opened by plain diffusers, by this package, and by both in turn (design of the
repo format).
"""

import json
import subprocess
import sys
import textwrap

import diffusers
import numpy as np
import pytest
import torch

from ddpm_hf import DDPMPipeline, DDPMScheduler, build_scheduler

WITHOUT_US = """
    import sys
    sys.modules["ddpm_hf"] = None  # importing it raises ImportError
    import warnings
    warnings.simplefilter("error")
    import logging, numpy as np, torch, diffusers
    caught = []
    class Catch(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING:
                caught.append(record.getMessage())
    diffusers.utils.logging.add_handler(Catch())
"""


def stock(script: str, *arguments) -> str:
    """Run a script where ddpm_hf cannot be imported."""
    code = textwrap.dedent(WITHOUT_US) + textwrap.dedent(script)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def saved(tiny_unet, tmp_path):
    scheduler = build_scheduler(ddpm_beta_schedule="sigmoid")
    extras = {**scheduler.extras, "note": {"list": [1, 2.5]}}
    scheduler.register_to_config(_ddpm_hf=extras)
    quiet(DDPMPipeline(tiny_unet, scheduler)).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def test_the_files_name_only_stock_classes(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    config = json.loads((saved / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DDPMScheduler"
    assert len(config["trained_betas"]) == 1000
    assert config["_ddpm_hf"] == {
        "format": 1,
        "beta_schedule": "sigmoid",
        "note": {"list": [1, 2.5]},
    }
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_stock_without_us_us_and_stock_again(saved, tmp_path):
    """The gate: stock loads silently, samples the same images, and its re-save keeps the extras."""
    stock(
        """
        pipe = diffusers.DDPMPipeline.from_pretrained(sys.argv[1])
        generic = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
        assert type(pipe.scheduler) is diffusers.DDPMScheduler and type(generic) is type(pipe)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(2, torch.Generator().manual_seed(0), 10, output_type="np").images
        np.save(sys.argv[2], images)
        pipe.save_pretrained(sys.argv[3])
        assert not caught, caught
        """,
        saved, tmp_path / "stock.npy", tmp_path / "again",
    )  # fmt: skip
    ours = quiet(DDPMPipeline.from_pretrained(saved))
    assert type(ours.scheduler) is DDPMScheduler
    assert ours.scheduler.extras["note"] == {"list": [1, 2.5]}
    images = ours(2, torch.Generator().manual_seed(0), 10, output_type="np").images
    np.testing.assert_allclose(images, np.load(tmp_path / "stock.npy"), atol=1e-4)

    again = quiet(DDPMPipeline.from_pretrained(tmp_path / "again"))
    assert again.scheduler.extras == ours.scheduler.extras
    assert torch.equal(again.scheduler.alpha_bar, ours.scheduler.alpha_bar)
    repeat = again(2, torch.Generator().manual_seed(0), 10, output_type="np").images
    assert np.array_equal(repeat, images)


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
def test_other_stock_pipelines_open_it(saved, name):
    stock(
        f"""
        pipe = diffusers.{name}.from_pretrained(sys.argv[1])
        pipe.set_progress_bar_config(disable=True)
        assert len(pipe(1, num_inference_steps=2).images) == 1
        """,
        saved,
    )


def test_a_stock_pipeline_holding_our_scheduler_saves_a_loadable_folder(tiny_unet, tmp_path):
    """Trap 2 of the Hub facts: the module's name would be written and could not be loaded by
    anyone.
    """
    diffusers.DDPMPipeline(tiny_unet, build_scheduler()).save_pretrained(tmp_path / "x")
    stock("diffusers.DDPMPipeline.from_pretrained(sys.argv[1])", tmp_path / "x")
    assert type(DDPMPipeline.from_pretrained(tmp_path / "x").scheduler) is DDPMScheduler


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "sigmoid", "laplace"])
@pytest.mark.parametrize("steps", [1000, 200])
def test_every_schedule_is_the_same_process_in_stock(schedule, steps, tmp_path):
    ours = build_scheduler(ddpm_beta_schedule=schedule, ddpm_num_steps=steps)
    ours.save_pretrained(tmp_path)
    stock = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    # float32 cumulative product of up to 1,000 factors; where alpha_bar is tiny only its size
    # matters
    np.testing.assert_allclose(stock.alphas_cumprod, ours.alpha_bar[1:], rtol=2e-4, atol=1e-7)
    assert stock.config.timestep_spacing == "trailing"
    assert stock.config.beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")


def test_a_stock_folder_opens_with_us(tiny_unet, tmp_path):
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    diffusers.DDPMPipeline(tiny_unet, scheduler).save_pretrained(tmp_path)
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    assert pipe.scheduler.extras == {}
    assert pipe.scheduler.config.timestep_spacing == "leading"


def test_a_newer_format_is_refused_in_words(saved):
    path = saved / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    config["_ddpm_hf"]["format"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="newer ddpm_hf .format 2.*pip install --upgrade ddpm_hf"):
        DDPMPipeline.from_pretrained(saved)
