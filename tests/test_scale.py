"""What docs/scale.md says is what the code and the launchers do."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file

from ddpm_hf import TrainingConfig, train
from ddpm_hf.checkpoint import list_checkpoints
from ddpm_hf.errors import EXIT_STOPPED
from ddpm_hf.presets import build_unet, unet_config
from ddpm_hf.probe import count_flops
from ddpm_hf.streaming import (
    MOST_SHARDS,
    SHARDS_PER_LANE,
    WINDOW,
    WINDOW_BYTES,
    LaneStream,
    StreamedImages,
)

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "accelerate_configs"
DOCUMENT = (REPOSITORY / "docs" / "scale.md").read_text()

FLOPS = 0.35 * 790e12
"""What the document assumes of a GPU, a second."""
SAVED = 320e6
"""Bytes of a checkpoint saved in a second, as measured there."""


def launch_environment(name, *flags):
    """The variables that `accelerate launch` starts processes with."""
    words = ["--config_file", str(CONFIGS / name), *flags, "train_accelerate.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.main_process_port = 0  # any: the test must not need a certain one
    return prepare_multi_gpu_env(args), args


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("single_gpu", "NO", 1, 1),
        ("multi_gpu", "MULTI_GPU", 1, 8),
        ("multi_node", "MULTI_GPU", 2, 16),
        ("fsdp2", "FSDP", 1, 8),
    ],
)
def test_accelerate_reads_every_file_and_the_precision_stays_open(name, kind, machines, processes):
    read = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # raises for unknown keys
    assert (read.distributed_type, read.num_machines, read.num_processes) == (
        kind, machines, processes
    )  # fmt: skip
    assert read.mixed_precision == "no"  # not False, as YAML reads a bare no
    assert f"accelerate_configs/{name}.yaml" in DOCUMENT


def test_two_nodes_take_rank_and_address_from_the_command_line():
    _, args = launch_environment(
        "multi_node.yaml", "--main_process_ip", "node7", "--machine_rank", "1"
    )
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert args.rdzv_endpoint.startswith("node7:")


def test_fsdp2_is_what_the_file_asks_for_and_every_residual_block_is_sharded(
    tiny_unet, monkeypatch
):
    environment, _ = launch_environment("fsdp2.yaml")
    without_launcher = dict(re.findall(r"\b(ACCELERATE_USE_FSDP|FSDP_\w+)=([\w]+)", DOCUMENT))
    assert without_launcher["ACCELERATE_USE_FSDP"] == "true"
    assert without_launcher["FSDP_VERSION"] == "2"
    assert without_launcher.items() <= environment.items()
    for variables in (without_launcher, environment):
        with monkeypatch.context() as patch:
            for key in [key for key in os.environ if key.startswith("FSDP_")]:
                patch.delenv(key)
            for key, value in variables.items():
                patch.setenv(key, value)
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward
        assert not plugin.cpu_ram_efficient_loading
        plugin.set_auto_wrap_policy(tiny_unet)
        shards = fsdp2_prepare_auto_wrap_policy(plugin, tiny_unet)
        sharded = [module for module in tiny_unet.modules() if shards(module)]
        blocks = [module for module in tiny_unet.modules() if isinstance(module, ResnetBlock2D)]
        assert sharded == blocks != []


# The table


def test_the_table_is_what_the_code_gives():
    """To the digits that are printed: half a unit of the last, at most 1 %."""
    rows = [line.strip("|").split("|") for line in DOCUMENT.splitlines() if line.startswith("| ")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    gpus = [int(re.search(r"(\d+) GPU", cell)[1]) for cell in cells[""]]
    for column, number in enumerate(gpus):
        said = {
            name: float(row[column].replace(",", ""))
            for name, row in cells.items()
            if len(row) == len(gpus) and re.fullmatch(r"[\d,.]+", row[column])
        }
        preset, side = cells["preset and resolution"][column].split(", ")
        size = (int(side), int(side))
        with torch.device("meta"):
            unet = build_unet(preset, resolution=size)
        parameters = sum(p.numel() for p in unet.parameters())
        flops = count_flops(unet_config(preset, resolution=size))
        rate, batch = FLOPS * number / flops, said["global batch"]
        saving = 16 * parameters / SAVED
        computed = {
            "parameters": parameters,
            "GFLOP an image, forward and backward": flops / 1e9,
            "images/s in all, at 277 TFLOP/s a GPU": rate,
            "hours": said["steps"] * batch / rate / 3600,
            "checkpoint, MB": 16 * parameters / 1e6,
            "seconds to save, at 320 MB/s": saving,
            "% of time added, at --checkpointing_steps 5000": 100 * saving / (5000 * batch / rate),
        }
        for name, value in computed.items():
            assert said[name] == pytest.approx(value, rel=0.01, abs=0.05), (preset, name)
        assert said["parameters"] == parameters


def test_steps_batches_and_bytes_of_images_are_those_of_the_recipes():
    cifar10 = TrainingConfig.from_recipe("cifar10")
    bedroom = TrainingConfig.from_recipe("lsun-bedroom", train_data_dir="bedroom")
    for config in (cifar10, bedroom):
        assert f"| {config.max_train_steps:,} " in DOCUMENT
        assert config.checkpointing_steps == 5000
        assert config.mixed_precision == "no"
    assert (cifar10.train_batch_size, bedroom.train_batch_size) == (128, 64)
    assert f"{50_000 * 3 * 32 * 32 / 1e6:.0f} MB" in DOCUMENT
    assert f"{3_033_042 * 3 * 256 * 256 / 1e9:.0f} GB" in DOCUMENT
    assert cifar10.ema_snapshot_steps == 500
    snapshot = 2 * 4 * 35_746_307
    assert f"{800_000 / 500 * snapshot / 1e9:.0f} GB" in DOCUMENT
    assert f"--ema_snapshot_steps 16000` {800_000 / 16000 * snapshot / 1e9:.0f} GB" in DOCUMENT


def test_a_checkpoint_is_sixteen_bytes_a_parameter(quick_settings):
    profiles = dict(ema_profiles="0.05,0.10")
    out = train(TrainingConfig(**quick_settings | profiles)).output_dir
    (*_, folder) = list_checkpoints(out)
    tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    bytes_of = {group: sum(t.nbytes for t in named.values()) for group, named in tensors.items()}
    weights = bytes_of["unet"]
    assert bytes_of.pop("losses") < 1000  # since the last log, whatever the network
    assert bytes_of == {
        "unet": weights,
        "ema": weights,
        "ema-0.05": weights,
        "ema-0.1": weights,
        "optimizer": 2 * weights + 4 * len(tensors["unet"]),  # and a count of steps for each
    }


def test_lanes_of_a_streamed_set_are_as_many_as_the_document_says():
    assert f"{WINDOW:,} of them over all lanes" in DOCUMENT
    assert f"More than {MOST_SHARDS:,} files" in DOCUMENT
    assert "at most 1 GiB of them as" in DOCUMENT
    assert WINDOW_BYTES == 2**30
    assert SHARDS_PER_LANE == 8
    kind = dict(
        name="", source=None, decoder=None, size=(64, 64), channels=3, deep=False, skip=False
    )
    kind |= dict(num_classes=None, class_names=None, probe="", image_bytes=0, num_threads=1)
    assert "| 64 lanes x 8 = 512," in DOCUMENT
    assert "with 100 files | 8 lanes," in DOCUMENT
    for files, lanes in ((512, 64), (100, 8)):
        stream = LaneStream(StreamedImages(num_shards=files, **kind), 0, 4096, flip=False)
        assert stream.lanes == lanes


# The SLURM script

SRUN = """#!/bin/bash
# Two tasks of one step, as SLURM starts them; its exit code is the greatest of theirs.
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!); done
echo "${pids[@]}" > "$RECORDS/pids"
most=0
for pid in "${pids[@]}"; do wait $pid; code=$?; (( code > most )) && most=$code; done
exit $most
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" > "$RECORDS/requeued"; fi
"""


def sbatch_script():
    return re.search(r"```bash\n(#!/bin/bash\n.*?)```", DOCUMENT, re.DOTALL)[1]


def test_every_script_is_valid_bash():
    for script in re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.slow
def test_the_signal_reaches_the_trainers_which_save_and_are_put_back(quick_settings, tmp_path):
    programs = {"srun": SRUN, "scontrol": SCONTROL, "train.sbatch": sbatch_script()}
    programs["python"] = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = dict(SLURM_JOB_ID="29872", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2")
    job |= dict(SLURM_JOB_NODELIST="localhost", SLURM_CPUS_PER_TASK="1", RECORDS=str(tmp_path))
    settings = quick_settings | dict(max_train_steps=100_000, checkpointing_steps=50_000)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            ["bash", str(tmp_path / "train.sbatch"), *flags], stdout=output, stderr=output,
            env=os.environ | job | dict(PATH=path), cwd=REPOSITORY, start_new_session=True,
        )  # fmt: skip
    metrics = Path(settings["output_dir"]) / "metrics.jsonl"
    try:
        while process.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.1)
        assert process.poll() is None, (tmp_path / "output").read_text()
        for pid in (tmp_path / "pids").read_text().split():
            os.kill(int(pid), signal.SIGUSR1)
        code = process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "output").read_text()
    assert code == EXIT_STOPPED, text
    assert "Processes: 2, on cpu" in text
    assert "Stopped by SIGUSR1 after step" in text
    assert len(list_checkpoints(metrics.parent)) == 1
    assert (tmp_path / "requeued").read_text() == "requeue 29872\n"
