"""What a run says: losses by timestep, lines or a bar, curves on a disk that may be full."""

import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from ddpm_hf import TrainingConfig, train
from ddpm_hf.logbook import (
    BUCKETS,
    Logbook,
    LossWindow,
    duration,
    loss_by_bucket,
    save_loss_curve,
)


@pytest.fixture
def book(quick_settings, tmp_path):
    config = TrainingConfig(**quick_settings)
    config.run_dir.mkdir()
    book = Logbook(Accelerator(cpu=True), config, total_steps=4, images=4)
    yield book
    book.close()


def test_a_window_means_over_images_and_by_timestep():
    window = LossWindow(torch.device("cpu"), 1000)
    window.add(torch.tensor([1.0, 2.0]), torch.tensor([0, 99]), torch.ones(2))
    window.add(torch.tensor([4.0]), torch.tensor([999]), torch.tensor([3.0]))
    mean, buckets = window.read(Accelerator(cpu=True))
    assert mean == pytest.approx((1 + 2 + 3 * 4) / 3)  # the weighted loss, as it is optimised
    assert buckets[0] == pytest.approx(1.5)
    assert buckets[-1] == pytest.approx(4.0)  # and the plain one by timestep
    assert all(math.isnan(b) for b in buckets[1:-1])
    assert math.isnan(window.read(Accelerator(cpu=True))[0])  # a new window


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_window_goes_on_on_any_number_of_processes(count):
    """What two processes had added is there once; as many as before have their own again."""
    sums = torch.rand(2, 3, BUCKETS, generator=torch.Generator().manual_seed(0))
    found = []
    for rank in range(count):
        window = LossWindow(torch.device("cpu"), 1000)
        window.load(sums, SimpleNamespace(process_index=rank, num_processes=count))
        found.append(window.sums)
    assert torch.equal(sum(found), sums[0] + sums[1])
    if count == 2:
        assert torch.equal(torch.stack(found), sums)


def test_buckets_are_named_by_their_share_of_the_timesteps():
    named = loss_by_bucket("x", [1.0, float("nan")] + [2.0] * (BUCKETS - 2))
    assert list(named)[:2] == ["x/0.0-0.1", "x/0.2-0.3"]
    assert list(named)[-1] == "x/0.9-1.0"


def test_every_timestep_has_a_bucket():
    window = LossWindow(torch.device("cpu"), 7)
    window.add(torch.ones(7), torch.arange(7))
    assert window.sums[2].sum() == 7


def test_without_a_terminal_lines_come_now_and_then(book, capsys):
    book.start(0)
    for step in range(1, 5):
        assert book.tick(step)
        book.show(step, f"loss {step}")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Step")]
    assert [line.split(":")[0] for line in lines] == ["Step 1 of 4", "Step 4 of 4"]
    assert "loss 4" in lines[-1]
    assert "left" in lines[-1]


def test_on_a_terminal_a_bar_shows_the_figures(book, monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    book.start(0)
    book.tick(1)
    book.show(1, "loss 0.5")
    book.close()
    assert "loss 0.5" in terminal.getvalue()
    assert "Step 1" not in capsys.readouterr().out


def test_a_disk_that_is_full_stops_no_curve(book, capsys, monkeypatch):
    book.start(0)
    book.write(1, {"loss": 1.0})
    metrics = book.config.run_dir / "metrics.jsonl"
    metrics.rename(metrics.with_name("kept"))
    metrics.mkdir()  # cannot be opened for writing, as on a full disk
    book.write(2, {"loss": 1.0})
    book.write(3, {"loss": 1.0})
    assert capsys.readouterr().out.count("Warning: cannot write the curves") == 1
    metrics.rmdir()
    metrics.with_name("kept").rename(metrics)
    book.write(4, {"loss": 2.0})
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 4]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (89.6, "1:30"), (3700, "1:01:40"), (59.4, "0:59")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_loss_curve_shows_held_out_losses_too(tmp_path):
    rows = [dict(step=s, loss=1 / s) for s in range(1, 30)]
    rows.insert(10, dict(step=10, train_loss=0.5, held_out_loss=0.6))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert save_loss_curve(metrics, tmp_path / "a.png") == pytest.approx(1 / 29)
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows if "loss" in row))
    save_loss_curve(plain, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_pictures_go_to_trackers_that_take_them(book, tmp_path):
    from PIL import Image

    Image.new("L", (4, 3), 9).save(tmp_path / "x.png")
    seen = []
    for name in ("tensorboard", "wandb", "trackio"):
        tracker = SimpleNamespace(name=name, log_images=lambda v, **o: seen.append((v, o)))
        book.accelerator.trackers = [tracker]
        book.write_picture(5, tmp_path / "x.png")
    book.accelerator.trackers = []
    assert [options["step"] for _, options in seen] == [5, 5]
    assert seen[0][0]["samples"].shape == (1, 3, 4, 3)


def test_tensorboard_gets_curves_and_grids(quick_settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = quick_settings | dict(logger="tensorboard", save_images_steps=2)
    out = train(TrainingConfig(**settings)).output_dir
    events = EventAccumulator(str(next((out / "logs").rglob("*tfevents*")).parent))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "lr", "grad_norm", "images_per_second"} <= set(tags["scalars"])
    assert any(tag.startswith("loss_at_t/") for tag in tags["scalars"])
    assert [image.step for image in events.Images("samples")] == [2, 4]
