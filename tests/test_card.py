"""The model card: the whole of it, what it escapes, and whose text it leaves alone."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import diffusers
import pytest
from huggingface_hub import ModelCard

from ddpm_hf import __version__
from ddpm_hf.calibration import store
from ddpm_hf.card import MARK, code, escape, located, render_card, write_card
from ddpm_hf.config import TrainingConfig
from ddpm_hf.errors import InputError
from ddpm_hf.hub import files_to_push
from ddpm_hf.presets import build_scheduler, unet_config
from ddpm_hf.results import Result, TrainingRecord, add_results, read_record, write_record
from ddpm_hf.scheduler import DDPMScheduler

from .conftest import REPOSITORY
from .test_calibration import world_statistics

EXPECTED = REPOSITORY / "tests" / "expected_card.md"
MADE_BY = dict(commit="0123abc", hardware="1 core of a|processor")


def make_folder(folder, *, recorded=True, process=None, unet=None, raw=None, **settings):
    """The files that a card is made from, of a run that never was."""
    for part in ("unet", "scheduler", "samples"):
        (folder / part).mkdir(parents=True)
    network = unet_config("fashion-quick", resolution=(28, 32)) | (unet or {})
    (folder / "unet" / "config.json").write_text(json.dumps(network))
    scheduler = build_scheduler(**(process or {}))
    (folder / "scheduler" / "scheduler_config.json").write_text(scheduler.to_json_string())
    (folder / "samples" / "grid.png").touch()
    if recorded:
        config = TrainingConfig(**({"dataset_name": "embedded"} | settings))
        (folder / "config.json").write_text(json.dumps(located(asdict(config)) | (raw or {})))
        by_timestep = {"training loss": {"0.0-0.1": 0.5, "0.9-1.0": 0.01}, "x|y": {"0.0-0.1": 0.6}}
        record = TrainingRecord(
            step=1000, global_batch_size=16, num_images=6000, num_processes=2, seconds=5400.0,
            energy_kwh=0.06, parameters=1_234_567, loss_by_timestep=by_timestep, **MADE_BY,
        )  # fmt: skip
        write_record(folder, record)
    return folder


def test_the_whole_card(tmp_path):
    folder = make_folder(tmp_path / "garments")
    (folder / "loss_curve.png").touch()
    row = dict(dataset="zalando/fashion", split="test", num_images=1000, seed=3, **MADE_BY)
    add_results(
        folder,
        [
            Result("bits_per_dim", 2.94512345, "bits/dim", protocol="all timesteps", **row,
                   standard_error=0.0123),
            Result("fd", 3.2, "squared | distance", protocol="20 steps,\n<b>DDIM</b>", **row),
        ],
    )  # fmt: skip
    expected = EXPECTED.read_text().replace("VERSION", __version__)
    assert render_card(folder, "org/garments") == expected


def test_metadata_is_what_the_hub_reads(tmp_path):
    base = dict(init_from="org/base", model_config_name_or_path="org/base")
    folder = make_folder(tmp_path / "run", dataset_name="org/photos", **base)
    row = dict(dataset="org/photos", split="test", num_images=10, protocol="p", seed=0)
    add_results(folder, [Result("fd", 3.25, "squared distance", **row)])
    data = ModelCard(render_card(folder, "org/name", license="cc-by-4.0")).data
    assert data.datasets == ["org/photos"]
    assert data.license == "cc-by-4.0"
    assert data.base_model == "org/base"
    assert data.pipeline_tag == "unconditional-image-generation"
    (measured,) = data.eval_results
    assert (measured.dataset_type, measured.metric_type) == ("org/photos", "fd")
    assert measured.metric_value == 3.25
    assert measured.metric_args["num_images"] == 10


def test_a_local_set_and_a_local_model_are_not_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret" / "place"
    secret.mkdir(parents=True)
    folder = make_folder(
        tmp_path / "run", dataset_name="secret/place", train_data_dir=str(secret),
        init_from="secret/place", model_config_name_or_path="secret/place",
        raw={"recipe": str(secret / "mine.yaml")},
    )  # fmt: skip
    monkeypatch.chdir("/")  # where these names could be ids on the Hub
    text = render_card(folder)
    assert "a local image set" in text
    assert "| started from | another model |" in text
    assert "| recipe | `./mine.yaml`" in text
    assert "| their licence | not stated |" in text
    assert "secret" not in text
    assert ModelCard(text).data.license is None


def test_the_licence_of_the_images(tmp_path):
    folder = make_folder(tmp_path / "run", dataset_name="org/photos")
    assert "| their licence | cc0 |" in render_card(folder, data_license="cc0")
    assert "| their licence | see its page |" in render_card(folder)


def test_numbers_of_older_weights_are_not_shown(tmp_path):
    folder = make_folder(tmp_path / "run")
    row = dict(unit="u", dataset="d", split="s", num_images=1, protocol="p", seed=0)
    rows = [Result(name, 1.0, step=step, **row) for name, step in
            (("now", 1000), ("before", 500), ("whenever", None))]  # fmt: skip
    add_results(folder, rows)
    card = ModelCard(render_card(folder))
    assert [row.metric_type for row in card.data.eval_results] == ["now", "whenever"]
    assert "before" not in card.text


def test_the_picture_of_an_evaluation_is_shown_with_its_numbers_only(tmp_path):
    folder = make_folder(tmp_path / "run")
    (folder / "rate_distortion.png").touch()
    row = dict(unit="u", dataset="d", split="s", num_images=1, protocol="p", seed=0)
    add_results(folder, [Result("rate", 1.0, step=500, **row), Result("x", 1.0, step=1000, **row)])
    assert "rate_distortion.png" not in render_card(folder)
    add_results(folder, [Result("rate", 1.0, step=1000, **row)])
    assert "rate_distortion.png" in render_card(folder)


def test_settings_from_elsewhere_are_text(tmp_path):
    folder = make_folder(tmp_path / "run", raw={"optimizer": "<b>x</b> | [y](http://z)"})
    assert r"\<b\>x\</b\> \| \[y\](http\://z), learning rate" in render_card(folder)


def test_a_calibrated_model_samples_its_timesteps_with_stock_by_two_lines(tmp_path):
    folder = make_folder(tmp_path / "run")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    scheduler = DDPMScheduler.from_config(config)
    store(scheduler, world_statistics(scheduler), num_images=2000)
    measured = scheduler.analytic | {"timesteps": {"3": [999, 500, 10]}}
    config["_ddpm_hf"]["analytic"] = measured
    path.write_text(json.dumps(config))
    text = render_card(folder)
    assert "calibrated on 2000 images" in text
    code = text.split("with plain diffusers too:\n\n```python\n")[1].split("images =")[0]
    pipe = SimpleNamespace(scheduler=diffusers.DDPMScheduler())
    exec(code, {"pipe": pipe})
    pipe.scheduler.set_timesteps(3, device="cpu")  # as a pipeline calls it
    assert pipe.scheduler.timesteps.tolist() == [999, 500, 10]


def test_configurations_may_be_silent(tmp_path):
    folder = make_folder(tmp_path / "run", recorded=False, unet={"sample_size": None})
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    text = render_card(folder)
    assert "predicts `epsilon`; the noise schedule is `linear` with 1000" in text
    assert "of any size of" in text


def test_a_pipeline_that_was_not_trained_here(tmp_path):
    text = render_card(make_folder(tmp_path / "found", recorded=False))
    assert "not recorded" in text
    assert "Nothing yet." in text
    assert "# found\n" in text


def test_a_process_that_needs_all_steps_says_so(tmp_path):
    process = dict(variance_type="fixed_large", ddpm_beta_schedule="sigmoid", ddpm_num_steps=500)
    text = render_card(make_folder(tmp_path / "run", process=process))
    assert "That variance is for all 500 steps" in text
    assert "`sigmoid` with 500" in text


def test_a_class_conditional_network_does_not_promise_what_stock_cannot(tmp_path):
    names = ["a`b", "two\nlines"] + [f"class {i}" for i in range(100)]
    folder = make_folder(
        tmp_path / "run", process=dict(class_names=names), unet={"num_class_embeds": 103}
    )
    text = render_card(folder)
    assert "from diffusers import DDPMPipeline" not in text
    assert text.count("class_labels=0") == 2
    assert "Classes: 0 `` a`b ``, 1 `two lines`, 2 `class 0`" in text
    assert "and 2 more." in text


def test_a_name_stays_inside_its_quotes(tmp_path):
    text = render_card(make_folder(tmp_path / 'a"; import os #'))
    assert r'from_pretrained("path/to/a\"; import os #")' in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("<script>", r"\<script\>"),
        ("![x](http://x)", r"!\[x\](http\://x)"),
        ("one\ntwo", "one two"),
        ("www.x.org a_b*", r"www\.x.org a\_b\*"),
        ("0.5 (plain), 1-2", "0.5 (plain), 1-2"),
    ],
)
def test_text_of_others_is_shown_as_text(text, shown):
    assert escape(text) == shown


def test_code_holds_backticks_and_pipes():
    assert code("a") == "`a`"
    assert code("a``b") == "``` a``b ```"
    assert code("a|b") == r"`a\|b`"


def test_a_card_that_a_person_edited_stays(tmp_path):
    folder = make_folder(tmp_path / "run")
    written = write_card(folder).read_text()
    assert MARK in written
    (folder / "README.md").write_text("my own words")
    write_card(folder)
    assert (folder / "README.md").read_text() == "my own words"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("unet/config.json", None, "holds no pipeline"),
        ("unet/config.json", "{", "cannot read .*config.json"),
        ("scheduler/scheduler_config.json", "[]", "must hold a JSON object; got list"),
    ],
)
def test_a_folder_without_a_readable_pipeline_is_named(tmp_path, name, text, message):
    folder = make_folder(tmp_path / "run")
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        render_card(folder)


def test_our_own_card_is_written_anew(tmp_path):
    folder = make_folder(tmp_path / "run")
    write_card(folder)
    row = dict(metric="fd", value=2.5, unit="squared", dataset="org/set", split="train")
    add_results(folder, [Result(**row, num_images=9, protocol="p", seed=0, step=1000)])
    assert "| fd | 2.5" in write_card(folder).read_text()


def test_a_measurement_of_a_step_needs_a_record_of_the_step(tmp_path):
    folder = make_folder(tmp_path / "run", recorded=False)
    row = dict(metric="fd", value=2.5, unit="squared", dataset="org/set", split="train")
    add_results(folder, [Result(**row, num_images=9, protocol="p", seed=0, step=5)])
    assert "| fd | 2.5" not in render_card(folder)


def test_the_licence_of_the_settings_is_that_of_the_weights(tmp_path):
    card = ModelCard(render_card(make_folder(tmp_path / "run", license="cc-by-4.0")))
    assert card.data.license == "cc-by-4.0"


def test_the_bound_is_not_weighted(tmp_path):
    settings = dict(loss="vlb", variance_type="learned_range")
    assert "weighted by" not in render_card(make_folder(tmp_path / "run", **settings))


@pytest.mark.parametrize("name", ["init_from", "ema_max_decay", "eval_batch_size"])
def test_a_setting_that_an_older_run_does_not_name_was_the_default(tmp_path, name):
    folder = make_folder(tmp_path / "run")
    before = render_card(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop(name)
    (folder / "config.json").write_text(json.dumps(settings))
    assert render_card(folder) == before


def test_a_model_calibrated_from_python_has_a_card(tmp_path):
    folder = make_folder(tmp_path / "run")
    scheduler = build_scheduler()
    store(scheduler, world_statistics(scheduler))
    (folder / "scheduler" / "scheduler_config.json").write_text(scheduler.to_json_string())
    assert "The variance for fewer steps is calibrated\n" in render_card(folder)


def test_a_persons_card_may_have_any_encoding(tmp_path):
    folder = make_folder(tmp_path / "run")
    words = "sch\u00f6ne Bilder".encode("latin-1")
    (folder / "README.md").write_bytes(words)
    write_card(folder)
    assert (folder / "README.md").read_bytes() == words
    assert folder / "README.md" in files_to_push(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"_ddpm_hf": ["a"]},
        {"_ddpm_hf": "a"},
        {"num_train_timesteps": "many"},
        {"_ddpm_hf": {"analytic": {"x": 1}}},
        {"_ddpm_hf": {"analytic": 5}},
        {"_ddpm_hf": {"analytic": {"timesteps": {"10": "abc"}}}},
    ],
)
def test_a_damaged_scheduler_is_one_clear_line(tmp_path, change):
    folder = make_folder(tmp_path / "run")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="cannot read the scheduler of"):
        render_card(folder)


def test_numbers_are_told_as_they_are(tmp_path):
    """A long time in hours, an error only where there is one, a weighted loss as such."""
    folder = make_folder(tmp_path / "m", snr_gamma=5.0)
    record = read_record(folder)
    write_record(folder, replace(record, seconds=3 * 3600.0))
    row = dict(dataset="d", split="test", num_images=1, seed=0, protocol="p", **MADE_BY)
    add_results(folder, [Result("fd", 3.2, "FD", **row)])
    text = render_card(folder)
    assert "| time | 3.0 hours |" in text
    write_record(folder, replace(record, seconds=31.0))
    assert "| time | 31 seconds |" in render_card(folder)
    assert "±" not in text
    assert "The training loss is weighted." in text
