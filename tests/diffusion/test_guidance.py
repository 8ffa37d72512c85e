"""Guidance tables: weights that sum to 1, the published formulas, and what a mixture may not depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from nag_jax.diffusion.guidance import (
    CONDITIONAL,
    UNCONDITIONAL,
    Branch,
    Difference,
    Guidance,
    autoguidance,
    cfg,
    class_free,
    domain,
    joint,
    nag,
    nested,
    plain,
    self_guidance,
)
from nag_jax.diffusion.process import DDPM, GVP, PREDICTION_KINDS, Linear, Process
from nag_jax.errors import UserError

C_T, U_T = CONDITIONAL, UNCONDITIONAL
C_NULL, U_NULL = Branch(noise="null"), Branch(drop_label=True, noise="null")
C_POSTERIOR = Branch(noise="posterior")

scales = st.floats(-20.0, 20.0, allow_nan=False)
times = st.floats(0.0, 1.0)
intervals = st.tuples(times, times).map(lambda ends: (min(ends), max(ends)))
channel_counts = st.one_of(st.none(), st.integers(1, 4))


@st.composite
def guidances(draw: st.DrawFn) -> Guidance:
    make = draw(st.sampled_from([cfg, nag, joint, class_free, autoguidance, domain, self_guidance]))
    options = {"interval": draw(intervals), "channels": draw(channel_counts)}
    guidance = make(draw(scales), **options)
    if draw(st.booleans()):
        guidance += nested(draw(scales), draw(scales), interval=draw(intervals), channels=draw(channel_counts))
    if draw(st.booleans()):
        guidance += nag(draw(scales), null="posterior", interval=draw(intervals))
    if draw(st.booleans()):
        guidance = guidance.with_base(U_T)
    return guidance


@hypothesis.given(guidances(), times)
@hypothesis.settings(max_examples=150)
def test_weights_sum_to_one_on_every_channel(guidance: Guidance, t: float) -> None:
    table = guidance.table(t, num_channels=4)
    np.testing.assert_allclose(sum(table.values()), np.ones(4), atol=1e-11)
    assert next(iter(table)) == guidance.base
    assert set(table) <= set(guidance.branches)
    assert all(weights.any() for branch, weights in table.items() if branch != guidance.base)


@hypothesis.given(guidances(), guidances(), times)
@hypothesis.settings(max_examples=50)
def test_a_sum_has_both_differences_in_any_order(first: Guidance, second: Guidance, t: float) -> None:
    first, second = first.with_base(C_T), second.with_base(C_T)
    tables = [first.table(t, 4), second.table(t, 4), (first + second).table(t, 4), (second + first).table(t, 4)]
    for branch in {*first.branches, *second.branches}:
        a, b, ab, ba = (table.get(branch, np.zeros(4)) for table in tables)
        np.testing.assert_allclose(ab, a + b - (branch == C_T), atol=1e-11)
        np.testing.assert_allclose(ab, ba, atol=1e-11)


S, W = 1.7, 0.6
FORMULAS: dict[str, tuple[Guidance, dict[Branch, float]]] = {
    "plain": (plain(), {C_T: 1.0}),
    "plain without the class": (plain(drop_label=True), {U_T: 1.0}),
    "cfg": (cfg(S), {C_T: S, U_T: 1 - S}),
    "nag": (nag(W), {C_T: 1 + W, C_NULL: -W}),
    "nag with the posterior": (nag(W, null="posterior"), {C_T: 1 + W, C_POSTERIOR: -W}),
    "cfg + nag": (cfg(S) + nag(W), {C_T: 1 + (S - 1) + W, U_T: -(S - 1), C_NULL: -W}),
    "joint": (joint(W), {C_T: 1 + W, U_NULL: -W}),
    "class-free": (class_free(W), {C_T: 1.0, U_T: W, U_NULL: -W}),
    # s N(c) + (1 - s) N(null), N(y) = (1 + w) f(y, t) - w f(y, null)
    "nested": (
        nested(S, W),
        {C_T: S * (1 + W), C_NULL: -S * W, U_T: (1 - S) * (1 + W), U_NULL: -(1 - S) * W},
    ),
    "autoguidance": (autoguidance(S), {C_T: S, Branch("weak"): 1 - S}),
    "autoguidance, named": (autoguidance(S, network="bad"), {C_T: S, Branch("bad"): 1 - S}),
    "domain": (domain(S), {C_T: S, Branch("original", drop_label=True): 1 - S}),
    "domain + nag": (
        domain(S) + nag(W),
        {C_T: S + W, Branch("original", drop_label=True): 1 - S, C_NULL: -W},
    ),
    "self-guidance": (self_guidance(W, 0.02), {C_T: 1 + W, Branch(time_shift=0.02): -W}),
    "cfg on the unconditional": (cfg(S).with_base(U_T), {U_T: 2 - S, C_T: S - 1}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str) -> None:
    guidance, weights = FORMULAS[name]
    table = guidance.table(0.5, num_channels=2)
    assert set(table) == set(weights)
    for branch, weight in weights.items():
        np.testing.assert_allclose(table[branch], [weight, weight], rtol=1e-12, err_msg=str(branch))


OFF: dict[str, Guidance] = {
    "cfg": cfg(1.0),
    "nag": nag(0.0),
    "nag posterior": nag(0.0, null="posterior"),
    "cfg + nag": cfg(1.0) + nag(0.0),
    "joint": joint(0.0),
    "class-free": class_free(0.0),
    "nested": nested(1.0, 0.0),
    "autoguidance": autoguidance(1.0),
    "domain": domain(1.0),
    "self-guidance": self_guidance(0.0),
    "self-guidance without a shift": self_guidance(2.0, 0.0),
}


@pytest.mark.parametrize("name", OFF)
def test_off_values_cost_nothing(name: str) -> None:
    table = OFF[name].table(0.3)
    assert list(table) == [C_T]
    np.testing.assert_array_equal(table[C_T], [1.0])


def test_nested_is_cfg_or_nag_where_the_other_is_off() -> None:
    for nested_guidance, guidance in ((nested(S, 0.0), cfg(S)), (nested(1.0, W), nag(W))):
        table, expected = nested_guidance.table(0.5), guidance.table(0.5)
        assert set(table) == set(expected)
        for branch in table:
            np.testing.assert_allclose(table[branch], expected[branch], rtol=1e-12)


INTERVAL_MAKERS: dict[str, Callable[..., Guidance]] = {
    "cfg": lambda **options: cfg(2.0, **options),
    "nag": lambda **options: nag(2.0, **options),
    "joint": lambda **options: joint(2.0, **options),
    "class_free": lambda **options: class_free(2.0, **options),
    "nested": lambda **options: nested(2.0, 2.0, **options),
    "autoguidance": lambda **options: autoguidance(2.0, **options),
    "domain": lambda **options: domain(2.0, **options),
    "self_guidance": lambda **options: self_guidance(2.0, **options),
}


@pytest.mark.parametrize("name", INTERVAL_MAKERS)
def test_intervals_and_channels(name: str) -> None:
    make = INTERVAL_MAKERS[name]
    everywhere = make()
    limited = make(interval=(0.25, 0.75), channels=3)
    for t in (0.0, 0.2499, 0.7501, 1.0):
        assert list(limited.table(t, 4)) == [C_T]
    for t in (0.25, 0.5, 0.75):
        table, unlimited = limited.table(t, 4), everywhere.table(t, 4)
        assert set(table) == set(unlimited)
        for branch, weights in table.items():
            np.testing.assert_array_equal(weights[:3], unlimited[branch][:3])
            assert weights[3] == (branch == C_T)


def test_different_intervals_of_a_sum_act_on_their_own() -> None:
    guidance = cfg(S, interval=(0.5, 1.0)) + nag(W, interval=(0.0, 0.6))
    tables = guidance.tables([0.9, 0.55, 0.1])
    assert [set(table) for table in tables] == [{C_T, U_T}, {C_T, U_T, C_NULL}, {C_T, C_NULL}]


def test_different_bases_refuse_to_add() -> None:
    with pytest.raises(UserError, match="with_base"):
        cfg(2.0) + plain(drop_label=True)
    total = cfg(2.0) + plain(drop_label=True).with_base(C_T)
    assert total == cfg(2.0)
    on_unconditional = cfg(S).with_base(U_T) + nag(W).with_base(U_T)
    assert on_unconditional.base == U_T
    assert on_unconditional.differences == (cfg(S) + nag(W)).differences


def test_branches_are_named_once_and_the_base_first() -> None:
    assert (cfg(2.0) + nag(1.0) + cfg(3.0)).branches == (C_T, U_T, C_NULL)
    assert cfg(2.0).with_base(U_T).branches == (U_T, C_T)


@pytest.mark.parametrize(
    "make",
    [
        lambda: cfg(2.0, interval=(0.6, 0.4)),
        lambda: cfg(2.0, interval=(-0.1, 0.4)),
        lambda: nag(2.0, interval=(0.5, 1.1)),
        lambda: nag(2.0, interval=(float("nan"), 1.0)),
        lambda: nag(2.0, channels=0),
        lambda: nag(float("nan")),
        lambda: cfg(float("inf")),
    ],
)
def test_impossible_guidances_are_refused(make: Callable[[], Guidance]) -> None:
    with pytest.raises(UserError):
        make()


def test_more_guided_channels_than_a_state_has_are_refused() -> None:
    with pytest.raises(UserError, match="4 channels, but a state has 3"):
        cfg(2.0, channels=4).table(0.5, num_channels=3)


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("process", [Linear(), GVP(), DDPM()], ids=lambda process: process.name)
def test_the_space_of_mixing_does_not_matter(process: Process) -> None:
    # Conversions at one t are affine and weights sum to 1, so mixing commutes with them: any predictions will do.
    rng = np.random.default_rng(0)
    t = jnp.asarray([0.03, 0.4, 0.97])
    x = jnp.asarray(rng.normal(size=(3, 2, 2, 4)))
    guidance = nested(S, W, channels=3) + nag(0.3, null="posterior") + autoguidance(2.5)
    table = guidance.table(0.5, num_channels=4)
    assert len(table) == 6
    for kind in PREDICTION_KINDS:
        values = {branch: jnp.asarray(rng.normal(size=x.shape)) for branch in table}
        mixed = sum(weights * values[branch] for branch, weights in table.items())
        for space in PREDICTION_KINDS:
            converted = {branch: process.convert(value, x, t, kind, space) for branch, value in values.items()}
            mixed_there = sum(weights * converted[branch] for branch, weights in table.items())
            back = process.convert(mixed_there, x, t, space, kind)
            np.testing.assert_allclose(back, mixed, rtol=1e-9, atol=1e-9, err_msg=f"{kind} in {space}")


def test_a_difference_is_towards_minus_away() -> None:
    table = Guidance(C_T, (Difference(0.5, U_T, C_NULL),)).table(0.5)
    assert {branch: float(weights[0]) for branch, weights in table.items()} == {C_T: 1.0, U_T: 0.5, C_NULL: -0.5}
