"""Layers of the configuration, and what bad input gets."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from ddpm_hf.commandline import parse_command, parse_config
from ddpm_hf.config import RANGES, TrainingConfig, field_names
from ddpm_hf.errors import InputError
from ddpm_hf.origin import default_folder
from ddpm_hf.recipe import RECIPES, read_recipe, recipe_names


def test_without_anything_named_the_quick_recipe_runs():
    config = parse_config([])
    assert (config.recipe, config.dataset_name) == ("fashion-quick", "embedded")
    assert config.image_size == (28, 28)


def test_with_images_and_no_recipe_the_default_recipe_applies():
    config = parse_config(["--train_data_dir", "photos"])
    assert config == TrainingConfig(train_data_dir="photos")


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
def test_the_users_images_replace_the_recipes(flag):
    config = parse_config(["--recipe", "cifar10", flag, "mine"])
    assert {config.dataset_name, config.train_data_dir} == {"mine", None}


def test_flags_win_over_the_recipe_and_the_recipe_over_the_preset(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("preset: cifar10\nvariance_type: fixed_small\nlearning_rate: 1e-4\n")
    config = parse_config(["--recipe", str(recipe), "--learning-rate=3e-4"])
    assert config.variance_type == "fixed_small"  # the recipe's; the preset says fixed_large
    assert config.ddpm_beta_schedule == "linear"  # the preset's; the default is cosine
    assert config.learning_rate == 3e-4
    assert config.run_dir.as_posix() == "out/mine"


def test_yaml_values_are_read_like_flags(tmp_path):
    """YAML takes 1e-4 for text and no for False; here both mean what the flag would mean."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learning_rate: 1e-4\nrandom_flip: yes\nmixed_precision: 'no'\n")
    config = parse_config(["--recipe", str(recipe)])
    assert (config.learning_rate, config.random_flip, config.mixed_precision) == (1e-4, True, "no")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_comes_back_from_its_own_json(name, tmp_path):
    config = TrainingConfig.from_recipe(name)
    assert config.recipe == name
    saved = {k: v for k, v in asdict(config).items() if v is not None and k != "recipe"}
    (tmp_path / "again.yaml").write_text(json.dumps(saved))
    again = TrainingConfig.from_recipe(str(tmp_path / "again.yaml"))
    assert asdict(again) | {"recipe": name} == asdict(config)


def test_the_papers_cifar10_recipe():
    config = TrainingConfig.from_recipe("cifar10")
    expected = dict(
        preset="cifar10", resolution="32", random_flip=True, dropout=0.1, ddpm_num_steps=1000,
        ddpm_beta_schedule="linear", prediction_type="epsilon", variance_type="fixed_large",
        snr_gamma=0.0, timestep_sampler="uniform", optimizer="adamw", learning_rate=2e-4,
        adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, adam_weight_decay=0.0,
        lr_scheduler="constant_with_warmup", lr_warmup_steps=5000, train_batch_size=128,
        max_train_steps=800_000, max_grad_norm=1.0, use_ema=True, ema_min_decay=0.9999,
        ema_max_decay=0.9999,
    )  # fmt: skip
    assert asdict(config).items() >= expected.items()


@pytest.mark.parametrize(
    ("recipe", "preset", "rate", "batch", "steps", "flip"),
    [
        ("cifar10-batch512", "cifar10", 4e-4, 512, 195_000, True),
        ("lsun-bedroom", "lsun", 2e-5, 64, 2_400_000, True),
        ("lsun-church", "lsun", 2e-5, 64, 1_200_000, True),
        ("lsun-cat", "lsun", 2e-5, 64, 1_800_000, False),
        ("celebahq-256", "lsun", 2e-5, 64, 500_000, True),
        ("lsun-bedroom-large", "lsun-large", 2e-5, 64, 1_150_000, True),
    ],
)
def test_the_papers_other_recipes(recipe, preset, rate, batch, steps, flip):
    config = TrainingConfig.from_recipe(recipe)
    got = (config.preset, config.learning_rate, config.train_batch_size, config.max_train_steps)
    assert got == (preset, rate, batch, steps)
    assert config.random_flip is flip
    assert config.variance_type == ("fixed_large" if preset == "cifar10" else "fixed_small")
    assert config.dropout == (0.1 if preset == "cifar10" else 0.0)


def test_published_batches_hold_on_any_number_of_devices():
    from ddpm_hf.devices import plan_batch

    for recipe, batch in (("cifar10", 128), ("cifar10-batch512", 512), ("lsun-bedroom", 64)):
        config = TrainingConfig.from_recipe(recipe)
        for processes in (1, 2, 8):
            plan = plan_batch(config, processes)
            assert plan == (batch, batch // processes, 1)
        smaller = TrainingConfig.from_recipe(recipe, train_batch_size=16)
        assert plan_batch(smaller, 1) == (batch, 16, batch // 16)


def test_the_diffusers_recipe_holds_the_scripts_defaults():
    config = TrainingConfig.from_recipe("diffusers-unconditional")
    expected = dict(
        resolution="64", train_batch_size=16, num_epochs=100, learning_rate=1e-4,
        lr_scheduler="cosine", lr_warmup_steps=500, adam_beta1=0.95, adam_beta2=0.999,
        adam_weight_decay=1e-6, adam_epsilon=1e-8, use_ema=False, prediction_type="epsilon",
        ddpm_beta_schedule="linear", ddpm_num_inference_steps=1000, checkpointing_steps=500,
        mixed_precision="no", variance_type="fixed_small",
    )  # fmt: skip
    assert asdict(config).items() >= expected.items()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rte", "1"], "unknown flag '--learning_rte'. Did you mean '--learning_rate'"),
        (["--learning_rate", "fast"], "argument --learning_rate.*invalid float value: 'fast'"),
        (["--optimizer", "muonn"], "optimizer.*invalid choice: 'muonn'"),
        (
            ["--recipe", "cifar"],
            "recipe 'cifar' is neither a file nor one of .*Did you mean 'cifar10'",
        ),
        (["--preset", "cifar1"], "preset must be one of .*Did you mean 'cifar10'"),
        (["--resolution", "32x"], "resolution must be a number or HEIGHTxWIDTH.*got '32x'"),
        (["--resolution", "1x2x3"], "resolution must be a number or HEIGHTxWIDTH"),
        (["--train_batch_size", "0"], "train_batch_size must be at least 1; got 0"),
        (["--dropout", "1.5"], "dropout must be between 0 and 1; got 1.5"),
        (["--cpu_threads", "many"], "cpu_threads must be auto or a number of threads; got 'many'"),
        (["--ema_min_decay", "0.9999"], "ema_min_decay must not exceed ema_max_decay"),
        (["--ddpm_num_inference_steps", "2000"], "ddpm_num_inference_steps must be at most"),
        (["stray"], "'stray' stands without a flag"),
        (["--push_steps", "5"], "push_steps has no effect without --push_to_hub"),
        (["--variance_type", "learned_range"], "is not trained by the simple loss"),
        (["--loss", "hybrid"], "loss hybrid adds the bound for a learned variance only"),
        (["--ema_profiles", "0.05,long"], "ema_profiles must be two or more .*'0.05,long'"),
        (["--ema_profiles", "0.05,0.3"], "ema_profiles must be two or more relative lengths"),
        (["--ema_profiles", "0.1,0.10,0.2"], "all different, like .*'0.1,0.10,0.2'"),
        (["--cpu_threads", "²"], "cpu_threads must be auto or a number of threads; got '²'"),
        (["--resolution", "²"], "resolution must be a number or HEIGHTxWIDTH.*got '²'"),
        (["--ema_profiles", "0.05"], "ema_profiles must be two or more relative lengths"),
        (["--label_column", "x"], "label_column has no effect without --class_conditional"),
        (
            ["--streaming", "--data_on_device", "yes", "--max_train_steps", "1"],
            "data_on_device yes needs all images at hand",
        ),
        (["--dataset_name", "x", "--streaming"], "streaming does not know how long an epoch is"),
        (["--resolution", "30"], "resolution 30x30 cannot be halved 2 times.*for example 28x28"),
        (
            ["--dataset_name", "x", "--ddpm_num_steps", "20", "--ddpm_beta_schedule", "linear"],
            "ddpm_num_steps must be more than 20 for the linear schedule; got 20",
        ),
    ],
)
def test_bad_flags_are_one_clear_line(argv, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_config(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown setting 'learning_rat'. Did you mean 'learning_rate'"),
        ("learning_rate: [1]", r"learning_rate must be a number, text, true or false; got \[1\]"),
        ("learning_rate:", "learning_rate must be a number, text, true or false; got None"),
        ("- a\n- b", "must hold `setting: value` lines; got list"),
        ("a: [", "is no valid YAML"),
        ("recipe: cifar10", "names another recipe"),
    ],
)
def test_bad_recipes_are_one_clear_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        parse_config(["--recipe", str(path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(RANGES))
def test_every_number_has_a_range_that_is_checked(name):
    with pytest.raises(InputError, match=f"{name} must be"):
        TrainingConfig(**{name: -1})


def test_every_numeric_setting_is_in_the_table_of_ranges():
    numbers = {
        name for name, value in asdict(TrainingConfig()).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }  # fmt: skip
    assert numbers - set(RANGES) == set()


def test_a_word_set_in_python_is_checked_like_a_flag():
    with pytest.raises(InputError, match="lr_scheduler must be one of .*Did you mean 'linear'"):
        TrainingConfig(lr_scheduler="liner")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "1e-4"}, "learning_rate must be of type float; got '1e-4'"),
        ({"max_train_steps": 10.5}, "max_train_steps must be of type int; got 10.5"),
        ({"seed": None}, "seed must be of type int; got None"),
        ({"random_flip": "yes"}, "random_flip must be of type bool; got 'yes'"),
        ({"train_batch_size": True}, "train_batch_size must be of type int; got True"),
        ({"split": 1.5}, "split must be of type str; got 1.5"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0; got nan"),
        ({"recipe": "cifar10"}, r"use TrainingConfig.from_recipe\('cifar10', ...\)"),
    ],
)
def test_values_of_another_type_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TrainingConfig(**settings)


def test_values_that_are_meant_are_converted():
    config = TrainingConfig(resolution=64, cpu_threads=2, output_dir=Path("x"), dropout=0, seed=3.0)
    assert (config.resolution, config.cpu_threads, config.output_dir) == ("64", "2", "x")
    assert (type(config.dropout), type(config.seed)) == (float, int)


def test_sampled_grids_take_no_more_steps_than_there_are():
    assert TrainingConfig().ddpm_num_inference_steps == 100
    assert TrainingConfig(ddpm_num_steps=50).ddpm_num_inference_steps == 50


def test_from_recipe_takes_settings_and_refuses_unknown_ones():
    assert TrainingConfig.from_recipe("cifar10", seed=3).seed == 3
    with pytest.raises(InputError, match="unknown setting 'sed'. Did you mean 'seed'"):
        TrainingConfig.from_recipe("cifar10", sed=3)


def test_help_is_instant_and_names_every_flag():
    """The bound is the issue's; what makes it hold is that no torch is imported, checked first."""
    code = (
        "import sys; from ddpm_hf.commandline import parse_config\n"
        "try: parse_config(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(f"--{name} " in result.stdout for name in [*field_names(), "dry_run"])
    # 1.3 s alone; the machine may be busy with something else
    assert time.perf_counter() - started < 10


def test_recipes_say_what_they_are():
    for name in recipe_names():
        assert (RECIPES / f"{name}.yaml").read_text().startswith("# "), name
        assert read_recipe(name)


def test_flags_of_the_diffusers_script_with_another_effect_are_explained_in_a_line_each():
    argv = ["--dataset_name", "x", "--train_data_dir", "y", "--hub_token", "hf_secret"]
    argv += ["--local_rank", "0", "--enable_xformers_memory_efficient_attention"]
    argv += ["--preserve_input_precision", "--hub_model_id", "a/b", "--overwrite_output_dir"]
    argv += ["--resume_from_checkpoint", "latest"]
    config, command = parse_command(argv)
    lines = command.explain(config)
    named = [line.split(":")[0].split(",")[0] for line in lines]
    assert named == [
        "--hub_token", "--local_rank", "--enable_xformers_memory_efficient_attention",
        "--preserve_input_precision", "--train_data_dir", "--overwrite_output_dir",
        "--hub_model_id",
    ]  # fmt: skip
    assert "hf_secret" not in "".join(lines) + str(asdict(config))
    assert parse_command(["--dataset_name", "x"])[1].explain(config) == []


@pytest.mark.parametrize(
    ("argv", "epochs", "steps"),
    [
        (["--recipe", "cifar10", "--num_epochs", "1"], 1, None),
        (["--num_epochs=2"], 2, None),
        (["--recipe", "cifar10", "--num-epochs", "1", "--max_train_steps", "7"], 1, 7),
        (["--recipe", "cifar10"], 100, 800_000),
    ],
)
def test_epochs_that_are_asked_for_win_over_the_steps_of_a_recipe(argv, epochs, steps):
    config = parse_config(argv)
    assert (config.num_epochs, config.max_train_steps) == (epochs, steps)


def test_epochs_of_a_stream_are_refused_whatever_the_recipe():
    with pytest.raises(InputError, match="streaming does not know how long an epoch is"):
        TrainingConfig.from_recipe("cifar10", streaming=True, num_epochs=1)


def test_a_learning_rate_that_muon_does_not_take_is_said():
    """As in the commands of diffusers' README."""
    words = ["--dataset_name", "x", "--learning_rate=1e-4", "--adam_beta1", "0.95"]
    config, command = parse_command(words)
    assert command.explain(config) == [
        "--learning_rate, --adam_beta1: not for the hidden convolutions, which Muon trains with "
        "--muon_learning_rate 0.02; --optimizer adamw is diffusers' optimiser for all"
    ]
    for more in (["--optimizer", "muon"], ["--muon_learning_rate=0.01"], ["--optimizer=adamw"]):
        config, command = parse_command([*words, *more])
        assert command.explain(config) == []
    config, command = parse_command(["--recipe", "cifar10", "--learning_rate", "1e-4"])
    assert command.explain(config) == []


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("max_train_steps: '2e3'", "max_train_steps", 2000),
        ("compile: no", "compile", "no"),
        ("data_on_device: yes\ncompile: 'yes'", "data_on_device", "yes"),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("resolution: 32", "resolution", "32"),
        ("hub_model_id: '12'", "hub_model_id", "12"),
        ("resolution: 032", "resolution", "032"),
        ("seed: 010", "seed", 10),
        ("seed: '9007199254740993'", "seed", 9007199254740993),
        ("seed: 9007199254740993", "seed", 9007199254740993),
    ],
)
def test_a_recipe_may_be_written_as_yaml_is(tmp_path, text, name, value):
    """It reads 1e-4 as text and a bare no as false."""
    (tmp_path / "mine.yaml").write_text(text)
    config = TrainingConfig.from_recipe(str(tmp_path / "mine.yaml"))
    assert (getattr(config, name), type(getattr(config, name))) == (value, type(value))


def test_what_a_dry_run_prints_is_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config(["--recipe", "cifar10", "--seed", "3", "--learning_rate", "1e-6"])
    Path("mine.json").write_text(json.dumps(asdict(config), indent=2))
    again = parse_config(["--recipe", "mine.json"])
    assert asdict(again) == asdict(config) | {"recipe": "mine.json"}
    assert again.run_dir == Path("out/mine")


def test_a_recipe_says_what_it_does_not_understand(tmp_path):
    (tmp_path / "mine.yaml").write_text("learning_rate: fast")
    with pytest.raises(InputError, match="learning_rate must be of type float; got 'fast'"):
        TrainingConfig.from_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--snr_gamma 1 --loss vlb", "--snr_gamma: without effect, the bound has weights of"),
        ("--muon_learning_rate .1 --optimizer adamw", "--muon_learning_rate: without effect, with"),
        ("--class_dropout_prob .2", "--class_dropout_prob: without effect, without --class_cond"),
        ("--held_out_steps 5", "--held_out_steps: without effect, without --held_out"),
        ("--ema_power 1 --use_ema false", "--ema_power: without effect, beside --use_ema false"),
        ("--ema_snapshot_steps 5", "--ema_snapshot_steps: without effect, without --ema_profiles"),
        ("--num_epochs 2 --max_train_steps 5", "--num_epochs: without effect, beside --max_train"),
        ("--lr_warmup_steps 5 --lr_scheduler constant", "--lr_warmup_steps: without effect, the"),
        ("--save_images_epochs 2 --save_images_steps 5", "--save_images_epochs: without effect,"),
        ("--ema_update_every 2 --use_ema no", "--ema_update_every: without effect, beside --use_"),
        ("--logging_dir x --logger none", "--logging_dir: without effect, only --logger tens"),
        (
            "--save_images_epochs 2 --streaming --max_train_steps 5",
            "--save_images_epochs: without effect, a stream has no epochs",
        ),
        (
            "--save_model_epochs 2 --streaming --max_train_steps 5",
            "--save_model_epochs: without effect, a stream has no epochs",
        ),
        ("--dataset_config_name a", "--dataset_config_name: without effect, a folder or a file"),
        (
            "--train_batch_size 65 --global_batch_size 64",
            "--train_batch_size: without effect, beyond the 64 images of --global_batch_size",
        ),
        (
            "--gradient_accumulation_steps 4 --global_batch_size 64",
            "--gradient_accumulation_steps: without effect, it follows from the global batch of 64",
        ),
    ],
)
def test_a_flag_without_effect_says_so(argv, line):
    config, command = parse_command(["--train_data_dir", "x", *argv.split()])
    (said,) = command.explain(config)
    assert said.startswith(line)


@pytest.mark.parametrize("file", ["dataset_info.json", "dataset_dict.json"])
def test_a_set_of_save_to_disk_has_no_configurations(tmp_path, file):
    words = ["--dataset_name", str(tmp_path), "--dataset_config_name", "a"]
    config, command = parse_command(words)
    assert command.explain(config) == []
    (tmp_path / file).touch()
    (said,) = command.explain(config)
    assert said.startswith("--dataset_config_name: without effect")


def test_an_average_of_a_profile_is_updated_too():
    words = "--train_data_dir x --use_ema no --ema_profiles .05,.1 --ema_update_every 2"
    config, command = parse_command(words.split())
    assert command.explain(config) == []


def test_the_recipes_batch_wins_over_the_accumulation_and_that_is_said():
    config, command = parse_command(["--recipe", "cifar10", "--gradient_accumulation_steps", "8"])
    assert command.explain(config) == [
        "--gradient_accumulation_steps: without effect, it follows from the global batch of 128"
    ]
    config, command = parse_command(["--recipe", "cifar10", "--train_batch_size", "128"])
    assert command.explain(config) == []


@pytest.mark.parametrize("name", ["train_data_dir", "dataset_name", "output_dir", "split"])
def test_an_empty_value_as_of_an_unset_variable_is_refused(name):
    """`--train_data_dir "$DATA"` trained on the embedded garments."""
    with pytest.raises(InputError, match=f"{name} is empty: give it a value, or leave it out"):
        parse_config([f"--{name}", ""])


@pytest.mark.parametrize("name", ["snr_gamma", "max_grad_norm", "learning_rate", "seed"])
def test_infinity_is_one_clear_line(name):
    with pytest.raises(InputError, match=f"{name} must be"):
        parse_config([f"--{name}", "inf"] if name != "seed" else ["--seed", str(2**63)])
    with pytest.raises(InputError, match=f"{name} must be"):
        TrainingConfig(**{name: float("inf")})


def test_numbers_of_numpy_are_numbers():
    config = TrainingConfig(seed=np.int64(3), learning_rate=np.float32(0.5), resolution=np.int32(8))
    assert (config.seed, config.learning_rate, config.resolution) == (3, 0.5, "8")
    assert (type(config.seed), type(config.learning_rate)) == (int, float)


def test_one_schedule_has_one_name():
    assert TrainingConfig(ddpm_beta_schedule="squaredcos_cap_v2").ddpm_beta_schedule == "cosine"


def test_a_rate_below_the_end_of_a_polynomial_is_refused():
    with pytest.raises(InputError, match="lr_scheduler polynomial ends at 1e-7"):
        TrainingConfig(lr_scheduler="polynomial", learning_rate=1e-8)


def test_settings_of_a_recipes_images_go_where_others_are_named(tmp_path):
    text = "dataset_name: a/b\nsplit: train[:10]\nimage_column: img\nheld_out: 0.1\nseed: 4"
    (tmp_path / "mine.yaml").write_text(text)
    config = parse_config(["--recipe", str(tmp_path / "mine.yaml"), "--train_data_dir", "photos"])
    found = config.dataset_name, config.split, config.image_column, config.held_out, config.seed
    assert found == (None, "train", None, 0.1, 4)
    assert parse_config(["--recipe", str(tmp_path / "mine.yaml")]).split == "train[:10]"
    assert parse_config(["--dataset_name", "x"]).image_mode == "auto"


@pytest.mark.parametrize(
    ("recipe", "folder"),
    [
        ("cifar10", "out/cifar10"),
        ("mine/long.yaml", "out/long"),
        ("from-ddpm-v1.5", "out/from-ddpm-v1.5"),
    ],
)
def test_a_run_has_the_folder_of_its_recipe(recipe, folder):
    assert default_folder(recipe) == Path(folder)
