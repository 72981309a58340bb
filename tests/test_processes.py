"""Several processes, by plain torchrun with gloo: the same run as one, killed and resumed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline
from ddpm_hf.checkpoint import list_checkpoints
from ddpm_hf.sources import FASHION_MNIST

from .conftest import REPOSITORY

pytestmark = pytest.mark.slow

JOB = """
import gc, hashlib, json, os, sys
import torch
from torch.nn.parallel import DistributedDataParallel as Wrapper
from ddpm_hf import TrainingConfig, streaming, train
from ddpm_hf.cli import run
from ddpm_hf.losses import simple_loss
from ddpm_hf.run import Run

streaming.WINDOW = 32  # blocks of four steps of eight images
settings, kill_in, folder = json.loads(sys.argv[1])
calls = 0
draw = Run.draw

def recorded(self, step, micro):
    drawn = draw(self, step, micro)
    with open(f"{folder}/draws-{os.environ.get('RANK', 0)}.txt", "a") as file:
        for row in zip(drawn.x_0, drawn.eps, drawn.t, drawn.weight, drawn.labels, strict=True):
            content = b"".join(tensor.numpy().tobytes() for tensor in row)
            print(step, hashlib.sha256(content).hexdigest(), file=file)
    return drawn

def loss(*arguments):
    global calls
    calls += 1
    if calls == kill_in:
        os.kill(os.getpid(), 9)
    return simple_loss(*arguments)

destroy = torch.distributed.destroy_process_group
def checked(*arguments):
    assert not [x for x in gc.get_objects() if isinstance(x, Wrapper)], "may hang"
    destroy(*arguments)

torch.distributed.destroy_process_group = checked
Run.draw = recorded
code = run(lambda argv: train(TrainingConfig(**settings), loss), [], "job")
# one write: processes share the pipe
sys.stdout.write(f"process group {torch.distributed.is_initialized()}\\n")
sys.stdout.flush()
sys.exit(code)
"""


@pytest.fixture
def launch(tmp_path, quick_settings):
    """Trains in `count` processes; returns (what they printed, folder of the run)."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    base = dict(class_conditional=True, random_flip=True, split="test[:50]", snr_gamma=0.0)

    def start(count, kill_in=None, expect=0, environment=None, **changes):
        settings = quick_settings | base | changes
        folder = Path(settings["output_dir"])
        argument = json.dumps([settings, kill_in, str(tmp_path)])
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count),
                    "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
        command = [*(torchrun if count > 1 else [sys.executable]), str(script), argument]
        result = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | (environment or {})
        )
        assert (result.returncode == 0) == (expect == 0), result.stdout + result.stderr
        if not expect:
            assert result.stdout.count("process group False") == count
        return result.stdout + result.stderr, folder

    def draws():
        """Every row drawn since the last call, sorted by step, and how many processes drew."""
        files = sorted(tmp_path.glob("draws-*.txt"))
        lines = [line for file in files for line in file.read_text().splitlines()]
        for file in files:
            file.unlink()
        return sorted(lines), len(files)

    start.draws = draws
    return start


def weights(folder, name="unet"):
    newest = list_checkpoints(folder)[-1]
    return {k: v.clone() for k, v in load_file(newest / f"{name}.safetensors").items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def farthest(a, b):
    """Largest difference of two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def test_any_number_of_processes_draws_the_same_and_ends_with_the_same_weights(launch, tmp_path):
    """1 x 8, 2 x 2 x 2 and 4 x 2 over eight steps, across the border of an epoch.

    Parameters differ by the order of summation only: by less than 1e-6 here. Adam divides by the
    gradient's size, so that rounding of 1e-7 in a small gradient could show as the whole learning
    rate; an epsilon of 1e-3 lets the sums themselves be seen.
    """
    settings = dict(max_train_steps=8, adam_epsilon=1e-3, checkpointing_steps=8)
    runs = {}
    for count, batch, accumulation in ((1, 8, 1), (2, 2, 2), (4, 2, 1)):
        _, folder = launch(
            count, train_batch_size=batch, gradient_accumulation_steps=accumulation,
            output_dir=str(tmp_path / f"run{count}"), **settings,
        )  # fmt: skip
        rows, processes = launch.draws()
        assert processes == count
        assert len(set(rows)) == 8 * 8
        runs[count] = rows, weights(folder), folder
    assert runs[1][0] == runs[2][0] == runs[4][0]
    for count in (2, 4):
        difference = farthest(runs[1][1], runs[count][1])
        print(f"1 and {count} processes differ by {difference:.1e}")
        assert difference < 1e-6
    grids = [np.asarray(Image.open(runs[n][2] / "samples" / "grid.png")).astype(int) for n in runs]
    assert max(np.abs(grids[0] - grid).max() for grid in grids) <= 1


def test_two_processes_resume_bit_for_bit(launch, tmp_path):
    """Mid-epoch, with accumulation and dropout, killed inside a step."""
    settings = dict(
        max_train_steps=6, train_batch_size=2, gradient_accumulation_steps=2, dropout=0.2,
        checkpointing_steps=2,
    )  # fmt: skip
    _, whole = launch(2, output_dir=str(tmp_path / "whole"), **settings)
    launch(2, kill_in=2 * 3 + 2, expect=1, **settings)
    output, resumed = launch(2, **settings)
    assert "Going on from checkpoint-2" in output
    for name in ("unet", "ema", "optimizer"):
        assert equal(weights(whole, name), weights(resumed, name)), name


def test_a_run_killed_on_two_processes_goes_on_on_one_and_then_on_four(launch, tmp_path):
    settings = dict(max_train_steps=6, train_batch_size=4, checkpointing_steps=1, adam_epsilon=1e-3)
    _, whole = launch(2, output_dir=str(tmp_path / "whole"), **settings)
    all_rows, _ = launch.draws()
    launch(2, kill_in=3, expect=1, **settings)
    first, _ = launch.draws()
    output, _ = launch(1, kill_in=2 * 2 + 1, expect=1, **settings)
    assert "8 images = 1 processes x 4 x 2 micro-steps" in output
    second, _ = launch.draws()
    output, folder = launch(4, **settings)
    assert "8 images = 4 processes x 2 x 1 micro-steps" in output
    third, _ = launch.draws()
    assert set(first + second + third) == set(all_rows)
    assert farthest(weights(whole), weights(folder)) < 1e-6


def test_a_stream_goes_on_on_another_number_of_processes(launch, tmp_path):
    """Two lanes over sixteen uneven shards, killed in the third block of the stream."""
    test = datasets.load_dataset("parquet", data_files=str(FASHION_MNIST / "test.parquet"))["train"]
    first = 0
    for shard in range(16):
        rows = range(first, first := first + 2 + 3 * shard % 7)
        test.select(rows).to_parquet(str(tmp_path / "shards" / f"train-{shard:02}.parquet"))
    settings = dict(max_train_steps=14, dataset_name=str(tmp_path / "shards"), split="train",
                    streaming=True, checkpointing_steps=5, adam_epsilon=1e-3)  # fmt: skip
    _, whole = launch(1, train_batch_size=8, output_dir=str(tmp_path / "whole"), **settings)
    all_rows, _ = launch.draws()
    launch(2, kill_in=12, expect=1, train_batch_size=4, **settings)
    before, _ = launch.draws()
    _, folder = launch(1, train_batch_size=4, **settings)
    after, _ = launch.draws()
    assert set(before) | set(after) == set(all_rows)
    assert farthest(weights(whole), weights(folder)) < 1e-6


def test_every_process_tells_of_the_images_that_it_skipped(launch, tmp_path):
    """Two lanes of eight shards, one a process; each shard's last image is broken."""
    test = datasets.load_dataset("parquet", data_files=str(FASHION_MNIST / "test.parquet"))["train"]
    whole = test.cast_column("image", datasets.Image(decode=False))
    for shard in range(16):
        rows = [whole[row] for row in range(5 * shard, 5 * shard + 5)]
        rows[-1]["image"] = {"bytes": b"no image", "path": None}
        part = datasets.Dataset.from_list(rows, features=test.features)
        part.to_parquet(str(tmp_path / "shards" / f"train-{shard:02}.parquet"))
    settings = dict(max_train_steps=8, dataset_name=str(tmp_path / "shards"), split="train",
                    streaming=True, corrupt_images="skip", train_batch_size=4)  # fmt: skip
    output, _ = launch(2, **settings)
    end = output[output.index("Step 8 of 8") :]
    shards = {int(shard) for shard in re.findall(r"decoded: row 4 of shard (\d+)", end)}
    assert len(shards) > 8  # more than the shards of one lane
    assert f"Skipped {len(shards)} images in all" in end


def test_processes_that_cannot_share_the_global_batch_are_refused(launch):
    launch(1, train_batch_size=3, max_train_steps=1)
    output, _ = launch(2, train_batch_size=3, max_train_steps=2, expect=1)
    assert "a global batch of 3 images cannot be shared equally by 2 processes" in output


def test_what_one_process_cannot_read_ends_all_in_a_line(launch, tmp_path):
    """The first decodes; the others would wait for it."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    output, _ = launch(
        2, dataset_name=str(tmp_path / "broken"), split="train", class_conditional=False, expect=1
    )
    assert output.count("error: 1 of 1 images cannot be decoded") >= 1
    assert "Traceback" not in output.split("error: 1 of 1")[0]


def test_gradients_that_are_not_finite_end_all_processes(launch):
    output, _ = launch(
        2, learning_rate=1e30, max_train_steps=100, logging_steps=10, max_grad_norm=0, expect=1
    )
    assert output.count("error: the gradients of steps") == 2


def test_muon_on_two_processes(launch, tmp_path):
    settings = dict(optimizer="muon", max_train_steps=3, checkpointing_steps=3, adam_epsilon=1e-3)
    one, two = (
        launch(n, train_batch_size=8 // n, output_dir=str(tmp_path / f"{n}"), **settings)[1]
        for n in (1, 2)
    )
    # Muon makes every direction of a gradient equally long, rounding's too; .02 is its rate
    assert farthest(weights(one), weights(two)) < 2e-3


def test_the_history_of_losses_is_the_same_on_every_process(launch, tmp_path):
    settings = dict(timestep_sampler="loss_second_moment", ddpm_num_steps=30, max_train_steps=100,
                    loss="vlb", checkpointing_steps=100, adam_epsilon=1e-3)  # fmt: skip
    runs = [
        launch(n, train_batch_size=8 // n, output_dir=str(tmp_path / f"{n}"), **settings)[1]
        for n in (1, 2)
    ]
    one, two = (weights(folder, "timestep_history") for folder in runs)
    assert torch.equal(one["counts"], two["counts"])
    assert bool((one["counts"] > 10).all())  # past the warm-up
    assert torch.allclose(one["history"], two["history"], rtol=1e-3)


def test_fsdp2_trains_saves_whole_files_and_resumes(launch, tmp_path):
    """torch's fully_shard on gloo, which accelerate itself ignores on a CPU (pitfall L6)."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    settings = dict(max_train_steps=4, train_batch_size=4, adam_epsilon=1e-3,
                    ema_profiles="0.05,0.10", gradient_accumulation_steps=2)  # fmt: skip
    _, plain = launch(2, output_dir=str(tmp_path / "plain"), **settings)
    output, sharded = launch(2, output_dir=str(tmp_path / "sharded"), environment=asked, **settings)
    assert "sharded by FSDP2" in output
    for name in ("unet", "ema", "optimizer"):
        # the same sums in another order
        assert farthest(weights(plain, name), weights(sharded, name)) < 1e-6, name
    assert DDPMPipeline.from_pretrained(sharded)(2, num_inference_steps=1, class_labels=0).images
    stopped = dict(output_dir=str(tmp_path / "stopped"), environment=asked)
    launch(2, kill_in=2 * 3 + 1, expect=1, **stopped, **settings)
    output, resumed = launch(2, **stopped, **settings)
    assert "Going on from checkpoint-2" in output
    for name in ("unet", "ema", "optimizer"):
        assert farthest(weights(sharded, name), weights(resumed, name)) < 1e-6, name
    # a sharded run goes on unsharded, in one process
    launch(1, output_dir=str(tmp_path / "stopped"), **settings | dict(max_train_steps=5))


def test_the_script_under_torchrun(quick_settings):
    words = [word for k, v in quick_settings.items() for word in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               str(REPOSITORY / "train_accelerate.py"), *words]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Processes: 2, on cpu" in result.stdout


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_accelerate_launch_that_starts_fewer_processes_than_asked_is_refused(quick_settings):
    """Pitfall L2: it starts one, and says nothing."""
    words = [word for k, v in quick_settings.items() for word in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
               str(REPOSITORY / "train_accelerate.py"), *words]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "asked for several processes, and one takes part" in result.stderr
    assert not Path(quick_settings["output_dir"]).exists()


def test_processes_with_different_images_are_refused(launch, tmp_path):
    """As of machines whose disks hold other copies of a set."""
    for rank in "01":
        folder = tmp_path / f"images-{rank}"
        folder.mkdir()
        for i in range(8):
            Image.new("L", (8, 8), int(rank) + i).save(folder / f"{i}.png")
    here = 'settings["train_data_dir"] += os.environ["RANK"]'
    job = tmp_path / "job.py"
    job.write_text(job.read_text().replace("calls = 0", f"calls = 0\n{here}", 1))
    said, folder = launch(
        2, expect=1, dataset_name=None, split="train", class_conditional=False,
        train_data_dir=str(tmp_path / "images-"),
    )  # fmt: skip
    assert "the processes have different images" in said
    assert not folder.exists()
