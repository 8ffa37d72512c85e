"""`--mode=noise_shift`: measures the noise shift of every method in `eval.methods`, and nothing else."""

from __future__ import annotations

from etils import epath

from nag_jax import storage
from nag_jax.config import Config, to_dict
from nag_jax.jobs import evaluate
from nag_jax.jobs.drawing import draw
from nag_jax.jobs.estimators import prepare_guiding, prepare_measuring
from nag_jax.jobs.experiment import open_trained, sampling_conditions
from nag_jax.noise_shift.figure import noise_shift_figure


def run(config: Config, workdir: epath.Path, checkpoint: epath.Path) -> epath.Path:
    """Measures a trained network; returns the folder noise_shift/NAME with conditions.json, noise_shift.json and .png.

    Raises:
        UserError: the checkpoint cannot be read, or NAME holds a measurement under other conditions.
    """
    experiment, params, step = open_trained(config, workdir, checkpoint)
    methods = evaluate.make_methods(config)
    measuring = prepare_measuring(experiment, params)
    conditions = {
        "step": step,
        "checkpoint": str(checkpoint),
        "noise_shift": to_dict(config.noise_shift) | {"estimator": measuring.fingerprint},
        "reference": experiment.eval_source.fingerprint,
        "num_reference": len(experiment.eval_arrays[0]),
    } | sampling_conditions(experiment, methods)
    folder = workdir / "noise_shift" / evaluate.folder_name(config, conditions)
    if evaluate.is_finished(folder, conditions, last_file="noise_shift.json"):
        return folder
    guiding = prepare_guiding(experiment, params, methods)
    denoiser = experiment.description.denoiser(params)
    drawn = draw(experiment, denoiser, methods, measuring=measuring.estimator, guiding=guiding)
    shifts = evaluate.measure_shifts(experiment, drawn, measuring)
    storage.write_json(folder / "conditions.json", conditions)
    storage.write_bytes(folder / "noise_shift.png", noise_shift_figure(shifts))
    storage.write_json(folder / "noise_shift.json", evaluate.shifts_to_json(shifts))
    return folder
