"""Configs: defaults, unknown keys, types, options, resume, and that every key is read by somebody."""

from __future__ import annotations

import ast
import dataclasses
import json
import runpy
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from nag_jax.config import Config, check_resume, choose_options, defaults, from_config_dict, key_paths, to_dict
from nag_jax.errors import UserError

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


def test_every_key_is_read_somewhere():
    """A key is read if an attribute of its name is loaded outside of `config.py`."""
    loaded: set[str] = set()
    for file in (ROOT / "nag_jax").rglob("*.py"):
        if file.name == "config.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                loaded.add(node.attr)
            # getattr(section, key) over a tuple of names counts as reading them.
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                loaded.add(node.value)
    keys = {field.name for section in sections(Config) for field in dataclasses.fields(section)}
    assert keys - loaded == set()


def test_that_test_would_see_an_unread_key():
    names = {section.__name__ for section in sections(Config)}
    assert names >= {"Config", "ModelConfig", "EmaConfig", "SamplingConfig"}


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
    assert (sit.model.size, sit.model.patch_size, sit.process.name) == ("XL", 16, "linear")
    assert (sit.objective.prediction, sit.sampling.stepper, sit.objective.noise_dropout) == (
        "velocity",
        "euler_maruyama",
        0.1,
    )
    assert (dit.model.size, dit.model.patch_size, dit.process.name) == ("S", 32, "ddpm")
    assert dit.objective.learn_variance and dit.model.learn_sigma and dit.objective.noise_dropout == 0.0
    assert "nag" not in dit.eval.methods


@pytest.mark.parametrize("name", ["digits.py", "imagenet256.py"])
def test_every_config_has_a_smoke_variant(name: str):
    assert get_config(name, "smoke").num_steps <= 10


def test_resume_refuses_differing_keys_and_allows_the_rest():
    config = Config()
    check_resume(config, dataclasses.replace(config, num_steps=5000))
    check_resume(config, dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, num_steps=7)))
    changed = dataclasses.replace(config, seed=3, model=dataclasses.replace(config.model, depth=9))
    with pytest.raises(UserError, match=r"model.depth was 4, is 9; seed was 0, is 3"):
        check_resume(config, changed)
    cosine = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule="cosine"))
    with pytest.raises(UserError, match="num_steps was 1000, is 5000"):
        check_resume(cosine, dataclasses.replace(cosine, num_steps=5000))


def test_key_paths_reach_every_leaf():
    assert dict(key_paths({"a": {"b": 1, "c": {"d": 2}}, "e": 3})) == {"a.b": 1, "a.c.d": 2, "e": 3}
