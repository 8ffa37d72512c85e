"""Training an estimator: it learns what can be known about t, repeats itself, and leaves the denoiser alone."""

import itertools

import jax
import numpy as np
import pytest

from nag_jax.diffusion.process import DDPM, Linear
from nag_jax.errors import TrainingDivergedError, UserError
from nag_jax.models.dit import ModelConfig, build_model, init_params
from nag_jax.models.noise_estimator import build_estimator
from nag_jax.noise_shift.estimator import (
    EstimatorConfig,
    estimator_seed,
    image_batches,
    make_estimator,
    negative_log_likelihood,
    train_estimator,
)

SHAPE = (8, 8, 2)
CONFIG = EstimatorConfig(num_steps=150, batch_size=32, learning_rate=5e-3)
POINTS = np.zeros((4, *SHAPE), np.float32)


@pytest.fixture(scope="module")
def setting():
    model = build_model(ModelConfig(depth=1, hidden_size=32, num_heads=2), input_shape=SHAPE, num_classes=2)
    trunk_params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    return build_estimator(model), trunk_params


def train(setting, config, seed=0, images=POINTS, process=None, **options):
    model, trunk_params = setting
    batches = image_batches(images, config.batch_size, seed=seed)
    return train_estimator(
        model, trunk_params, process if process is not None else Linear(), batches, config, seed=seed, **options
    )


def test_learns_t_on_data_at_the_origin(setting):
    # For a point in d dimensions |x| / sqrt(d) says t up to a deviation of t / sqrt(2 d); a uniform guess has .29.
    model, trunk_params = setting
    heard = []
    params = train(setting, CONFIG, progress=lambda step, loss: heard.append((step, loss)))
    estimator = make_estimator(model, params)
    rng = np.random.default_rng(1)
    t = np.linspace(0.1, 0.9, 400, dtype=np.float32)
    x = t[:, None, None, None] * rng.standard_normal((400, *SHAPE), np.float32)
    mean, log_variance = jax.jit(estimator.posterior.apply)(params, x)
    likelihood = np.asarray(negative_log_likelihood(mean, log_variance, t)).mean()
    uniform = 0.5 * np.log(2 * np.pi / 12) + 0.5 * 12 * np.mean((t - 0.5) ** 2)
    best = 0.5 * np.log(2 * np.pi * np.e * t**2 / (2 * np.prod(SHAPE))).mean()
    assert best < likelihood < 0.5 * (uniform + best)
    assert np.sqrt(np.mean((mean - t) ** 2)) < 0.08
    assert np.corrcoef(mean, t)[0, 1] > 0.95
    assert [step for step, _ in heard] == list(range(25, 151, 25)) and heard[-1][1] < heard[0][1]
    # The denoiser's own parameters were copied, not donated.
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trunk_params))


SHORT = EstimatorConfig(num_steps=2, batch_size=4)


def test_same_seed_same_parameters_and_roles_differ_on_a_discrete_process(setting):
    seeds = [estimator_seed(5, "measure"), estimator_seed(5, "measure"), estimator_seed(5, "guide")]
    first, again, guide = (train(setting, SHORT, seed=seed, process=DDPM()) for seed in seeds)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(first))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, guide)), strict=True))
    assert estimator_seed(5, "measure") != estimator_seed(6, "measure")
    with pytest.raises(UserError, match="measure, guide"):
        estimator_seed(5, "judge")


def test_batches_are_permutations_one_after_the_other():
    images = np.arange(7, dtype=np.float32)
    seen = np.concatenate(list(itertools.islice(image_batches(images, 3, seed=0), 14)))
    for epoch in seen.reshape(6, 7):
        np.testing.assert_array_equal(np.sort(epoch), images)
    assert not np.array_equal(seen[:7], seen[7:14])
    again = np.concatenate(list(itertools.islice(image_batches(images, 6, seed=0), 7)))
    np.testing.assert_array_equal(seen, again)


def test_loss_that_is_not_finite_is_reported(setting):
    with pytest.raises(TrainingDivergedError, match="step 0"):
        train(setting, SHORT, images=np.full_like(POINTS, np.nan), process=DDPM())


def test_data_that_end_are_reported(setting):
    model, trunk_params = setting
    with pytest.raises(UserError, match="end after 1"):
        train_estimator(model, trunk_params, Linear(), iter([POINTS]), SHORT, seed=0)


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"batch_size": 0}, {"beta": 1.5}])
def test_impossible_configurations(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        EstimatorConfig(**bad)
