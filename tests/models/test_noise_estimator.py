"""The noise-level estimator: where it starts, what it may look at, and what it takes from the denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.models import dit
from nag_jax.models.dit import ModelConfig, build_model, init_params
from nag_jax.models.noise_estimator import LOG_VARIANCE_RANGE, build_estimator, estimator_params

SHAPE = (4, 6, 2)


@pytest.fixture(scope="module")
def setting():
    config = ModelConfig(depth=2, hidden_size=16, num_heads=2, dtype="bfloat16", remat="dots")
    model = build_model(config, input_shape=SHAPE, num_classes=3)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    trained = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape, np.float32)), shapes
    )
    estimator = build_estimator(model)
    params = estimator_params(trained, jax.random.key(2), estimator)
    apply = jax.jit(lambda params, x: estimator.apply({"params": params}, x))
    x = rng.standard_normal((5, *SHAPE), np.float32)
    return model, trained, estimator, params, apply, x


def with_head(params):
    kernel = 0.3 * jax.random.normal(jax.random.key(4), params["head"]["kernel"].shape)
    return {**params, "head": {**params["head"], "kernel": kernel}}


def test_starts_at_the_moments_of_uniform_t(setting):
    *_, params, apply, x = setting
    mean, log_variance = apply(params, x)
    assert mean.shape == log_variance.shape == (5,)
    assert mean.dtype == log_variance.dtype == jnp.float32
    np.testing.assert_allclose(mean, 0.5, rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_variance), 1 / 12, rtol=1e-6)


def test_parameters_are_the_trunk_and_a_head(setting):
    model, trained, estimator, params, _, x = setting
    assert set(trained) - set(params["trunk"]) == {"final_layer", "t_embedder"}
    for name, value in params["trunk"].items():
        jax.tree.map(np.testing.assert_array_equal, value, trained[name])
    fresh = jax.eval_shape(estimator.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    assert estimator.trunk.dtype == "float32" and estimator.trunk.precision == "highest"


def test_block_layouts_agree_and_a_mixture_is_explained(setting):
    model, trained, _, params, apply, x = setting
    unrolled = build_estimator(model.clone(scan_blocks=False))
    with pytest.raises(ValueError, match="blocks_0.*unstack_blocks"):
        estimator_params(trained, jax.random.key(2), unrolled)
    other = estimator_params(dit.unstack_blocks(trained), jax.random.key(2), unrolled)
    actual = jax.jit(unrolled.apply)({"params": with_head(other)}, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, apply(with_head(params), x)
    )


def test_sees_the_state_alone(setting):
    _, _, _, params, apply, x = setting
    params = with_head(params)
    mean, log_variance = apply(params, x)
    assert np.std(mean) > 1e-3 and np.std(log_variance) > 1e-3

    def loss(params):
        mean, log_variance = apply(params, x)
        return jnp.square(mean).sum() + jnp.square(log_variance).sum()

    gradient = jax.jit(jax.grad(loss))(params)["trunk"]
    classes, null_class = jnp.split(gradient["y_embedder"]["embedding"], [3])
    assert not classes.any() and null_class.any() and gradient["null_noise_embedding"].any()
    assert jax.tree.leaves(gradient["blocks"])[0].any()


def test_features_are_those_of_the_denoiser_with_both_conditions_dropped(setting):
    model, trained, estimator, _, _, x = setting
    trunk = estimator.trunk
    yes, any_time, any_label = np.ones(5, bool), np.linspace(0, 1, 5), np.arange(5, dtype=np.int32) % 3
    variables = {"params": trained}
    dropped = trunk.apply(variables, any_time, any_label, yes, yes, method=trunk.conditioning)
    null = trunk.apply(variables, 5, method=trunk.null_conditioning)
    np.testing.assert_array_equal(dropped, null)


def test_log_variance_is_clipped(setting):
    *_, params, apply, x = setting
    for extreme, bound in zip((-1e3, 1e3), LOG_VARIANCE_RANGE, strict=True):
        head = {**params["head"], "bias": jnp.array([0.5, extreme])}
        np.testing.assert_array_equal(apply({**params, "head": head}, x)[1], bound)
