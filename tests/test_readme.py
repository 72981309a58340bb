"""The commands and code that the README and its pages show are accepted by the program."""

import ast
import re
import shlex

import pytest

from ddpm_hf.cli import main
from ddpm_hf.commandline import parse_config
from ddpm_hf.recipe import recipe_names

from .conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
PAGES = [REPOSITORY / "README.md"]
PAGES += [REPOSITORY / "docs" / f"{name}.md" for name in ("training", "hub", "convert")]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.DOTALL)
]
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
]
TRAINING = [line.split("#")[0] for line in COMMANDS if "train_accelerate.py" in line]


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_resolve(command):
    words = shlex.split(command)
    parse_config(words[words.index("train_accelerate.py") + 1 :])


def test_the_readme_has_training_commands():
    assert len(TRAINING) >= 4


def test_the_sampling_command_is_accepted(tmp_path, monkeypatch, capsys):
    """It fails on the missing folder and not before."""
    monkeypatch.chdir(tmp_path)
    (command,) = [line for line in COMMANDS if line.startswith("ddpm-hf sample")]
    assert main(shlex.split(command)[1:]) == 2
    assert "cannot load a pipeline from 'out/fashion-quick'" in capsys.readouterr().err


def test_the_averaging_command_is_accepted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (command,) = [line for line in COMMANDS if line.startswith("ddpm-hf ema")]
    assert main(shlex.split(command)[1:]) == 2
    assert "out/profiles is no folder" in capsys.readouterr().err


def test_the_pushing_command_is_accepted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (command,) = [line for line in COMMANDS if line.startswith("ddpm-hf push")]
    assert main(shlex.split(command)[1:]) == 2
    assert "out/fashion-quick is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if line.startswith("ddpm-hf convert")]
)
def test_the_converting_commands_are_accepted(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command, comments=True)[1:]) == 2
    assert "is not a file; name a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["evaluate", "calibrate"])
def test_the_measuring_commands_are_accepted(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (command,) = [line for line in COMMANDS if line.startswith(f"ddpm-hf {verb}")]
    assert main(shlex.split(command, comments=True)[1:]) == 2
    assert "cannot load a pipeline from 'out/fashion-quick'" in capsys.readouterr().err


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_python_blocks_compile_and_import_what_exists(code):
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "README.md", "exec"), {})


def test_every_recipe_is_in_the_readme_and_no_other():
    table = README.split("| recipe | what |")[1].split("\n\n")[0]
    named = set(
        re.findall(r"`([\w-]+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))
    )
    assert named == set(recipe_names())


@pytest.mark.parametrize(
    "page", [PAGES[0], *sorted((REPOSITORY / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_pictures_and_links_exist(page):
    """Files beside the page, and their headings."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text())
    for link, anchor in links:
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{link}#{anchor}"
