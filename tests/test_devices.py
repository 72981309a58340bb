"""Processes: what was asked for is there or refused; how they share a batch."""

import pytest
import torch

from ddpm_hf.config import TrainingConfig
from ddpm_hf.devices import plan_batch, start_accelerator, start_processes, wants_fsdp
from ddpm_hf.errors import InputError


def config(**changes):
    return TrainingConfig(dataset_name="embedded", logger="none", cpu_threads="1", **changes)


@pytest.mark.parametrize(
    ("settings", "processes", "plan"),
    [
        (dict(train_batch_size=16), 1, (16, 16, 1)),
        (dict(train_batch_size=16), 4, (64, 16, 1)),
        (dict(train_batch_size=16, gradient_accumulation_steps=3), 2, (96, 16, 3)),
        (dict(train_batch_size=16, global_batch_size=64), 1, (64, 16, 4)),
        (dict(train_batch_size=16, global_batch_size=64), 8, (64, 8, 1)),
        (dict(train_batch_size=16, global_batch_size=60), 2, (60, 15, 2)),
        (dict(train_batch_size=16, global_batch_size=34), 2, (34, 1, 17)),
        (dict(train_batch_size=5, global_batch_size=5), 1, (5, 5, 1)),
    ],
)
def test_the_global_batch_is_shared(settings, processes, plan):
    assert plan_batch(config(**settings), processes) == plan


@pytest.mark.parametrize(
    ("processes", "plan"), [(1, (16, 8, 2)), (2, (16, 8, 1)), (4, (16, 4, 1)), (16, (16, 1, 1))]
)
def test_the_same_command_on_other_processes_keeps_the_global_batch(processes, plan):
    before = dict(train_batch_size=8, gradient_accumulation_steps=1, global_batch_size=16)
    assert plan_batch(config(train_batch_size=8), processes, before) == plan


def test_another_batch_size_or_a_stated_global_batch_is_taken_at_its_word():
    before = dict(train_batch_size=8, gradient_accumulation_steps=1, global_batch_size=16)
    assert plan_batch(config(train_batch_size=4), 1, before).global_batch_size == 4
    assert plan_batch(config(train_batch_size=8, global_batch_size=32), 1, before)[0] == 32


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="64 images cannot be shared equally by 3 processes"):
        plan_batch(config(global_batch_size=64), 3)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "PARALLELISM_CONFIG is not supported"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "asks for torch dynamo .INDUCTOR.: leave that"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 is not supported: set fsdp_version: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            "FSDP shards over several processes, and this run has one",
        ),
        (
            {
                "ACCELERATE_MIXED_PRECISION": "no",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29500",
            },
            "asked for several processes, and one takes part",
        ),
    ],
)
def test_what_is_asked_for_and_not_there_is_refused(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as caught:
        start_processes(config(optimizer="adamw"))
    assert "\n" not in str(caught.value)


def test_a_world_larger_than_the_run_is_refused(monkeypatch):
    """As where torchrun starts processes that do not meet."""
    from ddpm_hf.devices import _check_processes

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="asked for 2 processes, and one takes part"):
        _check_processes(1)
    _check_processes(2)


def test_muon_cannot_be_sharded(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert wants_fsdp()
    with pytest.raises(InputError, match="muon needs whole matrices, and FSDP shards them"):
        start_processes(config(optimizer="muon"))


def test_what_cannot_be_sharded_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match="FSDP shards contiguous weights only"):
        start_processes(config(optimizer="adamw", memory_format="channels_last"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(InputError, match="on a CPU FSDP2 computes in fp32"):
        start_processes(config(optimizer="adamw", mixed_precision="bf16"))


def test_another_accumulation_in_the_environment_is_refused(monkeypatch):
    """accelerate would take it in place of ours, and sum gradients over other micro-steps."""
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    start_processes(config())
    monkeypatch.setenv(name, "4")
    with pytest.raises(InputError, match=f"{name}=4 is not the 2 micro-steps"):
        start_accelerator(config(mixed_precision="no"), 2)
    assert start_accelerator(config(mixed_precision="no"), 4).gradient_accumulation_steps == 4


def test_a_launcher_that_says_cpu_gets_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert start_processes(config()).device.type == "cpu"


def test_one_process_starts_on_what_there_is():
    state = start_processes(config())
    assert state.num_processes == 1
    assert (state.device.type == "cpu") == (not torch.accelerator.is_available())


def test_an_address_that_a_site_exports_asks_for_no_second_process(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch` does
    assert start_processes(config(optimizer="adamw")).num_processes == 1
