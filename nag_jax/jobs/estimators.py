"""The noise-level estimators of a work folder: trained once for a network, then read back while it is the same.

One measures; another, trained with another seed, guides the methods that need one. NAG is not graded by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from nag_jax.data.pipeline import make_batches
from nag_jax.denoiser import Params
from nag_jax.diffusion.process import make_process
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.jobs.experiment import Experiment
from nag_jax.jobs.methods import Method
from nag_jax.models.noise_estimator import build_estimator
from nag_jax.noise_shift.answers import Answers, forward_answers
from nag_jax.noise_shift.calibration import Calibration, calibrate
from nag_jax.noise_shift.estimator import Role, estimator_seed, make_estimator, train_estimator
from nag_jax.noise_shift.store import estimator_conditions, load_estimator, save_estimator
from nag_jax.params_hash import params_hash
from nag_jax.progress import progress


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

    def forward(self, experiment: Experiment, times: np.ndarray) -> Answers:
        """Its answers on `noise_shift.num_forward` held-out forward states at each of `times`."""
        images = experiment.eval_arrays[0]
        repeated = np.resize(images, (experiment.config.noise_shift.num_forward, *images.shape[1:]))
        process = make_process(experiment.description.process)
        return forward_answers(self.estimator, process, repeated, times, seed=experiment.config.eval.seed)


def prepare_measuring(experiment: Experiment, params: Params) -> Measuring:
    """The estimator that measures the noise shift of the network with `params`."""
    estimator, calibration = prepare(experiment, params, "measure")
    return Measuring(estimator, calibration, params_hash(jax.device_get(estimator.params)))


def prepare_guiding(experiment: Experiment, params: Params, methods: Mapping[str, Method]) -> Estimator | None:
    """The estimator that guides, or None if no method needs one."""
    if not any(method.needs_estimator for method in methods.values()):
        return None
    return prepare(experiment, params, "guide")[0]


def prepare(experiment: Experiment, params: Params, role: Role) -> tuple[Estimator, Calibration]:
    """Reads the estimator of `role` from estimator/, or trains, calibrates and keeps it."""
    config = experiment.config
    process = make_process(experiment.description.process)
    model = build_estimator(experiment.description.network())
    seed = estimator_seed(config.seed, role)
    conditions = estimator_conditions(model, params_hash(jax.device_get(params)), process, config.estimator, seed)
    folder = experiment.workdir / "estimator"
    stored = load_estimator(folder, role, conditions)
    if stored is not None:
        return make_estimator(model, experiment.place(stored[0])), stored[1]

    start = time.perf_counter()
    with progress(f"noise-level estimator ({role})", config.estimator.num_steps) as report_progress:
        trained = train_estimator(
            model,
            params,
            process,
            _training_images(experiment, seed),
            config.estimator,
            seed=seed,
            progress=lambda step, loss: report_progress(step, f"loss {loss:.3f}"),
        )
    estimator = make_estimator(model, trained)
    calibration = calibrate(estimator, process, experiment.eval_arrays[0], seed=config.eval.seed)
    save_estimator(folder, role, trained, calibration, conditions)
    experiment.add_seconds(**{f"estimator ({role})": time.perf_counter() - start})
    return estimator, calibration


def _training_images(experiment: Experiment, seed: int) -> Iterator[np.ndarray]:
    batches = make_batches(
        experiment.train_source,
        experiment.config.data,
        batch_size=experiment.config.estimator.batch_size,
        seed=seed,
        start_step=0,
    )
    return (batch["image"] for batch in batches)
