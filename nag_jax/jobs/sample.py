"""`--mode=sample`: draws samples of every method in `eval.methods` and keeps them with their conditions."""

from __future__ import annotations

from etils import epath

from nag_jax.config import Config
from nag_jax.hosts import is_first
from nag_jax.jobs import results
from nag_jax.jobs.drawing import draw
from nag_jax.jobs.estimators import prepare_guiding
from nag_jax.jobs.evaluate import make_methods
from nag_jax.jobs.experiment import open_trained


def run(config: Config, workdir: epath.Path, checkpoint: epath.Path) -> epath.Path:
    """Samples a trained network; returns the folder samples/NAME with conditions.json, samples.png and the samples.

    Raises:
        UserError: the checkpoint cannot be read, or NAME holds samples of other conditions.
    """
    methods = make_methods(config)
    experiment, network = open_trained(config, workdir, checkpoint, methods, needs_data=False)
    guiding = prepare_guiding(experiment, network, methods)
    conditions = results.sampling_conditions(experiment, network, methods, guiding)
    folder = workdir / "samples" / results.folder_name(config, conditions)
    if results.is_finished(folder, conditions, last_file=results.sample_files(methods)[-1]):
        return folder
    results.begin(folder, conditions)
    drawn = draw(experiment, network, methods, folder / results.BLOCKS, guiding=guiding, keep_images=True)
    if is_first():
        results.write_pictures(experiment, drawn, folder)
        results.write_samples(experiment, drawn, folder)
    results.finish(folder)
    return folder
