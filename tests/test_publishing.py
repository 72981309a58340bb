"""What a run pushes while it trains, and going on elsewhere from what it pushed."""

import json
import sys
import textwrap
import threading
from types import SimpleNamespace

import pytest

from ddpm_hf import TrainingConfig, train
from ddpm_hf.checkpoint import load_checkpoint
from ddpm_hf.publishing import finish_pushes
from ddpm_hf.uploads import BackgroundPush

from .conftest import REPOSITORY, quick_settings_in
from .hub_server import HubServer, run_client

TOKEN = "hf_PlantedTokenOfThisTest"


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def command(folder, **settings):
    """`ddpm-hf train` for seconds, in a folder."""
    settings = quick_settings_in(folder) | dict(learning_rate=1e-3) | settings
    entry = "import sys; from ddpm_hf.cli import main; sys.exit(main())"
    return [sys.executable, "-c", entry, "train", *flags(**settings)]


def test_a_run_pushes_while_it_trains_and_its_token_stays_nowhere(tmp_path):
    with HubServer(tokens={TOKEN: "write"}) as hub:
        words = command(
            tmp_path, logger="tensorboard", push_to_hub=True, push_steps=3, push_checkpoints=True,
            hub_model_id="org/fashion", hub_private_repo=True, hub_token=TOKEN,
            save_images_steps=2,
        )  # fmt: skip
        said = run_client(hub, tmp_path / "home", words, token=None)
    model, kept = (hub.repos["model", f"org/{name}"] for name in ("fashion", "fashion-checkpoints"))
    assert model.private
    assert kept.private
    assert set(model.tags) == {"step-3", "step-4"}  # one step in three, and the end
    assert model.tags["step-4"] == model.branches["main"]
    milestone = model.tree("step-3")
    assert json.loads(milestone["training.json"])["step"] == 3
    assert {row["step"] for row in json.loads(milestone["results.json"])} == {3}
    grid = tmp_path / "run" / "samples" / "step-2.png"
    assert milestone["samples/grid.png"] == grid.read_bytes()
    assert set(model.tree()) == {
        ".gitattributes", "README.md", "config.json", "loss_curve.png", "model_index.json",
        "results.json", "samples/grid.png", "scheduler/scheduler_config.json", "training.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    (only,) = kept.history()  # squashed
    assert {name.split("/")[0] for name in only.tree} == {
        ".gitattributes", "README.md", "checkpoint-4", "config.json", "metrics.jsonl"
    }  # fmt: skip
    assert not [name for name in only.tree if not name.endswith((".safetensors", ".json", ".md",
                ".jsonl", ".gitattributes"))]  # fmt: skip
    assert said.count("Pushed:     ") == 2

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    contents = [path.read_bytes() for path in files]
    contents += [blob for repo in hub.repos.values() for c in repo.commits.values()
                 for blob in c.tree.values()]  # fmt: skip
    assert not [text for text in (*contents, said.encode()) if TOKEN.encode() in text]
    assert not list((tmp_path / "run").glob(".push*"))


def test_a_failed_push_neither_stops_training_nor_is_hidden(hub_server, tmp_path):
    hub_server.fail("POST", "/commit/", status=403, message="no space left", times=None)
    words = command(tmp_path, push_to_hub=True, hub_model_id="org/fashion", max_train_steps=2)
    said = run_client(hub_server, tmp_path / "home", words)
    assert (tmp_path / "run" / "README.md").is_file()
    problem = "Not pushed: the model of step 2: cannot push to 'org/fashion': you may not"
    assert problem in said
    assert f"Push it with: ddpm-hf push {tmp_path / 'run'} --repo org/fashion" in said
    assert len(hub_server.repos["model", "org/fashion"].history()) == 1  # as it was made


@pytest.mark.slow
def test_a_hub_that_is_down_does_not_keep_a_run_from_training(hub_server, tmp_path, monkeypatch):
    script = f"""
        from ddpm_hf import TrainingConfig, train, uploads
        uploads.RETRY_SECONDS = ()
        result = train(TrainingConfig(**{quick_settings_in(tmp_path)!r} | dict(
            max_train_steps=1, push_to_hub=True, hub_model_id="org/x")))
        print("pushed:", result.pushed)
        """
    hub_server.__exit__()
    said = run_client(hub_server, tmp_path / "home", textwrap.dedent(script))
    assert "training begins, pushes will try again" in said
    assert "Not pushed: the model of step 1" in said
    assert "pushed: None" in said


def test_what_would_fail_later_is_said_before_training(hub_server, tmp_path):
    """One process asks for all: a command that cannot push does not train first."""
    script = f"""
        from ddpm_hf import TrainingConfig, train
        from ddpm_hf.errors import InputError
        from huggingface_hub import constants
        settings = {quick_settings_in(tmp_path)!r}
        for more in (
            dict(push_to_hub=True, hub_model_id="stranger/x"),
            dict(push_to_hub=True, hub_model_id="org/open", hub_private_repo=True),
            dict(push_checkpoints=True, hub_model_id="org/open"),
            dict(resume_from_checkpoint="org/none"),
            dict(resume_from_checkpoint="org/open"),
            dict(push_to_hub=True, hub_model_id="my model"),
            dict(push_to_hub=True, hub_model_id="org/offline"),
        ):
            constants.HF_HUB_OFFLINE = more.get("hub_model_id") == "org/offline"
            try:
                train(TrainingConfig(**settings | more))
            except InputError as error:
                print(error)
        """
    hub_server.add("org/open")
    hub_server.add("org/open-checkpoints")
    lines = run_client(hub_server, tmp_path / "home", textwrap.dedent(script)).splitlines()
    for line, part in zip(
        lines,
        [
            "cannot push to 'stranger/x': you may not",
            "org/open is public, and should be private",
            "org/open-checkpoints is public, and should be private",
            "cannot resume from 'org/none'",
            "org/open holds no checkpoint",
            "no name of a repo is like this",
            "cannot push to 'org/offline': HF_HUB_OFFLINE is set: unset it",
        ],
        strict=True,
    ):
        assert part in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_machine_goes_on_bit_for_bit(hub_server, tmp_path):
    """Two steps here, pushed; the rest elsewhere: as if it had never stopped."""
    profiles = dict(ema_profiles="0.05,0.1", ema_snapshot_steps=1, lr_scheduler="constant")
    straight = quick_settings_in(tmp_path / "straight") | dict(learning_rate=1e-3) | profiles
    train(TrainingConfig(**straight))

    kept = profiles | dict(push_checkpoints=True, hub_model_id="org/run")
    run_client(hub_server, tmp_path / "home", command(tmp_path / "here", max_train_steps=2, **kept))
    there = command(tmp_path / "there", **kept)  # the same command, elsewhere
    said = run_client(hub_server, tmp_path / "other-home", there)
    assert "Fetched checkpoint-2 from org/run-checkpoints" in said
    assert "Going on from checkpoint-2, 2 of 4 steps done" in said

    expected, got = (
        load_checkpoint(tmp_path / name / "run" / "checkpoint-4") for name in ("straight", "there")
    )
    assert got.tensors.keys() == expected.tensors.keys()
    for group, named in expected.tensors.items():
        for name, tensor in named.items():
            assert tensor.equal(got.tensors[group][name]), (group, name)
    snapshots = [
        sorted(path.name for path in (tmp_path / name / "run" / "ema").iterdir())
        for name in ("straight", "there")
    ]
    assert snapshots[0] == snapshots[1]
    # Again, there: its own checkpoint is as new.
    again = run_client(hub_server, tmp_path / "other-home", there)
    assert "checkpoint-4 here is as new as checkpoint-4 of org/run-checkpoints" in again
    third = command(tmp_path / "third", resume_from_checkpoint="org/run-checkpoints", **profiles)
    said = run_client(hub_server, tmp_path / "third-home", third)
    assert "Fetched checkpoint-4 from org/run-checkpoints" in said
    # Another run does not take its place by mistake.
    other = command(tmp_path / "fourth", seed=1, **kept)
    said = run_client(hub_server, tmp_path / "home", other, expect=2)
    assert "holds a checkpoint of another run: seed is 0 there. Name another" in said
    assert not (tmp_path / "fourth" / "run").exists()
    # Nor does its checkpoint come into the folder of this one.
    folder = tmp_path / "here" / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = command(tmp_path / "here", seed=1, **kept)
    said = run_client(hub_server, tmp_path / "home", other, expect=2)
    assert "is another one: seed was 0, now 1" in said
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_processes_push_and_go_on_elsewhere(hub_server, tmp_path):
    """Only one of them talks to the Hub; both go on from what it fetched."""
    kept = dict(push_to_hub=True, push_checkpoints=True, hub_model_id="org/run")

    def launch(folder, **more):
        words = command(tmp_path / folder, **kept, **more)[4:]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        script = [*torchrun, str(REPOSITORY / "train_accelerate.py")]
        return run_client(hub_server, tmp_path / "home", [*script, *words])

    assert "Processes: 2" in launch("here", max_train_steps=2)
    said = launch("there")
    assert said.count("Fetched checkpoint-2 from org/run-checkpoints") == 1
    assert "Going on from checkpoint-2, 2 of 4 steps done" in said
    assert "checkpoint-4/state.json" in hub_server.repos["model", "org/run-checkpoints"].tree()
    assert set(hub_server.repos["model", "org/run"].tags) == {"step-2", "step-4"}


@pytest.mark.slow
def test_checkpoints_that_cannot_be_gone_on_from(hub_server, tmp_path):
    settings = quick_settings_in(tmp_path / "first") | dict(max_train_steps=2)
    run = train(TrainingConfig(**settings)).output_dir
    script = """
        import sys
        from pathlib import Path
        from ddpm_hf import TrainingConfig
        from ddpm_hf.errors import InputError
        from ddpm_hf.remote import fetch_checkpoint, push_checkpoint
        run, new, name = sys.argv[1:]
        try:
            if name == "org/kept":
                push_checkpoint(Path(run), Path(run) / "checkpoint-2", name)
            if new.endswith("earlier"):
                (Path(run) / "checkpoint-2").rename(Path(run) / "checkpoint-1")
                push_checkpoint(Path(run), Path(run) / "checkpoint-1", name)
            config = TrainingConfig(**SETTINGS | dict(output_dir=new))
            print(fetch_checkpoint(name, config))
        except InputError as error:
            print(error)
        """.replace("SETTINGS", repr(settings))
    code = [sys.executable, "-c", textwrap.dedent(script), str(run)]

    def fetch(name, folder):
        return run_client(hub_server, tmp_path / "home", [*code, str(tmp_path / folder), name])

    assert fetch("org/kept", "new") == "Fetched checkpoint-2 from org/kept\n"
    weights = "checkpoint-2/unet.safetensors"
    (tmp_path / "new" / weights).write_bytes(b"damaged here")
    assert fetch("org/kept", "new") == "Fetched checkpoint-2 from org/kept\n"
    tree = hub_server.repos["model", "org/kept"].tree()
    assert (tmp_path / "new" / weights).read_bytes() == tree[weights]

    hub_server.add("org/damaged", tree | {weights: tree[weights] + b"x"})
    assert "is damaged: unet.safetensors has changed" in fetch("org/damaged", "fresh")
    hub_server.add("org/bare", {k: v for k, v in tree.items() if k != "config.json"})
    assert "org/bare holds no settings of a run" in fetch("org/bare", "fresh")
    assert not (tmp_path / "fresh").exists()
    later = "org/kept has a later one, checkpoint-2, which stays"
    assert later in fetch("org/kept", "earlier")
    assert "checkpoint-2/state.json" in hub_server.repos["model", "org/kept"].tree()


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_image_set_of_the_hub_is_trained_on(hub_server, tiny_images, tmp_path, streaming):
    card = b"---\nlicense: cc-by-4.0\n---\n"
    files = {f"train/{path.name}": path.read_bytes() for path in tiny_images.iterdir()}
    hub_server.add("org/photos", {"README.md": card, **files}, kind="dataset")
    words = command(
        tmp_path, dataset_name="org/photos", split="train", image_mode="auto",
        max_train_steps=1, streaming=streaming, push_to_hub=True, hub_model_id="org/model",
    )  # fmt: skip
    said = run_client(hub_server, tmp_path / "home", words)
    assert "RGB images" in said
    tree = hub_server.repos["model", "org/model"].tree()
    text = tree["README.md"].decode()
    assert "[org/photos](https://huggingface.co/datasets/org/photos)" in text
    assert "| their licence | cc-by-4.0 |" in text
    assert "datasets:\n- org/photos" in text
    assert json.loads(tree["config.json"])["dataset_name"] == "org/photos"


def test_the_address_of_a_pushed_checkpoint_is_not_that_of_a_commit_that_is_gone(
    hub_server, tmp_path
):
    script = """
        import sys
        from pathlib import Path
        import torch
        from ddpm_hf.checkpoint import save_checkpoint
        from ddpm_hf.remote import push_checkpoint
        run = Path(sys.argv[1])
        save_checkpoint(run, 2, {"unet": {"a": torch.zeros(3)}}, {})
        print(*push_checkpoint(run, run / "checkpoint-2", "org/kept")[:3])
        """
    words = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "run")]
    repo, url, commit = run_client(hub_server, tmp_path / "home", words).split()
    assert commit == hub_server.repos["model", repo].branches["main"]
    assert url == f"{hub_server.endpoint}/org/kept/tree/main"


def test_what_hangs_at_the_end_is_said_with_the_command_that_pushes_it(capsys):
    hang = threading.Event()
    pushes = BackgroundPush(print)
    pushes.submit("model", "the model of step 4", lambda: hang.wait(30), lambda: None)
    run = SimpleNamespace(
        pushes=pushes,
        accelerator=SimpleNamespace(print=print),
        stop=SimpleNamespace(noted=0),
        directory="out/x",
        config=SimpleNamespace(hub_repo="org/x"),
    )
    assert finish_pushes(run, 0.1) is None
    hang.set()
    _, problem, way_out = capsys.readouterr().out.splitlines()
    assert problem == "Not pushed: the model of step 4: not over after 0 seconds"
    assert way_out == "Push it with: ddpm-hf push out/x --repo org/x"
