"""Configs: defaults, unknown keys, types, options, resume, and that every key is read by somebody."""

from __future__ import annotations

import ast
import dataclasses
import json
import runpy
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from nag_jax.config import (
    Config,
    check_resume,
    choose_options,
    defaults,
    from_config_dict,
    key_paths,
    to_dict,
    with_training_of,
)
from nag_jax.data.fine_tuning_sets import FINE_TUNING_SETS
from nag_jax.errors import UserError
from nag_jax.models.dit import ModelConfig

ROOT = Path(__file__).resolve().parent.parent


def get_config(name: str, options: str = "") -> Config:
    return from_config_dict(runpy.run_path(str(ROOT / "configs" / name))["get_config"](options))


def sections(config: type) -> Iterator[type]:
    """The config class and every section below it."""
    yield config
    for hint in typing.get_type_hints(config).values():
        candidates = typing.get_args(hint) if typing.get_origin(hint) in (dict, Mapping) else ()
        for candidate in (hint, *candidates):
            if dataclasses.is_dataclass(candidate):
                yield from sections(typing.cast(type, candidate))


def test_defaults_are_those_of_the_sections():
    assert from_config_dict(defaults()) == Config()


# How the code calls an instance of each section.
CALLED = {
    "Config": {"config", "stored", "current"},
    "ModelConfig": {"config", "model", "explicit"},
    "ProcessConfig": {"config", "process"},
    "Objective": {"objective", "self"},
    "DataConfig": {"config", "data", "self"},
    "OptimizerConfig": {"config", "optimizer"},
    "EmaConfig": {"config"},
    "CheckpointConfig": {"checkpoint"},
    "ParallelConfig": {"config", "parallel"},
    "LogConfig": {"log"},
    "SamplingConfig": {"config", "sampling"},
    "EvalConfig": {"eval"},
    "NoiseShiftConfig": {"noise_shift"},
    "CompareConfig": {"grid", "compare"},
    "EstimatorConfig": {"config", "estimator"},
    "FeatureClassifierConfig": {"config", "features"},
}


def reads(trees: Iterable[ast.AST]) -> set[tuple[str, str]]:
    """Every (owner, attribute) that the code loads: ("eval", "seed") for `config.eval.seed`.

    `getattr(config, field)` in a loop over names counts each string of the module as read from its owner.
    """
    found = set()
    for tree in trees:
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                found.add((name, node.attr))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                found |= {(getattr(node.args[0], "id", ""), string) for string in strings}
    return found


def unread_keys(found: set[tuple[str, str]], config: type = Config) -> set[str]:
    """The keys of all sections that are in none of the reads."""
    return {
        f"{section.__name__}.{field.name}"
        for section in sections(config)
        for field in dataclasses.fields(section)
        if not any((owner, field.name) in found for owner in CALLED[section.__name__])
    }


@pytest.fixture(scope="module")
def found() -> set[tuple[str, str]]:
    files = [file for file in (ROOT / "nag_jax").rglob("*.py") if file.name != "config.py"]
    return reads(ast.parse(file.read_text()) for file in files)


def test_every_key_is_read_somewhere(found: set[tuple[str, str]]):
    assert unread_keys(found) == set()


def test_that_test_sees_an_unread_key(found: set[tuple[str, str]]):
    @dataclasses.dataclass(frozen=True)
    class SamplingConfig:
        num_steps: int = 1
        seed: int = 0  # eval.seed and config.seed are read, sampling.seed is not

    without_the_run_s_own = {read for read in found if read != ("config", "seed")}
    assert unread_keys(without_the_run_s_own, SamplingConfig) == {"SamplingConfig.seed"}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("sampling.nag_scal", "config.sampling.nag_scale"), ("optimizer.lr", "Known: "), ("modle", "config.model")],
)
def test_unknown_keys_are_refused_with_the_nearest_name(key: str, nearest: str):
    values = to_dict(Config())
    section = values
    *path, name = key.split(".")
    for part in path:
        section = section[part]
    section[name] = 1
    with pytest.raises(UserError, match=nearest):
        from_config_dict(values)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("batch_size",), "many", "config.batch_size = 'many' must be of type int"),
        (("batch_size",), True, "must be of type int"),
        (("sampling", "cfg_interval"), (0.1,), "must have 2 values"),
        (("sampling", "nag_null"), "both", "is not one of 'network', 'posterior'"),
        (("model",), 3, "is a section of keys"),
        (("objective", "label_dropout"), 2.0, "label_dropout"),
        (("eval", "num_samples"), 1, "eval.num_samples = 1 must be at least 2"),
        (("eval", "num_resamples"), 5, "eval.num_resamples = 5 must be at least 20"),
        (("noise_shift", "times"), (0.0,), "noise_shift.times"),
        (("log", "every_steps"), 0, "log.every_steps = 0 must be at least 1"),
    ],
)
def test_wrong_values_name_the_key(path: tuple[str, ...], value: object, message: str):
    values = to_dict(Config())
    section = values
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = value
    with pytest.raises(UserError, match=message):
        from_config_dict(values)


def test_a_config_survives_json():
    config = get_config("imagenet256.py", "dit_b4,nag")
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_an_average_may_be_added_by_name():
    config = defaults()
    config.ema.long = {"decay": 0.9999, "half_life_examples": 0.0}
    assert set(from_config_dict(config).ema) == {"ema", "long"}


def test_options():
    assert choose_options("", ("a", "b")) == ()
    assert choose_options("b,a", ("a", "b")) == ("b", "a")
    with pytest.raises(UserError, match="Nearest: smoke"):
        choose_options("smok", ("smoke", "nag"))
    with pytest.raises(UserError, match="exclude each other"):
        choose_options("a,b", ("a", "b"), exclusive=[("a", "b")])


def test_imagenet_options_choose_the_published_settings():
    sit, dit = get_config("imagenet256.py", "sit_xl2,nag"), get_config("imagenet256.py", "dit_s4")
    assert (sit.model.size, sit.model.patch_size, sit.process.name) == ("XL", 2, "linear")
    assert (sit.objective.prediction, sit.sampling.stepper, sit.objective.noise_dropout) == (
        "velocity",
        "euler_maruyama",
        0.1,
    )
    assert (dit.model.size, dit.model.patch_size, dit.process.name) == ("S", 4, "ddpm")
    assert dit.objective.learn_variance and dit.model.learn_sigma and dit.objective.noise_dropout == 0.0
    assert "nag" not in dit.eval.methods and not dit.init_from


@pytest.mark.parametrize("family", ["sit_xl2", "dit_xl2"])
def test_fine_tuning_and_its_control_differ_in_the_noise_dropout_alone(family: str):
    with_nag, control = (get_config("imagenet256.py", f"{family},finetune{nag}") for nag in (",nag", ""))
    assert with_nag.init_from == f"converted/{family}"
    assert with_nag.num_steps == 10 * 1_281_167 // 256
    as_control = dataclasses.replace(
        with_nag, objective=dataclasses.replace(with_nag.objective, noise_dropout=0.0), eval=control.eval
    )
    assert as_control == control


@pytest.mark.parametrize("name", FINE_TUNING_SETS)
def test_every_fine_tuning_set_has_the_same_protocol_and_a_control(name: str):
    with_nag, control = get_config("finetune.py", f"{name},nag"), get_config("finetune.py", name)
    assert (with_nag.num_steps, with_nag.batch_size, with_nag.optimizer.learning_rate) == (24_000, 32, 1e-4)
    assert (with_nag.sampling.num_steps, with_nag.eval.num_samples) == (50, 10_000)
    assert with_nag.data.name == FINE_TUNING_SETS[name].name and with_nag.data == control.data
    assert control.objective.noise_dropout == 0.0 and "domain+nag" in with_nag.eval.methods


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("imagenet256.py", "null_only", "add nag,finetune"),
        ("imagenet256.py", "sit_b2,finetune", "there is none of sit_b2"),
        ("finetune.py", "cub,cars", "exclude each other"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(name: str, options: str, message: str):
    with pytest.raises(UserError, match=message):
        get_config(name, options)


def test_training_the_null_path_alone_needs_dropped_noise_conditions():
    values = to_dict(Config())
    values["optimizer"]["trainable"] = "null_noise_embedding"
    assert from_config_dict(values).optimizer.trainable == "null_noise_embedding"
    values["objective"]["noise_dropout"] = 0.0
    with pytest.raises(UserError, match="objective.noise_dropout is 0. Set it above 0"):
        from_config_dict(values)


@pytest.mark.parametrize("name", ["digits.py", "finetune.py", "imagenet256.py"])
def test_every_config_has_a_smoke_variant(name: str):
    assert get_config(name, "smoke").num_steps <= 10


def test_resume_refuses_differing_keys_and_allows_the_rest():
    config = Config()
    check_resume(config, dataclasses.replace(config, num_steps=5000))
    check_resume(config, dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, num_steps=7)))
    check_resume(config, dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir="elsewhere")))
    check_resume(config, dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full")))
    accumulating = dataclasses.replace(config.optimizer, accumulation_steps=2)
    check_resume(config, dataclasses.replace(config, optimizer=accumulating))
    with pytest.raises(UserError, match="model.dtype was 'float32', is 'bfloat16'"):
        check_resume(config, dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16")))
    with pytest.raises(UserError, match="num_steps was 1000, is 500"):
        check_resume(config, dataclasses.replace(config, num_steps=500))
    changed = dataclasses.replace(config, seed=3, model=dataclasses.replace(config.model, depth=9))
    with pytest.raises(UserError, match=r"model.depth was 4, is 9; seed was 0, is 3"):
        check_resume(config, changed)
    cosine = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule="cosine"))
    with pytest.raises(UserError, match="num_steps was 1000, is 5000"):
        check_resume(cosine, dataclasses.replace(cosine, num_steps=5000))


def test_key_paths_reach_every_leaf():
    assert dict(key_paths({"a": {"b": 1, "c": {"d": 2}}, "e": 3})) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_a_job_on_a_trained_network_keeps_its_training():
    stored = dataclasses.replace(Config(), seed=7, num_steps=3)
    current = dataclasses.replace(Config(), seed=1, sampling=dataclasses.replace(Config().sampling, num_steps=9))
    merged = with_training_of(current, stored)
    assert (merged.seed, merged.num_steps, merged.sampling.num_steps) == (7, 3, 9)


def test_a_job_on_a_trained_network_has_an_attention_of_its_own():
    """A network that was trained with cuDNN's can be sampled on a machine without."""
    stored = dataclasses.replace(Config(), model=ModelConfig(depth=7, dtype="bfloat16", attention="cudnn"))
    assert with_training_of(Config(), stored).model == ModelConfig(depth=7, dtype="bfloat16", attention="auto")
