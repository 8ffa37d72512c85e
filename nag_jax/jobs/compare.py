"""`--mode=compare`: one trained network under a grid of guidance weights, an ablation of NAG's w with and without CFG.

Every pair of weights is sampled on the same noise and labels, by one compiled program, for weights are data. What is
measured is what `evaluate.py` measures; here it is put beside the weights.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from etils import epath

from nag_jax import storage
from nag_jax.config import Config
from nag_jax.errors import UserError
from nag_jax.figures import compare_figure
from nag_jax.hosts import is_first
from nag_jax.jobs import results
from nag_jax.jobs.drawing import draw
from nag_jax.jobs.estimators import prepare_guiding, prepare_measuring
from nag_jax.jobs.experiment import open_trained
from nag_jax.jobs.methods import Method, make_method
from nag_jax.noise_shift.measurement import NoiseShift


def run(config: Config, workdir: epath.Path, checkpoint: epath.Path) -> epath.Path:
    """Compares guidance weights; returns the folder compare/NAME with conditions.json, compare.json and compare.png.

    Raises:
        UserError: the checkpoint cannot be read, the grid is empty, or NAME holds a comparison under other conditions.
    """
    methods = make_methods(config)
    experiment, network = open_trained(config, workdir, checkpoint, methods, needs_data=True)
    measuring = prepare_measuring(experiment, network)
    guiding = prepare_guiding(experiment, network, methods)
    judge = results.prepare_judge(experiment)
    conditions = results.sampling_conditions(experiment, network, methods, guiding)
    conditions |= results.measuring_conditions(experiment, judge, measuring)
    # The grid's weights stand in "methods"; those of the config are not used.
    for unused in ("cfg_scale", "nag_scale"):
        del conditions["sampling"][unused]
    folder = workdir / "compare" / results.folder_name(config, conditions)
    if results.is_finished(folder, conditions, last_file="compare.json"):
        return folder

    results.begin(folder, conditions)
    drawn = draw(
        experiment,
        network,
        methods,
        folder / results.BLOCKS,
        feature_net=judge.feature_net,
        measuring=measuring.estimator,
        guiding=guiding,
    )
    distances, _ = results.measure_distances(experiment, methods, drawn, judge, folder, with_other_metrics=False)
    shifts = results.measure_shifts(experiment, drawn, measuring)
    if is_first():
        comparison = storage.as_json(make_comparison(weights(config), distances, shifts))
        storage.write_bytes(folder / "compare.png", compare_figure(comparison))
        storage.write_json(folder / "compare.json", comparison)
    results.finish(folder)
    return folder


def weights(config: Config) -> dict[str, tuple[float, float]]:
    """Every (cfg_scale, nag_scale) of `config.compare` by its name, "plain" where both are off.

    Raises:
        UserError: one of the lists is empty.
    """
    grid = config.compare
    if not grid.cfg_scales or not grid.nag_scales:
        raise UserError("config.compare.cfg_scales and config.compare.nag_scales need at least one scale each.")
    pairs = itertools.product(grid.cfg_scales, grid.nag_scales)
    return {"plain" if pair == (1.0, 0.0) else f"cfg {pair[0]} + nag {pair[1]}": pair for pair in pairs}


def make_methods(config: Config) -> dict[str, Method]:
    """CFG + NAG with every pair of weights, with the intervals, null branch and channels of `config.sampling`."""
    return {
        name: make_method("cfg+nag", dataclasses.replace(config.sampling, cfg_scale=cfg_scale, nag_scale=nag_scale))
        for name, (cfg_scale, nag_scale) in weights(config).items()
    }


def make_comparison(
    grid: Mapping[str, tuple[float, float]], distances: Mapping[str, Any], shifts: Mapping[str, NoiseShift]
) -> dict[str, Any]:
    """The content of compare.json: an entry for each pair of weights, and what the distances are to be read beside.

    Args:
        grid: name to (cfg_scale, nag_scale).
        distances: see `results.measure_distances`.
        shifts: by name.
    """
    entries = []
    for name, (cfg_scale, nag_scale) in grid.items():
        measured = distances["methods"][name]
        entries.append(
            {
                "cfg_scale": cfg_scale,
                "nag_scale": nag_scale,
                "evaluations_per_image": measured["evaluations_per_image"],
                "frechet_distance": measured["frechet_distance"],
                "interval": measured["interval"],
                # None for plain sampling itself, and everywhere if the grid is without it.
                "difference_to_plain": measured.get("difference_to_plain"),
                "mean_absolute_shift": shifts[name].mean_absolute_shift.to_json(),
                "shifts": shifts[name].to_json()["shifts"],
            }
        )
    return {"entries": entries} | {key: value for key, value in distances.items() if key != "methods"}
