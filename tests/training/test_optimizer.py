import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nag_jax.errors import UserError
from nag_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer

PARAMS = {"layer": {"kernel": jnp.array([[1.0, -2.0]])}, "null_noise_embedding": jnp.array([0.5, 0.1])}
GRADIENTS = {"layer": {"kernel": jnp.array([[30.0, -40.0]])}, "null_noise_embedding": jnp.array([3.0, -4.0])}


def one_update(config, gradients=GRADIENTS):
    optimizer = make_optimizer(config, 100)
    updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    return updates


def test_constant_rate_with_warmup():
    rate = learning_rate(OptimizerConfig(learning_rate=0.4, warmup_steps=4), 10)
    np.testing.assert_allclose([rate(s) for s in range(7)], [0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rtol=1e-6)
    assert float(learning_rate(OptimizerConfig(learning_rate=0.4), 10)(0)) == pytest.approx(0.4)


def test_cosine_ends_at_zero_and_is_half_in_the_middle():
    rate = learning_rate(OptimizerConfig(learning_rate=0.4, warmup_steps=4, schedule="cosine"), 24)
    steps = np.arange(4, 25)
    want = 0.2 * (1 + np.cos(np.pi * (steps - 4) / 20))
    np.testing.assert_allclose([rate(s) for s in steps], want, atol=1e-7)


def test_first_adam_step_is_the_sign_of_the_gradient():
    updates = one_update(OptimizerConfig(learning_rate=0.1))
    for update, gradient in zip(jax.tree.leaves(updates), jax.tree.leaves(GRADIENTS), strict=True):
        np.testing.assert_allclose(update, -0.1 * np.sign(gradient), rtol=1e-5)


def test_weight_decay_is_decoupled():
    plain, decayed = (one_update(OptimizerConfig(learning_rate=0.1, weight_decay=decay)) for decay in (0.0, 0.5))
    for one, other, param in zip(*map(jax.tree.leaves, (plain, decayed, PARAMS)), strict=True):
        np.testing.assert_allclose(other - one, -0.1 * 0.5 * param, rtol=1e-5)


@pytest.mark.parametrize("trainable, norm", [("all", np.hypot(50.0, 5.0)), ("null_noise_embedding", 5.0)])
def test_clipping_by_the_norm_of_what_is_trained(trainable, norm):
    # A large eps makes Adam's first step proportional to the clipped gradient: -lr g / (|g| + eps).
    config = OptimizerConfig(learning_rate=1.0, clip_norm=2.0, eps=1e6, trainable=trainable)
    clipped = GRADIENTS["null_noise_embedding"] * 2.0 / norm
    np.testing.assert_allclose(
        one_update(config)["null_noise_embedding"], -clipped / (jnp.abs(clipped) + 1e6), rtol=1e-5
    )


def test_a_small_gradient_is_not_clipped():
    small = jax.tree.map(lambda g: g * 1e-3, GRADIENTS)
    config = OptimizerConfig(learning_rate=1.0, eps=1e6)
    clipping = OptimizerConfig(learning_rate=1.0, eps=1e6, clip_norm=2.0)
    for one, other in zip(*(jax.tree.leaves(one_update(c, small)) for c in (config, clipping)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_the_null_embedding_has_updates_and_moments():
    config = OptimizerConfig(trainable="null_noise_embedding", weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(PARAMS)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim) == [(2,), (2,)]
    params = PARAMS
    for _ in range(3):
        updates, state = optimizer.update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["layer"]["kernel"], PARAMS["layer"]["kernel"])
    assert not np.array_equal(params["null_noise_embedding"], PARAMS["null_noise_embedding"])


def test_mistakes():
    for change in ({"schedule": "linear"}, {"trainable": "head"}, {"accumulation_steps": 0}, {"clip_norm": -1.0}):
        with pytest.raises(UserError, match=f"optimizer.{next(iter(change))}"):
            OptimizerConfig(**change)
    with pytest.raises(UserError, match="warmup_steps"):
        learning_rate(OptimizerConfig(schedule="cosine", warmup_steps=10), 10)
    with pytest.raises(UserError, match="no such parameter"):
        make_optimizer(OptimizerConfig(trainable="null_noise_embedding"), 10).init({"w": jnp.ones(2)})
