"""The layers of the package, what an import costs, and that the paper's map is true."""

import ast
import importlib
import re
import subprocess
import sys

import pytest

from .conftest import REPOSITORY

PACKAGE = REPOSITORY / "src" / "ddpm_hf"

# A module imports only modules above it. CONTRIBUTING.md explains the layers.
ORDER = [
    "errors",
    "access",
    "functional",
    "scheduler",
    "loading",
    "origin",
    "presets",
    "recipe",
    "config",
    "commandline",
    "checkpoint",
    "results",
    "card",
    "uploads",
    "hub",
    "remote",
    "pixels",
    "sources",
    "images",
    "data",
    "streaming",
    "losses",
    "likelihood",
    "calibration",
    "inversion",
    "multistep",
    "pictures",
    "arguments",
    "chain",
    "pipeline",
    "optimization",
    "sampling",
    "ema",
    "convert.reading",
    "convert.layout",
    "convert.openai",
    "convert.pesser",
    "convert.pytorch_ddpm",
    "convert.lucidrains",
    "convert",
    "devices",
    "stopping",
    "logbook",
    "probe",
    "learner",
    "run",
    "publishing",
    "resuming",
    "outputs",
    "training",
    "bound",
    "evaluation",
    "cli",
]
MATHS = ORDER[: ORDER.index("ema") + 1]


def path_of(name):
    """The file of a module; a package's is its __init__."""
    path = PACKAGE / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(name):
    """(modules of ours, other packages) imported anywhere in a module, functions included."""
    ours, others = set(), set()
    folder = path_of(name).parent.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path_of(name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            ours |= {".".join([*above, name]) for name in ([node.module] if node.module else names)}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return ours, others


def test_every_module_has_its_place():
    assert {PACKAGE / "__init__.py", *map(path_of, ORDER)} == set(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_modules_above_it(name):
    ours, others = imports(name)
    assert ours <= set(ORDER[: ORDER.index(name)])
    if name in MATHS:
        assert not others & {"accelerate", "matplotlib", "gradio"}
    if name not in ("pixels", "sources", "images", "data", "streaming"):
        assert "datasets" not in others


def test_import_is_lazy():
    heavy = ("torch", "diffusers", "datasets", "transformers", "accelerate", "matplotlib")
    code = f"import ddpm_hf, sys; print(*[m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "", result.stderr


def test_public_names_resolve_and_unknown_ones_do_not():
    import ddpm_hf

    assert all(getattr(ddpm_hf, name) is not None for name in ddpm_hf.__all__)
    assert set(ddpm_hf.__all__) <= set(dir(ddpm_hf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ddpm_hf.nothing


def test_docs_paper_md_names_functions_and_tests_that_exist():
    rows = re.findall(
        r"`([a-z_]+)\.([\w.]+)`.*`(test_\w+)::(test_\w+)`",
        (REPOSITORY / "docs/paper.md").read_text(),
    )
    assert len(rows) >= 15
    for module, path, test_file, test in rows:
        found = importlib.import_module(f"ddpm_hf.{module}")
        for part in path.split("."):
            found = getattr(found, part)
        assert f"def {test}(" in (REPOSITORY / "tests" / f"{test_file}.py").read_text(), (
            test_file,
            test,
        )
