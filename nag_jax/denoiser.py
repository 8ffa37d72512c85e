"""The one interface to anything that denoises: a network, an exact oracle or a plain function.

A `Denoiser` answers the same question for all of them, in our time (t = 0 is data) and our sign. What a network's own
convention needs (its time input, the sign of its output, learned variance) is applied here and nowhere else. Guidance,
steppers and training see Denoisers only. No weights are loaded and no samples are drawn here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from nag_jax.diffusion.process import PREDICTION_KINDS, PredictionKind, Process
from nag_jax.errors import UserError
from nag_jax.models.dit import DiT

Params: TypeAlias = Any
NetworkTime: TypeAlias = Literal["t", "1 - t", "1000 t - 1"]
NetworkOutput: TypeAlias = Literal["velocity", "negative velocity", "noise", "data"]


class Prediction(NamedTuple):
    """What a denoiser says about a state.

    Attributes:
        value: [B, ...], of the denoiser's prediction kind.
        variance: [B, ...] or None; the learned interpolation v in [-1, 1] between the logarithms of the smallest and
            the largest variance of an ancestral step (Nichol & Dhariwal 2021, equation 15), unclipped.
    """

    value: jax.Array
    variance: jax.Array | None = None


class DenoiserFunction(Protocol):
    """The pure function behind a Denoiser; equal functions must compare equal, for they key compiled programs."""

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        t: jax.Array,
        labels: jax.Array,
        drop_label: jax.Array,
        drop_noise: jax.Array,
        time_embedding_offset: jax.Array | None,
    ) -> Prediction: ...


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """The latents that a network works on, where its states are no images.

    Attributes:
        scaling_factor: a state is this times an unscaled latent of the autoencoder.
        downsampling: pixels of an image per side of one latent position.
        encoder_hash: content hash of the encoder that the training latents come from; "" where it is not known, as in
            published weight files.
    """

    scaling_factor: float = 0.18215
    downsampling: int = 8
    encoder_hash: str = ""


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A denoiser with its parameters.

    Attributes:
        apply: the pure function; see `DenoiserFunction`.
        params: a pytree, always passed to compiled programs as an argument and never closed over.
        process: the process it was made for.
        prediction: what `Prediction.value` is.
        num_classes: labels lie in [0, num_classes).
        sample_shape: shape of one state, (height, width, channels) for images.
        has_null_label: whether `drop_label` may be used.
        has_null_noise: whether `drop_noise` may be used.
        latent: what its states are latents of; None for a denoiser of images.
    """

    apply: DenoiserFunction
    params: Params
    process: Process
    prediction: PredictionKind
    num_classes: int
    sample_shape: tuple[int, ...]
    has_null_label: bool = True
    has_null_noise: bool = True
    latent: LatentSpace | None = None

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTION_KINDS:
            raise UserError(f"prediction = {self.prediction!r} is not one of {', '.join(PREDICTION_KINDS)}.")

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        t: jax.Array,
        labels: jax.Array,
        *,
        drop_label: jax.Array | None = None,
        drop_noise: jax.Array | None = None,
        time_embedding_offset: jax.Array | None = None,
    ) -> Prediction:
        """Predicts from noisy states.

        Args:
            params: parameters to use (usually `self.params`; another set when training).
            x: states [B, ...].
            t: times in [0, 1], [B] or a scalar.
            labels: int32 [B], in [0, num_classes).
            drop_label: bool [B]; True asks without the class.
            drop_noise: bool [B]; True asks without the noise level.
            time_embedding_offset: [B, width], added to the time embedding of a network; None for no offset.

        Returns:
            The prediction for each state.
        """
        batch = x.shape[0]
        never = jnp.zeros((batch,), bool)
        return self.apply(
            params,
            x,
            jnp.broadcast_to(t, (batch,)),
            labels,
            never if drop_label is None else drop_label,
            never if drop_noise is None else drop_noise,
            time_embedding_offset,
        )

    def prepare(self, params: Params) -> Params:
        """`params` for many calls: those of a DiT in its compute dtype; answers stay the same bit for bit."""
        if isinstance(self.apply, NetworkFunction) and isinstance(self.apply.model, DiT):
            return self.apply.model.in_compute_dtype(params)
        return params

    def without_params(self) -> Denoiser:
        """The same denoiser with `params` None: hashable, so that it can be a static argument of a program."""
        return dataclasses.replace(self, params=None)


def in_network_time(network_time: NetworkTime, t: jax.Array) -> jax.Array:
    """Our times `t` as a network of that convention gets them, of the same shape."""
    return {"t": t, "1 - t": 1.0 - t, "1000 t - 1": 1000.0 * t - 1.0}[network_time]


def predicted(output: NetworkOutput) -> PredictionKind:
    """The prediction kind of a network's output in our sign."""
    return "velocity" if output == "negative velocity" else output


@dataclasses.dataclass(frozen=True)
class NetworkFunction:
    """Calls a DiT-like Linen module in its own convention and answers in ours.

    Attributes:
        model: module called as model(x, network_time, labels, drop_label, drop_noise, time_embedding_offset).
        network_time: what the network gets for t: "t", "1 - t" (public SiT) or "1000 t - 1" (public DiT).
        output: what the network returns; "negative velocity" is a public SiT, whose time runs the other way.
        learned_variance: whether the second half of the output channels is the variance interpolation.
    """

    model: nn.Module
    network_time: NetworkTime = "t"
    output: NetworkOutput = "velocity"
    learned_variance: bool = False

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        t: jax.Array,
        labels: jax.Array,
        drop_label: jax.Array,
        drop_noise: jax.Array,
        time_embedding_offset: jax.Array | None,
    ) -> Prediction:
        time = in_network_time(self.network_time, t)
        output: Any = self.model.apply(
            {"params": params}, x, time, labels, drop_label, drop_noise, time_embedding_offset
        )
        variance = None
        if self.learned_variance:
            output, variance = jnp.split(output, 2, axis=-1)
        return Prediction(-output if self.output == "negative velocity" else output, variance)

    @property
    def prediction(self) -> PredictionKind:
        """The prediction kind of the answer."""
        return predicted(self.output)


def from_network(
    function: NetworkFunction,
    params: Params,
    process: Process,
    *,
    num_classes: int,
    sample_shape: tuple[int, ...],
    has_null_label: bool = True,
    has_null_noise: bool = True,
    latent: LatentSpace | None = None,
) -> Denoiser:
    """The Denoiser of a DiT-like network; the arguments are the fields of `Denoiser`."""
    return Denoiser(
        function,
        params,
        process,
        function.prediction,
        num_classes,
        sample_shape,
        has_null_label=has_null_label,
        has_null_noise=has_null_noise,
        latent=latent,
    )


@dataclasses.dataclass(frozen=True)
class PlainFunction:
    """Adapts f(x, t, labels) -> value; it knows no parameters and no null conditions."""

    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        t: jax.Array,
        labels: jax.Array,
        drop_label: jax.Array,
        drop_noise: jax.Array,
        time_embedding_offset: jax.Array | None,
    ) -> Prediction:
        return Prediction(self.function(x, t, labels))


def from_function(
    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    process: Process,
    prediction: PredictionKind,
    *,
    num_classes: int,
    sample_shape: tuple[int, ...],
) -> Denoiser:
    """The Denoiser of a plain function f(x [B, ...], t [B], labels [B]) -> value [B, ...], with no null branches."""
    return Denoiser(
        PlainFunction(function),
        {},
        process,
        prediction,
        num_classes,
        sample_shape,
        has_null_label=False,
        has_null_noise=False,
    )
