"""Averages during training, their snapshots, and averages of other lengths made after it."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline, TrainingConfig, build_scheduler
from ddpm_hf.calibration import Estimate, store
from ddpm_hf.cli import main
from ddpm_hf.ema import (
    build_ema,
    build_power_averages,
    check_updates,
    drop_snapshots,
    ema_warning,
    fit_profile,
    gamma_of_length,
    list_snapshots,
    post_hoc,
    reconstruct,
    relative_length,
    save_snapshot,
    share_of_initial_weights,
    warmup_decay,
)
from ddpm_hf.errors import InputError

HO = dict(ema_min_decay=0.9999, ema_max_decay=0.9999)
PROFILES = dict(ema_profiles="0.05,0.10")


def config(**settings):
    return TrainingConfig(dataset_name="x", **settings)


def walk(steps, size=100):
    """Weights at steps 0, 1, ... of a random walk around 1, (steps + 1, size) float64."""
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(steps + 1, size, generator=generator, dtype=torch.float64)
    return 1 + moves.cumsum(0) / math.sqrt(steps)


def follow(network, averages, weights, save=None, every=1):
    """Step averages along weights (steps, size), with snapshots into a folder."""
    for step, row in enumerate(weights, 1):
        network.weight.data.copy_(row)
        for average in averages:
            average.step(network.parameters())
            if save and step % every == 0:
                save_snapshot(save, average, average.named_tensors())


def line(weights):
    """A network of one vector, at the first of the weights."""
    network = torch.nn.Linear(weights.shape[1], 1, bias=False)
    network.weight.data.copy_(weights[0])
    return network


def power_average(weights, sigma_rel):
    """By its definition: the mean of weights at steps 1, 2, ... under the density tau^gamma."""
    edges = np.linspace(0, 1, len(weights)) ** (gamma_of_length(sigma_rel) + 1)
    return torch.from_numpy(np.diff(edges)) @ weights[1:]


# Profiles


def test_the_papers_ema_is_constant_from_the_first_step():
    """Pitfall L8: EMAModel(decay=.9999) runs 0, .18, .25 ... and drops the initial weights."""
    layer = torch.nn.Linear(1, 1, bias=False)
    ours, stock = build_ema(layer, config(**HO)), EMAModel(layer.parameters(), decay=0.9999)
    torch.nn.init.zeros_(layer.weight)
    for start in (ours.averages["weight"], stock.shadow_params[0]):
        start.fill_(1.0)
    for _ in range(2000):
        ours.step(layer.parameters())
        stock.step(layer.parameters())
    # float32 rounds 1 - 0.9999 by 2e-7 relative, 2,000 times
    assert ours.averages["weight"].item() == pytest.approx(0.9999**2000, rel=1e-3)
    assert stock.shadow_params[0].item() == 0.0


@pytest.mark.parametrize("lowest", [0.0, 0.5])
def test_ema_with_warm_up_follows_its_formula(lowest):
    layer = torch.nn.Linear(1, 1, bias=False)
    ema = build_ema(layer, config(ema_max_decay=0.9, ema_min_decay=lowest))
    decays = []
    for _ in range(40):
        ema.step(layer.parameters())
        decays.append(ema.decay(ema.optimization_step))
    rising = [0.0] + [min(0.9, 1 - (1 + k) ** -0.75) for k in range(1, 40)]
    assert decays == pytest.approx([max(lowest, decay) for decay in rising])


def test_the_decays_of_many_steps_are_those_of_each():
    settings = dict(inv_gamma=3.0, power=0.6, min_decay=0.2, max_decay=0.8)
    together = warmup_decay(np.arange(1, 50), **settings)
    # numpy's vectorised power may differ in the last bit
    assert list(together) == pytest.approx([warmup_decay(k, **settings) for k in range(1, 50)])


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.28])
def test_a_power_average_is_the_integral_of_its_density(sigma_rel):
    weights = walk(300)
    network = line(weights)
    average, _ = build_power_averages(network, config(ema_profiles=f"{sigma_rel},0.2"))
    follow(network, [average], weights[1:])
    # float32 keeps 6e-8 of each of 300 updates
    expected = power_average(weights, sigma_rel).float()
    torch.testing.assert_close(average.averages["weight"][0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_lengths_and_exponents_are_those_of_karras(sigma_rel, gamma):
    assert gamma_of_length(sigma_rel) == pytest.approx(gamma, abs=0.005)  # as printed


@pytest.mark.parametrize("sigma_rel", [1e-4, 0.01, 0.05, 0.2, 0.2886])
def test_the_length_is_the_densitys_standard_deviation(sigma_rel):
    gamma = gamma_of_length(sigma_rel)
    assert relative_length(gamma) == pytest.approx(sigma_rel, rel=1e-9)  # a root in float64
    # Moments of (gamma + 1) tau^gamma on [0, 1]; as a fraction, since their difference is small.
    mean_square, square_mean = (gamma + 1) / (gamma + 3), ((gamma + 1) / (gamma + 2)) ** 2
    assert math.sqrt(mean_square - square_mean) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("settings", [HO, dict(ema_max_decay=0.9), PROFILES])
@pytest.mark.parametrize("every", [3, 4])
def test_rarer_updates_average_over_the_same_length(settings, every):
    """Where the weights are constant between two updates, nothing changes."""
    weights = walk(24)
    results = []
    for update_every in (1, every):
        network = line(weights)
        chosen = config(**settings, ema_update_every=update_every)
        averages = [build_ema(network, chosen), *build_power_averages(network, chosen)]
        follow(network, averages, weights[1:].repeat_interleave(every, 0))
        results.append([average.averages["weight"] for average in averages])
    # float32, a few hundred updates at most
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


# The share of the initial weights


def test_the_share_of_the_initial_weights():
    assert share_of_initial_weights(config(**HO), 2000) == pytest.approx(0.9999**2000)
    assert share_of_initial_weights(config(**HO, ema_update_every=7), 20) == pytest.approx(
        0.9999**14
    )
    endless = HO | dict(ema_min_decay=1 - 1e-9, ema_max_decay=1 - 1e-9)
    found = share_of_initial_weights(config(**endless), 10**9)  # in no memory to speak of
    assert found == pytest.approx(np.exp(-1), rel=1e-6)
    assert share_of_initial_weights(config(), 2000) == 0.0  # warm-up starts with decay 0
    longest = config(ema_min_decay=0.999999, ema_max_decay=0.999999)
    # rounding of 2.4 million products of float64
    assert share_of_initial_weights(longest, 2_400_000) == pytest.approx(
        0.999999**2_400_000, rel=1e-9
    )


def test_a_decay_too_long_for_the_run_is_said_with_one_that_is_not():
    line = ema_warning(config(**HO), 2000)
    assert line == (
        "Warning: --ema_min_decay 0.9999 keeps 82 % of the initial weights after 2000 steps: use "
        "at most 0.9977, or 0 to warm up"
    )
    for steps in (1, 2000, 31_234, 800_000):
        words = ema_warning(config(ema_min_decay=1.0, ema_max_decay=1.0), steps).split()
        decay = float(words[words.index("most") + 1].strip(","))
        advised = config(ema_min_decay=decay, ema_max_decay=decay)
        assert ema_warning(advised, steps) is None
        assert share_of_initial_weights(advised, steps) > 0.001  # and it is no shorter than needed


@pytest.mark.parametrize("settings", [{}, HO | dict(use_ema=False)])
def test_no_warning_with_warm_up_or_without_ema(settings):
    assert ema_warning(config(**settings), 100) is None


@pytest.mark.parametrize("settings", [{}, PROFILES | dict(use_ema=False)])
def test_an_average_that_would_never_be_updated_is_refused(settings):
    with pytest.raises(InputError, match="ema_update_every 11 is longer than the run of 10 steps"):
        check_updates(config(ema_update_every=11, **settings), 10)
    check_updates(config(ema_update_every=10, **settings), 10)
    check_updates(config(ema_update_every=11, use_ema=False), 10)


# State


@pytest.mark.parametrize("update_every", [1, 3])
def test_an_average_goes_on_bit_for_bit(update_every):
    settings = config(**PROFILES, ema_update_every=update_every)
    weights = walk(20)

    def averages(network):
        return [build_ema(network, settings), *build_power_averages(network, settings)]

    network = line(weights)
    straight = averages(network)
    follow(network, straight, weights[1:])
    stopped = averages(line(weights))
    follow(network, stopped, weights[1:8])
    resumed = averages(line(weights))
    for new, old in zip(resumed, stopped, strict=True):
        new.load(old.named_tensors(), old.optimization_step)
    follow(network, resumed, weights[8:])
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a.averages["weight"], b.averages["weight"])
        assert a.optimization_step == b.optimization_step == 20


def test_sharded_parameters(tmp_path):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    weights = walk(6)
    plain, sharded = line(weights), line(weights)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        ours, expected = build_ema(sharded, config()), build_ema(plain, config())
        for row in weights[1:]:
            plain.weight.data.copy_(row)
            sharded.weight.data.to_local().copy_(row)
            ours.step(sharded.parameters())
            expected.step(plain.parameters())
        assert isinstance(ours.averages["weight"], DTensor)
        # two ways to add a product, one rounding apart
        torch.testing.assert_close(ours.named_tensors(), expected.named_tensors())
        resumed = build_ema(sharded, config())
        resumed.load(ours.named_tensors(), 6)
        assert torch.equal(resumed.named_tensors()["weight"], ours.named_tensors()["weight"])
    finally:
        torch.distributed.destroy_process_group()


# Snapshots


@pytest.fixture
def run(tmp_path):
    """600 steps of a random walk with 20 snapshots of two profiles: (folder, weights)."""
    weights = walk(600)
    network = line(weights)
    folder = tmp_path / "run"
    follow(network, build_power_averages(network, config(**PROFILES)), weights[1:], folder, 30)
    return folder, weights


def test_a_snapshot_says_what_it_is(run):
    folder, weights = run
    snapshots = list_snapshots(folder)
    assert len(snapshots) == 40
    assert snapshots[-1] == (folder / "ema/600-0.1.safetensors", 600, 0.1, gamma_of_length(0.1))
    stored = load_file(snapshots[-1].path)
    # float32, 600 updates
    torch.testing.assert_close(
        stored["weight"][0], power_average(weights, 0.1).float(), rtol=1e-4, atol=1e-5
    )
    assert len(list((folder / "ema").iterdir())) == 40  # no half-written ones


def test_snapshots_of_steps_to_be_done_again_are_dropped(run):
    folder, _ = run
    drop_snapshots(folder, 329)
    assert [snapshot.step for snapshot in list_snapshots(folder)[-3:]] == [270, 300, 300]
    drop_snapshots(folder / "nowhere", 0)


def test_a_snapshot_between_two_updates_is_of_the_update(tmp_path):
    weights = walk(10)
    network = line(weights)
    averages = build_power_averages(network, config(**PROFILES, ema_update_every=4))
    follow(network, averages, weights[1:], tmp_path, 3)  # at steps 3 (none yet), 6 and 9
    assert [snapshot.step for snapshot in list_snapshots(tmp_path)] == [4, 4, 8, 8]


@pytest.mark.parametrize("content", [b"broken", None])
def test_a_file_that_is_no_snapshot_is_named(tmp_path, content):
    from safetensors.torch import save_file

    path = tmp_path / "ema" / "x.safetensors"
    path.parent.mkdir()
    path.write_bytes(content) if content else save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="x.safetensors is no snapshot of an average: delete it"):
        list_snapshots(tmp_path)


# Averages after training


@pytest.mark.parametrize("length", [0.03, 0.07, 0.085, 0.15, 0.2])
@pytest.mark.parametrize("step", [None, 450])
def test_any_length_is_close_to_exact_averaging(run, length, step):
    folder, weights = run
    weights = weights[: (step or 600) + 1]
    made, exact = reconstruct(folder, length, step), power_average(weights, length)
    assert (made.step, made.num_snapshots) == (step or 600, 40 if step is None else 30)
    error = (made.tensors["weight"][0] - exact).norm()
    # Cauchy-Schwarz: what the profiles differ by, times how far the weights are from any constant;
    # and float32 snapshots (6e-8 of 100 weights around 1, times coefficients of up to 9 in all).
    gamma = gamma_of_length(length)
    own_norm = (gamma + 1) / math.sqrt(2 * gamma + 1)
    spread = (weights[1:] - weights.mean(0)).square().mean(0).sqrt().norm()
    assert error <= made.error * own_norm * spread + 1e-4
    # The bound holds for any weights. On these: 30 (length 0.03, step 450) to 1,200 times closer.
    stored = [load_file(snapshot.path)["weight"][0] for snapshot in list_snapshots(folder)]
    assert error < min((tensor - exact).norm() for tensor in stored) / 20


def test_a_stored_length_is_its_snapshot(run):
    folder, _ = run
    for length in (0.05, 0.1):
        stored = load_file(folder / "ema" / f"600-{length}.safetensors")
        made = reconstruct(folder, length)
        torch.testing.assert_close(made.tensors, stored, rtol=0, atol=1e-6)
        assert made.error < 1e-6


def test_weights_that_do_not_change_are_kept_by_few_snapshots(tmp_path):
    """Without the constraint two snapshots per profile would shrink them by 24 %."""
    weights = torch.full((41, 3), 2.0)
    network = line(weights)
    averages = build_power_averages(network, config(**PROFILES))
    follow(network, averages, weights[1:], tmp_path, 20)
    made = reconstruct(tmp_path, 0.2)
    assert made.error > 0.05  # the profile is met badly
    torch.testing.assert_close(made.tensors["weight"], weights[:1], rtol=1e-6, atol=0)


def test_a_thousand_snapshots_stay_stable():
    times = np.tile(np.linspace(500, 300_000, 600), 2)
    gammas = np.repeat([gamma_of_length(0.05), gamma_of_length(0.10)], 600)
    fit = fit_profile(times, gammas, time=300_000, gamma=gamma_of_length(0.075))
    assert fit.error < 1e-4
    assert abs(fit.coefficients.sum() - 1) < 1e-9  # float64 through a condition number of 1e9
    assert np.abs(fit.coefficients).sum() < 2  # what the snapshots' rounding is multiplied by


# The verb


@pytest.fixture
def trained(tiny_unet, tmp_path):
    """A folder as a run leaves it, with four snapshots of two profiles."""
    folder = tmp_path / "trained"
    DDPMPipeline(tiny_unet, build_scheduler()).save_pretrained(folder)
    averages = build_power_averages(tiny_unet, config(**PROFILES))
    torch.manual_seed(1)
    for step in range(1, 41):
        for parameter in tiny_unet.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        for average in averages:
            average.step(tiny_unet.parameters())
            if step % 10 == 0:
                save_snapshot(folder, average, average.named_tensors())
    return folder


def test_the_verb_writes_a_pipeline_that_stock_diffusers_opens(trained, tmp_path, capsys):
    output = tmp_path / "longer"
    words = ["ema", str(trained), "--length", "0.07", "--output", str(output)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"Wrote {output}: step 40, from 8 snapshots\n"
    expected = reconstruct(trained, 0.07).tensors
    for kind in (DDPMPipeline, diffusers.DDPMPipeline):
        pipe = kind.from_pretrained(output)
        for name, parameter in pipe.unet.named_parameters():
            assert torch.equal(parameter.cpu(), expected[name]), name
    assert pipe(1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    assert {path.name for path in output.parent.iterdir()} == {"trained", "longer"}


def test_an_earlier_step_and_a_length_that_is_met_badly(trained, tmp_path, capsys):
    words = ["--length", "0.25", "--step", "20", "--output", str(tmp_path / "out")]
    assert main(["ema", str(trained), *words]) == 0
    wrote, warning = capsys.readouterr().out.splitlines()
    assert wrote.endswith("step 20, from 4 snapshots")
    assert warning.startswith("Warning: they meet this length to ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", "0.3"], "length must be between 0 and 0.288; got 0.3"),
        (["--length", "0"], "length must be between 0 and 0.288; got 0.0"),
        (["--length", "0.07", "--step", "50"],
         "step must be one of the 4 stored ones, the last is 40 and the nearest 40; got 50"),
        (["--length", "0.07", "--step", "10"], "only step 10 is stored up to there"),
        ([], "the following arguments are required: --length"),
    ],
)  # fmt: skip
def test_errors_of_the_verb_are_one_line(trained, tmp_path, words, message, capsys):
    assert main(["ema", str(trained), *words, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_averaged(trained, tmp_path):
    with pytest.raises(InputError, match="nowhere is no folder: name the folder of a run"):
        post_hoc(tmp_path / "nowhere", 0.07, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no snapshots: train with --ema_profiles"):
        post_hoc(tmp_path / "empty", 0.07, tmp_path / "out")
    with pytest.raises(InputError, match="trained exists already: name another folder"):
        post_hoc(trained, 0.07, trained)
    (trained / "model_index.json").unlink()
    with pytest.raises(InputError, match="cannot load a pipeline from"):
        post_hoc(trained, 0.07, tmp_path / "out")
    for path in (trained / "ema").glob("*-0.1.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match="have one length, 0.05, and two are needed"):
        reconstruct(trained, 0.07)


def test_other_weights_are_not_calibrated(trained, tmp_path):
    pipe = DDPMPipeline.from_pretrained(trained)
    noise = torch.linspace(0.5, 0.999, 1000).double()
    store(pipe.scheduler, Estimate(noise, torch.zeros(1000)))
    pipe.save_pretrained(trained)
    post_hoc(trained, 0.07, tmp_path / "out")
    assert DDPMPipeline.from_pretrained(trained).scheduler.analytic is not None
    assert DDPMPipeline.from_pretrained(tmp_path / "out").scheduler.analytic is None
