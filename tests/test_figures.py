"""The pictures of docs/theory.md are those that docs/figures.py draws; its links lead somewhere."""

import importlib
import re
import subprocess
import sys

import pytest
import torch

from ddpm_hf import DDPMPipeline, build_scheduler, build_unet
from ddpm_hf.calibration import Estimate, store

from .conftest import REPOSITORY

THEORY = (REPOSITORY / "docs/theory.md").read_text()


def draw(folder, *options):
    """Run docs/figures.py."""
    command = [sys.executable, REPOSITORY / "docs/figures.py", folder, *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def pipeline():
    """An untrained one of the embedded images' shape."""
    torch.manual_seed(0)
    scheduler = build_scheduler("fashion-quick")
    return DDPMPipeline(build_unet("fashion-quick", image_channels=1), scheduler)


def test_links_of_the_course_lead_to_what_they_name():
    links = re.findall(r"\[`(\w+)`\]\(\.\./src/ddpm_hf/(\w+)\.py\)", THEORY)
    assert len(links) >= 25
    for name, module in links:
        found = importlib.import_module(f"ddpm_hf.{module}")
        owners = [
            found,
            getattr(found, "DDPMScheduler", None),
            getattr(found, "DDPMPipeline", None),
        ]
        assert any(hasattr(owner, name) for owner in owners), (name, module)


def test_pictures_of_the_course_are_there():
    pictures = set(re.findall(r"\(images/(\w+\.png)\)", THEORY))
    assert len(pictures) >= 9
    assert all((REPOSITORY / "docs/images" / name).is_file() for name in pictures)


@pytest.mark.slow
def test_every_picture_of_the_course_is_drawn(pipeline, tmp_path):
    noise = torch.linspace(0.5, 0.999, 1000).double()  # of 1, as an exact network's rises to
    store(pipeline.scheduler, Estimate(noise, torch.zeros(1000)))
    pipeline.save_pretrained(tmp_path / "model")
    options = ["--output", tmp_path / "images", "--num_images", "2", "--timesteps", "4"]
    done = draw(tmp_path / "model", *options)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in (tmp_path / "images").iterdir()}
    assert drawn == set(re.findall(r"\(images/(\w+\.png)\)", THEORY))


@pytest.mark.slow
def test_figures_say_what_the_model_lacks(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    done = draw(tmp_path / "model", "--output", tmp_path / "images")
    assert done.returncode == 2
    assert "calibrate it first: ddpm-hf calibrate" in done.stderr
    assert not (tmp_path / "images").exists()
