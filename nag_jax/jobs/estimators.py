"""The noise-level estimators of a work folder: trained once for a network, then read back while it is the same.

One measures; another, trained with another seed, guides the methods that need one. NAG is not graded by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from nag_jax.data.pipeline import make_batches
from nag_jax.denoiser import Params
from nag_jax.diffusion.process import make_process
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import UserError
from nag_jax.hosts import check_same, is_first
from nag_jax.jobs.experiment import Experiment, TrainedNetwork
from nag_jax.jobs.methods import Method
from nag_jax.models.noise_estimator import NoiseEstimator, build_estimator
from nag_jax.noise_shift.answers import Answers, forward_answers
from nag_jax.noise_shift.calibration import Calibration, calibrate
from nag_jax.noise_shift.control import matched_images
from nag_jax.noise_shift.estimator import Role, estimator_seed, make_estimator, train_estimator
from nag_jax.noise_shift.store import estimator_conditions, load_estimator, save_estimator
from nag_jax.parallel import to_host
from nag_jax.params_hash import params_hash
from nag_jax.progress import progress
from nag_jax.training.step import batch_states


class Measuring(NamedTuple):
    """The estimator that measures.

    Attributes:
        estimator: the trained posterior.
        calibration: its mean answers on held-out data.
        fingerprint: hash of its parameters.
    """

    estimator: Estimator
    calibration: Calibration
    fingerprint: str

    def forward(self, experiment: Experiment, times: np.ndarray, sample_labels: np.ndarray) -> Answers:
        """Its answers on forward states of held-out images at each of `times`, the control of samples.

        Args:
            experiment: config and data.
            times: [T].
            sample_labels: of the samples; the images get the same ones, see `matched_images`.

        Returns:
            Answers [T, M], of M <= `noise_shift.num_forward` different images.

        Raises:
            UserError: fewer than two images match.
        """
        states, labels = experiment.eval_states
        limit = experiment.config.noise_shift.num_forward
        control = states[matched_images(sample_labels, labels, limit)]
        process = make_process(experiment.description.process)
        return forward_answers(self.estimator, process, control, times, seed=experiment.config.eval.seed)


def prepare_measuring(experiment: Experiment, network: TrainedNetwork) -> Measuring:
    """The estimator that measures the noise shift of `network`. Raises UserError where there are no times for it."""
    if not experiment.config.noise_shift.times:
        raise UserError("noise_shift.times names no time to measure the noise shift at. Give at least one.")
    estimator, calibration = prepare(experiment, network, "measure")
    assert calibration is not None
    return Measuring(estimator, calibration, params_hash(to_host(estimator.params)))


def prepare_guiding(
    experiment: Experiment, network: TrainedNetwork, methods: Mapping[str, Method]
) -> Estimator | None:
    """The estimator that guides, or None if no method needs one."""
    if not any(method.needs_estimator for method in methods.values()):
        return None
    return prepare(experiment, network, "guide")[0]


def prepare(experiment: Experiment, network: TrainedNetwork, role: Role) -> tuple[Estimator, Calibration | None]:
    """Reads the estimator of `role` from estimator/, or trains and keeps it; the one that measures is calibrated too.

    One that is the same but for its calibration, which depends on the held-out images, is calibrated anew only.
    """
    config = experiment.config
    process = make_process(experiment.description.process)
    model = build_estimator(experiment.description.network())
    reference = {
        "reference": experiment.eval_source.fingerprint,
        "num_images": min(len(experiment.eval_source), config.eval.num_reference),
        "seed": config.eval.seed,
    }
    conditions = estimator_conditions(
        model,
        network.fingerprint,
        process,
        config.estimator,
        estimator_seed(config.seed, role),
        training_data={"fingerprint": experiment.train_source.fingerprint, "random_flip": config.data.random_flip},
        calibration=reference if role == "measure" else None,
    )
    folder = experiment.workdir / "estimator"
    stored = load_estimator(folder, role, conditions)
    state = "missing" if stored is None else "not calibrated" if stored[1] is None else "complete"
    check_same(f"estimator in {folder}", state)  # before the first host writes one
    if stored is not None and (stored[1] is not None or role == "guide"):
        return make_estimator(model, experiment.place(stored[0])), stored[1]

    start = time.perf_counter()
    trained = stored[0] if stored is not None else to_host(_train(experiment, network.params, role, model))
    # Devices that add up in no fixed order give each process another one, by rounding: the first one's counts.
    host_params = multihost_utils.broadcast_one_to_all(trained)
    estimator = make_estimator(model, experiment.place(host_params))
    calibration = None
    if role == "measure":
        calibration = calibrate(estimator, process, experiment.eval_states[0], seed=config.eval.seed)
    if is_first():
        save_estimator(folder, role, host_params, calibration, conditions)
    experiment.add_seconds(**{f"estimator ({role})": time.perf_counter() - start})
    return estimator, calibration


def _train(experiment: Experiment, params: Params, role: Role, model: NoiseEstimator) -> Params:
    config = experiment.config
    seed = estimator_seed(config.seed, role)
    with progress(f"noise-level estimator ({role})", config.estimator.num_steps) as report_progress:
        return train_estimator(
            model,
            params,
            make_process(experiment.description.process),
            _training_states(experiment, seed),
            config.estimator,
            seed=seed,
            progress=lambda step, loss: report_progress(step, f"loss {loss:.3f}"),
        )


def _training_states(experiment: Experiment, seed: int) -> Iterator[np.ndarray]:
    """x_0 of training data, a batch for each step of the estimator's training."""
    batches = make_batches(
        experiment.train_source,
        experiment.config.data,
        batch_size=experiment.config.estimator.batch_size,
        seed=seed,
        start_step=0,
    )
    run_key = jax.random.key(seed, impl="threefry2x32")
    for step, batch in enumerate(batches):
        yield np.asarray(batch_states(batch, experiment.description.latent, run_key, step))
