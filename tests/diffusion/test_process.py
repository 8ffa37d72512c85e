"""Processes: derivatives, conversions and their limits, the official DDPM levels, grids and shift numbers."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nag_jax.diffusion.process import (
    DDPM,
    GVP,
    LARGEST_REGULAR_TIME,
    PREDICTION_KINDS,
    Linear,
    Process,
    ProcessConfig,
    make_process,
)
from nag_jax.errors import UserError

PROCESSES = (Linear(), GVP(), DDPM())
by_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
KIND_PAIRS = list(itertools.permutations(PREDICTION_KINDS, 2))


def ddpm_alpha_bars() -> np.ndarray:
    return np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))


def true_predictions(process: Process, t: jax.Array, seed: int = 0) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A state x_t [B, 3] and all four predictions for it, each from its definition."""
    rng = np.random.default_rng(seed)
    x_0, noise = (jnp.asarray(rng.normal(size=(t.shape[0], 3)), t.dtype) for _ in range(2))
    score = -noise / process.sigma(t)[:, None]
    values = {"velocity": process.velocity(x_0, noise, t), "noise": noise, "data": x_0, "score": score}
    return process.add_noise(x_0, noise, t), values


@by_process
def test_derivatives_are_those_of_alpha_and_sigma(process: Process) -> None:
    with jax.enable_x64(True):
        t = jnp.array([0.0123, 0.0877, 0.2314, 0.5003, 0.7446, 0.9871])
        for value, derivative in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
            np.testing.assert_allclose(jax.vmap(jax.grad(value))(t), derivative(t), rtol=1e-11)
            # Central differences on the host path; the step stays within one interval of the discrete process.
            step, host = 1e-6, np.asarray(t)
            np.testing.assert_allclose(
                (value(host + step) - value(host - step)) / (2 * step), derivative(host), rtol=1e-6
            )


@by_process
def test_host_and_device_agree(process: Process) -> None:
    times = np.linspace(0.001, 0.999, 50)
    for function in (process.alpha, process.sigma, process.alpha_dot, process.sigma_dot):
        assert function(times).dtype == np.float64
        device = jax.jit(function)(jnp.asarray(times, jnp.float32))
        assert device.dtype == jnp.float32
        np.testing.assert_allclose(device, function(times), rtol=2e-3 if process.name == "ddpm" else 1e-4, atol=1e-6)


@by_process
@pytest.mark.parametrize(("source", "target"), KIND_PAIRS)
def test_conversions_agree_with_the_definitions(process: Process, source, target) -> None:
    with jax.enable_x64(True):
        t = jnp.array([0.003, 0.0517, 0.31, 0.5, 0.777, 0.97])
        x, values = true_predictions(process, t)
        np.testing.assert_allclose(
            process.convert(values[source], x, t, source, target), values[target], rtol=1e-9, atol=1e-9
        )


@by_process
@pytest.mark.parametrize(("source", "target"), KIND_PAIRS)
def test_conversions_round_trip_in_float32(process: Process, source, target) -> None:
    t = jnp.array([0.1, 0.31, 0.5, 0.777, 0.9], jnp.float32)
    x, values = true_predictions(process, t)
    converted = process.convert(values[source], x, t, source, target)
    assert converted.dtype == jnp.float32
    np.testing.assert_allclose(process.convert(converted, x, t, target, source), values[source], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("process", [Linear(), GVP()], ids=lambda process: process.name)
def test_velocity_gives_data_and_noise_at_both_ends(process: Process) -> None:
    t = jnp.array([0.0, 1.0], jnp.float32)
    x_0, noise = jnp.array([[2.0], [-1.5]]), jnp.array([[0.7], [0.3]])
    x, v = process.add_noise(x_0, noise, t), process.velocity(x_0, noise, t)
    np.testing.assert_allclose(process.convert(v, x, t, "velocity", "data"), x_0, rtol=1e-6)
    np.testing.assert_allclose(process.convert(v, x, t, "velocity", "noise"), noise, rtol=1e-6)
    process.check_conversion(np.array([0.0, 1.0]), "velocity", "data")
    process.check_conversion(np.array([0.0, 1.0]), "velocity", "noise")


@pytest.mark.parametrize("process", [Linear(), GVP()], ids=lambda process: process.name)
def test_both_ends_are_exact(process: Process) -> None:
    for t in (np.array([0.0, 1.0]), jnp.array([0.0, 1.0], jnp.float32)):
        assert np.asarray(process.alpha(t)).tolist() == [1.0, 0.0]
        assert np.asarray(process.sigma(t)).tolist() == [0.0, 1.0]


def test_ddpm_data_and_noise_from_velocity_at_clean_data_are_finite() -> None:
    DDPM().check_conversion(np.array([0.0, 1.0]), "velocity", "data")
    a, b = DDPM().conversion(np.array([0.0]), "velocity", "data")
    assert a == 1.0 and b == 0.0


def test_check_conversion_says_where_no_answer_exists() -> None:
    grid = np.linspace(1.0, 0.0, 5)
    for source, target, t in (
        ("noise", "data", 1),
        ("noise", "velocity", 1),
        ("data", "noise", 0),
        ("velocity", "score", 0),
    ):
        with pytest.raises(UserError, match=rf"{source} prediction does not determine the {target} at t = {t}"):
            Linear().check_conversion(grid, source, target)
        Linear().check_conversion(grid[1:-1], source, target)
    DDPM().check_conversion(DDPM().time_grid(250)[:-1], "noise", "data")


def test_linear_path_formulas() -> None:
    """x_0 = x - t v, eps = x + (1 - t) v, score = -eps / t."""
    t = np.array([0.2, 0.7])
    assert np.allclose(Linear().conversion(t, "velocity", "data"), [np.ones(2), -t])
    assert np.allclose(Linear().conversion(t, "velocity", "noise"), [np.ones(2), 1 - t])
    assert np.allclose(Linear().conversion(t, "velocity", "score"), [-1 / t, -(1 - t) / t])


def test_euler_step_on_the_linear_path_is_ddim() -> None:
    with jax.enable_x64(True):
        t, t_next = jnp.array([0.8, 0.35]), jnp.array([0.6, 0.0])
        x, values = true_predictions(Linear(), t)
        euler = x + (t_next - t)[:, None] * values["velocity"]
        np.testing.assert_allclose(euler, Linear().add_noise(values["data"], values["noise"], t_next), rtol=1e-12)


@by_process
@pytest.mark.parametrize("target", ["velocity", "noise", "data", "score"])
def test_score_difference_is_the_difference_of_converted_scores(process: Process, target) -> None:
    with jax.enable_x64(True):
        t = jnp.array([0.01, 0.4, 0.94])
        x, values = true_predictions(process, t)
        first, second = values["score"], 0.3 * values["score"] + 1.0
        expected = process.convert(first, x, t, "score", target) - process.convert(second, x, t, "score", target)
        np.testing.assert_allclose(process.score_difference(first - second, t, target), expected, rtol=1e-10)


@pytest.mark.parametrize("process", [Linear(), GVP()], ids=["linear", "gvp"])
def test_score_differences_fade_towards_pure_noise_in_all_kinds_alike(process: Process) -> None:
    with jax.enable_x64(True):
        ones = jnp.ones((1, 2))
        end = process.sigma(LARGEST_REGULAR_TIME) / process.alpha(LARGEST_REGULAR_TIME)
        for time in (0.97, 0.999):
            t = jnp.array([time])
            score = process.score_difference(ones, t, "score")
            np.testing.assert_allclose(score, end * process.alpha(t) / process.sigma(t) * ones, rtol=1e-12)
            for kind in ("velocity", "noise", "data"):
                expected = process.conversion(t, "score", kind)[1] * score
                np.testing.assert_allclose(process.score_difference(ones, t, kind), expected, rtol=1e-9)
        at_noise = process.score_difference(ones, jnp.ones(1), "velocity")
        np.testing.assert_allclose(at_noise, -process._determinant(1.0) * end, rtol=1e-12)


def test_a_discrete_process_keeps_its_score_differences_to_the_last_level() -> None:
    t = jnp.ones(1)
    _, factor = DDPM().conversion(t, "score", "velocity")
    difference = DDPM().score_difference(jnp.ones((1, 2)), t, "velocity")
    np.testing.assert_allclose(difference, factor[:, None] * np.ones((1, 2)), rtol=1e-6)


def test_ddpm_levels_are_those_of_the_cumulative_product() -> None:
    t = (np.arange(1000) + 1) / 1000
    alpha_bars = ddpm_alpha_bars()
    np.testing.assert_allclose(DDPM().alpha(t) ** 2, alpha_bars, rtol=1e-12)
    np.testing.assert_allclose(DDPM().sigma(t) ** 2, 1.0 - alpha_bars, rtol=1e-12)
    device = DDPM().alpha(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(device**2, alpha_bars, rtol=2e-5)
    # No level is exact data or exact noise.
    assert f"{DDPM().sigma(t[0]):.4f}" == "0.0100" and f"{DDPM().alpha(t[-1]):.5f}" == "0.00635"


def test_ddpm_log_alpha_bar_is_linear_between_levels() -> None:
    levels = np.arange(1001) / 1000
    log_alpha_bar = 2.0 * np.log(DDPM().alpha(levels))
    middle = 2.0 * np.log(DDPM().alpha(0.5 * (levels[1:] + levels[:-1])))
    np.testing.assert_allclose(middle, 0.5 * (log_alpha_bar[1:] + log_alpha_bar[:-1]), rtol=1e-10)
    assert DDPM().alpha(np.float64(0.0)) == 1.0 and DDPM().sigma(np.float64(0.0)) == 0.0


@pytest.mark.parity
def test_ddpm_levels_are_those_of_diffusers() -> None:
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )
    t = (np.arange(1000) + 1) / 1000
    np.testing.assert_allclose(DDPM().alpha(t) ** 2, scheduler.alphas_cumprod.numpy(), rtol=5e-5)


def test_every_ddpm_level_is_its_integer_step_in_float32() -> None:
    t = jnp.asarray(DDPM().levels(1000), jnp.float32)
    np.testing.assert_allclose(1000.0 * t - 1.0, np.arange(1000), atol=1e-4)


def test_ddpm_grid_is_the_official_respacing() -> None:
    """One section of guided diffusion's respacing: a cursor from 0 advances by (T - 1) / (count - 1) and is rounded."""
    for count in range(2, 1001):
        cursor, expected = 0.0, []
        for _ in range(count):
            expected.append(round(cursor))
            cursor += 999 / (count - 1)
        grid = DDPM().time_grid(count)
        np.testing.assert_allclose(1000 * grid[:-1] - 1, expected[::-1], atol=1e-9, err_msg=str(count))
        assert grid[-1] == 0.0


@by_process
@given(bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)), num_steps=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_time_grids_descend_within_their_bounds(process: Process, bounds, num_steps: int) -> None:
    t_min, t_max = min(bounds), max(bounds)
    if t_max - t_min < 0.1:
        return
    grid = process.time_grid(num_steps, t_max, t_min)
    assert grid.shape == (num_steps + 1,) and grid.dtype == np.float64
    assert (np.diff(grid) < 0).all() and grid[-1] == t_min
    if process.num_levels is None:
        assert grid[0] == t_max
        np.testing.assert_allclose(np.diff(grid), (t_min - t_max) / num_steps, atol=1e-12)
    else:
        steps = grid[:-1] * process.num_levels
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-9)
        assert t_max - 1 / process.num_levels < grid[0] <= t_max + 1e-12


@by_process
def test_time_grid_refuses_impossible_ranges(process: Process) -> None:
    for arguments in ((0,), (5, 0.5, 0.5), (5, 0.2, 0.4), (5, 1.1), (5, 1.0, -0.1)):
        with pytest.raises(UserError):
            process.time_grid(*arguments)


def test_ddpm_grid_refuses_more_steps_than_levels() -> None:
    with pytest.raises(UserError, match="more than the 1000 levels"):
        DDPM().time_grid(1001)
    with pytest.raises(UserError, match="at most"):
        DDPM().time_grid(101, t_max=0.1)


@by_process
def test_times_of_sigma_and_of_ratio_are_inverses(process: Process) -> None:
    t = np.linspace(0.0, 0.995, 200)
    np.testing.assert_allclose(process.time_of_sigma(process.sigma(t)), t, atol=1e-7)
    np.testing.assert_allclose(process.time_of_ratio(process.sigma(t) / process.alpha(t)), t, atol=1e-9)
    device = jnp.asarray(t[:180], jnp.float32)
    np.testing.assert_allclose(process.time_of_ratio(process.sigma(device) / process.alpha(device)), device, atol=1e-4)
    assert np.isnan(process.time_of_sigma(np.array([1.01]))).all()
    assert np.isnan(process.time_of_sigma(jnp.array([1.01]))).all()


def test_shift_numbers_of_the_linear_path() -> None:
    """sigma_e = .05: shift to the level of the same signal-to-noise ratio, and to that of the same sigma."""
    for t, ratio_shift, sigma_shift in (
        (0.1, ".0105", ".0118"),
        (0.5, ".0012", ".0025"),
        (0.9, ".00014", ".0014"),
    ):
        sigma = np.sqrt(t**2 + 0.05**2)
        digits = len(ratio_shift) - 1
        assert f"{Linear().time_of_ratio(sigma / (1 - t)) - t:.{digits}f}" == "0" + ratio_shift
        assert f"{Linear().time_of_sigma(sigma) - t:.4f}" == "0" + sigma_shift


def test_paper_shift_has_no_solution_near_pure_noise_on_ddpm() -> None:
    """sigma_t^2 + sigma_e^2 > 1 at 231 of the 1000 steps for sigma_e = .05."""
    sigma = np.sqrt(DDPM().sigma(DDPM().levels(1000)) ** 2 + 0.05**2)
    assert (sigma > 1.0).sum() == 231
    unsolved = np.isnan(DDPM().time_of_sigma(sigma))
    assert unsolved[sigma > 1.0].all()
    # The process ends just below sigma = 1, at sigma^2 = 1 - 4e-5: nothing else is without a solution.
    np.testing.assert_array_equal(unsolved, sigma > DDPM().sigma(np.float64(1.0)))


def test_levels_of_the_prior() -> None:
    np.testing.assert_allclose(Linear().levels(4), [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(DDPM().levels(1000), (np.arange(1000) + 1) / 1000)
    np.testing.assert_allclose(DDPM().levels(2), [0.001, 1.0])


def test_uniform_times_give_uniform_ddpm_levels() -> None:
    t = jnp.asarray((np.arange(4000) + 0.5) / 4000, jnp.float32)
    levels, counts = np.unique(np.round(np.asarray(DDPM().nearest_level(t)) * 1000), return_counts=True)
    np.testing.assert_array_equal(levels, np.arange(1, 1001))
    assert (counts == 4).all()
    np.testing.assert_array_equal(Linear().nearest_level(t), t)


@by_process
def test_the_flow_is_regular_in_the_variables_of_the_process(process: Process) -> None:
    """d(x / ode_scale) / d(ode_time) is the prediction of kind ode_kind, along x = alpha x_0 + sigma eps."""
    t, step, x_0, noise = np.array([0.2003, 0.6004]), 1e-5, 0.7, -1.2

    def state(t: np.ndarray) -> np.ndarray:
        return (process.alpha(t) * x_0 + process.sigma(t) * noise) / process.ode_scale(t)

    slope = (state(t + step) - state(t - step)) / (process.ode_time(t + step) - process.ode_time(t - step))
    velocity = process.alpha_dot(t) * x_0 + process.sigma_dot(t) * noise
    np.testing.assert_allclose(slope, {"velocity": velocity, "noise": noise}[process.ode_kind], rtol=1e-6)


def test_log_snr_falls_from_plus_to_minus_infinity() -> None:
    for process in PROCESSES:
        values = process.log_snr(np.linspace(0, 1, 100))
        assert values[0] == np.inf and (np.diff(values) < 0).all()
    assert Linear().log_snr(np.float64(1.0)) == -np.inf


def test_make_process() -> None:
    assert make_process(ProcessConfig("linear")) == Linear()
    assert make_process(ProcessConfig("ddpm", num_levels=100)) == DDPM(num_levels=100)
    assert len({make_process(ProcessConfig(name)) for name in ("linear", "gvp", "ddpm", "gvp")}) == 3
    with pytest.raises(UserError, match="Known: linear, gvp, ddpm"):
        make_process(ProcessConfig("cosine"))
