"""Steppers against closed forms: orders of convergence, exact cases, moments, and parity with live peers.

Data N(MEAN, VARIANCE) in every dimension: predictions, marginals and the probability flow are known. Nothing here
runs the sampler; rows are taken one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.diffusion.process import DDPM, GVP, PREDICTION_KINDS, Linear, Process
from nag_jax.diffusion.stepping import (
    DDIM,
    STEPPERS,
    Ancestral,
    DPMSolverPlusPlus,
    Euler,
    EulerMaruyama,
    GuidedPrediction,
    Heun,
    Rows,
    Stepper,
    make_stepper,
)
from nag_jax.errors import UserError

MEAN, VARIANCE = 0.7, 0.3
PROCESSES: tuple[Process, ...] = (Linear(), GVP(), DDPM())
by_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
by_stepper = pytest.mark.parametrize("stepper", STEPPERS.values(), ids=STEPPERS.keys())


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def predict(process: Process, x: jax.Array, t: jax.Array, variance: float = VARIANCE) -> GuidedPrediction:
    """The exact velocity, finite at both ends of every process, with the learned variance in its middle."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    centred = (x - alpha * MEAN) / (alpha**2 * variance + sigma**2)
    data, noise = MEAN + alpha * variance * centred, sigma * centred
    velocity = process.alpha_dot(t) * data + process.sigma_dot(t) * noise
    return GuidedPrediction(process, "velocity", x, t, velocity, jnp.zeros_like(x))


def row_of(rows: Rows, index: int) -> dict[str, Any]:
    return {name: values[index] for name, values in rows.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def take_row(stepper: Stepper, process: Process, carry: Any, row: Any, noise: Any, variance: Any) -> Any:
    x = stepper.state(carry)
    prediction = predict(process, x, jnp.broadcast_to(row["t"], x.shape), variance)
    return stepper.advance(carry, prediction, row, noise)


def program(stepper: Stepper) -> Stepper:
    """A stepper with the same `advance`, which does not look at the ends of the grid: fewer programs to compile."""
    if isinstance(stepper, Ancestral):
        return Ancestral(variance=stepper.variance)
    return DDIM(eta=float(stepper.eta > 0)) if isinstance(stepper, DDIM) else type(stepper)()


def walk(
    stepper: Stepper, process: Process, num_steps: int, x: Any, noises: Any = None, variance: float = VARIANCE
) -> np.ndarray:
    """Takes all rows from states `x`, with `noises` [R, ...]."""
    rows = stepper.schedule(process, num_steps)
    carry = stepper.init(jnp.asarray(x, float))
    for index in range(len(rows["t"])):
        noise = None if noises is None else noises[index]
        carry = take_row(program(stepper), process, carry, row_of(rows, index), noise, variance)
    return np.asarray(stepper.state(carry))


def marginal(process: Process, t: float, variance: float = VARIANCE) -> tuple[float, float]:
    """Mean and variance of true states."""
    alpha, sigma = process.alpha(np.float64(t)), process.sigma(np.float64(t))
    return float(alpha * MEAN), float(alpha**2 * variance + sigma**2)


def flow(process: Process, x: np.ndarray, t_from: float, t_to: float) -> np.ndarray:
    """The probability flow of Gaussian data."""
    (mean, variance), (mean_to, variance_to) = marginal(process, t_from), marginal(process, t_to)
    return mean_to + np.sqrt(variance_to / variance) * (x - mean)


# --- Order of convergence ---

# Away from the ends, so that no singular coefficient hides the order; on DDPM where sigma / alpha stays moderate.
ORDER_RANGE = {"linear": (0.9, 0.1), "gvp": (0.9, 0.1), "ddpm": (0.6, 0.05)}


@by_process
@pytest.mark.parametrize(
    ("make", "order"), [(Euler, 1), (DDIM, 1), (Heun, 2), (DPMSolverPlusPlus, 2)], ids=lambda value: str(value)
)
def test_order_of_convergence(process: Process, make: Callable[..., Stepper], order: int) -> None:
    t_max, t_min = ORDER_RANGE[process.name]
    x = np.array([-1.5, 0.1, 2.0])
    exact = flow(process, x, t_max, t_min)
    counts = np.array([23, 46, 92])
    stepper = make(t_max=t_max, t_min=t_min)
    errors = [np.abs(walk(stepper, process, count, x) - exact).max() for count in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.2, (slope, errors)


@by_process
@pytest.mark.parametrize("stepper", [Euler(), DDIM(), Heun(), DPMSolverPlusPlus()], ids=lambda s: type(s).__name__)
def test_whole_range_converges_from_pure_noise_to_data(process: Process, stepper: Stepper) -> None:
    x = np.array([-1.5, 0.1, 2.0])
    exact = flow(process, x, 1.0, 0.0)
    errors = [np.abs(walk(stepper, process, count, x) - exact).max() for count in (80, 320)]
    assert errors[1] < errors[0] / 2.5
    assert errors[1] < 0.01


# --- Exact cases ---


@by_process
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_deterministic_solvers_are_exact_for_one_data_point(process: Process, num_steps: int) -> None:
    # A right x_0 is the same x_0 all the way; on the linear path so is the velocity.
    x = np.array([-1.5, 0.1, 2.0])
    steppers: list[Stepper] = [DDIM(), DPMSolverPlusPlus()]
    if process.name != "gvp":  # There x_0 = 0.7 is not reached along a straight line in (x, t).
        steppers += [Euler(), Heun()]
    for stepper in steppers:
        got = walk(stepper, process, num_steps, x, variance=0.0)
        np.testing.assert_allclose(got, MEAN, atol=1e-9, err_msg=str(stepper))


@pytest.mark.parametrize("process", [Linear(), DDPM()], ids=lambda process: process.name)
def test_euler_is_ddim_in_the_variables_of_the_process(process: Process) -> None:
    x = np.array([-1.5, 0.1, 2.0])
    euler, ddim = (walk(stepper, process, 9, x) for stepper in (Euler(), DDIM()))
    np.testing.assert_allclose(euler, ddim, rtol=1e-10)


@by_process
@by_stepper
def test_any_prediction_kind_gives_the_same_step(process: Process, stepper: Stepper) -> None:
    # A step in the middle of the range, where every kind determines every other.
    rows = stepper.schedule(process, 6)
    row = row_of(rows, 3)
    x, noise = jnp.array([-1.5, 0.1, 2.0]), jnp.array([0.3, -0.2, 1.0])
    t = jnp.full(3, row["t"])
    velocity = predict(process, x, t)
    results = []
    for kind in PREDICTION_KINDS:
        prediction = velocity._replace(kind=kind, value=velocity.read_as(kind))
        results.append(stepper.advance(stepper.init(x), prediction, row, noise if stepper.is_stochastic else None))
    for result in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), result, results[0])


# --- Schedules ---


@by_process
@by_stepper
@pytest.mark.parametrize("num_steps", [2, 7, 50])
def test_rows_are_finite_and_descend_from_pure_noise(process: Process, stepper: Stepper, num_steps: int) -> None:
    rows = stepper.schedule(process, num_steps)
    assert len(rows["t"]) == (2 * num_steps - 1 if isinstance(stepper, Heun) else num_steps)
    assert rows["t"][0] == 1.0 and rows["t"].min() > 0.0
    at_states = rows["t"][rows["start"] == 1.0]
    assert len(at_states) == num_steps and (np.diff(at_states) < 0).all()
    assert set(np.unique(rows["start"])) <= {0.0, 1.0}
    for name, values in rows.items():
        assert values.dtype == np.float64 and values.shape == rows["t"].shape, name
        assert np.isfinite(values).all(), name


@by_process
@by_stepper
def test_needs_are_enough_to_step_from_a_velocity(process: Process, stepper: Stepper) -> None:
    # What `needs` declares is convertible from a velocity everywhere, and a whole run stays finite.
    times = stepper.schedule(process, 5)["t"]
    for kind in stepper.needs(process):
        process.check_conversion(times, "velocity", kind)
    x = np.array([-1.5, 0.1, 2.0])
    noises = np.zeros((5, 3)) if stepper.is_stochastic else None
    assert np.isfinite(walk(stepper, process, 5, x, noises)).all()


def test_heun_evaluates_the_end_of_every_step_but_the_last() -> None:
    rows = Heun().schedule(Linear(), 4)
    np.testing.assert_allclose(rows["t"], [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])
    np.testing.assert_array_equal(rows["start"], [1, 0, 1, 0, 1, 0, 1])


def test_heun_is_the_trapezoidal_rule_written_out() -> None:
    process, x = Linear(), np.array([-1.5, 0.1, 2.0])
    grid = np.linspace(1.0, 0.0, 4)

    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        return np.asarray(predict(process, jnp.asarray(x), jnp.full(3, t)).value)

    expected = x
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        first = velocity(expected, t)
        guess = expected + (t_next - t) * first
        mean = 0.5 * (first + velocity(guess, t_next)) if t_next > 0 else first
        expected = expected + (t_next - t) * mean
    np.testing.assert_allclose(walk(Heun(), process, 3, x), expected, rtol=1e-12)


# --- Stochastic steppers ---


def moments_of_walk(
    stepper: Stepper, process: Process, num_steps: int, start: tuple[float, float], variance: float = VARIANCE
) -> tuple[float, float]:
    """Exact mean and variance of a stepper's last states: each row is affine, x_next = a x + b + c z, for such data."""
    rows = stepper.schedule(process, num_steps)
    mean, state_variance = start
    for index in range(num_steps):
        x, noise = np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0])
        carry = take_row(program(stepper), process, jnp.asarray(x), row_of(rows, index), noise, variance)
        at_zero, at_one, noisy = np.asarray(carry)
        mean = (at_one - at_zero) * mean + at_zero
        state_variance = (at_one - at_zero) ** 2 * state_variance + (noisy - at_zero) ** 2
    return mean, state_variance


STOCHASTIC: dict[str, Stepper] = {
    "euler_maruyama": EulerMaruyama(),
    "ancestral small": Ancestral(),
    "ancestral large": Ancestral(variance="large"),
    "ancestral learned": Ancestral(variance="learned"),
    "ddim eta 1": DDIM(eta=1.0),
    "ddim eta 0.5": DDIM(eta=0.5),
}
COUNTS = (50, 100, 200)


@by_process
@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name != "euler_maruyama"])
def test_moments_of_ancestral_samples_converge_at_first_order(process: Process, name: str) -> None:
    stepper = STOCHASTIC[name]
    start = marginal(process, 1.0)
    mean_errors, variance_errors = [], []
    for count in COUNTS:
        mean, variance = moments_of_walk(stepper, process, count, start)
        mean_errors.append(abs(mean - MEAN))
        variance_errors.append(abs(variance - VARIANCE))
    assert mean_errors[-1] < 0.02 and variance_errors[-1] < 0.05
    slope = -np.polyfit(np.log(COUNTS), np.log(variance_errors), 1)[0]
    assert 0.75 < slope < 1.35, (slope, variance_errors)


@pytest.mark.parametrize("process", [Linear(), GVP()], ids=lambda process: process.name)
def test_moments_of_euler_maruyama_converge_at_first_order(process: Process) -> None:
    # The length of the last step shrinks with the others.
    errors = []
    for count in COUNTS:
        _, variance = moments_of_walk(EulerMaruyama(last_step=2.0 / count), process, count, marginal(process, 1.0))
        errors.append(abs(variance - VARIANCE))
    slope = -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]
    # At these counts the GVP path is still on its way to first order, from above.
    assert errors[-1] < 0.02 and 0.75 < slope < (1.35 if process.name == "linear" else 2.5), (slope, errors)


@by_process
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_and_ancestral_keep_the_marginals_of_one_data_point(process: Process, eta: float) -> None:
    # x_0 is predicted exactly, so each step draws from q(x_s | x_t, x_0): any few steps keep every marginal.
    t_min = 0.3
    expected = marginal(process, t_min, variance=0.0)
    steppers: list[Stepper] = [DDIM(eta=eta, t_min=t_min)] + ([Ancestral(t_min=t_min)] if eta == 1.0 else [])
    for stepper in steppers:
        got = moments_of_walk(stepper, process, 4, marginal(process, 1.0, 0.0), variance=0.0)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12, err_msg=str(stepper))


@by_process
def test_ddim_with_eta_one_is_the_ancestral_step(process: Process) -> None:
    rng = np.random.default_rng(0)
    x, noises = rng.normal(size=3), rng.normal(size=(6, 3))
    ddim, ancestral = (walk(stepper, process, 6, x, noises) for stepper in (DDIM(eta=1.0), Ancestral()))
    np.testing.assert_allclose(ddim, ancestral, rtol=1e-9)


@by_process
def test_learned_variance_at_its_bounds_and_in_the_middle(process: Process) -> None:
    x, noise = jnp.array([-1.5, 0.1, 2.0]), jnp.array([0.3, -0.2, 1.0])
    learned, small, large = (Ancestral(variance=variance) for variance in ("learned", "small", "large"))
    row = row_of(learned.schedule(process, 6), 2)
    prediction = predict(process, x, jnp.full(3, row["t"]))

    def added(stepper: Stepper, v: float) -> np.ndarray:
        answer = prediction._replace(variance=jnp.full(3, v))
        return np.asarray(stepper.advance(x, answer, row, noise) - stepper.advance(x, answer, row, jnp.zeros(3)))

    np.testing.assert_allclose(added(learned, -1.0), added(small, 0.3), rtol=1e-12)
    np.testing.assert_allclose(added(learned, 1.0), added(large, 0.3), rtol=1e-12)
    middle = np.sqrt(np.abs(added(small, 0.3) * added(large, 0.3)))
    np.testing.assert_allclose(np.abs(added(learned, 0.0)), middle, rtol=1e-12)
    t, t_next = np.float64(row["t"]), np.float64(row["t_next"])
    ratio = np.exp(process.log_snr(t) - process.log_snr(t_next))
    for stepper, at in ((small, t_next), (large, t)):
        deviation = process.sigma(at) * np.sqrt(1.0 - ratio)
        np.testing.assert_allclose(added(stepper, 0.0), deviation * np.asarray(noise), rtol=1e-9)


@by_process
@pytest.mark.parametrize("stepper", STOCHASTIC.values(), ids=STOCHASTIC.keys())
def test_the_last_step_to_data_adds_no_noise(process: Process, stepper: Stepper) -> None:
    row = row_of(stepper.schedule(process, 5), -1)
    assert row["t_next"] == 0.0
    x = jnp.array([-1.5, 2.0])
    prediction = predict(process, x, jnp.full(2, row["t"]))
    results = [stepper.advance(stepper.init(x), prediction, row, jnp.full(2, z)) for z in (0.0, 10.0)]
    np.testing.assert_array_equal(*results)


def test_euler_maruyama_is_the_public_samplers_loop() -> None:
    # linspace(1, 0.04, n) with n - 1 noisy steps, then one step of 0.04 along the mean; w = 2 sigma, score from v.
    num_steps, rng = 12, np.random.default_rng(0)
    start, noises = rng.normal(size=3), rng.normal(size=(num_steps, 3))
    grid = np.linspace(1.0, 0.04, num_steps)

    def drift(x: np.ndarray, t: float) -> np.ndarray:
        spread = (1 - t) ** 2 * VARIANCE + t**2
        centred = (x - (1 - t) * MEAN) / spread
        v = t * centred - MEAN - (1 - t) * VARIANCE * centred
        score = -(x + (1 - t) * v) / t
        return v - 0.5 * (2.0 * t) * score

    x = start
    for i in range(num_steps - 1):
        step = grid[i + 1] - grid[i]
        x = x + drift(x, grid[i]) * step + np.sqrt(2.0 * grid[i]) * noises[i] * np.sqrt(-step)
    x = x - 0.04 * drift(x, 0.04)
    np.testing.assert_allclose(walk(EulerMaruyama(), Linear(), num_steps, start, noises), x, rtol=1e-10)


# --- Mistakes ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EulerMaruyama().schedule(Linear(), 1), "num_steps >= 2"),
        (lambda: EulerMaruyama(last_step=0.0).schedule(Linear(), 5), "last_step"),
        (lambda: EulerMaruyama(last_step=0.5, t_max=0.5).schedule(Linear(), 5), "last_step"),
        (lambda: DDIM(eta=1.5).schedule(DDPM(), 5), "eta"),
        (lambda: DDIM(eta=-0.5), "eta"),
        (lambda: Ancestral(variance="huge"), "learned, small, large"),
        (lambda: Euler(t_max=1.1).schedule(Linear(), 5), "t_max"),
        (lambda: Euler(t_max=0.5, t_min=0.5).schedule(Linear(), 5), "t_min"),
        (lambda: Heun().schedule(Linear(), 0), "at least one step"),
        (lambda: DPMSolverPlusPlus().schedule(DDPM(), 1001), "1000 levels"),
        (lambda: make_stepper("dpm"), "dpm_solver_pp_2m"),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_learned_variance_without_a_variance_is_named() -> None:
    stepper, process = Ancestral(variance="learned"), Linear()
    x = jnp.zeros(2)
    prediction = predict(process, x, jnp.ones(2))._replace(variance=None)
    with pytest.raises(UserError, match="learned variance"):
        stepper.advance(x, prediction, row_of(stepper.schedule(process, 3), 0), x)


# --- Parity with diffusers, teacher-forced: every step gets the same states, predictions and noise ---

LEVELS = list(range(999, -1, -111))
PEER_OPTIONS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}


def teacher_forced(stepper: Stepper, peer_step: Callable[..., Any], learned: bool = False) -> None:
    """Compares every row with `peer_step(level, x, noise prediction, variance, noise)` on random inputs."""
    process = DDPM()
    rows = stepper.schedule(process, len(LEVELS))
    np.testing.assert_allclose(np.round(rows["t"] * 1000) - 1, LEVELS)
    rng = np.random.default_rng(0)
    carry = stepper.init(jnp.zeros((2, 3)))
    for index, level in enumerate(LEVELS):
        x, eps, v, noise = rng.normal(size=(4, 2, 3))
        carry = carry._replace(x=jnp.asarray(x)) if hasattr(carry, "_replace") else jnp.asarray(x)
        t = jnp.full(2, rows["t"][index])
        prediction = GuidedPrediction(
            process, "noise", jnp.asarray(x), t, jnp.asarray(eps), jnp.asarray(v) if learned else None
        )
        drawn = jnp.asarray(noise) if stepper.is_stochastic else None
        carry = stepper.advance(carry, prediction, row_of(rows, index), drawn)
        expected = np.asarray(peer_step(level, x, eps, v, noise))
        # The peer holds its levels in float32; x_0 is as large as 1 / alpha.
        np.testing.assert_allclose(
            stepper.state(carry), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=f"level {level}"
        )


@pytest.mark.parity
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_that_of_diffusers(eta: float) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler(**PEER_OPTIONS, clip_sample=False, set_alpha_to_one=True)
    peer.set_timesteps(9)  # The peer steps by 1000 // 9 = 111, which is our respacing of ten steps.

    def peer_step(level: int, x: np.ndarray, eps: np.ndarray, v: np.ndarray, noise: np.ndarray) -> Any:
        drawn = torch.tensor(noise) if eta else None
        return peer.step(torch.tensor(eps), level, torch.tensor(x), eta=eta, variance_noise=drawn).prev_sample

    teacher_forced(DDIM(eta=eta), peer_step)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("ours", "theirs"), [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")]
)
def test_ancestral_is_that_of_diffusers(ours: str, theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    peer = diffusers.DDPMScheduler(**PEER_OPTIONS, clip_sample=False, variance_type=theirs)
    peer.set_timesteps(timesteps=LEVELS)

    def peer_step(level: int, x: np.ndarray, eps: np.ndarray, v: np.ndarray, noise: np.ndarray) -> Any:
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: torch.tensor(noise))
        output = np.concatenate([eps, v], axis=1) if ours == "learned" else eps
        return peer.step(torch.tensor(output), level, torch.tensor(x)).prev_sample

    teacher_forced(Ancestral(variance=ours), peer_step, learned=ours == "learned")


@pytest.mark.parity
def test_dpm_solver_plus_plus_is_that_of_diffusers() -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DPMSolverMultistepScheduler(
        **PEER_OPTIONS, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero"
    )
    peer.set_timesteps(timesteps=LEVELS)

    def peer_step(level: int, x: np.ndarray, eps: np.ndarray, v: np.ndarray, noise: np.ndarray) -> Any:
        return peer.step(torch.tensor(eps), level, torch.tensor(x)).prev_sample

    teacher_forced(DPMSolverPlusPlus(), peer_step)
