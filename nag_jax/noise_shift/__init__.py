"""The noise shift: its formulas, the estimator that judges noise levels, and the measurement on samplers.

    estimator = make_estimator(model, train_estimator(model, trunk_params, process, batches, config, seed=0))
    shifts = measure(denoiser, estimator, held_out_images, held_out_labels, guidances={"nag": nag(1.0)})
    noise_shift_figure(shifts)

Everything public of the package can be had from here; a name is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nag_jax.noise_shift.answers import AnswerObserver, Answers, forward_answers
    from nag_jax.noise_shift.calibration import Calibration, calibrate
    from nag_jax.noise_shift.estimator import (
        EstimatorConfig,
        estimator_seed,
        image_batches,
        make_estimator,
        train_estimator,
    )
    from nag_jax.noise_shift.figure import noise_shift_figure
    from nag_jax.noise_shift.measurement import NoiseShift, compare_answers, measure
    from nag_jax.noise_shift.store import estimator_conditions, load_estimator, save_estimator

_MODULES = {
    "answers": ("AnswerObserver", "Answers", "forward_answers"),
    "calibration": ("Calibration", "calibrate"),
    "estimator": ("EstimatorConfig", "estimator_seed", "image_batches", "make_estimator", "train_estimator"),
    "figure": ("noise_shift_figure",),
    "measurement": ("NoiseShift", "compare_answers", "measure"),
    "store": ("estimator_conditions", "load_estimator", "save_estimator"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AnswerObserver",
    "Answers",
    "Calibration",
    "EstimatorConfig",
    "NoiseShift",
    "calibrate",
    "compare_answers",
    "estimator_conditions",
    "estimator_seed",
    "forward_answers",
    "image_batches",
    "load_estimator",
    "make_estimator",
    "measure",
    "noise_shift_figure",
    "save_estimator",
    "train_estimator",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
