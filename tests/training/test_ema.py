import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.errors import UserError
from nag_jax.training.ema import EmaConfig, decay_per_step, update


def test_closed_form():
    # From e_0 with constant parameters p: e_n = p + d^n (e_0 - p).
    ema, params = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 5.0])}
    start = ema["w"]
    for _ in range(7):
        ema = update(ema, params, 0.8)
    np.testing.assert_allclose(ema["w"], params["w"] + 0.8**7 * (start - params["w"]), rtol=1e-6)


def test_equal_parameters_stay_bitwise_equal():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=100), jnp.float32)}
    np.testing.assert_array_equal(update(params, params, 0.9999)["w"], params["w"])


@pytest.mark.parametrize("batch_size", [10, 50])
def test_half_life_does_not_depend_on_the_batch_size(batch_size):
    decay = decay_per_step(EmaConfig(half_life_examples=1000.0), batch_size)
    assert decay ** (1000 / batch_size) == pytest.approx(0.5)


def test_constant_decay_is_the_default():
    assert decay_per_step(EmaConfig(), 10) == decay_per_step(EmaConfig(), 999) == 0.9999


@pytest.mark.parametrize("change", [{"decay": 1.1}, {"decay": -0.1}, {"half_life_examples": -1.0}])
def test_impossible_settings(change):
    with pytest.raises(UserError, match=next(iter(change))):
        EmaConfig(**change)
