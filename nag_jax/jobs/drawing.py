"""Draws the samples of several methods on the same noise and labels, and asks an estimator on the way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nag_jax.config import Config
from nag_jax.data.labels import label_rule
from nag_jax.diffusion.sampler import Sampler
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import NagJaxError
from nag_jax.jobs.experiment import Experiment, TrainedNetwork
from nag_jax.jobs.methods import Method, make_samplers
from nag_jax.noise_shift.answers import Answers
from nag_jax.parallel import batch_sharding
from nag_jax.progress import progress


class Drawn(NamedTuple):
    """The samples of one method.

    Attributes:
        images: uint8 [N, H, W, C], decoded where the states are latents.
        answers: Answers [T, N] of the measuring estimator, or None.
        times: the times [T] of the answers.
        evaluations_per_image: network evaluations behind each sample.
        estimator_calls_per_image: calls of the guiding estimator behind each sample, a gradient counted as one.
        seconds: wall time of sampling, compilation included.
    """

    images: np.ndarray
    answers: Answers | None
    times: np.ndarray
    evaluations_per_image: int
    estimator_calls_per_image: int
    seconds: float


def sample_labels(experiment: Experiment) -> np.ndarray:
    """The labels of the samples, int32 [eval.num_samples], by the config's rule and seed."""
    config = experiment.config
    if config.sampling.label_rule == "reference":
        return np.resize(experiment.eval_states[1], config.eval.num_samples)
    rule = label_rule(config.sampling.label_rule)
    return rule(config.eval.num_samples, experiment.description.num_classes, config.eval.seed)


def sampling_batch_size(config: Config, mesh: Mesh) -> int:
    """Samples that are drawn at once: a multiple of the devices, for the last batch is filled up anyway."""
    num_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-min(config.sampling.batch_size, config.eval.num_samples) // num_devices) * num_devices


def draw(
    experiment: Experiment,
    network: TrainedNetwork,
    methods: Mapping[str, Method],
    *,
    measuring: Estimator | None = None,
    guiding: Estimator | None = None,
) -> dict[str, Drawn]:
    """Draws `eval.num_samples` samples of every method.

    Args:
        experiment: config and devices.
        network: what is sampled.
        methods: by name.
        measuring: asked for the noise level of the states at `noise_shift.times`.
        guiding: for the methods that need an estimator; never the one that measures.

    Returns:
        By method's name.

    Raises:
        NagJaxError: samples are not finite.
        UserError: see `Sampler`.
    """
    config = experiment.config
    labels = sample_labels(experiment)
    batch_size = sampling_batch_size(config, experiment.mesh)
    num_batches = -(-len(labels) // batch_size)
    denoiser = experiment.description.denoiser(network.params)
    original = experiment.original if any(method.needs_original for method in methods.values()) else None
    samplers = make_samplers(config, denoiser, methods, measuring=measuring, guiding=guiding, original=original)
    drawn: dict[str, Drawn] = {}
    with progress("sampling", num_batches * len(methods)) as report_progress:
        for name, sampler in samplers.items():
            start = time.perf_counter()
            batches = []
            for first in range(0, len(labels), batch_size):
                batches.append(_draw_batch(experiment, sampler, name, labels, first, batch_size))
                report_progress(len(drawn) * num_batches + len(batches), name)
            drawn[name] = _join(name, batches, len(labels), sampler, time.perf_counter() - start)
    return {name: drawn[name] for name in methods}


def _draw_batch(
    experiment: Experiment, sampler: Sampler, name: str, labels: np.ndarray, first: int, batch_size: int
) -> tuple[np.ndarray, Any]:
    """Samples first ... first + batch_size on the host; the last batch is filled up with the first samples."""
    indices = np.arange(first, first + batch_size) % len(labels)
    place = batch_sharding(experiment.mesh)
    with jax.set_mesh(experiment.mesh):  # for `parallel.keep_rows_apart`
        samples = sampler(
            name,
            jax.device_put(labels[indices], place),
            seed=experiment.config.eval.seed,
            indices=jax.device_put(indices.astype(np.uint32), place),
        )
    finite, observations = jax.device_get((_finite_rows(samples.x), samples.observations))
    if not finite.all():
        row = int(np.argmin(finite))
        raise NagJaxError(
            f"Sample {indices[row]} of method {name!r} is not finite. Lower its guidance scale, or take more steps."
        )
    return np.asarray(experiment.decoder(samples.x)), observations


@jax.jit
def _finite_rows(x: jax.Array) -> jax.Array:
    """Whether all numbers of a sample are finite, bool [B]."""
    return jnp.isfinite(x).reshape(len(x), -1).all(axis=1)


def _join(name: str, batches: list[tuple[np.ndarray, Any]], count: int, sampler: Sampler, seconds: float) -> Drawn:
    images = np.concatenate([images for images, _ in batches])[:count]
    answers = None
    if sampler.program.observer is not None:
        parts = zip(*(observations for _, observations in batches), strict=True)
        answers = Answers(*(np.concatenate(part, axis=1)[:, :count].astype(np.float64) for part in parts))
    return Drawn(
        images,
        answers,
        sampler.observed_times,
        sampler.evaluations_per_image[name],
        sampler.estimator_calls_per_image[name],
        seconds,
    )
