"""The probe: what is set is taken, what is auto is measured, nothing of the run is disturbed."""

import itertools

import numpy as np
import pytest
import torch

from ddpm_hf import probe
from ddpm_hf.config import TrainingConfig
from ddpm_hf.errors import InputError
from ddpm_hf.presets import unet_config
from ddpm_hf.probe import Speed, agree, choose_speed, compare, count_flops

CPU = torch.device("cpu")
TINY = dict(
    sample_size=[8, 4],
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    add_attention=False,
    norm_num_groups=4,
)
PLAIN, BF16 = Speed("no", "contiguous"), Speed("bf16", "contiguous")
LAST = Speed("no", "channels_last")
LONG = 10**9
"""Images of a run that is long at every rate below."""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two steps a candidate, and no precision from a launcher."""
    monkeypatch.setattr(probe, "SECONDS_EACH", 0.0)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def table(rates):
    """A measurement with known results; an exception in it is raised."""

    def measure(speed):
        rate = rates[speed[:3]]
        if isinstance(rate, Exception):
            raise rate
        return rate

    return measure


def rates_of(**by_name):
    """Rates of PLAIN, BF16, LAST and their compiled forms."""
    names = {"plain": PLAIN, "bf16": BF16, "last": LAST}
    names |= {f"{name}_compiled": speed._replace(compile=True) for name, speed in names.items()}
    return table({names[name][:3]: rate for name, rate in by_name.items()})


def test_what_is_set_is_taken_and_not_measured(monkeypatch):
    monkeypatch.delattr(probe, "images_per_second")
    for precision, layout, compiling in itertools.product(
        ("no", "bf16"), ("contiguous", "channels_last"), ("yes", "no")
    ):
        config = TrainingConfig(mixed_precision=precision, memory_format=layout, compile=compiling)
        speed = choose_speed(TINY, config, CPU, batch_size=4, num_images=LONG)
        assert speed == Speed(precision, layout, compiling == "yes")


def test_a_launchers_precision_counts_as_set(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = TrainingConfig(memory_format="contiguous")
    assert probe.candidates(config, CPU) == [BF16]


def test_a_launchers_fp8_and_fp16_on_a_cpu_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="fp8 is not supported: use bf16"):
        probe.candidates(TrainingConfig(), CPU)
    with pytest.raises(InputError, match="fp16 needs a GPU; on a CPU use bf16 or no"):
        probe.candidates(TrainingConfig(mixed_precision="fp16"), CPU)


def test_bf16_is_a_candidate_only_where_the_cpu_has_it(monkeypatch):
    config = TrainingConfig()
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert probe.candidates(config, CPU) == [PLAIN, LAST]
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert probe.candidates(config, CPU) == [
        PLAIN,
        BF16,
        LAST,
        LAST._replace(mixed_precision="bf16"),
    ]


def test_the_fastest_is_taken_and_all_are_named():
    speed = compare([PLAIN, BF16, LAST], rates_of(plain=10, bf16=20, last=15), LONG, "no")
    assert speed[:3] == BF16[:3]
    assert speed.describe() == (
        "Computing in bf16, contiguous, eager (images/s tried: fp32, contiguous, eager: 10; "
        "bf16, contiguous, eager: 20; fp32, channels_last, eager: 15)"
    )


def test_the_plainer_is_kept_unless_another_is_clearly_faster():
    assert compare([PLAIN, BF16], rates_of(plain=100, bf16=104), LONG, "no")[:3] == PLAIN[:3]
    assert compare([PLAIN, BF16], rates_of(plain=100, bf16=106), LONG, "no")[:3] == BF16[:3]


def test_a_run_of_less_than_a_minute_takes_what_is_plain():
    measure = rates_of(plain=100, bf16=1000)
    assert compare([PLAIN, BF16], measure, 5_999, "auto") == PLAIN._replace(
        measured=("fp32, contiguous, eager: 100",)
    )
    assert compare([PLAIN, BF16], measure, 6_001, "no")[:3] == BF16[:3]


def test_no_further_candidate_is_tried_after_the_budget(monkeypatch):
    monkeypatch.setattr(probe, "BUDGET_SECONDS", 0.0)
    speed = compare([PLAIN, BF16], rates_of(plain=1, bf16=9), LONG, "no")
    assert speed == PLAIN._replace(measured=("fp32, contiguous, eager: 1",))


def test_what_does_not_fit_into_memory_is_named_and_not_taken():
    measure = rates_of(plain=torch.OutOfMemoryError("CUDA out of memory.\nTried"), bf16=9)
    speed = compare([PLAIN, BF16], measure, LONG, "no")
    assert speed[:3] == BF16[:3]
    assert "fp32, contiguous, eager: failed (CUDA out of memory.)" in speed.describe()


def test_another_error_of_an_eager_step_is_raised():
    with pytest.raises(RuntimeError, match="shape"):
        compare([PLAIN], rates_of(plain=RuntimeError("shape")), LONG, "no")


def test_auto_compiles_in_long_runs_if_that_is_faster():
    options = [PLAIN, BF16]
    faster = rates_of(plain=10, bf16=20, bf16_compiled=30)
    slower = rates_of(plain=10, bf16=20, bf16_compiled=20.5)
    hour = 3600 * 20
    assert compare(options, faster, hour + 1, "auto")[:3] == ("bf16", "contiguous", True)
    assert compare(options, slower, hour + 1, "auto")[:3] == BF16[:3]
    assert compare(options, faster, hour - 1, "auto")[:3] == BF16[:3]
    # `yes` needs no measurement: the table holds none.
    assert compare(options, rates_of(plain=10, bf16=20), 10**5, "yes")[:3] == (
        "bf16",
        "contiguous",
        True,
    )


def test_auto_stays_eager_where_compiling_fails_and_says_why():
    measure = rates_of(plain=10, plain_compiled=RuntimeError("No working C++ compiler\nmore"))
    speed = compare([PLAIN], measure, LONG, "auto")
    assert not speed.compile
    assert "fp32, contiguous, compiled: failed (No working C++ compiler)" in speed.describe()


def test_a_missing_compiler_is_one_line(monkeypatch, tmp_path):
    import torch._inductor.config as inductor

    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before
    with (
        inductor.patch({"cpp.cxx": ("/no/such/compiler",)}),
        pytest.raises(InputError, match="torch.compile does not work here") as caught,
    ):
        agree(lambda: PLAIN._replace(compile=True))
    assert "\n" not in str(caught.value)
    torch.compiler.reset()


def test_a_tiny_network_is_measured_for_real_and_random_states_are_left_alone():
    config = TrainingConfig(optimizer="adamw", gradient_checkpointing=True, compile="no")
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    speed = choose_speed(TINY, config, CPU, batch_size=2, num_images=LONG)
    count_flops(TINY)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert len(speed.measured) == len(probe.candidates(config, CPU))
    assert all(float(line.rpartition(" ")[2]) > 0 for line in speed.measured)


def test_a_network_with_classes_is_measured_too():
    config = TrainingConfig(optimizer="adamw")
    unet = dict(TINY, num_class_embeds=3)
    assert probe.images_per_second(unet, config, CPU, 2, LAST) > 0
    assert count_flops(unet) == count_flops(TINY)  # looking a class up is no product


@pytest.mark.slow  # compiles a network: half a minute
def test_a_network_compiles():
    config = TrainingConfig(optimizer="adamw")
    compiled = PLAIN._replace(compile=True)
    assert probe.images_per_second(TINY, config, CPU, 2, compiled) > 0


def test_processes_agree_on_rank_0s_choice_or_error():
    def refuse():
        raise InputError("no")

    assert agree(lambda: BF16) == BF16
    with pytest.raises(InputError, match="no"):
        agree(refuse)


def test_flops_of_the_cifar10_network_are_known():
    # 36.3 GFLOP an image and step, as counted where attention is one fused operation; attention's
    # products are 4 N^2 C forward (5 layers at 16x16, one at 4x4, C = 256), twice that backward.
    attention = 3 * 4 * 256 * (5 * 256**2 + 16**2)
    counted = count_flops(unet_config("cifar10"))
    # 2 %: which small layers are counted differs by version.
    assert counted - attention == pytest.approx(36.3e9, rel=0.02)


def test_a_backward_pass_costs_twice_a_forward_pass():
    from torch.utils.flop_counter import FlopCounterMode

    from ddpm_hf.presets import build_unet

    unet = build_unet("fashion-quick", image_channels=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.zeros(1, 1, 28, 28), 0)
    forward = counter.get_total_flops()
    # 1 %: the first layer needs no gradient of the image.
    assert count_flops(dict(unet.config)) == pytest.approx(3 * forward, rel=0.01)


def test_the_peak_of_a_device_is_above_what_a_network_reaches():
    config = TrainingConfig(optimizer="adamw")
    unet = unet_config("fashion-quick", image_channels=1)
    reached = probe.images_per_second(unet, config, CPU, 4, PLAIN) * count_flops(unet)
    precision = torch.get_float32_matmul_precision()
    assert probe.peak_flops(CPU, "no") > reached
    assert torch.get_float32_matmul_precision() == precision
