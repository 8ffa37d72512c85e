"""`--mode=noise_shift`: measures the noise shift of every method in `eval.methods`, and nothing else."""

from __future__ import annotations

from etils import epath

from nag_jax import storage
from nag_jax.config import Config
from nag_jax.hosts import is_first
from nag_jax.jobs import results
from nag_jax.jobs.drawing import draw
from nag_jax.jobs.estimators import prepare_guiding, prepare_measuring
from nag_jax.jobs.evaluate import make_methods
from nag_jax.jobs.experiment import open_trained
from nag_jax.noise_shift.figure import noise_shift_figure


def run(config: Config, workdir: epath.Path, checkpoint: epath.Path) -> epath.Path:
    """Measures a trained network; returns the folder noise_shift/NAME with conditions.json, noise_shift.json and .png.

    Raises:
        UserError: the checkpoint cannot be read, or NAME holds a measurement under other conditions.
    """
    methods = make_methods(config)
    experiment, network = open_trained(config, workdir, checkpoint, methods, needs_data=True)
    measuring = prepare_measuring(experiment, network)
    guiding = prepare_guiding(experiment, network, methods)
    conditions = results.sampling_conditions(experiment, network, methods, guiding) | results.shift_conditions(
        experiment, measuring
    )
    folder = workdir / "noise_shift" / results.folder_name(config, conditions)
    if results.is_finished(folder, conditions, last_file="noise_shift.json"):
        return folder
    results.begin(folder, conditions)
    drawn = draw(
        experiment, network, methods, folder / results.BLOCKS, measuring=measuring.estimator, guiding=guiding
    )
    shifts = results.measure_shifts(experiment, drawn, measuring)
    if is_first():
        storage.write_bytes(folder / "noise_shift.png", noise_shift_figure(shifts))
        storage.write_json(folder / "noise_shift.json", results.shifts_to_json(experiment, shifts, measuring))
    results.finish(folder)
    return folder
