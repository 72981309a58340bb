"""Numbers beside a model: results.json and training.json."""

import json
import math

import numpy as np
import pytest

from ddpm_hf.errors import InputError
from ddpm_hf.results import (
    Result,
    TrainingRecord,
    add_results,
    code_version,
    hardware,
    read_record,
    read_results,
    write_record,
)


def result(**changes):
    row = dict(
        metric="fd", value=2.5, unit="squared distance", dataset="org/set", split="train",
        num_images=1000, protocol="20 steps of DDIM", seed=0,
    )  # fmt: skip
    return Result(**(row | changes))


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [result(), result(metric="kid", standard_error=0.1)]
    add_results(tmp_path, rows)
    assert read_results(tmp_path) == rows
    assert rows[0].hardware == hardware()
    assert rows[0].commit == code_version()


def test_the_same_measurement_is_replaced_and_others_stay(tmp_path):
    add_results(tmp_path, [result(value=1), result(seed=1)])
    add_results(tmp_path, [result(value=2)])
    assert [(row.seed, row.value) for row in read_results(tmp_path)] == [(1, 2.5), (0, 2.0)]


def test_all_rows_of_a_metric_can_be_replaced(tmp_path):
    add_results(tmp_path, [result(), result(num_images=10), result(metric="kid")])
    add_results(tmp_path, [result(num_images=20)], replacing={"fd"})
    rows = [(row.metric, row.num_images) for row in read_results(tmp_path)]
    assert rows == [("kid", 1000), ("fd", 20)]


def test_values_are_plain_floats(tmp_path):
    add_results(tmp_path, [result(value=np.float32(0.5), standard_error=np.float64(0.25))])
    assert type(result(value=np.float32(0.5)).value) is float
    assert json.loads((tmp_path / "results.json").read_text())[0]["standard_error"] == 0.25


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_refused(value):
    with pytest.raises(InputError, match="fd of a model must be finite"):
        result(value=value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read .*results.json"),
        ("[1]", "must hold objects of Result; got 1"),
        ('[{"metric": "fd"}]', "cannot read .*results.json: .*missing"),
        ('[{"metric": "fd", "value": "much"}]', "value in .*results.json must be .*got 'much'"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_results(tmp_path)


def test_what_a_newer_version_wrote_beside_is_left(tmp_path):
    add_results(tmp_path, [result()])
    rows = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps([rows[0] | {"colour": "blue"}]))
    assert read_results(tmp_path) == [result()]


def test_a_record_knows_images_seen_and_energy(tmp_path):
    record = TrainingRecord(
        step=100, global_batch_size=8, num_images=None, num_processes=2, seconds=3600.0,
        energy_kwh=0.5, parameters=10,
    )  # fmt: skip
    assert record.images_seen == 800
    assert read_record(tmp_path) is None
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


def test_other_images_are_another_measurement(tmp_path):
    for changes in ({}, {"split": "test"}, {"dataset": "org/other"}):
        add_results(tmp_path, [result(**changes)])
    assert len(read_results(tmp_path)) == 3


def test_a_whole_number_is_a_number(tmp_path):
    add_results(tmp_path, [result()])
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace("2.5", "3"))
    assert read_results(tmp_path)[0].value == 3.0


def test_an_error_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="the fd of a model must be finite; got nan"):
        result(standard_error=float("nan"))


@pytest.mark.parametrize("text", ["5", '{"a": 1}', "{}", '""', "0", "false", "null"])
def test_results_that_are_no_list_are_one_clear_line(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match="results.json must hold a list of rows"):
        read_results(tmp_path)


def test_losses_of_a_record_are_by_timestep(tmp_path):
    row = dict(
        step=1, global_batch_size=1, num_images=1, num_processes=1, seconds=1.0, energy_kwh=0.0,
        parameters=1, loss_by_timestep={"training loss": 0.5},
    )  # fmt: skip
    (tmp_path / "training.json").write_text(json.dumps(row))
    with pytest.raises(InputError, match="loss_by_timestep in .*training.json must be"):
        read_record(tmp_path)


def test_a_record_holds_no_loss_that_json_has_no_number_for(tmp_path):
    losses = {"training loss": {"0.0-0.1": math.inf, "0.1-0.2": 0.5}, "held out": {"a": math.nan}}
    record = TrainingRecord(
        step=1, global_batch_size=1, num_images=1, num_processes=1, seconds=1.0, energy_kwh=0.0,
        parameters=1, loss_by_timestep=losses,
    )  # fmt: skip
    write_record(tmp_path, record)
    assert read_record(tmp_path).loss_by_timestep == {"training loss": {"0.1-0.2": 0.5}}
