"""The noise shift: its formulas, the estimator that judges noise levels, and the measurement on samplers.

    estimator, calibration = load("runs/digits")
    shifts = measure(denoiser, estimator, images, labels, guidances={"nag": nag(1.0)}, calibration=calibration)
    noise_shift_figure(shifts)

Everything public of the package can be had from here; a name is imported when it is first asked for. `load` is
`nag_jax.loading`'s: it reads folders of trained networks, which nothing in this package does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nag_jax.loading import load_measuring_estimator as load
    from nag_jax.noise_shift.answers import AnswerObserver, Answers, forward_answers
    from nag_jax.noise_shift.calibration import Calibration, calibrate
    from nag_jax.noise_shift.control import matched_images
    from nag_jax.noise_shift.difference import SizeDifference, paired_size_difference, shift_differences
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
    "control": ("matched_images",),
    "difference": ("SizeDifference", "paired_size_difference", "shift_differences"),
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
    "SizeDifference",
    "calibrate",
    "compare_answers",
    "estimator_conditions",
    "estimator_seed",
    "forward_answers",
    "image_batches",
    "load",
    "load_estimator",
    "make_estimator",
    "matched_images",
    "measure",
    "noise_shift_figure",
    "paired_size_difference",
    "save_estimator",
    "shift_differences",
    "train_estimator",
]


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("nag_jax.loading").load_measuring_estimator
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
