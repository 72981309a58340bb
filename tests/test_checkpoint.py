"""Checkpoints are whole or absent; a run's folder is never overwritten by another run."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from ddpm_hf import checkpoint as ck
from ddpm_hf.config import TrainingConfig
from ddpm_hf.errors import InputError

TENSORS = {"unet": {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3.5)}}


def write(folder, step, state=None):
    return ck.save_checkpoint(folder, step, TENSORS, state or {"x": [0.1, None, "w"]})


def test_round_trip(tmp_path):
    loaded = ck.load_checkpoint(write(tmp_path, 7))
    assert loaded.step == 7
    assert loaded.state == {"x": [0.1, None, "w"]}
    assert all(torch.equal(loaded.tensors["unet"][k], v) for k, v in TENSORS["unet"].items())


def test_no_pickle_is_written(tmp_path):
    names = {path.suffix for path in write(tmp_path, 1).iterdir()}
    assert names == {".safetensors", ".json"}


def test_a_failed_save_leaves_the_earlier_checkpoint_and_nothing_partial(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(TypeError):  # no JSON: fails after the tensors are written
        write(tmp_path, 2, {"x": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert ck.find_latest(tmp_path) == (tmp_path / "checkpoint-1", [])


def test_what_a_kill_inside_a_save_leaves_is_not_taken_for_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2).rename(tmp_path / ".checkpoint-2.partial")
    assert ck.find_latest(tmp_path)[0].name == "checkpoint-1"
    write(tmp_path, 2)
    assert ck.find_latest(tmp_path)[0].name == "checkpoint-2"


def test_a_checkpoint_written_again_replaces_the_old_one(tmp_path):
    write(tmp_path, 1, {"x": 1})
    assert ck.load_checkpoint(write(tmp_path, 1, {"x": 2})).state["x"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_leftovers_of_a_kill_are_cleared_and_nothing_else(tmp_path):
    write(tmp_path, 1)
    for name in (".checkpoint-2.partial", ".checkpoint-1.replaced", "other", ".mine"):
        (tmp_path / name).mkdir()
    ck.clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "other", ".mine"}


def test_a_kill_before_the_first_file_leaves_a_folder_that_can_be_used(tmp_path):
    (tmp_path / ".config.json.partial").write_text("{")
    ck.check_folder(tmp_path)
    ck.clear_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".mine").touch()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        ck.check_folder(tmp_path)


def test_lines_of_metrics_that_were_cut_are_left_out(tmp_path):
    path = tmp_path / ck.METRICS
    path.write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n{"step": 5, "l')
    assert ck.read_metrics(path) == [{"step": 1}, {"step": 4}]
    ck.keep_metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n'
    assert ck.read_metrics(tmp_path / "nowhere") == []


def test_a_newer_format_is_refused_and_not_taken_for_damage(tmp_path):
    write(tmp_path, 1)
    manifest = write(tmp_path, 2) / ck.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    with pytest.raises(InputError, match=r"newer ddpm_hf \(format 2, .* up to 1\): pip install"):
        ck.find_latest(tmp_path)


def test_a_full_disk_is_an_oserror_also_where_safetensors_meets_it(tmp_path):
    """A limit on the size of files stands for the disk: writes fail in the same way."""
    script = (
        "import resource, sys, torch, ddpm_hf.checkpoint as ck\n"
        "from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: ck.save_checkpoint(Path(sys.argv[1]), 2, {'unet': {'x': torch.zeros(100_000)}}, {})\n"
        "except OSError as error: print(error)"
    )
    write(tmp_path, 1)
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "cannot write" in result.stdout, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "unet.safetensors").write_bytes(b"x"), "unet.safetensors has changed"),
        (lambda f: (f / "state.json").unlink(), "state.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, harm, message):
    write(tmp_path, 1)
    harm(write(tmp_path, 2))
    latest, passed_over = ck.find_latest(tmp_path)
    assert latest.name == "checkpoint-1"
    assert len(passed_over) == 1
    assert message in passed_over[0]
    with pytest.raises(InputError, match=message):
        ck.verify(tmp_path / "checkpoint-2")


def test_order_is_by_number_and_strangers_are_ignored(tmp_path):
    for step in (2, 10, 9):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-9",
        "checkpoint-10",
    ]
    assert ck.find_latest(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize(
    ("limit", "left"),
    [(1, [3]), (2, [2, 3]), (5, [1, 2, 3]), (0, [1, 2, 3]), (None, [1, 2, 3])],
)
def test_rotation_keeps_the_newest(tmp_path, limit, left):
    for step in (1, 2, 3):
        write(tmp_path, step)
    ck.rotate(tmp_path, limit)
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == [
        f"checkpoint-{k}" for k in left
    ]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


def muon(parameters):
    from pytorch_optimizer import Muon

    weight, bias = parameters
    return Muon([dict(params=[weight], use_muon=True), dict(params=[bias], use_muon=False)])


@pytest.mark.parametrize("make", [adamw, muon])
def test_an_optimizer_survives_bit_for_bit(tmp_path, make):
    """Three steps, save, load, three more: as six without a stop."""

    def steps(parameters, optimizer, count):
        for _ in range(count):
            sum((p**2).sum() for p in parameters).backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        parameters = [
            torch.nn.Parameter(torch.randn(4, 3, 3, 3)),
            torch.nn.Parameter(torch.randn(4)),
        ]
        return parameters, make(parameters)

    whole, optimizer = fresh()
    steps(whole, optimizer, 6)

    first, optimizer = fresh()
    steps(first, optimizer, 3)
    tensors, rest = ck.split_optimizer(optimizer)
    named = {str(i): p for i, p in enumerate(first)}
    folder = ck.save_checkpoint(tmp_path, 3, {"p": named, "optimizer": tensors}, {"o": rest})

    loaded = ck.load_checkpoint(folder)
    second, optimizer = fresh()
    for i, p in enumerate(second):
        p.data.copy_(loaded.tensors["p"][str(i)])
    optimizer.load_state_dict(ck.join_optimizer(loaded.tensors["optimizer"], loaded.state["o"]))
    steps(second, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


# The folder of a run


RUN = {"seed": 0, "max_train_steps": 5, "data_fingerprint": "x", "logging_dir": "logs"}


def run_folder(tmp_path, **settings):
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RUN | settings))
    return folder


def test_an_empty_or_missing_folder_is_free(tmp_path):
    assert ck.compare_runs(tmp_path / "none", {"seed": 1}) == []
    assert ck.compare_runs(tmp_path, {"seed": 1}) == []


def test_harmless_changes_are_listed_and_identity_is_refused(tmp_path):
    folder = run_folder(tmp_path)
    changed = ck.compare_runs(folder, RUN | {"max_train_steps": 9})
    assert changed == ["Changed: max_train_steps was 5, now 9"]
    with pytest.raises(InputError, match="is another one: seed was 0, now 1.*overwrite_output_dir"):
        ck.compare_runs(folder, RUN | {"seed": 1, "max_train_steps": 9})


def test_identity_names_existing_settings():
    from ddpm_hf.config import field_names

    assert set(ck.IDENTITY) - set(field_names()) == {"trained_variance", "data_fingerprint"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("thesis.txt", "dear"),
        ("config.json", '{"model_type": "bert"}'),  # as every transformers model has
        ("config.json", "[1]"),
        ("config.json", "{broken"),
    ],
)
def test_a_strangers_folder_is_refused_and_left_alone(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (tmp_path / "unet").mkdir()
    with pytest.raises(InputError, match="is not empty and holds no run of ddpm_hf"):
        ck.check_folder(tmp_path)
    ck.clear_run(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "unet"])
    assert (tmp_path / name).read_text() == text


def test_when_no_checkpoint_is_whole_nothing_is_started_over(tmp_path):
    for step in (1, 2):
        (write(tmp_path, step) / "unet.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="no checkpoint in .* is whole: .*checkpoint-2.*-1 is dam"):
        ck.find_latest(tmp_path)


def test_checkpoints_beyond_a_step_are_set_aside(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "aside-checkpoint-3").mkdir()
    assert ck.set_aside(tmp_path, 1) == ["checkpoint-2", "checkpoint-3"]
    assert sorted(os.listdir(tmp_path)) == [
        "aside-checkpoint-2",
        "aside-checkpoint-3",
        "checkpoint-1",
    ]
    assert (tmp_path / "aside-checkpoint-3" / "manifest.json").is_file()


def test_clearing_a_run_leaves_what_is_not_its_own(tmp_path):
    folder = run_folder(tmp_path)
    write(folder, 3)
    (folder / "aside-checkpoint-9").mkdir()
    for name in ("unet", "scheduler", "samples", "logs", "mine"):
        (folder / name).mkdir()
    (folder / "notes.txt").write_text("dear")
    for name in ck.EVALUATED:
        (folder / name).touch()
    ck.clear_run(folder)
    assert sorted(os.listdir(folder)) == ["mine", "notes.txt"]
    ck.clear_run(tmp_path / "none")


def test_metrics_of_lost_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    ck.keep_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    ck.keep_metrics(tmp_path / "none", 2)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen, flush = [], ck.flush

    def spy(path):
        seen.append((path.name, (tmp_path / "checkpoint-1").exists()))
        flush(path)

    monkeypatch.setattr(ck, "flush", spy)
    ck.save_checkpoint(tmp_path, 1, {"unet": {"a": torch.ones(1)}}, {})
    before = {name for name, named in seen if not named}
    assert before == {
        "unet.safetensors", "state.json", "manifest.json", ".checkpoint-1.partial"
    }  # fmt: skip
    assert seen[-1] == (tmp_path.name, True)  # and then the name itself


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen, flush = [], ck.flush
    monkeypatch.setattr(ck, "flush", lambda path: (seen.append(path.read_text()), flush(path)))
    ck.write_text(tmp_path / "a.json", "x")
    assert seen == ["x"]


@pytest.mark.parametrize("inside", [False, True])
def test_clearing_a_run_leaves_logs_outside_of_it(tmp_path, inside):
    (tmp_path / "logs").mkdir()
    folder = run_folder(tmp_path, logging_dir="../logs" if inside else str(tmp_path / "logs"))
    ck.clear_run(folder)
    assert (tmp_path / "logs").is_dir()


def test_clearing_a_run_leaves_nothing_of_it(tmp_path):
    folder = run_folder(tmp_path)
    for name in ("ema", "origin", "unet", "scheduler", "samples", "logs", "checkpoint-2"):
        (folder / name).mkdir()
    for name in (
        "model_index.json", "README.md", "loss_curve.png", "results.json", "training.json",
        "metrics.jsonl", *ck.EVALUATED,
    ):  # fmt: skip
        (folder / name).touch()
    ck.clear_run(folder)
    assert not list(folder.iterdir())


def test_a_setting_that_is_newer_than_the_run_had_its_default_then(tmp_path):
    folder = run_folder(tmp_path)
    now = asdict(TrainingConfig()) | RUN
    now.pop("output_dir")
    assert ck.compare_runs(folder, now) == []


@pytest.mark.parametrize(
    "manifest", ['{"sha256": null}', '{"sha256": {}, "step": 2}', '{"sha256": [1], "step": 2}', "5"]
)
def test_a_manifest_of_anything_else_is_damage(tmp_path, manifest):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "manifest.json").write_text(manifest)
    found, damaged = ck.find_latest(tmp_path)
    assert found.name == "checkpoint-1"
    assert "manifest.json" in damaged[0]


def test_lines_of_metrics_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n5\n{"loss": 3}\n{"step": "1"}\n{"step": 4}\n')
    ck.keep_metrics(path, 2)
    assert path.read_text() == '{"step": 1, "loss": 2}\n'


@pytest.mark.parametrize("name", [".thesis.partial", ".mine.replaced", ".notes.txt.partial"])
def test_hidden_files_of_others_are_not_taken_for_ours(tmp_path, name):
    (tmp_path / name).write_text("three years of work")
    ck.clear_leftovers(tmp_path)
    assert (tmp_path / name).exists()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        ck.check_folder(tmp_path)


def test_what_a_killed_fetch_and_a_killed_snapshot_left_is_ours(tmp_path):
    (tmp_path / ".fetched.partial" / "checkpoint-2").mkdir(parents=True)
    ck.check_folder(tmp_path)  # the folder may be trained in
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / ".2-0.05.safetensors.partial").touch()
    (tmp_path / "ema" / "2-0.05.safetensors").touch()
    ck.clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["ema", "2-0.05.safetensors"]
