"""The methods that a config names are the guidances of the library, with the config's scales."""

from __future__ import annotations

import dataclasses

import pytest

from nag_jax.config import SamplingConfig
from nag_jax.diffusion import guidance
from nag_jax.diffusion.corrections import ClassifierNAG
from nag_jax.errors import UserError
from nag_jax.jobs.methods import GUIDANCES, make_method

CONFIG = SamplingConfig(
    cfg_scale=2.0,
    domain_scale=3.0,
    nag_scale=0.7,
    cfg_interval=(0.1, 0.9),
    nag_interval=(0.0, 0.8),
    guided_channels=3,
)
CFG = guidance.cfg(2.0, interval=(0.1, 0.9), channels=3)
NAG = guidance.nag(0.7, interval=(0.0, 0.8), channels=3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", guidance.plain()),
        ("cfg", CFG),
        ("nag", NAG),
        ("cfg+nag", CFG + NAG),
        ("joint", guidance.joint(0.7, interval=(0.0, 0.8), channels=3)),
        ("class_free", guidance.class_free(0.7, interval=(0.0, 0.8), channels=3)),
        ("domain", guidance.domain(3.0, interval=(0.1, 0.9), channels=3)),
        ("domain+nag", guidance.domain(3.0, interval=(0.1, 0.9), channels=3) + NAG),
        ("nested", guidance.nested(2.0, 0.7, interval=(0.0, 0.8), channels=3)),
        ("classifier_nag", guidance.plain()),
        ("cfg+classifier_nag", CFG),
    ],
)
def test_tables(name: str, expected: guidance.Guidance):
    assert make_method(name, CONFIG).guidance == expected


def test_every_method_is_tested_and_says_its_scales():
    for name in GUIDANCES:
        method = make_method(name, CONFIG)
        assert ("cfg_scale 2" in method.text) == ("cfg" in name or name == "nested")
        assert ("domain_scale 3" in method.text) == ("domain" in name) == method.needs_original
        assert ("nag_scale 0.7" in method.text) == (name not in ("plain", "cfg", "domain"))


def test_an_estimator_is_asked_for_only_where_one_takes_part():
    assert [name for name in GUIDANCES if make_method(name, CONFIG).needs_estimator] == [
        "classifier_nag",
        "cfg+classifier_nag",
    ]
    posterior = dataclasses.replace(CONFIG, nag_null="posterior")
    assert make_method("nag", posterior).needs_estimator and make_method("cfg+nag", posterior).needs_estimator
    assert make_method("classifier_nag", CONFIG).corrections == (ClassifierNAG(0.7, (0.0, 0.8)),)


def test_zero_guided_channels_means_all():
    method = make_method("nag", dataclasses.replace(CONFIG, guided_channels=0))
    assert method.guidance.differences[0].channels is None


def test_an_unknown_method_is_named():
    with pytest.raises(UserError, match="'nagg', which is not a method. Known: plain, cfg"):
        make_method("nagg", CONFIG)
