"""Gives the parity tests their twins: a torch network of the official layout, and the same network converted to ours.

Every tensor of a twin is random, the gates and the final layer too, for with zeros there most of a network would not be
compared. The reference samplers and losses stand in the tests that use them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nag_jax
from nag_jax.convert import tables
from nag_jax.denoiser import Denoiser
from nag_jax.diffusion.stepping import GuidedPrediction, Stepper
from nag_jax.loading import ModelDescription

CLASSES = 5
SEED = 7
STATE_TOLERANCE = 1e-5


def relative_error(actual: Any, expected: Any) -> float:
    """The largest difference of any entry, as a part of the largest expected entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    difference, size = np.abs(actual - expected).max(), np.abs(expected).max()
    return float(difference / size) if difference else 0.0


def row_noise(seed: int, count: int, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """What the sampler draws: the initial noise and every row's, [rows + 1, count, ...]."""

    def draw(stream: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
        return jax.random.normal(jax.random.fold_in(key, stream), shape)

    over_samples = jax.vmap(draw, in_axes=(None, 0))
    streams, indices = jnp.arange(rows + 1, dtype=jnp.uint32), jnp.arange(count, dtype=jnp.uint32)
    return np.asarray(jax.vmap(over_samples, in_axes=(0, None))(streams, indices))


class SamplerComparison(NamedTuple):
    """Our sampler beside the published one; largest absolute entries are taken over a whole state.

    Attributes:
        step_errors: [steps], what a step of ours from the published state differs in, as a part of the state it gives.
        moves: [steps], how far the published step goes, as a part of the same.
        free: [steps + 1], how far our states are from the published ones when both run on their own.
        disturbed: [steps + 1], how far the published sampler's states are from themselves when every step is disturbed
            at random by up to as much as our step differs: what roundings of that size grow to.
    """

    step_errors: np.ndarray
    moves: np.ndarray
    free: np.ndarray
    disturbed: np.ndarray

    def check(self) -> None:
        """Asserts that every step agrees, and that all steps together differ by no more than roundings explain.

        Over many steps roundings partly cancel. An error of a rounding's size that goes the same way in every step adds
        up to more than that, and `free` shows it. The factor 2 leaves room, for the largest entry varies from draw to
        draw.
        """
        assert self.step_errors.max() <= STATE_TOLERANCE
        assert self.moves.min() > 100 * STATE_TOLERANCE  # The tolerance is small against what a step does.
        assert self.free.max() <= 2 * self.disturbed.max()
        assert self.free[-1] <= 2 * self.disturbed[-1]


@dataclasses.dataclass(frozen=True)
class Twin:
    """A torch network and the denoiser that conversion makes of it.

    Attributes:
        network: called as network(x [B, C, H, W], network time [B], labels [B], drop_noise=None).
        kind: of the official network, "dit" or "sit".
        description: of the converted network, which computes at the highest precision.
        denoiser: the converted network with its parameters.
    """

    network: Any
    kind: tables.Kind
    description: ModelDescription
    denoiser: Denoiser

    def output(self, x: np.ndarray, network_time: Any, labels: np.ndarray, drop_noise: np.ndarray | None = None) -> Any:
        """The torch network's raw output.

        Args:
            x: states [B, H, W, C].
            network_time: [B] or a number.
            labels: [B]; the null class is CLASSES.
            drop_noise: bool [B].

        Returns:
            A torch tensor [B, H, W, 2 C], float64, with a graph where torch makes one.
        """
        import torch

        output = self.network(
            torch.from_numpy(np.asarray(x, np.float32).transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(np.broadcast_to(np.asarray(network_time, np.float32), (len(x),)).copy()),
            torch.from_numpy(np.asarray(labels)).long(),
            None if drop_noise is None else torch.from_numpy(drop_noise),
        )
        return output.permute(0, 2, 3, 1).double()

    def gradient_errors(self, gradient: Any) -> dict[str, float]:
        """The `relative_error` of a gradient tree of ours from that in the torch network, by official name."""
        ours = tables.export_params(gradient, self.description, self.kind, source="a gradient", keep_null_noise=True)
        theirs = {name: parameter.grad for name, parameter in self.network.named_parameters()}
        assert ours.keys() == theirs.keys()
        assert all(theirs[name].any() for name in theirs if name != tables.POSITIONS)  # 0 = 0 would compare nothing
        return {name: relative_error(ours[name], theirs[name]) for name in theirs if name != tables.POSITIONS}

    def compare_sampler(
        self, stepper: Stepper, labels: np.ndarray, published: Callable[..., np.ndarray], num_steps: int
    ) -> "SamplerComparison":
        """Runs our sampler and the published one from the same noise.

        Args:
            stepper: ours.
            labels: [B].
            published: published(noises [num_steps + 1, B, H, W, C], disturbances [num_steps, B, H, W, C] or None) gives
                the states from pure noise to the sample, [num_steps + 1, B, H, W, C], with the disturbance of each step
                added to what the step gives.
            num_steps: steps of both.

        Returns:
            The comparison.
        """
        noises = row_noise(SEED, len(labels), num_steps, self.denoiser.sample_shape)
        reference = published(noises, None)
        forced = self.teacher_forced(stepper, labels, reference[:-1], noises[1:])
        step_differences = np.abs(forced - reference[1:]).max(axis=(1, 2, 3, 4))

        sample = nag_jax.sample(
            self.denoiser, labels, seed=SEED, stepper=stepper, num_steps=num_steps, observer=lambda params, x, t: x
        )
        ours = np.concatenate([sample.observations, sample.x[None]])
        np.testing.assert_array_equal(ours[0], noises[0])
        signs = np.random.default_rng(1).uniform(-1, 1, forced.shape)
        disturbed = published(noises, step_differences[:, None, None, None, None] * signs)

        def largest(states: np.ndarray) -> np.ndarray:
            return np.abs(states).max(axis=(1, 2, 3, 4))

        sizes = largest(reference[1:])
        return SamplerComparison(
            step_errors=step_differences / sizes,
            moves=largest(np.diff(reference, axis=0)) / sizes,
            free=largest(ours - reference),
            disturbed=largest(disturbed - reference),
        )

    def teacher_forced(
        self, stepper: Stepper, labels: np.ndarray, states: np.ndarray, noises: np.ndarray
    ) -> np.ndarray:
        """One step of ours from each of `states`.

        Args:
            stepper: the stepper; it makes as many steps as there are states.
            labels: [B].
            states: [steps, B, H, W, C], where each step starts.
            noises: [steps, B, H, W, C], the noise of each step.

        Returns:
            [steps, B, H, W, C], where each step ends.
        """
        process = self.denoiser.process

        @jax.jit
        def advance(params: Any, carry: Any, row: Any, noise: Any) -> Any:
            x, t = stepper.state(carry), jnp.broadcast_to(row["t"], labels.shape)
            value, variance = self.denoiser(params, x, t, jnp.asarray(labels))
            prediction = GuidedPrediction(process, self.denoiser.prediction, x, t, value, variance)
            return stepper.advance(carry, prediction, row, noise)

        rows = stepper.schedule(process, len(states))
        starts = np.flatnonzero(rows["start"])
        ends = []
        for step, indices in enumerate(np.split(np.arange(len(rows["t"])), starts[1:])):
            carry = stepper.init(jnp.asarray(states[step], jnp.float32))
            noise = jnp.asarray(noises[step]) if stepper.is_stochastic else None
            for index in indices:
                row = {name: jnp.asarray(values[index], jnp.float32) for name, values in rows.items()}
                carry = advance(self.denoiser.params, carry, row, noise)
            ends.append(np.asarray(stepper.state(carry)))
        return np.stack(ends)


@pytest.fixture(scope="session")
def error() -> Callable[[Any, Any], float]:
    """The function `relative_error`."""
    return relative_error


@pytest.fixture(scope="session")
def sampler_noise() -> Callable[..., np.ndarray]:
    """The function `row_noise`."""
    return row_noise


@pytest.fixture(scope="session")
def twin_of() -> Callable[..., Twin]:
    """A function that makes the Twin of a torch network."""

    def twin_of(network: Any, kind: tables.Kind) -> Twin:
        state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        description = tables.recognise(state, kind, source="the twin", num_heads=network.blocks[0].attn.heads)
        model = dataclasses.replace(description.model, precision="highest")
        description = dataclasses.replace(description, model=model)
        params = tables.import_params(state, description, source="the twin")
        return Twin(network, kind, description, description.denoiser(jax.tree.map(jnp.asarray, params)))

    return twin_of


@pytest.fixture(scope="session")
def random_network(torch_dit) -> Callable[[], Any]:
    """A function that makes a torch network with a null noise embedding, every tensor random."""
    import torch

    class NullableDiT(torch_dit.TorchDiT):
        """Puts a parameter in the place of the time embedding of dropped rows."""

        def __init__(self, **sizes: int) -> None:
            super().__init__(**sizes)
            self.null_noise_embedding = torch.nn.Parameter(torch.empty(sizes["hidden"]))
            self.drop_noise = None

        def conditioning(self, time, labels):
            noise = self.t_embedder(time)
            if self.drop_noise is not None:
                noise = torch.where(self.drop_noise[:, None], self.null_noise_embedding, noise)
            return noise + self.y_embedder(labels)

        def forward(self, x, time, labels, drop_noise=None):
            self.drop_noise = drop_noise
            return super().forward(x, time, labels)

    def make() -> Any:
        network = NullableDiT(size=8, channels=4, patch=2, hidden=64, depth=2, heads=4, num_classes=CLASSES)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in network.named_parameters():
            if name != tables.POSITIONS:
                std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
                torch.nn.init.normal_(parameter, std=std, generator=generator)
        return network

    return make
