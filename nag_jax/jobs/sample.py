"""`--mode=sample`: draws samples of every method in `eval.methods` and keeps them with their conditions."""

from __future__ import annotations

from etils import epath

from nag_jax import storage
from nag_jax.config import Config
from nag_jax.jobs import evaluate
from nag_jax.jobs.drawing import draw, sample_labels
from nag_jax.jobs.estimators import prepare_guiding
from nag_jax.jobs.experiment import open_trained, sampling_conditions


def run(config: Config, workdir: epath.Path, checkpoint: epath.Path) -> epath.Path:
    """Samples a trained network; returns the folder samples/NAME with conditions.json, samples.png and samples.npz.

    Raises:
        UserError: the checkpoint cannot be read, or NAME holds samples of other conditions.
    """
    experiment, params, step = open_trained(config, workdir, checkpoint)
    methods = evaluate.make_methods(config)
    conditions = {"step": step, "checkpoint": str(checkpoint)} | sampling_conditions(experiment, methods)
    folder = workdir / "samples" / evaluate.folder_name(config, conditions)
    if evaluate.is_finished(folder, conditions, last_file="samples.npz"):
        return folder
    guiding = prepare_guiding(experiment, params, methods)
    drawn = draw(experiment, experiment.description.denoiser(params), methods, guiding=guiding)
    labels = sample_labels(experiment)
    storage.write_json(folder / "conditions.json", conditions)
    storage.write_bytes(folder / "samples.png", evaluate.grid(experiment, drawn))
    storage.write_bytes(folder / "samples.npz", evaluate.pack_samples(drawn, labels))
    return folder
