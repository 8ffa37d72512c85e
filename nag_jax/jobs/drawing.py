"""Draws the samples of several methods on the same noise and labels, and keeps what is asked of them, block by block.

What is asked are features of a feature net, an estimator's answers on the way, and images: all of them, or those that a
picture shows. A host keeps the rows of its own devices and never holds all images.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from numpy.typing import NDArray

from nag_jax.config import Config
from nag_jax.data.images import to_float
from nag_jax.data.labels import label_rule
from nag_jax.data.pipeline import parts_of
from nag_jax.diffusion.sampler import Sampler
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import NagJaxError
from nag_jax.figures import shown_samples
from nag_jax.hosts import wait_for_all
from nag_jax.jobs.attention_choice import settled
from nag_jax.jobs.experiment import Experiment, TrainedNetwork
from nag_jax.jobs.methods import Method, make_samplers
from nag_jax.jobs.sample_store import SampleStore
from nag_jax.jobs.scores import Features, feature_function, outputs_in_use
from nag_jax.loading import ModelDescription
from nag_jax.metrics.features import FeatureNet
from nag_jax.noise_shift.answers import Answers
from nag_jax.parallel import batch_sharding, holds_first_copy, local_part, local_rows, place, replicated, row_by_row
from nag_jax.progress import progress

SHOWN_PER_CLASS = 8


class Drawn(NamedTuple):
    """The samples of one method.

    Attributes:
        store: their blocks; `images(drawn)` reads the images from it.
        shown: uint8 [K, H, W, C], images of the samples in `shown_samples`, decoded where the states are latents.
        features: [N, width] by tap; none without a feature net.
        answers: Answers [T, N] of the measuring estimator, or None.
        times: the times [T] of the answers.
        evaluations_per_image: network evaluations behind each sample.
        estimator_calls_per_image: calls of the guiding estimator behind each sample, a gradient counted as one.
        seconds: wall time of sampling, compilation included.
    """

    store: SampleStore
    shown: NDArray[np.uint8]
    features: Features
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


def sampled_network(experiment: Experiment) -> ModelDescription:
    """The network with the attention that samples are drawn by; every process must call it."""
    mesh = experiment.mesh
    rows = sampling_batch_size(experiment.config, mesh) // (mesh.shape["data"] * mesh.shape["fsdp"])
    # Of one branch: those of a guidance are as many times more for every attention.
    return settled(experiment, "sampling", rows=rows)


def draw(
    experiment: Experiment,
    network: TrainedNetwork,
    methods: Mapping[str, Method],
    folder: epath.Path,
    *,
    feature_net: FeatureNet | None = None,
    measuring: Estimator | None = None,
    guiding: Estimator | None = None,
    keep_images: bool = False,
) -> dict[str, Drawn]:
    """Draws `eval.num_samples` samples of every method, those that `folder` does not hold already.

    Args:
        experiment: config and devices.
        network: what is sampled.
        methods: by name.
        folder: of the blocks; what is there must be of the same conditions and arguments.
        feature_net: whose features are kept.
        measuring: asked for the noise level of the states at `noise_shift.times`.
        guiding: for the methods that need an estimator; never the one that measures.
        keep_images: keep every image and not only those that are shown.

    Returns:
        By method's name.

    Raises:
        NagJaxError: samples are not finite, or a block cannot be written.
        UserError: see `Sampler`; a block is damaged.
    """
    config = experiment.config
    labels = sample_labels(experiment)
    description = sampled_network(experiment)
    denoiser = description.denoiser(network.params)
    original = None
    if any(method.needs_original for method in methods.values()):
        original = experiment.original_description(description).denoiser(experiment.original_params)
    samplers = make_samplers(config, denoiser, methods, measuring=measuring, guiding=guiding, original=original)
    stores = {name: SampleStore(folder / re.sub(r"[^\w.+-]", "_", name), len(labels)) for name in methods}
    missing = {name: store.agreed_missing() for name, store in stores.items()}
    total = len(labels) * len(methods)
    done = total - sum(len(samples) for ranges in missing.values() for samples in ranges)
    if done < total:
        look = _Look(experiment, feature_net, shown_samples(labels, SHOWN_PER_CLASS), keep_images)
        with progress("sampling", total, done) as report_progress:
            for name, sampler in samplers.items():
                for size in _draw_missing(look, sampler, name, labels, missing[name], stores[name]):
                    done += size
                    report_progress(done, name)
    wait_for_all("samples")
    taps = outputs_in_use(feature_net) if feature_net is not None else []
    return {name: _join(stores[name], samplers[name], name, taps) for name in methods}


def images(drawn: Drawn) -> Iterator[NDArray[np.uint8]]:
    """The images of samples that were drawn with `keep_images`, block by block in order."""
    for block in drawn.store.read("images"):
        yield block["images"]


class _Look:
    """What is kept of a batch of samples: one compiled function over the mesh, and the host's part of its results."""

    def __init__(
        self, experiment: Experiment, feature_net: FeatureNet | None, shown: np.ndarray, keep_images: bool
    ) -> None:
        self.experiment = experiment
        self.shown = shown
        self.keep_images = keep_images
        mesh = experiment.mesh
        self._finite = jax.jit(_finite_rows, out_shardings=batch_sharding(mesh))
        self._by_row = jax.jit(lambda answers: jax.tree.map(jnp.transpose, answers), out_shardings=batch_sharding(mesh))
        self._features: Any = None
        if feature_net is not None:
            function = feature_function(feature_net)
            self._params = place(feature_net.params, replicated(mesh))
            self._features = row_by_row(lambda params, images: function(params, to_float(images)), mesh)

    def start(self, x: jax.Array, observations: Any) -> dict[str, Any]:
        """Begins the computation for samples `x` [B, ...]; returns arrays split over the mesh, by row."""
        images = self.experiment.decoder(x)
        started = {"finite": self._finite(x), "images": images}
        if self._features is not None:
            started |= {f"features/{tap}": values for tap, values in self._features(self._params, images).items()}
        if observations is not None:
            by_row = self._by_row(observations)
            started |= {"answers/mean": by_row.mean, "answers/variance": by_row.variance}
        return started

    def finish(self, started: dict[str, Any], samples: range, method: str) -> tuple[range, dict[str, NDArray]]:
        """This host's part of a batch: which samples it is of, and the arrays of a block."""
        (batch_size,) = started["finite"].shape
        own = local_rows(self.experiment.mesh, batch_size)
        own_samples = samples[own.start : own.stop] if holds_first_copy(started["finite"]) else samples[:0]
        arrays = {name: local_part(values)[: len(own_samples)] for name, values in started.items()}
        finite = arrays.pop("finite")
        if not finite.all():
            raise NagJaxError(
                f"Sample {own_samples[int(np.argmin(finite))]} of method {method!r} is not finite. Lower its guidance "
                "scale, or take more steps."
            )
        images = arrays["images"] if self.keep_images else arrays.pop("images")
        arrays["shown"] = images[np.isin(own_samples, self.shown)]
        return own_samples, arrays


def _draw_missing(
    look: _Look, sampler: Sampler, name: str, labels: np.ndarray, missing: list[range], store: SampleStore
) -> Iterator[int]:
    """Draws and writes what is missing of a method, and says how many samples after each batch.

    The devices begin a batch before the host fetches the one before it, so that neither waits for the other.
    """
    experiment = look.experiment
    sharding = batch_sharding(experiment.mesh)
    batch_size = sampling_batch_size(experiment.config, experiment.mesh)
    last = time.perf_counter()

    def write(started: dict[str, Any], samples: range) -> int:
        nonlocal last
        own_samples, arrays = look.finish(started, samples, name)
        now = time.perf_counter()
        if own_samples:
            # A batch's seconds are shared out among the hosts' blocks of it.
            arrays["seconds"] = np.array((now - last) * len(own_samples) / len(samples))
            store.write(own_samples.start, len(own_samples), arrays)
        last = now
        return len(samples)

    before: tuple[dict[str, Any], range] | None = None
    for samples in (part for each in missing for part in parts_of(each, batch_size)):
        # The last batch of a range is filled up with other samples, which are thrown away.
        indices = np.arange(samples.start, samples.start + batch_size) % len(labels)
        with jax.set_mesh(experiment.mesh):  # for `parallel.keep_rows_apart`
            drawn = sampler(name, labels[indices], seed=experiment.config.eval.seed, indices=indices, sharding=sharding)
        started = look.start(drawn.x, drawn.observations)
        if before is not None:
            yield write(*before)
        before = started, samples
    if before is not None:
        yield write(*before)


def _finite_rows(x: jax.Array) -> jax.Array:
    """Whether all numbers of a sample are finite, bool [B]."""
    return jnp.isfinite(x).reshape(len(x), -1).all(axis=1)


def _join(store: SampleStore, sampler: Sampler, name: str, taps: list[str]) -> Drawn:
    """What the blocks of a method hold, in the samples' order."""
    of_features = {tap: f"features/{tap}" for tap in taps}
    of_answers = ["answers/mean", "answers/variance"] if sampler.program.observer is not None else []
    blocks = list(store.read("shown", "seconds", *of_features.values(), *of_answers))

    def joined(array: str) -> NDArray:
        return np.concatenate([block[array] for block in blocks])

    return Drawn(
        store,
        joined("shown"),
        {tap: joined(array) for tap, array in of_features.items()},
        Answers(*(joined(array).T.astype(np.float64) for array in of_answers)) if of_answers else None,
        sampler.observed_times,
        sampler.evaluations_per_image[name],
        sampler.estimator_calls_per_image[name],
        float(sum(block["seconds"] for block in blocks)),
    )
