"""The sampler's loop: what it calls, in which order and how often, which draws it makes, and what comes out.

Cheap probes stand for networks where the question is about the loop, exact mixtures where it is about the mathematics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from nag_jax.denoiser import Denoiser, Prediction, from_function
from nag_jax.diffusion.analytic import Mixture, make_mixture
from nag_jax.diffusion.guidance import (
    CONDITIONAL,
    MODEL,
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
from nag_jax.diffusion.process import DDPM, GVP, Linear, PredictionKind, Process
from nag_jax.diffusion.sampler import NUM_POSTERIOR_NODES, Sampler, initial_noise, sample
from nag_jax.diffusion.stepping import (
    DDIM,
    Ancestral,
    Euler,
    EulerMaruyama,
    GuidedPrediction,
    Heun,
    Row,
    Rows,
)
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import UserError


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def spread(values: Any, x: Any) -> Any:
    return jnp.reshape(values, (-1,) + (1,) * (x.ndim - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A denoiser function that tells every branch apart and records its traces and its executions."""

    counts: bool = True
    traces: list[int] = dataclasses.field(default_factory=list)
    executions: list[np.ndarray] = dataclasses.field(default_factory=list)

    def __call__(
        self, params: Any, x: Any, t: Any, labels: Any, drop_label: Any, drop_noise: Any, offset: Any
    ) -> Prediction:
        self.traces.append(x.shape[0])
        if self.counts:
            jax.debug.callback(lambda t: self.executions.append(np.asarray(t)), t)
        return Prediction(*probe_answer(params["gain"], x, t, labels, drop_label, drop_noise))

    def take_executions(self) -> list[np.ndarray]:
        """The times [rows of the batch] of every execution since the last call."""
        jax.effects_barrier()
        taken = list(self.executions)
        self.executions.clear()
        return taken


def probe_answer(gain: Any, x: Any, t: Any, labels: Any, drop_label: Any, drop_noise: Any) -> tuple[Any, Any]:
    """Value and variance of a probe: no two branches, labels or times agree, and every channel has its own."""
    class_part = spread(jnp.where(drop_label, 0.4, labels + 1.0), x) * (1.0 + jnp.arange(x.shape[-1]))
    time_part = spread(jnp.where(drop_noise, -0.7, jnp.sin(5.0 * t)), x)
    value = gain * (0.3 * x + class_part + time_part * x)
    return value, 0.1 * value + spread(jnp.where(drop_label | drop_noise, 100.0, 0.0), x)


def probe_denoiser(
    probe: Probe, gain: float = 1.0, prediction: PredictionKind = "velocity", **changes: Any
) -> Denoiser:
    options: dict[str, Any] = {"process": Linear(), "num_classes": 3, "sample_shape": (1, 2, 4)} | changes
    return Denoiser(probe, {"gain": np.float64(gain)}, prediction=prediction, **options)


LABELS = np.array([0, 2], np.int32)


def draw(sampler: Sampler, name: str, labels: np.ndarray = LABELS, **options: Any) -> Any:
    """Samples from a given start: drawing noise would take most of the time to compile."""
    shape = (len(labels), *sampler.denoiser.sample_shape)
    options = {"initial": np.random.default_rng(0).normal(size=shape)} | options
    return sampler(name, labels, seed=0, indices=np.arange(len(labels)), **options)


# --- Which branches are evaluated, and how they are mixed ---

WEAK, ORIGINAL, DATA = "weak", "original", "data"
GAINS = {MODEL: 1.0, WEAK: 0.6, ORIGINAL: -0.4, DATA: 0.5}

# Guidance and evaluations per image in three Heun steps, which evaluate at t = .9, .6333, .6333, .3667, .3667.
GUIDANCES: dict[str, tuple[Guidance, int]] = {
    "plain": (plain(), 5),
    "plain without the class": (plain(drop_label=True), 5),
    "cfg": (cfg(1.7), 10),
    "cfg 3 channels": (cfg(1.7, channels=3), 10),
    "cfg interval": (cfg(1.7, interval=(0.5, 0.8)), 7),
    "nag": (nag(0.6), 10),
    "cfg + nag": (cfg(1.7) + nag(0.6), 15),
    "cfg + nag, intervals": (cfg(1.7, interval=(0.5, 1.0)) + nag(0.6, interval=(0.0, 0.7), channels=1), 5 + 3 + 4),
    "joint": (joint(0.6), 10),
    "class-free": (class_free(0.6), 15),
    "nested": (nested(1.7, 0.6), 20),
    "autoguidance": (autoguidance(1.7), 10),
    "autoguidance of another kind": (autoguidance(1.7, network=DATA), 10),
    "domain + nag": (domain(1.5) + nag(0.6), 15),
    "self-guidance": (self_guidance(0.6, 0.3), 10),
    "on the weak network": (Guidance(Branch(WEAK), (Difference(0.5, CONDITIONAL, UNCONDITIONAL),)), 15),
    "off": (cfg(1.0) + nag(0.0), 5),
}


def written_out(guidance: Guidance, x: np.ndarray) -> np.ndarray:
    """Heun's method with every branch called by itself."""
    process = Linear()

    def branch_value(branch: Branch, x: np.ndarray, t: float) -> np.ndarray:
        flags = np.full(len(x), branch.drop_label), np.full(len(x), branch.noise == "null")
        asked = np.full(len(x), min(t + branch.time_shift, 1.0))
        value = np.asarray(probe_answer(GAINS[branch.network], x, asked, LABELS, *flags)[0])
        # The data network's x_0 as a velocity of the linear path: v = (x - x_0) / t.
        return (x - value) / t if branch.network == DATA else value

    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        table = guidance.table(t, x.shape[-1])
        return sum(weights * branch_value(branch, x, t) for branch, weights in table.items())

    grid = process.time_grid(3, 0.9, 0.1)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        first = velocity(x, t)
        mean = first if t_next == grid[-1] else 0.5 * (first + velocity(x + (t_next - t) * first, t_next))
        x = x + (t_next - t) * mean
    return x


def test_every_guidance_is_its_loop_written_out_in_one_program(float64: None) -> None:
    probes = {name: Probe() for name in GAINS}
    networks = {
        name: probe_denoiser(probe, GAINS[name], "data" if name == DATA else "velocity")
        for name, probe in probes.items()
    }
    sampler = Sampler(
        networks[MODEL],
        {name: guidance for name, (guidance, _) in GUIDANCES.items()},
        stepper=Heun(t_max=0.9, t_min=0.1),
        num_steps=3,
        networks={name: network for name, network in networks.items() if name != MODEL},
    )
    start = np.random.default_rng(0).normal(size=(2, 1, 2, 4))
    traces = None
    for name, (guidance, evaluations) in GUIDANCES.items():
        result = draw(sampler, name, initial=start)
        np.testing.assert_allclose(result.x, written_out(guidance, start), rtol=1e-9, err_msg=name)
        assert result.evaluations_per_image == evaluations == sampler.evaluations_per_image[name], name

        # What really ran: one batch per network and row, with no branch that the row's table does not hold.
        executions = {network: probe.take_executions() for network, probe in probes.items()}
        assert sum(len(t) for ran in executions.values() for t in ran) == 2 * evaluations, name
        tables = guidance.tables([0.9, 0.9 - 0.8 / 3, 0.9 - 0.8 / 3, 0.9 - 1.6 / 3, 0.9 - 1.6 / 3], 4)
        for network, ran in executions.items():
            assert len(ran) == sum(any(branch.network == network for branch in table) for table in tables), name

        # One program: nothing is traced again for another guidance.
        counts = {network: len(probe.traces) for network, probe in probes.items()}
        traces = traces or counts
        assert counts == traces


def tiny(probe: Probe, guidances: dict[str, Guidance], **options: Any) -> Sampler:
    options = {"stepper": Euler(), "num_steps": 4} | options
    return Sampler(probe_denoiser(probe, sample_shape=(1, 1, 2)), guidances, **options)


def test_sweeps_share_one_program_and_other_layouts_compile_again() -> None:
    probe = Probe(counts=False)
    tiny_cfg = tiny(probe, {"cfg": cfg(2.0, interval=(0.3, 0.8))})
    results = [draw(tiny_cfg, "cfg").x]
    compiled = len(probe.traces)
    for guidance in (
        cfg(3.5, interval=(0.3, 0.8)),  # another weight
        cfg(2.0, interval=(0.0, 0.6)),  # another interval, with both layouts in use
        nag(0.5, interval=(0.3, 0.8)),  # another condition dropped
        self_guidance(1.0, 0.05, interval=(0.3, 0.8)),  # another time shift
        joint(0.5, interval=(0.3, 0.8), channels=1),  # another number of channels
    ):
        results.append(draw(tiny(probe, {"any": guidance}), "any").x)
        assert len(probe.traces) == compiled
    assert len({np.asarray(x).tobytes() for x in results}) == len(results)
    draw(tiny(probe, {"any": cfg(2.0)}), "any")  # a layout for every row: another set of layouts
    assert len(probe.traces) > compiled


def test_four_guidances_are_one_program() -> None:
    probe = Probe(counts=False)
    guidances = {"plain": plain(), "cfg": cfg(2.0), "nag": nag(1.0), "cfg + nag": cfg(2.0) + nag(1.0)}
    sampler = tiny(probe, guidances)
    draw(sampler, "plain")
    compiled = len(probe.traces)
    assert sorted(set(probe.traces)) == [2, 4, 6]  # One batch per layout: 1, 2 and 3 branches of 2 samples.
    for name in guidances:
        draw(sampler, name, labels=np.array([1, 1], np.int32))
    assert len(probe.traces) == compiled
    assert sampler.evaluations_per_image == {"plain": 4, "cfg": 8, "nag": 8, "cfg + nag": 12}


@pytest.mark.parametrize("stepper", [Euler(), Heun()])
def test_many_steps_are_a_program_as_long_as_that_of_three(stepper: Any) -> None:
    """And the network is traced once in each of them."""
    lengths = []
    for num_steps in (3, 250):
        probe = Probe(counts=False)
        sampler = tiny(probe, {"nag": nag(1.0)}, stepper=stepper, num_steps=num_steps)
        labels = jax.ShapeDtypeStruct((2,), jnp.int32)
        program = sampler.lower("nag", labels, jax.ShapeDtypeStruct((2,), jnp.uint32))
        assert probe.traces == [4]  # Both branches of 2 samples.
        lengths.append(len(program.as_text().splitlines()))
    assert lengths[0] == lengths[1]


def test_other_parameters_need_no_other_program() -> None:
    probe = Probe(counts=False)
    samplers = [
        Sampler(probe_denoiser(probe, gain, sample_shape=(1, 1, 2)), {"plain": plain()}, stepper=Euler(), num_steps=3)
        for gain in (1.0, 0.5)
    ]
    first = draw(samplers[0], "plain").x
    compiled = len(probe.traces)
    assert not np.allclose(draw(samplers[1], "plain").x, first)
    assert len(probe.traces) == compiled


# --- The loop itself ---


@dataclasses.dataclass(frozen=True)
class Record:
    """A stepper that writes each row's number into the next channel of the state."""

    order: tuple[int, ...]
    is_stochastic: ClassVar[bool] = False

    def needs(self, process: Process) -> tuple[PredictionKind, ...]:
        return ()

    def schedule(self, process: Process, num_steps: int) -> Rows:
        t = np.linspace(1.0, 0.2, num_steps)
        return {"t": t, "start": np.ones(num_steps), "number": np.array(self.order, np.float64)}

    def init(self, x: jax.Array) -> tuple[jax.Array, int]:
        return jnp.zeros_like(x), 0

    def state(self, carry: Any) -> jax.Array:
        return carry[0]

    def advance(self, carry: Any, prediction: GuidedPrediction, row: Row, noise: jax.Array | None) -> Any:
        x, position = carry
        assert noise is None
        return x.at[..., position].set(row["number"] + prediction.value[..., position]), position + 1


def test_rows_are_taken_in_order_exactly_once_and_the_last_state_returned() -> None:
    order = (3, 1, 7, 2, 5, 6, 4)

    def unvisited(x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        # 0 on channels that were not visited before: a second visit, or a state that is not the last, would show.
        return jnp.where(x == 0.0, spread(0.01 * labels + 0.1 * t, x), 1000.0)

    denoiser = from_function(unvisited, Linear(), "velocity", num_classes=3, sample_shape=(1, 1, 7))
    seen = sample(
        denoiser,
        LABELS,
        seed=0,
        initial=np.zeros((2, 1, 1, 7)),
        stepper=Record(order),
        num_steps=7,
        observer=lambda params, x, t: (x, t),
    )
    times = np.linspace(1.0, 0.2, 7)
    expected = np.array(order) + 0.1 * times + 0.01 * LABELS[:, None]
    np.testing.assert_allclose(seen.x[:, 0, 0], expected, rtol=1e-6)
    states, observed_times = seen.observations
    np.testing.assert_allclose(observed_times, np.repeat(times[:, None], 2, axis=1), rtol=1e-6)
    for row in range(7):  # What is predicted at row r is the state after r rows.
        np.testing.assert_allclose(states[row, :, 0, 0], np.where(np.arange(7) < row, expected, 0.0), rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Expose:
    """A stepper of one row whose sample is the guided prediction's value, or its learned variance."""

    what: str = "value"
    time: float = 0.6
    is_stochastic: ClassVar[bool] = False

    def needs(self, process: Process) -> tuple[PredictionKind, ...]:
        return ()

    def schedule(self, process: Process, num_steps: int) -> Rows:
        return {"t": np.array([self.time]), "start": np.ones(1)}

    def init(self, x: jax.Array) -> jax.Array:
        return x

    def state(self, carry: jax.Array) -> jax.Array:
        return carry

    def advance(self, carry: Any, prediction: GuidedPrediction, row: Row, noise: jax.Array | None) -> Any:
        return getattr(prediction, self.what)


def test_unguided_channels_and_learned_variance_are_those_of_the_base() -> None:
    guidances = {
        "plain": plain(),
        "guided": cfg(3.0, channels=3) + nag(2.0, channels=3),
        "on null": (cfg(3.0, channels=3) + nag(2.0, channels=3)).with_base(UNCONDITIONAL),
        "null": plain(drop_label=True),
    }
    results = {}
    for what in ("value", "variance"):
        sampler = Sampler(probe_denoiser(Probe(counts=False)), guidances, stepper=Expose(what), num_steps=1)
        results[what] = {name: np.asarray(draw(sampler, name).x) for name in guidances}
    for guided, base in (("guided", "plain"), ("on null", "null")):
        value, variance = results["value"], results["variance"]
        np.testing.assert_allclose(value[guided][..., 3], value[base][..., 3], rtol=1e-6)
        assert (np.abs(value[guided][..., :3] - value[base][..., :3]) > 1e-3).all()
        np.testing.assert_allclose(variance[guided], variance[base], rtol=1e-6)
    assert not np.allclose(results["variance"]["plain"], results["variance"]["null"])


# --- Draws ---


@dataclasses.dataclass(frozen=True)
class ShowNoise:
    """A stepper whose next state is the noise of the row."""

    is_stochastic: ClassVar[bool] = True

    def needs(self, process: Process) -> tuple[PredictionKind, ...]:
        return ()

    def schedule(self, process: Process, num_steps: int) -> Rows:
        return {"t": np.linspace(1.0, 0.2, num_steps), "start": np.ones(num_steps)}

    def init(self, x: jax.Array) -> jax.Array:
        return x

    def state(self, carry: jax.Array) -> jax.Array:
        return carry

    def advance(self, carry: Any, prediction: GuidedPrediction, row: Row, noise: jax.Array | None) -> Any:
        return noise


def zero(x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.zeros_like(x)


def identity(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    return x


def shown_noise(seed: int, indices: Any, num_steps: int = 3) -> np.ndarray:
    """Initial noise and the noise of every row: [num_steps + 1, B, ...]."""
    denoiser = from_function(zero, Linear(), "velocity", num_classes=1, sample_shape=(2, 2, 1))
    sampler = Sampler(denoiser, {"plain": plain()}, stepper=ShowNoise(), num_steps=num_steps, observer=identity)
    result = sampler("plain", np.zeros(len(indices), np.int32), seed=seed, indices=np.asarray(indices))
    return np.concatenate([result.observations, result.x[None]])


def test_draws_are_standard_normal_functions_of_seed_index_and_row_alone() -> None:
    whole = shown_noise(5, range(600))
    first = shown_noise(5, range(4))
    np.testing.assert_array_equal(first, whole[:, :4])
    np.testing.assert_array_equal(shown_noise(5, [599, 7, 500, 0]), whole[:, [599, 7, 500, 0]])
    np.testing.assert_array_equal(shown_noise(5, range(4), num_steps=5)[:4], first)
    np.testing.assert_array_equal(initial_noise(5, np.arange(4), (2, 2, 1)), first[0])
    # No two of (seed, index, row) share a draw: a shared one would repeat a whole state.
    states = np.concatenate([whole, shown_noise(6, range(600))]).reshape(-1, 4)
    assert len(np.unique(states, axis=0)) == len(states)

    count = whole[0].size
    rows = whole.reshape(4, count)
    assert (np.abs(rows.mean(axis=1)) < 5 / np.sqrt(count)).all()
    assert (np.abs(rows.var(axis=1) - 1.0) < 5 * np.sqrt(2 / count)).all()
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 5 / np.sqrt(count)


def test_samples_do_not_depend_on_how_the_set_is_cut() -> None:
    denoiser = probe_denoiser(Probe(counts=False), sample_shape=(1, 1, 2))
    labels = np.array([0, 1, 2, 0, 1, 2, 1], np.int32)

    def run(labels: np.ndarray, first_index: int, seed: int = 3) -> np.ndarray:
        options: dict[str, Any] = {"stepper": EulerMaruyama(), "num_steps": 4, "guidance": cfg(2.0)}
        return np.asarray(sample(denoiser, labels, seed=seed, first_index=first_index, **options).x)

    whole = run(labels, 0)
    np.testing.assert_allclose(run(labels[:4], 0), whole[:4], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(labels[3:], 3), whole[3:], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(run(labels, 0), whole)
    assert not np.allclose(run(labels, 0, seed=4), whole)
    assert not np.allclose(run(labels, 1), whole)


def test_float32_and_defaults() -> None:
    denoiser = gaussians(Linear(), "velocity")
    result = sample(denoiser, LABELS, seed=0)
    assert result.x.shape == (2, 1, 2, 1) and result.x.dtype == jnp.float32
    assert result.observations is None and result.times.shape == (0,) and result.evaluations_per_image == 50
    start = initial_noise(0, np.arange(2), (1, 2, 1))
    again = sample(denoiser, LABELS, seed=1, initial=start)
    np.testing.assert_allclose(again.x, result.x, rtol=1e-5, atol=1e-6)


# --- Observers ---


def test_observers_see_the_states_of_the_path_and_no_stage() -> None:
    probe = Probe(counts=False)
    denoiser = probe_denoiser(probe, sample_shape=(1, 1, 2))
    start = np.random.default_rng(0).normal(size=(2, 1, 1, 2)).astype(np.float32)
    options: dict[str, Any] = {"stepper": Heun(), "observer": identity, "initial": start}
    seen = sample(denoiser, LABELS, seed=0, num_steps=4, **options)
    np.testing.assert_allclose(seen.times, [1.0, 0.75, 0.5, 0.25])
    np.testing.assert_array_equal(seen.observations[0], start)

    # A state of the path is where a run that ends there ends, up to its last step, which is Euler's: so take Heun's
    # own formula from each state to the next.
    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        never = np.zeros(2, bool)
        return np.asarray(probe_answer(1.0, jnp.asarray(x), np.full(2, t), LABELS, never, never)[0])

    states = [*np.asarray(seen.observations), np.asarray(seen.x)]
    for index, t in enumerate(seen.times):
        first = velocity(states[index], t)
        mean = 0.5 * (first + velocity(states[index] - 0.25 * first, t - 0.25)) if t > 0.25 else first
        np.testing.assert_allclose(states[index + 1], states[index] - 0.25 * mean, rtol=1e-5, atol=1e-6)


def test_observed_times_are_the_nearest_states_each_once() -> None:
    denoiser = probe_denoiser(Probe(counts=False), sample_shape=(1, 1, 2))

    def observe(params: Any, x: jax.Array, t: jax.Array) -> dict[str, jax.Array]:
        return {"t": t, "moments": params["scale"] * jnp.mean(x, axis=(1, 2, 3))}

    sampler = Sampler(
        denoiser,
        {"plain": plain(), "cfg": cfg(2.0)},
        stepper=Heun(),
        num_steps=10,
        observer=observe,
        observer_params={"scale": np.float32(2.0)},
        observe_times=[0.22, 0.9, 0.21, 0.58, 0.0],
    )
    np.testing.assert_allclose(sampler.observed_times, [0.9, 0.6, 0.2, 0.1])
    every = Sampler(denoiser, {"plain": plain()}, stepper=Heun(), num_steps=10, observer=identity)
    for name in ("plain", "cfg"):
        result = draw(sampler, name)
        np.testing.assert_allclose(result.times, [0.9, 0.6, 0.2, 0.1])
        np.testing.assert_allclose(result.observations["t"], np.repeat(result.times[:, None], 2, 1), rtol=1e-6)
        assert result.observations["moments"].shape == (4, 2)
    states = np.asarray(draw(every, "plain").observations)
    expected = 2.0 * states.mean(axis=(2, 3, 4))[[1, 4, 8, 9]]
    np.testing.assert_allclose(draw(sampler, "plain").observations["moments"], expected, rtol=1e-5, atol=1e-6)


def test_unobserved_rows_cost_nothing() -> None:
    calls: list[float] = []

    def observe(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return t

    denoiser = probe_denoiser(Probe(counts=False), sample_shape=(1, 1, 2))
    options: dict[str, Any] = {"num_steps": 10, "observer": observe, "observe_times": [0.5, 0.2]}
    sample(denoiser, LABELS, seed=0, initial=np.zeros((2, 1, 1, 2)), **options)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(calls), [0.2, 0.5], rtol=1e-6)


# --- Exact Gaussians and mixtures ---

MEANS, NULL_MEAN, VARIANCE = (0.7, -0.2, -0.9), 0.25, 0.3


def target(process: Process, kind: PredictionKind, x: Any, t: Any, mean: Any, variance: float = VARIANCE) -> Any:
    """E[target | x, t] for data N(mean, variance) in every dimension."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    centred = (x - alpha * mean) / (alpha**2 * variance + sigma**2)
    data, noise = mean + alpha * variance * centred, sigma * centred
    velocity = process.alpha_dot(t) * data + process.sigma_dot(t) * noise
    return {"data": data, "noise": noise, "score": -centred, "velocity": velocity}[kind]


@dataclasses.dataclass(frozen=True)
class GaussianPosterior:
    """p(t | x) for data N(NULL_MEAN, VARIANCE) and t uniform in [0, 1], at Gauss-Legendre nodes."""

    process: Process

    def quadrature(self, params: Any, x: Any, num_nodes: int) -> tuple[Any, Any]:
        nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
        t, weights = 0.5 * (nodes + 1.0), 0.5 * weights
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        variance = spread(alpha**2 * VARIANCE + sigma**2, x[None])
        axes = tuple(range(2, x.ndim + 1))
        exponents = (x - spread(alpha, x[None]) * NULL_MEAN) ** 2 / variance + np.log(variance)
        log_density = np.log(weights)[:, None] - 0.5 * jnp.sum(exponents, axis=axes)
        return np.broadcast_to(t[:, None], log_density.shape), jax.nn.softmax(log_density, axis=0)


@dataclasses.dataclass(frozen=True)
class GaussianFunction:
    """A Gaussian for each class and another without the class; without the noise level, E[target | x] at 5 nodes."""

    process: Process
    prediction: PredictionKind
    variance: float

    def __call__(
        self, params: Any, x: Any, t: Any, labels: Any, drop_label: Any, drop_noise: Any, offset: Any
    ) -> Prediction:
        mean = spread(jnp.where(drop_label, NULL_MEAN, jnp.asarray(MEANS)[labels]), x)

        def at(t: Any) -> Any:
            return target(self.process, self.prediction, x, spread(t, x), mean, self.variance)

        nodes, weights = GaussianPosterior(self.process).quadrature({}, x, 5)
        null = sum(spread(weight, x) * at(node) for node, weight in zip(jnp.asarray(nodes), weights, strict=True))
        return Prediction(jnp.where(spread(drop_noise, x), null, at(t)))


def gaussians(
    process: Process,
    prediction: PredictionKind,
    variance: float = VARIANCE,
    sample_shape: tuple[int, ...] = (1, 2, 1),
) -> Denoiser:
    return Denoiser(GaussianFunction(process, prediction, variance), {}, process, prediction, 3, sample_shape)


def two_modes(process: Process) -> Mixture:
    """Two components on the line, states of shape (1, 1, 1)."""
    means = np.array([-1.0, 0.8]).reshape(2, 1, 1, 1)
    return make_mixture(process, means, covariances=[0.05, 0.2], weights=[0.35, 0.65], levels=[0.5])


@pytest.mark.parametrize("process", [Linear(), DDPM()], ids=lambda process: process.name)
def test_a_deterministic_flow_carries_quantiles_to_quantiles(float64: None, process: Process) -> None:
    # On the line the flow keeps the order of states, so the u-quantile of the noise ends at the u-quantile of the data.
    u = (np.arange(64) + 0.5) / 64
    alpha, sigma = process.alpha(np.float64(1.0)), process.sigma(np.float64(1.0))
    weights, means, variances = np.array([0.35, 0.65]), np.array([-1.0, 0.8]), np.array([0.05, 0.2])

    def distribution(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        deviations = np.sqrt(alpha**2 * variances + sigma**2)
        return norm.cdf((x[:, None] - alpha * means) / deviations) @ weights

    grid = np.linspace(-5.0, 5.0, 20001)
    start = np.interp(u, distribution(grid, alpha, sigma), grid)
    result = sample(
        two_modes(process).denoiser(),
        np.zeros(64, np.int32),
        seed=0,
        stepper=Heun(),
        num_steps=200,
        initial=start.reshape(64, 1, 1, 1),
    )
    np.testing.assert_allclose(distribution(np.asarray(result.x).ravel(), 1.0, 0.0), u, atol=3e-3)


@pytest.mark.parametrize(
    ("stepper", "variance", "t_end", "num_steps"),
    [
        # With one data point every step is exact, in any number of steps.
        (Ancestral(t_min=0.3), 0.0, 0.3, 4),
        (DDIM(eta=0.6, t_min=0.3), 0.0, 0.3, 4),
        (EulerMaruyama(last_step=0.01), 0.3, 0.0, 150),
        (Ancestral(), 0.3, 0.0, 150),
    ],
    ids=["ancestral", "ddim", "euler_maruyama", "ancestral, many steps"],
)
def test_moments_of_stochastic_samples(stepper: Any, variance: float, t_end: float, num_steps: int) -> None:
    process, count = GVP(), 2000
    denoiser = gaussians(process, "velocity", variance, (2, 2, 1))
    result = sample(denoiser, np.zeros(count, np.int32), seed=0, stepper=stepper, num_steps=num_steps)
    x = np.asarray(result.x, np.float64).ravel()
    alpha, sigma = process.alpha(np.float64(t_end)), process.sigma(np.float64(t_end))
    expected = alpha**2 * variance + sigma**2
    # Five standard errors, and for the solvers that are not exact a per cent of discretisation.
    allowed = 0.0 if variance == 0.0 else 0.01
    assert abs(x.mean() - alpha * MEANS[0]) < 5 * np.sqrt(expected / x.size) + allowed
    assert abs(x.var() - expected) < 5 * expected * np.sqrt(2 / x.size) + allowed
    # The four pixels of a sample are independent.
    correlation = np.corrcoef(np.asarray(result.x, np.float64).reshape(count, 4).T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(count)


def test_guided_samples_do_not_depend_on_the_prediction_kind(float64: None) -> None:
    process = GVP()
    guidances = {"cfg": cfg(2.5), "nag": nag(0.8), "cfg + nag posterior": cfg(1.5) + nag(0.8, null="posterior")}
    kinds: tuple[PredictionKind, ...] = ("velocity", "noise", "data")
    results: dict[str, list[np.ndarray]] = {name: [] for name in guidances}
    for kind in kinds:
        sampler = Sampler(
            gaussians(process, kind),
            guidances,
            stepper=Euler(t_max=0.98, t_min=0.05),
            num_steps=8,
            estimator=Estimator(GaussianPosterior(process), {}),
            num_posterior_nodes=5,
        )
        for name in guidances:
            results[name].append(np.asarray(draw(sampler, name).x))
    for name, (velocity, *others) in results.items():
        for other in others:
            if name == "nag":  # The null branch averages another target: these are different methods.
                assert np.abs(other - velocity).max() > 1e-2
            else:
                np.testing.assert_allclose(other, velocity, rtol=1e-8, atol=1e-9, err_msg=name)


def test_posterior_null_branch_tends_to_the_true_marginal_score(float64: None) -> None:
    process, t, w = Linear(), 0.6, 1.3
    x = np.random.default_rng(0).normal(size=(2, 1, 2, 1))
    # Without the class, so that p(t | x) is the posterior of the very data whose score is guided.
    null = Branch(drop_label=True, noise="posterior")
    guidance = Guidance(UNCONDITIONAL, (Difference(w, UNCONDITIONAL, null),))
    nodes, weights = GaussianPosterior(process).quadrature({}, x, 200)
    marginal = sum(
        spread(weight, x) * target(process, "score", x, spread(node, x), NULL_MEAN)
        for node, weight in zip(nodes, weights, strict=True)
    )
    expected = (1 + w) * target(process, "score", x, np.float64(t), NULL_MEAN) - w * marginal
    a, b = process.conversion(t, "score", "velocity")
    errors = []
    for num_nodes in (2, 6, 32):
        sampler = Sampler(
            gaussians(process, "velocity"),
            {"nag": guidance},
            stepper=Expose(time=t),
            num_steps=1,
            estimator=Estimator(GaussianPosterior(process), {}),
            num_posterior_nodes=num_nodes,
        )
        result = draw(sampler, "nag", initial=x)
        assert result.evaluations_per_image == 1 + num_nodes
        errors.append(np.abs((np.asarray(result.x) - a * x) / b - expected).max())
    assert (np.diff(errors) < 0).all() and errors[-1] < 1e-9, errors


def test_posterior_null_branches_keep_or_drop_the_class(float64: None) -> None:
    process, t = Linear(), 0.6
    x = np.random.default_rng(0).normal(size=(2, 1, 2, 1))
    kept, dropped = Branch(noise="posterior"), Branch(drop_label=True, noise="posterior")
    posterior = GaussianPosterior(process)
    sampler = Sampler(
        gaussians(process, "noise"),
        {"both": Guidance(CONDITIONAL, (Difference(1.0, kept, dropped),))},
        stepper=Expose(time=t),
        num_steps=1,
        estimator=Estimator(posterior, {}),
        num_posterior_nodes=5,
    )
    result = draw(sampler, "both", initial=x)
    assert result.evaluations_per_image == 11
    means = spread(np.array(MEANS)[LABELS], x)
    expected = target(process, "noise", x, np.float64(t), means)
    for node, weight in zip(*posterior.quadrature({}, x, 5), strict=True):
        scores = [target(process, "score", x, spread(node, x), mean) for mean in (means, NULL_MEAN)]
        expected = expected - t * spread(weight, x) * (scores[0] - scores[1])
    np.testing.assert_allclose(result.x, expected, rtol=1e-9)


def test_posterior_branch_is_finite_from_pure_noise_in_float32() -> None:
    # At t = 1 a score difference has no finite velocity; a limited interval keeps the first steps tame.
    process = Linear()
    guidances = {"nag": nag(0.2, null="posterior"), "limited": nag(0.2, null="posterior", interval=(0.0, 0.85))}
    sampler = Sampler(
        gaussians(process, "velocity"),
        guidances,
        stepper=Euler(),
        num_steps=20,
        estimator=Estimator(GaussianPosterior(process), {}),
    )
    results = {name: draw(sampler, name) for name in guidances}
    for result in results.values():
        assert result.x.dtype == jnp.float32 and np.isfinite(result.x).all()
    assert np.abs(results["limited"].x).max() < 5.0
    assert results["nag"].evaluations_per_image == 20 * (1 + NUM_POSTERIOR_NODES)
    assert results["limited"].evaluations_per_image == 20 + 17 * NUM_POSTERIOR_NODES


# --- Mistakes ---


PLAIN = plain()


def refuse(message: str, guidance: Guidance = PLAIN, denoiser: Denoiser | None = None, **options: Any) -> None:
    denoiser = denoiser or probe_denoiser(Probe(counts=False))
    options = {"stepper": Euler(), "num_steps": 3} | options
    with pytest.raises(UserError, match=message):
        Sampler(denoiser, {"mine": guidance}, **options)


def test_guidances_that_cannot_be_evaluated_are_refused() -> None:
    probe = Probe(counts=False)
    function = from_function(zero, Linear(), "velocity", num_classes=1, sample_shape=(1, 1, 1))
    refuse("network 'weak'.*networks", autoguidance(2.0))
    refuse("no null class", cfg(2.0), function)
    refuse("noise-condition dropout", nag(1.0), function)
    refuse("pass `estimator`", nag(1.0, null="posterior"))
    refuse("base must be a network call", Guidance(Branch(noise="posterior")))
    refuse("4 channels, but a state has 2", cfg(2.0, channels=4), probe_denoiser(probe, sample_shape=(1, 1, 2)))


def test_networks_that_do_not_fit_are_refused() -> None:
    probe = Probe(counts=False)
    for message, changes in {
        "one process": {"process": GVP()},
        "one shape": {"sample_shape": (2, 2, 4)},
        "5 classes": {"num_classes": 5},
    }.items():
        refuse(message, autoguidance(2.0), networks={"weak": probe_denoiser(probe, **changes)})
    # Another number of classes does no harm where the class is dropped.
    original = probe_denoiser(probe, num_classes=5)
    Sampler(probe_denoiser(probe), {"mine": domain(1.5)}, stepper=Euler(), num_steps=3, networks={"original": original})


def test_predictions_that_do_not_determine_what_is_needed_are_refused() -> None:
    probe = Probe(counts=False)
    for prediction in ("noise", "score"):
        noisy = probe_denoiser(probe, prediction=prediction)
        refuse("t = 1.*t_max below 1", denoiser=noisy)
        Sampler(noisy, {"mine": plain()}, stepper=Euler(t_max=0.99), num_steps=3)
        # The same for a network that is only mixed in, unless its interval leaves that time out.
        refuse("t = 1", autoguidance(2.0), networks={"weak": noisy})
        limited = autoguidance(2.0, interval=(0.0, 0.9))
        Sampler(probe_denoiser(probe), {"mine": limited}, stepper=Euler(), num_steps=3, networks={"weak": noisy})
    # DDPM's last level still holds signal.
    noisy = probe_denoiser(probe, prediction="noise", process=DDPM())
    Sampler(noisy, {"mine": plain()}, stepper=Euler(), num_steps=3)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 3], {}, r"\[0, 3\)"),
        ([-1, 0], {}, r"\[0, 3\)"),
        ([], {}, "non-empty"),
        ([[0, 1]], {}, "shape"),
        ([0.5, 1.0], {}, "integers"),
        ([0, 1], {"initial": np.zeros((2, 1, 1, 2))}, "initial"),
        ([0, 1], {"initial": np.zeros((3, 1, 2, 4))}, "initial"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(labels: Any, options: dict[str, Any], message: str) -> None:
    probe = Probe(counts=False)
    with pytest.raises(UserError, match=message):
        sample(probe_denoiser(probe), np.array(labels), seed=0, num_steps=2, **options)
    assert not probe.traces


def test_one_index_per_label() -> None:
    sampler = Sampler(probe_denoiser(Probe(counts=False)), {"mine": plain()}, stepper=Euler(), num_steps=2)
    with pytest.raises(UserError, match="indices"):
        sampler("mine", LABELS, seed=0, indices=np.arange(3))


def test_a_lowered_program_needs_shapes_alone_and_is_the_one_that_runs():
    """Its text is that of a sampler with values, so what is planned is what is run."""
    mixture = make_mixture(Linear(), np.zeros((2, 1, 1, 2)), covariances=0.5, classes=[0, 1]).denoiser()
    shapes = dataclasses.replace(
        mixture, params=jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), mixture.params)
    )
    labels, indices = (jax.ShapeDtypeStruct((4,), dtype) for dtype in (jnp.int32, jnp.uint32))
    texts = [
        Sampler(denoiser, {"cfg": cfg(2.0)}, stepper=Euler(), num_steps=3).lower("cfg", labels, indices).as_text()
        for denoiser in (mixture, shapes)
    ]
    assert texts[0] == texts[1]
    sampler = Sampler(mixture, {"cfg": cfg(2.0)}, stepper=Euler(), num_steps=3)
    assert sampler.num_rows == 3
    assert Sampler(mixture, {"cfg": cfg(2.0)}, stepper=Heun(), num_steps=3).num_rows == 5
