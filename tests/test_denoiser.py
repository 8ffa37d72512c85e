"""Denoisers: every network convention arrives in our time and sign, and functions adapt."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.denoiser import Denoiser, NetworkFunction, from_function, from_network
from nag_jax.diffusion.process import DDPM, Linear
from nag_jax.errors import UserError


class Echo(nn.Module):
    """A network that answers with what it was given, in `channels` channels."""

    channels: int = 1

    @nn.compact
    def __call__(self, x, network_time, labels, drop_label, drop_noise, time_embedding_offset):
        gain = self.param("gain", nn.initializers.ones, (self.channels,))
        answer = network_time + 10_000.0 * labels + 0.25 * drop_label + 0.5 * drop_noise
        if time_embedding_offset is not None:
            answer += time_embedding_offset.sum(axis=-1)
        return (x + answer.reshape(-1, 1, 1, 1)) * gain


def make(function: NetworkFunction, gain: jax.Array | None = None) -> Denoiser:
    params = {"gain": jnp.ones(function.model.channels) if gain is None else gain}
    return from_network(function, params, Linear(), num_classes=10, sample_shape=(2, 2, 1))


def ask(denoiser: Denoiser, t, labels=(0, 0), **conditions) -> np.ndarray:
    x = jnp.zeros((2, 2, 2, 1))
    prediction = denoiser(denoiser.params, x, jnp.asarray(t), jnp.asarray(labels), **conditions)
    return np.asarray(prediction.value)[:, 0, 0, 0]


def test_a_network_in_our_convention() -> None:
    denoiser = make(NetworkFunction(Echo()))
    np.testing.assert_allclose(ask(denoiser, [0.25, 0.75]), [0.25, 0.75])
    assert denoiser.prediction == "velocity" and denoiser.has_null_label and denoiser.has_null_noise


def test_public_sit_runs_time_and_velocity_the_other_way() -> None:
    denoiser = make(NetworkFunction(Echo(), "1 - t", "negative velocity"))
    np.testing.assert_allclose(ask(denoiser, [0.25, 1.0]), [-0.75, 0.0])
    assert denoiser.prediction == "velocity"


def test_public_dit_gets_integer_steps() -> None:
    denoiser = make(NetworkFunction(Echo(), "1000 t - 1", "noise"))
    np.testing.assert_allclose(ask(denoiser, [0.001, 1.0]), [0.0, 999.0], atol=1e-4)
    assert denoiser.prediction == "noise"


def test_learned_variance_is_the_second_half_of_the_channels() -> None:
    denoiser = make(NetworkFunction(Echo(2), output="negative velocity", learned_variance=True), jnp.array([1.0, 7.0]))
    x, t, labels = jnp.ones((2, 2, 2, 1)), jnp.array([0.0, 0.5]), jnp.zeros(2, jnp.int32)
    value, variance = denoiser(denoiser.params, x, t, labels)
    assert value.shape == variance.shape == x.shape
    np.testing.assert_allclose(value[:, 0, 0, 0], [-1.0, -1.5])
    np.testing.assert_allclose(variance[:, 0, 0, 0], [7.0, 10.5])


def test_without_learned_variance_there_is_none() -> None:
    denoiser = make(NetworkFunction(Echo()))
    assert denoiser(denoiser.params, jnp.ones((1, 2, 2, 1)), jnp.ones(1), jnp.zeros(1, jnp.int32)).variance is None


def test_conditions_reach_the_network_per_row() -> None:
    denoiser = make(NetworkFunction(Echo()))
    drops = {"drop_label": jnp.array([True, False]), "drop_noise": jnp.array([False, True])}
    np.testing.assert_allclose(ask(denoiser, 0.0, (1, 2), **drops), [10_000.25, 20_000.5])
    offset = jnp.array([[1.0, 2.0], [0.0, 0.5]])
    np.testing.assert_allclose(ask(denoiser, 0.0, time_embedding_offset=offset), [3.0, 0.5])


def test_parameters_are_those_of_the_call() -> None:
    denoiser = make(NetworkFunction(Echo()))
    x, t, labels = jnp.ones((1, 2, 2, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    assert (denoiser({"gain": jnp.array([3.0])}, x, t, labels).value == 3.0).all()
    assert (denoiser(denoiser.params, x, t, labels).value == 1.0).all()


def test_without_params_is_hashable_and_equal_for_equal_networks() -> None:
    first, second = (make(NetworkFunction(Echo())).without_params() for _ in range(2))
    assert hash(first) == hash(second) and first == second
    assert first != make(NetworkFunction(Echo(), "1 - t")).without_params()

    program = jax.jit(
        lambda denoiser, params, x: denoiser(params, x, 0.5, jnp.zeros(1, jnp.int32)).value, static_argnums=0
    )
    params, x = {"gain": jnp.ones(1)}, jnp.zeros((1, 2, 2, 1))
    np.testing.assert_allclose(program(first, params, x), 0.5)
    program(second, params, x)
    assert program._cache_size() == 1


def test_a_plain_function_is_a_denoiser_without_null_branches() -> None:
    denoiser = from_function(
        lambda x, t, labels: x * t[:, None] + labels[:, None],
        DDPM(),
        "noise",
        num_classes=3,
        sample_shape=(1,),
    )
    prediction = denoiser(denoiser.params, jnp.array([[2.0], [4.0]]), 0.5, jnp.array([0, 2]))
    np.testing.assert_allclose(prediction.value, [[1.0], [4.0]])
    assert prediction.variance is None and denoiser.prediction == "noise"
    assert not denoiser.has_null_label and not denoiser.has_null_noise


def test_unknown_prediction_kind_is_refused() -> None:
    with pytest.raises(UserError, match="prediction = 'epsilon' is not one of velocity"):
        from_function(lambda x, t, labels: x, Linear(), "epsilon", num_classes=1, sample_shape=(1,))
