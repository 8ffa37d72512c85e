"""Power-function averages and those put together of them: against the closed form of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate

from nag_jax import loading, storage
from nag_jax.checkpoint import CheckpointConfig, Checkpoints
from nag_jax.diffusion.objective import Objective
from nag_jax.errors import UserError
from nag_jax.training.ema import EmaConfig, decay_per_step, power_of, update
from nag_jax.training.posthoc_ema import Profile, combination, inner_product
from nag_jax.training.state import TrainState, init_state
from nag_jax.training.step import make_train_step


def weights_of(sigma_rel: float, step: int) -> np.ndarray:
    """The weight of each step's parameters in the average: the recursion's products telescope."""
    edges = (np.arange(step + 1) / step) ** (power_of(sigma_rel) + 1)
    return np.diff(edges)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_power_has_the_width_that_was_asked_for(sigma_rel: float):
    gamma = power_of(sigma_rel)
    mean, _ = integrate.quad(lambda x: (gamma + 1) * x ** (gamma + 1), 0, 1)
    square, _ = integrate.quad(lambda x: (gamma + 1) * x ** (gamma + 2), 0, 1)
    assert np.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [-0.1, 0.3])
def test_impossible_widths_are_refused(sigma_rel: float):
    with pytest.raises(UserError, match="sigma_rel"):
        EmaConfig(sigma_rel=sigma_rel)


def test_the_recursion_is_the_weighted_sum():
    decay = decay_per_step(EmaConfig(sigma_rel=0.1), batch_size=8)
    params = np.random.default_rng(0).normal(size=(40, 3))
    average = {"w": jnp.full(3, 99.0)}  # what the run began with has no part in it
    for step, values in enumerate(params, start=1):
        average = update(average, {"w": jnp.asarray(values, jnp.float32)}, decay(jnp.float32(step)))
    np.testing.assert_allclose(average["w"], weights_of(0.1, 40) @ params, atol=2e-6)


def test_the_compiled_step_keeps_the_weighted_sums_also_where_it_goes_on(tiny_denoiser, batch_of, tmp_path: Path):
    widths, optimizer = {"short": 0.05, "long": 0.25}, optax.sgd(0.5)
    decays = {name: decay_per_step(EmaConfig(sigma_rel=width), batch_size=12) for name, width in widths.items()}
    step = jax.jit(make_train_step(tiny_denoiser, Objective(), optimizer, decays))
    state = init_state(jax.tree.map(jnp.copy, tiny_denoiser.params), optimizer, decays)
    walked: list[np.ndarray] = []
    for s in range(6):
        if s == 3:
            with Checkpoints(tmp_path) as checkpoints:
                checkpoints.save(state)
                checkpoints.wait()
                state, _ = checkpoints.restore(state)
        state, _ = step(state, batch_of(s), jax.random.key(1))
        walked.append(flat(state.params))
        for name, width in widths.items():
            np.testing.assert_allclose(flat(state.ema[name]), weights_of(width, s + 1) @ walked, atol=1e-6)
    assert np.abs(flat(state.ema["long"]) - flat(state.ema["short"])).max() > 1e-3, "the parameters have moved"


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_inner_products_are_integrals():
    for a, b in [((100, 0.05), (100, 0.1)), ((70, 0.05), (100, 0.1)), ((100, 0.2), (30, 0.05))]:
        one, other = Profile(*a), Profile(*b)

        def profile(x: float, each: Profile) -> float:
            gamma = power_of(each.sigma_rel)
            return (gamma + 1) * x**gamma / each.step ** (gamma + 1)

        expected, _ = integrate.quad(lambda x: profile(x, one) * profile(x, other), 0, min(a[0], b[0]))  # noqa: B023
        assert inner_product(one, other) == pytest.approx(expected, rel=1e-6)
        assert inner_product(other, one) == pytest.approx(expected, rel=1e-6)


def test_a_stored_profile_is_found_again():
    stored = [Profile(step, sigma_rel) for step in (50, 100) for sigma_rel in (0.05, 0.1)]
    weights, error = combination(stored, stored[2])
    np.testing.assert_allclose(weights, [0, 0, 1, 0], atol=1e-6)
    assert error < 1e-4
    assert combination(stored[:2], Profile(100, 0.1))[1] > 0.5, "nothing after step 50 is stored"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training folder with two averages of a random walk at every eighth step; the walk is `walk()`."""
    folder = tmp_path_factory.mktemp("run")
    widths = {"short": 0.05, "long": 0.10}
    averages = {"ema": {"decay": 0.99}} | {name: {"sigma_rel": width} for name, width in widths.items()}
    storage.write_json(folder / "config.json", {"ema": averages})
    with Checkpoints(folder / "checkpoints", keep=1, keep_every_steps=8) as checkpoints:
        for step in (*range(8, 65, 8), 66):
            ema = {name: {"w": weights_of(width, step) @ walk()[:step]} for name, width in widths.items()}
            state = TrainState(np.int32(step), {"w": walk()[step - 1]}, (), {"ema": ema["long"], **ema}, {})
            checkpoints.save(jax.tree.map(jnp.asarray, state))
        checkpoints.wait()
        assert checkpoints.steps() == [*range(8, 65, 8), 66]
    return folder


def walk() -> np.ndarray:
    return np.cumsum(np.random.default_rng(0).normal(size=(66, 5)), axis=0).astype(np.float32)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.15])
def test_any_length_can_be_asked_for_afterwards(folder: Path, sigma_rel: float):
    found = loading.read_params(folder, f"sigma_rel={sigma_rel}")["w"]
    expected = weights_of(sigma_rel, 66) @ walk()
    spread = np.abs(walk() - expected).std()
    assert np.abs(found - expected).max() < 0.05 * spread and found.dtype == np.float32
    early = loading.read_params(folder, f"sigma_rel={sigma_rel}", step=64)["w"]
    assert np.abs(early - weights_of(sigma_rel, 64) @ walk()[:64]).max() < 0.05 * spread


def test_what_the_stored_ones_cannot_make_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="make sigma_rel=0.005 only to"):
        loading.read_params(folder, "sigma_rel=0.005")
    with pytest.raises(UserError, match="sigma_rel=short is no number"):
        loading.read_params(folder, "sigma_rel=short")
    with pytest.raises(UserError, match="sigma_rel = 0.5 is not in"):
        loading.read_params(folder, "sigma_rel=0.5")
    storage.write_json(tmp_path / "config.json", {"ema": {"ema": {"decay": 0.99}}})
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="stores no power-function averages"):
        loading.read_params(tmp_path, "sigma_rel=0.1")


def test_kept_steps_are_steps_that_are_saved():
    with pytest.raises(UserError, match="keep_every_steps = 15 is no multiple of checkpoint.every_steps = 10"):
        CheckpointConfig(every_steps=10, keep_every_steps=15)
