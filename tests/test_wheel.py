"""The built wheel, installed where the repository is not: the default job, whole."""

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from .conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(REPOSITORY),
    ]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel in it. Its dependencies are this
    environment's.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    # A path in a .pth file brings the packages there, but not the editable install of the
    # repository.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [
        folder / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        str(wheel),
    ]
    subprocess.run(install, check=True)
    return folder / "bin"


def test_the_wheel_carries_recipes_images_card_and_licences(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {
        f"ddpm_hf/recipes/{path.name}" for path in (REPOSITORY / "src/ddpm_hf/recipes").iterdir()
    }
    images = {
        f"ddpm_hf/fashion_mnist/{name}" for name in ("train.parquet", "test.parquet", "LICENSE")
    }
    assert recipes | images | {"ddpm_hf/model_card.md", "ddpm_hf/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)


def test_the_default_job_trains_from_the_wheel_to_the_quality_it_promises(
    installed, tmp_path, request
):
    """`ddpm-hf train` without flags in an empty folder; FD <= 4.5 by the frozen yardstick."""

    def run(*command):
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    where = run(installed / "python", "-c", "import ddpm_hf; print(ddpm_hf.__file__)")
    assert str(REPOSITORY / "src") not in where
    printed = run(installed / "ddpm-hf", "train")
    out = tmp_path / "out" / "fashion-quick"
    assert "Pipeline:   out/fashion-quick" in printed
    assert (out / "samples" / "grid.png").is_file()
    assert "Going on from" in run(installed / "ddpm-hf", "train")
    sample = "sample out/fashion-quick --num_images 1000 --batch_size 250 --num_inference_steps 20"
    run(installed / "ddpm-hf", *sample.split(), "--scheduler", "ddim", "--output", "samples.npy")
    shared = request.getfixturevalue("shared")
    yardstick = [sys.executable, shared / "yardstick/yardstick.py", "--set", "fashion"]
    measured = json.loads(run(*yardstick, "--images", tmp_path / "samples.npy"))
    assert measured["num_images"] == 1000
    assert measured["fd"] <= 4.5
