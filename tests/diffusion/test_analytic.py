"""The exact oracle: its closed forms against autodiff, brute force and the method's identities, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.diffusion.analytic import Mixture, make_mixture
from nag_jax.diffusion.process import DDPM, GVP, PREDICTION_KINDS, Linear, Process
from nag_jax.errors import UserError

PROCESSES = (Linear(), GVP(), DDPM())
by_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def small_mixture(process: Process, num_levels: int = 20) -> Mixture:
    """Four components of two classes on states of shape (3, 1), with full covariances of unequal rank."""
    rng = np.random.default_rng(1)
    factors = rng.normal(size=(4, 3, 3)) * np.array([1.0, 0.4, 0.1])[:, None]
    factors[2, 2] = 0.0
    return make_mixture(
        process,
        2.0 * rng.normal(size=(4, 3, 1)),
        covariances=np.einsum("kri,krj->kij", factors, factors),
        weights=[1.0, 2.0, 3.0, 2.0],
        classes=[0, 1, 0, 1],
        levels=process.levels(num_levels),
        level_weights=1.0 + process.levels(num_levels),
    )


def states(count: int = 5) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=(count, 3, 1)))


TIMES = np.array([0.031, 0.2, 0.5, 0.75, 0.94])
LABELS = np.array([0, 1, 2, 0, 1])  # 2 stands for the whole mixture


def dense_log_density(mixture: Mixture, x: np.ndarray, t: float, members: np.ndarray, weights: np.ndarray) -> float:
    """log p(x | t) from dense covariances, by the textbook."""
    params, process = mixture.params, mixture.process
    alpha, sigma = process.alpha(np.float64(t)), process.sigma(np.float64(t))
    total = 0.0
    for k in members:
        covariance = (params["basis"][k] * params["eigenvalues"][k]) @ params["basis"][k].T
        noisy = alpha**2 * covariance + sigma**2 * np.eye(3)
        offset = x.ravel() - alpha * params["means"][k]
        quadratic = offset @ np.linalg.solve(noisy, offset)
        total += weights[k] * np.exp(-0.5 * quadratic) / np.sqrt(np.linalg.det(2 * np.pi * noisy))
    return float(np.log(total / weights[members].sum()))


@by_process
def test_log_density_is_that_of_dense_gaussians(process: Process) -> None:
    mixture = small_mixture(process)
    x, weights = states(), np.array([1.0, 2.0, 3.0, 2.0])
    members = {0: np.array([0, 2]), 1: np.array([1, 3]), 2: np.arange(4)}
    expected = [
        dense_log_density(mixture, np.asarray(x[i]), float(TIMES[i]), members[int(LABELS[i])], weights)
        for i in range(5)
    ]
    np.testing.assert_allclose(mixture.log_density(mixture.params, x, TIMES, LABELS), expected, rtol=1e-10)
    np.testing.assert_array_equal(
        mixture.log_density(mixture.params, x, TIMES),
        mixture.log_density(mixture.params, x, TIMES, jnp.full(5, mixture.num_classes)),
    )


@by_process
def test_score_is_the_gradient_of_the_log_density(process: Process) -> None:
    mixture, x = small_mixture(process), states()
    gradient = jax.grad(lambda x: mixture.log_density(mixture.params, x, TIMES, LABELS).sum())(x)
    score = mixture.posterior_mean(mixture.params, x, TIMES, "score", LABELS)
    np.testing.assert_allclose(score, gradient, rtol=1e-9, atol=1e-11)


@by_process
@pytest.mark.parametrize("source", PREDICTION_KINDS)
def test_posterior_means_are_one_another_converted(process: Process, source) -> None:
    mixture, x = small_mixture(process), states()
    known = mixture.posterior_mean(mixture.params, x, TIMES, source, LABELS)
    for target in PREDICTION_KINDS:
        expected = mixture.posterior_mean(mixture.params, x, TIMES, target, LABELS)
        np.testing.assert_allclose(process.convert(known, x, TIMES, source, target), expected, rtol=1e-9, atol=1e-9)


def test_posterior_mean_of_the_data_by_brute_force() -> None:
    """Importance sampling: samples of x_0 weighted by p(x | x_0, t)."""
    mixture, x, t = small_mixture(Linear()), states(1), jnp.array([0.6])
    data = mixture.sample_data(mixture.params, jax.random.key(0), 50_000)
    log_weights = -jnp.sum((x - 0.4 * data) ** 2, axis=(1, 2)) / (2 * 0.6**2)
    expected = jnp.einsum("n,n...->...", jax.nn.softmax(log_weights), data)
    mean = mixture.posterior_mean(mixture.params, x, t, "data")[0]
    np.testing.assert_allclose(mean, expected, atol=0.05)
    noise = mixture.posterior_mean(mixture.params, x, t, "noise")[0]
    np.testing.assert_allclose(noise, (x[0] - 0.4 * expected) / 0.6, atol=0.05)


@by_process
def test_guidance_difference_is_the_gradient_of_the_log_posterior(process: Process) -> None:
    """s(x | t) - s(x) = grad_x log p(t | x), the identity behind NAG."""
    mixture, x = small_mixture(process), states()
    difference = mixture.posterior_mean(mixture.params, x, TIMES, "score", LABELS)
    difference -= mixture.marginal_mean(mixture.params, x, "score", LABELS)
    gradient = jax.grad(lambda x: mixture.log_posterior(mixture.params, x, TIMES, LABELS).sum())(x)
    np.testing.assert_allclose(difference, gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("process", [Linear(), DDPM()], ids=lambda process: process.name)
def test_marginal_quantities_are_sums_over_levels(process: Process) -> None:
    mixture, count = small_mixture(process, num_levels=6), 6
    # Every state at every level: row i * count + b is state b at level i.
    x, labels = states(count), np.array([0, 1, 2, 0, 1, 2])
    every_x, every_label = jnp.tile(x, (6, 1, 1)), np.tile(labels, 6)
    every_t = np.repeat(mixture.params["levels"], count)
    log_density = mixture.log_density(mixture.params, every_x, every_t, every_label).reshape(6, count)
    log_joint = mixture.params["log_level_weights"][:, None] + np.asarray(log_density)
    marginal = np.logaddexp.reduce(log_joint, axis=0)
    np.testing.assert_allclose(mixture.log_marginal(mixture.params, x, labels), marginal, rtol=1e-12)
    log_posterior = mixture.log_posterior(mixture.params, every_x, every_t, every_label).reshape(6, count)
    # A density relative to uniform levels: probability times the number of levels.
    np.testing.assert_allclose(log_posterior, np.log(6) + log_joint - marginal, rtol=1e-9, atol=1e-12)
    for kind in ("score", process.ode_kind):
        targets = mixture.posterior_mean(mixture.params, every_x, every_t, kind, every_label)
        expected = np.einsum("tb,tbij->bij", np.exp(log_joint - marginal), targets.reshape(6, count, 3, 1))
        answer = mixture.marginal_mean(mixture.params, x, kind, labels)
        np.testing.assert_allclose(answer, expected, rtol=1e-9, atol=1e-12)


def test_log_posterior_is_a_density_in_t_on_a_continuous_process() -> None:
    mixture = make_mixture(Linear(), [[0.0], [3.0]], covariances=0.5, levels=Linear().levels(400))
    t = jnp.asarray((np.arange(5000) + 0.5) / 5000)
    density = jnp.exp(mixture.log_posterior(mixture.params, jnp.full((5000, 1), 1.3), t))
    np.testing.assert_allclose(density.mean(), 1.0, rtol=1e-4)


def corrections(mixture: Mixture, t: float, null) -> list[float]:
    """score(x | t) - null for x = 1.3, in score units, of the averages of scores, velocities and noises."""
    x, time = jnp.array([[1.3]]), jnp.array([t])
    answers = []
    for kind in ("score", "velocity", "noise"):
        difference = mixture.posterior_mean(mixture.params, x, time, kind) - null(x, time, kind)
        answers.append(float(difference[0, 0] / mixture.process.conversion(np.float64(t), "score", kind)[1]))
    return answers


@pytest.mark.parametrize(
    ("t", "expected"), [(0.1, "+.063 +.142 +.392"), (0.3, "+.060 +.159 +.214"), (0.6, "-.042 +.060 +.040")]
)
def test_known_gap_between_mixing_spaces_with_a_noisier_null(t: float, expected: str) -> None:
    """N(0, 1) data on the linear path: the null branch is the network at t + .02."""
    mixture = make_mixture(Linear(), [[0.0]], covariances=1.0)
    values = corrections(mixture, t, lambda x, t, kind: mixture.posterior_mean(mixture.params, x, t + 0.02, kind))
    assert " ".join(f"{value:+.3f}".replace("0.", ".", 1) for value in values) == expected


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0.1, "0.388 11.4 8.28"),
        (0.3, "-0.268 2.09 1.05"),
        (0.6, "-0.527 -0.333 -0.856"),
        (0.9, "0.388 -0.141 -0.489"),
    ],
)
def test_known_gap_between_mixing_spaces_with_the_exact_null(t: float, expected: str) -> None:
    """The same under uniform p(t); what the null branch averages matters, and even changes the sign."""
    mixture = make_mixture(Linear(), [[0.0]], covariances=1.0, levels=Linear().levels(2000))
    values = corrections(mixture, t, lambda x, _, kind: mixture.marginal_mean(mixture.params, x, kind))
    assert " ".join(f"{value:.3g}" for value in values) == expected


@by_process
def test_the_space_of_mixing_does_not_matter_at_one_time(process: Process) -> None:
    """Class guidance at one t: mixed as any kind and converted, the score is the same."""
    mixture, x = small_mixture(process), states()
    guided = []
    for kind in PREDICTION_KINDS:
        conditional = mixture.posterior_mean(mixture.params, x, TIMES, kind, jnp.zeros(5, int))
        whole = mixture.posterior_mean(mixture.params, x, TIMES, kind)
        guided.append(process.convert(2.5 * conditional - 1.5 * whole, x, TIMES, kind, "score"))
    for other in guided[1:]:
        np.testing.assert_allclose(other, guided[0], rtol=1e-8, atol=1e-8)


def low_rank_mixture(dimension: int, levels: np.ndarray) -> Mixture:
    """Data on two planes."""
    rng = np.random.default_rng(3)
    # Means near zero: larger ones tell about t too (through alpha) and narrow p(t | x) beyond t^2 / (2 d).
    factors, means = rng.normal(size=(2, 2, dimension)), 0.05 * rng.normal(size=(2, dimension))
    return make_mixture(Linear(), means, factors=factors, levels=levels)


def test_low_rank_data_equal_their_dense_covariance() -> None:
    rng = np.random.default_rng(4)
    factors, means = rng.normal(size=(2, 2, 5)), rng.normal(size=(2, 5))
    low_rank = make_mixture(Linear(), means, factors=factors)
    # A hair of variance in every direction makes the dense eigenbasis complete.
    dense = make_mixture(Linear(), means, covariances=np.einsum("kri,krj->kij", factors, factors) + 1e-13 * np.eye(5))
    assert low_rank.params["basis"].shape == (2, 5, 2) and dense.params["basis"].shape == (2, 5, 5)
    x, t = jnp.asarray(rng.normal(size=(3, 5))), jnp.array([0.1, 0.5, 1.0])
    for kind in PREDICTION_KINDS:
        np.testing.assert_allclose(
            low_rank.posterior_mean(low_rank.params, x, t, kind),
            dense.posterior_mean(dense.params, x, t, kind),
            rtol=1e-8,
        )
    np.testing.assert_allclose(
        low_rank.log_density(low_rank.params, x, t), dense.log_density(dense.params, x, t), rtol=1e-9
    )


def test_posterior_of_t_concentrates_for_low_rank_data_in_a_high_dimension() -> None:
    """Var[t | x] ~ t^2 / (2 d), and the mean is the true t within that width."""
    dimension, t = 2000, 0.4
    levels = np.linspace(0.36, 0.44, 161)
    mixture = low_rank_mixture(dimension, levels)
    data = mixture.sample_data(mixture.params, jax.random.key(0), 6)
    noise = jax.random.normal(jax.random.key(1), data.shape)
    posterior, params = mixture.time_posterior()
    nodes, weights = posterior.quadrature(params, Linear().add_noise(data, noise, jnp.full(6, t)), len(levels))
    mean = jnp.sum(weights * nodes, axis=0)
    variance = jnp.sum(weights * (nodes - mean) ** 2, axis=0)
    width = t / np.sqrt(2 * dimension)
    np.testing.assert_allclose(variance, width**2, rtol=0.1)
    np.testing.assert_allclose(mean, t, atol=4 * width)


def test_added_error_moves_the_posterior_to_the_shift_formulas() -> None:
    """A state plus error of .05: rescaled, it concentrates at the level of the same signal-to-noise ratio."""
    dimension, t = 2000, 0.4
    sigma = np.sqrt(t**2 + 0.05**2)
    shifted = Linear().time_of_ratio(sigma / (1 - t))
    mixture = low_rank_mixture(dimension, np.linspace(shifted - 0.04, shifted + 0.04, 161))
    data = mixture.sample_data(mixture.params, jax.random.key(0), 6)
    first, second = (jax.random.normal(jax.random.key(i), data.shape) for i in (1, 2))
    state = (Linear().add_noise(data, first, jnp.full(6, t)) + 0.05 * second) * (1 - shifted) / (1 - t)
    posterior, params = mixture.time_posterior()
    nodes, weights = posterior.quadrature(params, state, 161)
    mean = jnp.sum(weights * nodes, axis=0)
    np.testing.assert_allclose(mean.mean(), shifted, atol=4 * t / np.sqrt(2 * dimension * 6))


def test_point_masses() -> None:
    mixture = make_mixture(Linear(), [[1.0, 0.0], [-1.0, 0.0]], covariances=0.0)
    assert mixture.params["basis"].shape == (2, 2, 0)
    t = jnp.array([0.5])
    x = jnp.array([[0.3, 0.2]])
    # Two points at +-1: E[x_0 | x] = tanh(alpha x / sigma^2).
    mean = mixture.posterior_mean(mixture.params, x, t, "data")
    np.testing.assert_allclose(mean, [[np.tanh(0.5 * 0.3 / 0.25), 0.0]], atol=1e-12)
    assert mixture.sample_data(mixture.params, jax.random.key(0), 3).shape == (3, 2)


@pytest.mark.parametrize("process", [Linear(), GVP()], ids=lambda process: process.name)
def test_limits_at_both_ends(process: Process) -> None:
    mixture = make_mixture(
        process, [[1.0, 2.0], [0.0, -1.0]], covariances=[np.eye(2), [[2.0, 0.5], [0.5, 1.0]]], weights=[1, 3]
    )
    x, clean, noisy = jnp.array([[0.3, -0.4]]), jnp.zeros(1), jnp.ones(1)
    mean = np.array([[0.25, -0.25]])
    # At t = 1 the state is the noise and says nothing about the data.
    np.testing.assert_allclose(mixture.posterior_mean(mixture.params, x, noisy, "data"), mean, atol=1e-12)
    np.testing.assert_allclose(mixture.posterior_mean(mixture.params, x, noisy, "noise"), x, atol=1e-12)
    np.testing.assert_allclose(mixture.posterior_mean(mixture.params, x, noisy, "score"), -x, atol=1e-12)
    velocity = process.alpha_dot(np.float64(1)) * mean + process.sigma_dot(np.float64(1)) * np.asarray(x)
    np.testing.assert_allclose(mixture.posterior_mean(mixture.params, x, noisy, "velocity"), velocity, atol=1e-12)
    # At t = 0 the state is the data and says nothing about the noise.
    np.testing.assert_allclose(mixture.posterior_mean(mixture.params, x, clean, "data"), x, atol=1e-12)
    np.testing.assert_allclose(mixture.posterior_mean(mixture.params, x, clean, "noise"), 0.0, atol=1e-12)
    velocity = process.alpha_dot(np.float64(0)) * np.asarray(x)
    np.testing.assert_allclose(mixture.posterior_mean(mixture.params, x, clean, "velocity"), velocity, atol=1e-12)
    assert np.isfinite(mixture.posterior_mean(mixture.params, x, clean, "score")).all()


@pytest.mark.parametrize(("process", "prediction"), [(Linear(), "velocity"), (DDPM(), "noise")], ids=["linear", "ddpm"])
def test_denoiser_obeys_its_flags_row_by_row(process: Process, prediction) -> None:
    mixture = small_mixture(process)
    denoiser = mixture.denoiser(prediction)
    x, t, labels = states(4), TIMES[:4], jnp.array([0, 1, 1, 0])
    drop_label, drop_noise = jnp.array([False, True, False, True]), jnp.array([False, False, True, True])
    program = jax.jit(
        lambda d, params, *arrays: d(params, *arrays[:3], drop_label=arrays[3], drop_noise=arrays[4]).value,
        static_argnums=0,
    )
    value = program(denoiser.without_params(), denoiser.params, x, t, labels, drop_label, drop_noise)
    rows = jnp.array([0, 2, 1, 2])
    known = mixture.posterior_mean(mixture.params, x, t, prediction, rows)
    unknown = mixture.marginal_mean(mixture.params, x, prediction, rows)
    np.testing.assert_allclose(value[:2], known[:2], rtol=1e-11)
    np.testing.assert_allclose(value[2:], unknown[2:], rtol=1e-11)
    plain = denoiser(denoiser.params, x, t, labels)
    np.testing.assert_allclose(
        plain.value, mixture.posterior_mean(mixture.params, x, t, prediction, labels), rtol=1e-12
    )
    assert plain.variance is None and (denoiser.num_classes, denoiser.sample_shape) == (2, (3, 1))


def test_denoiser_refuses_a_time_embedding_offset() -> None:
    denoiser = small_mixture(Linear()).denoiser()
    with pytest.raises(UserError, match="time embedding"):
        denoiser(denoiser.params, states(1), 0.5, jnp.zeros(1, int), time_embedding_offset=jnp.zeros((1, 4)))


def test_float32_states_stay_float32_and_close() -> None:
    mixture, x = small_mixture(DDPM()), states()
    exact = mixture.posterior_mean(mixture.params, x, TIMES, "noise")
    single = mixture.posterior_mean(mixture.params, x.astype(jnp.float32), TIMES, "noise")
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact, rtol=1e-3, atol=1e-3)
    mixture = small_mixture(Linear())
    with jax.enable_x64(False):
        value = mixture.denoiser()(mixture.params, jnp.ones((2, 3, 1)), 0.5, jnp.zeros(2, jnp.int32)).value
        assert value.dtype == jnp.float32 and np.isfinite(value).all()


def test_time_posterior_quadrature_gives_the_marginal_score() -> None:
    mixture, x = small_mixture(Linear()), states()
    posterior, params = mixture.time_posterior()
    nodes, weights = posterior.quadrature(params, x, 20)
    np.testing.assert_allclose(weights.sum(axis=0), 1.0, rtol=1e-12)
    scores = jax.vmap(lambda t: mixture.posterior_mean(mixture.params, x, t, "score"))(nodes)
    marginal = mixture.marginal_mean(mixture.params, x, "score")
    np.testing.assert_allclose(jnp.einsum("tb,tbij->bij", weights, scores), marginal, rtol=1e-10)
    np.testing.assert_allclose(
        posterior.log_density(params, x, TIMES), mixture.log_posterior(mixture.params, x, TIMES), rtol=1e-12
    )
    # Fewer nodes: the posterior on an evenly spread subset of the levels.
    nodes, weights_of_few = posterior.quadrature(params, x, 2)
    np.testing.assert_allclose(nodes[:, 0], mixture.params["levels"][[0, -1]])
    np.testing.assert_allclose(weights_of_few, weights[np.array([0, -1])] / (weights[0] + weights[-1]), rtol=1e-9)
    hash(posterior)
    with pytest.raises(UserError, match="more than the 20 levels"):
        posterior.quadrature(params, x, 21)


def test_samples_have_the_moments_of_the_mixture() -> None:
    mixture = small_mixture(GVP())
    count = 40_000
    for label, t in ((None, 0.0), (1, 0.4)):
        labels = None if label is None else jnp.full(count, label)
        data = mixture.sample_data(mixture.params, jax.random.key(5), count, labels)
        noise = jax.random.normal(jax.random.key(6), data.shape)
        flat = np.asarray(GVP().add_noise(data, noise, jnp.full(count, t))).reshape(count, 3)
        mean, covariance = mixture.moments(mixture.params, t, label)
        spread = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose(flat.mean(axis=0), mean, atol=5 * spread.max() / np.sqrt(count))
        np.testing.assert_allclose(np.cov(flat.T), covariance, atol=10 * spread.max() ** 2 / np.sqrt(count))


@pytest.mark.parametrize(("process", "rank"), [(Linear(), 1), (GVP(), 3), (DDPM(), 1)], ids=["linear", "gvp", "ddpm"])
def test_gaussian_flow_solves_the_probability_flow(process: Process, rank: int) -> None:
    rng = np.random.default_rng(7)
    mixture = make_mixture(process, rng.normal(size=(1, 3)), factors=rng.normal(size=(1, rank, 3)))
    x, step = jnp.asarray(rng.normal(size=(2, 3))), 1e-5
    start, t = jnp.array([0.95, 0.1]), jnp.array([0.3004, 0.7002])

    @jax.jit
    def flow(t_from: jax.Array, t_to: jax.Array, x: jax.Array) -> jax.Array:
        return mixture.gaussian_flow(mixture.params, x, t_from, t_to)

    state = flow(start, t, x)
    slope = (flow(start, t + step, x) - flow(start, t - step, x)) / (2 * step)
    np.testing.assert_allclose(slope, mixture.posterior_mean(mixture.params, state, t, "velocity"), rtol=1e-6)
    np.testing.assert_allclose(flow(t, start, state), x, rtol=1e-10)


def test_gaussian_flow_needs_one_component() -> None:
    mixture = small_mixture(Linear())
    with pytest.raises(UserError, match="several components"):
        mixture.gaussian_flow(mixture.params, states(1), jnp.ones(1), jnp.zeros(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either covariances or factors"),
        ({"covariances": 1.0, "factors": np.ones((2, 1, 3))}, "either covariances or factors"),
        ({"covariances": np.eye(3)}, "covariances has shape"),
        ({"covariances": -1.0}, "positive semi-definite"),
        ({"factors": np.ones((2, 1, 4))}, "factors has shape"),
        ({"covariances": 1.0, "weights": [1.0, 0.0]}, "positive numbers"),
        ({"covariances": 1.0, "classes": [0, 2]}, "none unused"),
        ({"covariances": 1.0, "levels": [0.5], "level_weights": [0.5, 0.5]}, "level_weights must be 1"),
    ],
)
def test_make_mixture_refuses_what_does_not_fit(arguments, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mixture(Linear(), np.zeros((2, 3)), **arguments)
