"""However a run is stopped, nothing that was saved is lost, and the next start goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpm_hf import TrainingConfig, train
from ddpm_hf.checkpoint import list_checkpoints
from ddpm_hf.errors import EXIT_STOPPED, InputError, Stopped, TrainingError
from ddpm_hf.losses import simple_loss
from ddpm_hf.run import Run, same_command
from ddpm_hf.stopping import NONFINITE_LIMIT, StopSignals, explained_failures, out_of_memory
from ddpm_hf.uploads import BackgroundPush

JOB = """
import json, os, sys
from ddpm_hf import TrainingConfig, train
from ddpm_hf.cli import run
from ddpm_hf.losses import simple_loss

calls = 0

def loss(*arguments):
    global calls
    calls += 1
    print("micro-step", calls, "of process", os.environ.get("RANK", 0), os.getpid(), flush=True)
    {inside}
    return simple_loss(*arguments)

if __name__ == "__main__":
    settings = json.loads({settings!r})
    sys.exit(run(lambda argv: train(TrainingConfig(**settings), loss), [], "job"))
"""
LONG = dict(max_train_steps=100_000, checkpointing_steps=50_000, logging_steps=1000)


@pytest.fixture
def job(tmp_path, quick_settings):
    """Starts a training script in a process, or several under torchrun; killed at the end."""
    started = []

    def start(*launcher, inside="pass", **changes):
        script = tmp_path / f"job{len(started)}.py"
        settings = json.dumps(quick_settings | LONG | changes)
        script.write_text(JOB.format(settings=settings, inside=inside))
        process = subprocess.Popen(
            [*(launcher or [sys.executable]), str(script)], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def torchrun(count):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip


def read_until(process, text):
    """The line that has `text`; fails where the process ends before."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return line
    raise AssertionError(f"{text!r} did not come: {seen}")


def weights(run_dir, step=None, name="unet"):
    folder = run_dir / f"checkpoint-{step}" if step else list_checkpoints(run_dir)[-1]
    return {k: v.clone() for k, v in load_file(folder / f"{name}.safetensors").items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def check_saved_and_exact(settings, output):
    """The state that a signal saved is that of a run that was never stopped."""
    run_dir = Path(settings["output_dir"])
    (saved,) = list_checkpoints(run_dir)
    step = int(saved.name.split("-")[1])
    assert f"after step {step} of 100000, which is saved" in output
    other = run_dir.with_name("whole")
    changes = dict(max_train_steps=100_000, output_dir=str(other), lr_scheduler="constant")

    def until(*arguments):
        if (other / f"checkpoint-{step}").exists():
            raise KeyboardInterrupt
        return simple_loss(*arguments)

    with pytest.raises(KeyboardInterrupt):
        train(TrainingConfig(**settings | LONG | changes | dict(checkpointing_steps=step)), until)
    for name in ("unet", "ema", "optimizer"):
        assert equal(weights(run_dir, step, name), weights(other, step, name)), name


@pytest.mark.parametrize(
    ("number", "to_group"),
    [
        (signal.SIGTERM, False),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_finishes_the_step_saves_and_exits_with_75(job, quick_settings, number, to_group):
    settings = dict(snr_gamma=0.0, lr_scheduler="constant")
    process = job(**settings)
    read_until(process, "micro-step 3 ")
    (os.killpg if to_group else os.kill)(process.pid, number)
    output = process.stdout.read()
    assert process.wait() == EXIT_STOPPED, output
    assert f"Stopped by {number.name} after step" in output
    check_saved_and_exact(quick_settings | settings, output)


def test_a_signal_while_samples_are_drawn_leaves_the_grid_to_the_next_start(
    quick_settings, monkeypatch
):
    settings = quick_settings | dict(save_images_steps=2, max_train_steps=3, checkpointing_steps=50)
    from ddpm_hf.pipeline import DDPMPipeline

    denoise = DDPMPipeline.denoise

    def interrupted(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return denoise(self, *arguments, **options)

    monkeypatch.setattr(DDPMPipeline, "denoise", interrupted)
    config = TrainingConfig(**settings)
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        train(config)
    assert stopped.value.code == EXIT_STOPPED
    assert [path.name for path in list_checkpoints(config.run_dir)] == ["checkpoint-2"]
    grid = config.run_dir / "samples" / "step-2.png"
    assert not grid.exists()
    monkeypatch.undo()
    assert train(config).step == 3
    assert grid.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(), "the same command again goes on"),
        (
            dict(overwrite_output_dir=True),
            "the same command without --overwrite_output_dir goes on",
        ),
        (
            dict(overwrite_output_dir=True, resume_from_checkpoint="latest"),
            "the same command again goes on",
        ),
        (
            dict(resume_from_checkpoint="checkpoint-2"),
            "the same command without --resume_from_checkpoint goes on",
        ),
        (
            dict(overwrite_output_dir=True, resume_from_checkpoint="checkpoint-2"),
            "the same command without --overwrite_output_dir and --resume_from_checkpoint goes on",
        ),
    ],
)
def test_which_command_goes_on(changes, words):
    """Some flags would delete what was saved, or go back behind it."""
    assert f"{same_command(TrainingConfig(dataset_name='embedded', **changes))} goes on" == words


def test_which_command_goes_on_is_said(quick_settings, capsys):
    config = TrainingConfig(**quick_settings | dict(overwrite_output_dir=True))

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return simple_loss(*arguments)

    with pytest.raises(Stopped):
        train(config, stopped)
    words = "the same command without --overwrite_output_dir goes on"
    assert words in capsys.readouterr().out

    def lost(*arguments):
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(TrainingError, match=words):
        train(config, lost)


@pytest.fixture
def hanging_push(monkeypatch):
    """A run has a push in flight that ends with the test, for which a stop waits a second."""
    hang, build = threading.Event(), Run.build

    def built(config):
        run = build(config)
        run.pushes = BackgroundPush(run.log.say)
        run.pushes.submit("checkpoint", "checkpoint-2", hang.wait, lambda: None)
        return run

    monkeypatch.setattr(Run, "build", built)
    monkeypatch.setattr("ddpm_hf.resuming.STOP_WAIT", 1.0)
    yield
    hang.set()


def test_a_signal_does_not_wait_long_for_the_hub(quick_settings, hanging_push, capsys):
    """The machine is about to go, and what was saved stands."""

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return simple_loss(*arguments)

    with pytest.raises(Stopped):
        train(TrainingConfig(**quick_settings), stopped)
    assert "Waiting for the Hub, 1 seconds at most" in capsys.readouterr().out


@pytest.mark.parametrize("failure", ["memory", "gradients", "process", "state", "image"])
def test_a_run_that_fails_waits_for_its_pushes_and_names_those_that_are_late(
    quick_settings, hanging_push, monkeypatch, capsys, failure
):
    def failing(*arguments):
        if failure == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if failure == "process":
            raise RuntimeError("Connection closed by peer")
        if failure == "image":  # of a stream
            raise InputError("cannot decode 7.png")
        if failure == "state":  # a signal, whose state cannot be saved
            os.kill(os.getpid(), signal.SIGTERM)
            return simple_loss(*arguments)
        return simple_loss(*arguments) * float("nan")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    if failure == "state":
        monkeypatch.setattr("ddpm_hf.resuming.write_checkpoint", full)
    settings = dict(max_train_steps=30, logging_steps=NONFINITE_LIMIT, checkpointing_steps=50)
    with pytest.raises((InputError, TrainingError)):
        train(TrainingConfig(**quick_settings | settings), failing)
    said = capsys.readouterr().out
    assert "Waiting for the Hub, 1 seconds at most" in said
    assert said.count("Not pushed: checkpoint-2: not over after 1 seconds") == 1


def test_handlers_are_given_back_and_a_second_interrupt_is_at_once():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert stop.agreed() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_only_a_launchers_death_stops_a_run(monkeypatch):
    """A shell that started a run with nohup may go."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for launched in (False, True):
        if launched:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        else:
            monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getppid", lambda: 4321)  # that of the tests may be gone, too
            stop = StopSignals()
            patch.setattr(os, "getppid", lambda: 1)
            assert stop.agreed() == ("its launcher's death" if launched else None)


@pytest.mark.slow
def test_a_launcher_that_dies_lets_its_run_save_and_exit(job, quick_settings):
    """Pitfall L5: SIGTERM kills `accelerate launch`, which tells its child nothing."""
    process = job(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1")
    read_until(process, "micro-step 3 ")
    process.terminate()
    output = process.stdout.read()  # the child's end of the pipe closes when it exits
    assert "Stopped by its launcher's death after step" in output
    assert len(list_checkpoints(Path(quick_settings["output_dir"]))) == 1


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_both_processes_save(job, quick_settings):
    process = job(*torchrun(2), train_batch_size=2)
    read_until(process, "micro-step 3 of process 1")
    process.terminate()
    output = process.stdout.read()
    process.wait()
    assert "Stopped by SIGTERM after step" in output
    settings = quick_settings | dict(max_train_steps=1, train_batch_size=2)
    assert train(TrainingConfig(**settings)).step > 1  # one process goes on from two


@pytest.mark.slow
@pytest.mark.parametrize("launched", [True, False])
def test_a_process_that_dies_ends_the_others_within_a_minute(job, launched, monkeypatch):
    inside = 'calls == 3 and os.environ["RANK"] == "1" and os.kill(os.getpid(), 9)'
    if launched:
        processes = [job(*torchrun(2), inside=inside)]
    else:
        processes = []
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "29871")
        for rank in "01":
            for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2").items():
                monkeypatch.setenv(name, value)
            processes.append(job(inside=inside))
    read_until(processes[0], "micro-step 3 of process 0")
    began = time.monotonic()
    output = processes[0].stdout.read()
    assert processes[0].wait() == 1
    assert time.monotonic() - began < 60
    assert "error: another process of this run died" in output


# Gradients that are no numbers


def poisoned(steps, factor=float("nan")):
    """simple_loss, multiplied by `factor` in the given calls."""
    calls = 0

    def loss(*arguments):
        nonlocal calls
        calls += 1
        return simple_loss(*arguments) * (factor if calls in steps else 1)

    return loss


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_an_update_without_a_finite_gradient_is_skipped(quick_settings, optimizer, factor):
    settings = quick_settings | dict(
        optimizer=optimizer, checkpointing_steps=1, checkpoints_total_limit=None
    )
    out = train(TrainingConfig(**settings), poisoned({3}, factor)).output_dir
    assert equal(weights(out, 2), weights(out, 3))
    assert not equal(weights(out, 3), weights(out, 4))
    before, after = weights(out, 2, "optimizer"), weights(out, 3, "optimizer")
    assert equal(before, after)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is no JSON
    assert [row["skipped_updates"] for row in rows] == [0, 0, 1, 1]
    assert [row["loss"] is None for row in rows] == [False, False, True, False]
    assert all(torch.isfinite(tensor).all() for tensor in weights(out, 4).values())


def test_a_last_loss_that_is_not_finite_is_no_result(quick_settings):
    out = train(TrainingConfig(**quick_settings | dict(logging_steps=1)), poisoned({4})).output_dir
    for name in ("training.json", "results.json"):
        json.loads((out / name).read_text(), parse_constant=pytest.fail)
    assert '"training_loss"' not in (out / "results.json").read_text()
    assert (out / "loss_curve.png").is_file()


def test_skipped_updates_in_a_row_end_the_run_with_a_diagnosis(quick_settings):
    settings = quick_settings | dict(max_train_steps=100, checkpointing_steps=2, logging_steps=5)
    config = TrainingConfig(**settings)
    with pytest.raises(TrainingError) as caught:
        train(config, poisoned(range(6, 100)))
    last = 5 * -(-(5 + NONFINITE_LIMIT) // 5)
    assert str(caught.value).startswith(
        f"the gradients of steps 6 to {last} are not finite (loss nan, mixed precision no): these "
        "updates were skipped, the weights are those of step 5."
    )
    assert "in a new --output_dir, since that is another run: lower" in str(caught.value)
    with pytest.raises(InputError, match="learning_rate was 0.0002, now 0.0001"):  # as it says
        train(TrainingConfig(**settings | dict(learning_rate=1e-4)))
    before = weights(config.run_dir)
    assert all(torch.isfinite(tensor).all() for tensor in before.values())
    assert train(config).step == 100  # the same command again, its cause removed


def test_the_count_of_skipped_updates_survives_a_restart(quick_settings):
    train(TrainingConfig(**quick_settings | dict(max_train_steps=2)), poisoned({1}))
    out = train(TrainingConfig(**quick_settings)).output_dir
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_updates"] for row in rows] == [1, 1, 1, 1]


# No memory, no disk


def test_out_of_memory_names_the_way_out(quick_settings):
    def greedy(unet, scheduler, x_0, eps, t):
        return torch.empty(1 << 60)

    config = TrainingConfig(**quick_settings | dict(max_train_steps=1))
    message = (
        "out of memory with 4 images per device and micro-step. Try --train_batch_size 2 "
        "--gradient_accumulation_steps 2 (the same training, half the activations), "
        "--mixed_precision bf16, or --gradient_checkpointing (14 % less measured, a sixth slower)"
    )
    with pytest.raises(TrainingError) as caught:
        train(config, greedy)
    assert str(caught.value) == message

    def on_a_gpu(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(TrainingError, match="out of memory"):
        train(config, on_a_gpu)
    for words in (
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 18 GB)",
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ):
        with pytest.raises(TrainingError, match="way out"), explained_failures("way out"):
            raise RuntimeError(words)
    assert "half" not in out_of_memory(3, 1)


def test_a_lack_of_memory_outside_the_loop_has_its_own_way_out(quick_settings, monkeypatch):
    def greedy(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("ddpm_hf.run.place_images", greedy)
        with pytest.raises(TrainingError, match="before the first step: .*--data_on_device no"):
            train(TrainingConfig(**quick_settings))

    def greedy_samples(*arguments, **options):
        yield greedy()

    monkeypatch.setattr("ddpm_hf.pipeline.DDPMPipeline.denoise", greedy_samples)
    message = "out of memory while sampling 4 images: choose fewer --eval_batch_size"
    with pytest.raises(TrainingError, match=message):
        train(TrainingConfig(**quick_settings | dict(max_train_steps=1)))


def test_what_is_explained_once_is_not_explained_again():
    outer, inner = explained_failures("", "outer"), explained_failures("", "inner")
    with pytest.raises(TrainingError, match="inner goes on"), outer, inner:
        raise RuntimeError("Connection closed by peer")


def test_other_errors_keep_their_own_words(quick_settings):
    def broken(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(TrainingConfig(**quick_settings), broken)


def test_the_advice_against_a_lack_of_memory_continues_the_same_run(quick_settings):
    train(TrainingConfig(**quick_settings | dict(max_train_steps=2)))
    halved = dict(train_batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=True)
    assert train(TrainingConfig(**quick_settings | halved)).step == 4


@pytest.mark.slow
def test_a_full_disk_is_said_and_training_goes_on(job, quick_settings):
    """A limit on the size of files, from step 3 to 5, stands for the disk."""
    inside = (
        "import resource; limit = 20_000 if 3 <= calls < 5 else resource.RLIM_INFINITY; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))"
    )
    process = job(inside=inside, max_train_steps=6, checkpointing_steps=1, logging_steps=1,
                  checkpoints_total_limit=None, num_epochs=1, save_model_epochs=1,
                  train_batch_size=12, ema_profiles="0.05,0.1", ema_snapshot_steps=1)  # fmt: skip
    output = process.stdout.read()
    assert process.wait() == 0, output
    assert output.count("could not be saved, those before it stand, and training goes on") == 2
    assert output.count("the snapshot of step 3 could not be saved") == 2
    assert output.count("the pipeline could not be saved, training goes on") == 1  # epoch 1, step 4
    names = [path.name for path in list_checkpoints(Path(quick_settings["output_dir"]))]
    assert names == [f"checkpoint-{step}" for step in (1, 2, 5, 6)]


def test_a_disk_that_was_full_for_a_moment_does_not_end_a_run(quick_settings, monkeypatch, capsys):
    """TensorBoard's writer keeps its error for ever, and raises it when it is closed too."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, calls = RecordWriter.write, []

    def full(*arguments):
        raise OSError(28, "No space left on device")

    def loss(*arguments):
        calls.append(0)
        monkeypatch.setattr(RecordWriter, "write", full if len(calls) == 2 else write)
        return simple_loss(*arguments)

    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # of that writer
    result = train(TrainingConfig(**quick_settings | dict(logger="tensorboard")), loss)
    assert result.step == 4
    assert (result.output_dir / "model_index.json").is_file()
    assert "grid.png could not be saved" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_one_that_was_not(quick_settings, tmp_path):
    """SIGKILL at random moments, some inside a save: each step saves. One server process forks."""
    settings = quick_settings | dict(
        max_train_steps=150, checkpointing_steps=1, dropout=0.1, random_flip=True
    )
    whole = train(TrainingConfig(**settings | dict(output_dir=str(tmp_path / "whole"))))
    script = tmp_path / "server.py"
    script.write_text(
        "import os, random, signal, sys, time\n"
        "from ddpm_hf import TrainingConfig, train, checkpoint\n"
        "random.seed(0)\n"
        f"config = TrainingConfig(**{settings!r})\n"
        "kills = inside = 0\n"
        "while True:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        sys.stdout = sys.stderr = open(os.devnull, 'w')\n"
        "        try: train(config)\n"
        "        except BaseException as e: print(repr(e), file=sys.__stderr__); os._exit(1)\n"
        "        os._exit(0)\n"
        "    def state():\n"
        "        return {p.name for p in config.run_dir.glob('*checkpoint-*')}\n"
        "    before, wanted = state(), random.randint(1, 2)\n"
        "    while kills < 20 and len(state() - before) < wanted:\n"
        "        if os.waitpid(child, os.WNOHANG)[0]: sys.exit('ended early')\n"
        "        time.sleep(0.001)\n"
        "    if kills < 20:\n"
        "        time.sleep(random.random() * 0.05)\n"
        "        os.kill(child, signal.SIGKILL)\n"
        "        kills += 1\n"
        "    _, status = os.waitpid(child, 0)\n"
        "    inside += any(n.endswith('partial') for n in os.listdir(config.run_dir))\n"
        "    if not os.WIFSIGNALED(status):\n"
        "        print('kills', kills, 'inside', inside)\n"
        "        sys.exit(os.WEXITSTATUS(status))\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    kills, inside = map(int, result.stdout.split()[1::2])
    assert kills == 20
    assert inside >= 1  # at least one of them inside a save
    for name in ("unet", "ema", "optimizer"):
        one, other = (weights(d, 150, name) for d in (whole.output_dir, tmp_path / "run"))
        assert equal(one, other), name
