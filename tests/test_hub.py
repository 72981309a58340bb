"""Pushing to a real Hub protocol on the loopback interface, with the real client."""

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ddpm_hf import DDPMPipeline, build_scheduler
from ddpm_hf.card import MARK, public_settings
from ddpm_hf.config import TrainingConfig
from ddpm_hf.errors import InputError
from ddpm_hf.hub import _license_there, check_pipeline, files_to_push
from ddpm_hf.remote import is_repo

from .hub_server import run_client

PIPELINE = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def saved(tiny_unet, tmp_path) -> Path:
    """A pipeline, and files around it that must not leave the machine."""
    folder = tmp_path / "run"
    DDPMPipeline(tiny_unet, build_scheduler()).save_pretrained(folder)
    for name in ("checkpoint-2/optimizer.safetensors", "logs/events", "metrics.jsonl",
                 "unet/old.bin", "checkpoint-2/state.json"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("stays here")
    settings = TrainingConfig(train_data_dir=str(tmp_path), output_dir=str(folder))
    (folder / "config.json").write_text(json.dumps(vars(settings)))
    return folder


def push(hub, tmp_path, code, *arguments, token="hf_write"):
    """Run code that has `push_to_hub`, `folder` and `told`, which prints errors in a line each."""
    script = """
        import sys
        from pathlib import Path
        from ddpm_hf.errors import InputError
        from ddpm_hf.hub import push_to_hub
        folder = Path(sys.argv[1])

        def told(act, *arguments, **options):
            try:
                act(*arguments, **options)
            except InputError as error:
                print(error)
            else:
                print("no error")
    """
    command = [sys.executable, "-c", textwrap.dedent(script) + textwrap.dedent(code)]
    return run_client(hub, tmp_path / "home", [*command, *map(str, arguments)], token=token)


def test_a_push_is_one_commit_of_what_may_leave(hub_server, saved, tmp_path):
    push(hub_server, tmp_path, 'print(push_to_hub(folder, "org/name"))', saved)
    repo = hub_server.repos["model", "org/name"]
    assert not repo.private
    head, first = repo.history()  # the push, and the commit that makes a repository
    assert set(head.tree) == PIPELINE | {"README.md", "config.json", ".gitattributes"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert head.tree[weights] == (saved / weights).read_bytes()
    assert MARK.encode() in head.tree["README.md"]
    assert b'from_pretrained("org/name")' in head.tree["README.md"]
    settings = json.loads(head.tree["config.json"])
    assert settings["snr_gamma"] == 5.0
    assert settings["train_data_dir"] == f"./{tmp_path.name}"
    everything = b"".join(head.tree.values())
    assert str(tmp_path).encode() not in everything
    assert b"stays here" not in everything


def test_pushes_after_the_first(hub_server, saved, tmp_path):
    """Private, no commit for nothing, no old weights, a person's card, branches, tags, requests."""
    stale = {"unet/weights.bin": b"x", "results.json": b"[5]", "samples/grid.png": b"x"}
    hub_server.add("org/old", stale | {"README.md": b"words of a person"})
    hub_server.add("org/empty", {"README.md": b" "})
    said = push(
        hub_server,
        tmp_path,
        """
        a = push_to_hub(folder, "org/name", private=True, tag="v1", license="mit")
        b = push_to_hub(folder, "org/name", license="mit")
        print(a.commit == b.commit, a.tag)
        push_to_hub(folder, "org/old", message="new weights")
        push_to_hub(folder, "org/old", revision="next")
        push_to_hub(folder, "name-of-mine", private=False)
        push_to_hub(folder, "org/empty")
        (folder / "README.md").write_text("---\\nlicense: mit\\n---\\nmine")
        print(push_to_hub(folder, "org/old", create_pr=True).url)
        push_to_hub(folder, "org/old")
        push_to_hub(folder, "org/name", tag="v1", move_tag=True)
        """,
        saved,
    )
    assert said.splitlines()[0] == "True v1"
    assert "/org/old/discussions/1" in said.splitlines()[1]
    name, old = hub_server.repos["model", "org/name"], hub_server.repos["model", "org/old"]
    assert name.private
    assert len(name.history()) == 3  # made, pushed, pushed with another card
    assert name.tags["v1"] == name.branches["main"]
    assert not stale.keys() & old.tree().keys()
    assert MARK.encode() in hub_server.repos["model", "org/empty"].tree()["README.md"]
    assert old.tree()["README.md"].endswith(b"mine")
    kept = old.history()[1]
    assert (kept.title, kept.tree["README.md"]) == ("new weights", b"words of a person")
    assert "next" in old.branches
    assert not hub_server.repos["model", "tester/name-of-mine"].private
    assert set(old.pulls) == {1}


def test_a_folder_that_has_no_card_makes_no_repository(hub_server, saved, tmp_path):
    (saved / "training.json").write_text("{")
    said = push(hub_server, tmp_path, 'told(push_to_hub, folder, "org/new")', saved)
    assert "cannot read" in said
    assert not hub_server.repos


def test_what_a_person_can_get_wrong_is_a_line_each_and_nothing_is_pushed(
    hub_server, saved, tmp_path
):
    hub_server.add("org/open")
    hub_server.add("stranger/name")
    tagged = hub_server.add("org/tagged")
    tagged.tags["v1"] = tagged.branches["main"]
    before = {key: repo.branches["main"] for key, repo in hub_server.repos.items()}
    said = push(
        hub_server,
        tmp_path,
        """
        told(push_to_hub, folder, "org/open", private=True)
        told(push_to_hub, folder, "stranger/name")
        told(push_to_hub, folder, "org/tagged", tag="v1")
        told(push_to_hub, folder, "a/b/c")
        told(push_to_hub, folder, "org/open", tag="v1", create_pr=True)
        told(push_to_hub, folder, "org/open", tag="no tag")
        told(push_to_hub, folder / "logs", "org/open")
        told(push_to_hub, folder / "nowhere", "org/open")
        told(push_to_hub, folder, "org/name", token="hf_wrong")
        told(push_to_hub, folder, "org/name", token="hf_read")
        """,
        saved,
    )
    for line, part in zip(
        said.splitlines(),
        [
            "org/open is public, and should be private",
            "cannot push to 'stranger/name': you may not",
            "org/tagged has a tag 'v1' already",
            "no name of a repo is like this",
            "leave out create_pr",
            "tag must be letters",
            "holds no pipeline yet",
            "is no folder",
            "the token is not valid",
            "use a token that may write",
        ],
        strict=True,
    ):
        assert part in line
        assert "hf_" not in line
    assert {key: repo.branches["main"] for key, repo in hub_server.repos.items()} == before
    (line,) = push(
        hub_server, tmp_path, 'told(push_to_hub, folder, "org/n")', saved, token=None
    ).split("\n", 1)[:1]
    assert "`hf auth login`" in line


def test_a_connection_that_is_cut_leaves_the_repository_as_it_was(hub_server, saved, tmp_path):
    old = hub_server.add("org/name", {"README.md": b"old"}).branches["main"]
    hub_server.cut("POST", r"/commit/", after=100, times=1)
    said = push(
        hub_server,
        tmp_path,
        """
        told(push_to_hub, folder, "org/name")
        """,
        saved,
    )
    assert "no connection" in said
    assert hub_server.repos["model", "org/name"].branches["main"] == old
    push(hub_server, tmp_path, 'push_to_hub(folder, "org/name")', saved)
    assert set(hub_server.repos["model", "org/name"].tree()) >= PIPELINE


def test_a_pipeline_pushes_itself_and_loads_where_this_package_is_not(hub_server, saved, tmp_path):
    """The gate over the Hub: push, load with stock, save with stock, push, load with ours."""
    home = tmp_path / "home"
    script = f"""
        import sys, torch, numpy as np
        from ddpm_hf import DDPMPipeline
        pipe = DDPMPipeline.from_pretrained({str(saved)!r})
        pipe.scheduler.register_to_config(
            _ddpm_hf={{**pipe.scheduler.extras, "note": [1, 2.5]}}
        )
        pipe.set_progress_bar_config(disable=True)
        print(pipe.push_to_hub("org/ddpm-cifar", private=True))
        images = pipe(2, torch.Generator().manual_seed(0), 10, output_type="np").images
        np.save({str(tmp_path / "ours.npy")!r}, images)
        """
    said = run_client(hub_server, home, textwrap.dedent(script))
    assert said.startswith(f"{hub_server.endpoint}/org/ddpm-cifar/commit/")
    assert hub_server.repos["model", "org/ddpm-cifar"].private
    assert (
        "config.json" in hub_server.repos["model", "org/ddpm-cifar"].tree()
    )  # the recipe of the run
    stock = f"""
        import sys
        sys.modules["ddpm_hf"] = None  # importing it raises ImportError
        import numpy as np, torch, diffusers, logging
        caught = []
        class Catch(logging.Handler):
            def emit(self, record):
                if record.levelno >= logging.WARNING:
                    caught.append(record.getMessage())
        diffusers.utils.logging.add_handler(Catch())
        from diffusers import DDPMPipeline
        pipe = DDPMPipeline.from_pretrained("org/ddpm-cifar")
        pipe.set_progress_bar_config(disable=True)
        images = pipe(2, torch.Generator().manual_seed(0), 10, output_type="np").images
        np.testing.assert_allclose(images, np.load({str(tmp_path / "ours.npy")!r}), atol=1e-4)
        pipe = DDPMPipeline.from_pretrained("org/ddpm-cifar")
        assert len(pipe(batch_size=8, num_inference_steps=2).images) == 8
        assert not caught, caught
        pipe.push_to_hub("org/again")
        """
    run_client(hub_server, home, textwrap.dedent(stock))
    again = """
        from ddpm_hf import DDPMPipeline
        from huggingface_hub import ModelCard
        pipe = DDPMPipeline.from_pretrained("org/again")
        print(type(pipe.scheduler).__module__, pipe.scheduler.extras["note"])
        ModelCard.load("org/ddpm-cifar").validate()
        """
    said = run_client(hub_server, tmp_path / "other-home", textwrap.dedent(again))
    assert said.splitlines()[-1] == "ddpm_hf.scheduler [1, 2.5]"


def test_a_pipeline_of_a_revision_is_pushed_with_what_lies_beside_it_there(
    hub_server, saved, tmp_path
):
    script = f"""
        import json, pathlib
        from ddpm_hf import DDPMPipeline, push_to_hub
        folder = pathlib.Path({str(saved)!r})
        settings = json.loads((folder / "config.json").read_text())
        push_to_hub(folder, "org/name", tag="early")
        (folder / "config.json").write_text(json.dumps(settings | {{"seed": 123456}}))
        push_to_hub(folder, "org/name")
        DDPMPipeline.from_pretrained("org/name", revision="early").push_to_hub("org/early")
        """
    run_client(hub_server, tmp_path / "home", textwrap.dedent(script))
    now, early = (hub_server.repos["model", f"org/{name}"].tree() for name in ("name", "early"))
    assert b"123456" in now["config.json"]
    assert b"123456" not in early["config.json"]


def test_what_lies_beside_is_that_of_the_weights_that_are_pushed(hub_server, saved, tmp_path):
    """An old card in place of a newer one, a stranger's card, the recipe of other weights."""
    hub_server.add("out/run", {"README.md": b"card of a stranger", "model_index.json": b"{}"})
    script = """
        import os, shutil, sys, logging
        from pathlib import Path
        from ddpm_hf import DDPMPipeline, build_unet
        from huggingface_hub import HfApi
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        saved, here = Path(sys.argv[1]), Path(sys.argv[2])
        shutil.copytree(saved, here / "out/run")
        os.chdir(here)
        pipe = DDPMPipeline.from_pretrained("out/run")
        pipe.push_to_hub("org/first")
        HfApi().create_tag("org/first", tag="v1")
        os.chdir("/")
        pipe.push_to_hub("org/elsewhere")
        shutil.rmtree(here / "out")
        pipe.push_to_hub("org/gone")
        say = lambda repo, text: HfApi().upload_file(
            path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo)
        say("org/first", "first words")
        HfApi().create_tag("org/first", tag="v2")
        say("org/first", "better words")
        old = DDPMPipeline.from_pretrained("org/first", revision="v2")
        old.push_to_hub("org/first")
        old.push_to_hub("org/copy")
        old.unet = DDPMPipeline.from_pretrained("org/gone").unet
        old.push_to_hub("org/others")
        """
    command = [sys.executable, "-c", textwrap.dedent(script), str(saved), str(tmp_path)]
    said = run_client(hub_server, tmp_path / "home", command)
    trees = {name: hub_server.repos["model", f"org/{name}"].tree() for name in
             ("first", "elsewhere", "gone", "copy", "others")}  # fmt: skip
    assert "config.json" in trees["elsewhere"]
    assert MARK.encode() in trees["elsewhere"]["README.md"]
    assert f"{tmp_path}/out/run is gone: what lay there beside" in said
    assert "config.json" not in trees["gone"]
    assert trees["first"]["README.md"] == b"better words"
    assert trees["copy"]["README.md"] == b"first words"
    assert "config.json" in trees["copy"]
    assert "config.json" not in trees["others"]
    assert MARK.encode() in trees["others"]["README.md"]


def test_a_card_that_is_edited_during_a_push_stays(hub_server, saved, tmp_path):
    """The files were read before the upload, and the card written after it."""
    said = push(
        hub_server,
        tmp_path,
        """
        import ddpm_hf.hub as hub
        from huggingface_hub import HfApi
        push_to_hub(folder, "org/name")
        class Slow(HfApi):
            def create_commit(self, *arguments, **options):  # a person is quicker
                HfApi().upload_file(
                    path_or_fileobj=b"words of a person", path_in_repo="README.md",
                    repo_id="org/name")
                return super().create_commit(*arguments, **options)
        hub.HfApi = Slow
        told(push_to_hub, folder, "org/name", license="mit")
        """,
        saved,
    )
    assert "cannot push to 'org/name': somebody else pushed meanwhile" in said
    repo = hub_server.repos["model", "org/name"]
    assert repo.tree()["README.md"] == b"words of a person"


def test_what_leaves_is_a_list(hub_server, saved, tmp_path):
    """Of a folder that plain diffusers saved, of another trainer's settings, of a flat repo."""
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        config = json.loads((saved / name).read_text())
        (saved / name).write_text(json.dumps(config | {"_name_or_path": str(saved)}))
    flat = {"diffusion_pytorch_model.bin": b"x", "scheduler_config.json": b"{}"}
    hub_server.add("org/flat", flat | {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    settings = json.loads((saved / "config.json").read_text()) | {"wandb_key": "SECRET"}
    (saved / "config.json").write_text(json.dumps(settings))
    push(hub_server, tmp_path, 'push_to_hub(folder, "org/flat")', saved)
    del settings["snr_gamma"]
    settings["dataset_name"] = ["a", "b"]
    (saved / "config.json").write_text(json.dumps(settings))
    push(hub_server, tmp_path, 'push_to_hub(folder, "org/foreign")', saved)
    trees = [hub_server.repos["model", f"org/{name}"].tree() for name in ("flat", "foreign")]
    for tree in trees:
        everything = b"".join(tree.values())
        assert str(tmp_path).encode() not in everything
        assert b"SECRET" not in everything
        assert json.loads(tree["unet/config.json"])["sample_size"]
    assert not flat.keys() & trees[0].keys()
    # A card that the Hub's form made says the licence only.
    assert MARK.encode() in trees[0]["README.md"]
    assert b"license: apache-2.0" in trees[0]["README.md"]
    assert ["config.json" in tree for tree in trees] == [True, False]


@pytest.mark.parametrize(
    ("head", "license"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("tags:\n- a\nlicense: 'mit' ", "mit"),
        ("license: mit\r", "mit"),
        ("license: [mit", None),  # no YAML
        ("license:\ntags: []", None),
        ("tags: [license: mit]", None),
        (MARK + "\nlicense: mit", None),  # of ours: the settings have it
    ],
)
def test_the_licence_of_a_card_that_is_replaced_stays(head, license, tmp_path):
    card = tmp_path / "README.md"
    card.write_bytes(f"---\n{head}\n---\n".encode())
    assert _license_there(card) == license


def test_only_safetensors_are_pushed(tiny_unet, tmp_path):
    DDPMPipeline(tiny_unet, build_scheduler()).save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="unet has no diffusion_pytorch_model.safetensors"):
        check_pipeline(tmp_path)
    assert not [path for path in files_to_push(tmp_path) if path.suffix == ".bin"]


def test_pickles_are_neither_saved_nor_pushed(tiny_unet, tmp_path):
    pipe = DDPMPipeline(tiny_unet, build_scheduler())
    with pytest.raises(InputError, match="safe_serialization must be True"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="safe_serialization must be True"):
        pipe.push_to_hub("org/name", safe_serialization=False)
    with pytest.raises(InputError, match="leave out subfolder and variant"):
        pipe.push_to_hub("org/name", subfolder="x")


def test_settings_that_leave(tmp_path):
    settings = vars(
        TrainingConfig(
            dataset_name="org/set",
            init_from=str(tmp_path),
            output_dir="/home/me",
            seed=3,
            model_config_name_or_path=str(tmp_path),
        )
    )
    public = public_settings(settings)
    assert public["dataset_name"] == "org/set"
    assert public["init_from"] == f"./{tmp_path.name}"
    assert public["seed"] == 3
    assert not {"output_dir", "cache_dir", "hub_model_id"} & set(public)
    assert public_settings({"train_data_dir": "../private/dir"})["train_data_dir"] == "./dir"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name-checkpoints", True),
        ("latest", False),
        ("run/checkpoint-500", False),
        ("/somewhere/run", False),
        ("../x", False),
        ("a/b/c", False),
    ],
)
def test_what_is_the_name_of_a_repository(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repo(name) is expected
    os.makedirs(tmp_path / "org" / "name-checkpoints")
    assert not is_repo("org/name-checkpoints")
