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
