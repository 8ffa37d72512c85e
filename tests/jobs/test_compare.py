"""A grid of guidance weights on a trained network: complete, one program, and the evaluation's numbers."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from etils import epath

from nag_jax.config import CompareConfig, Config, SamplingConfig, from_config_dict
from nag_jax.diffusion.guidance import cfg, nag, plain
from nag_jax.diffusion.sampler import Program, Sampler
from nag_jax.errors import UserError
from nag_jax.findings import mean_absolute_shift
from nag_jax.jobs import compare, evaluate, methods

ROOT = Path(__file__).resolve().parent.parent.parent
# After six steps from zero only the parameters themselves, not yet their average, tell the branches apart.
COMPARE = ["--mode=compare", "--config.eval.name=mine", "--config.sampling.weights=params"]
FLAG = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # for GPUs; a CPU does not look at it
COMPARE.append("--config.compare.nag_scales=(0.0,0.5,2.0)")
# The smoke config's methods by their weights.
EVALUATED = {(1.0, 0.0): "plain", (1.5, 0.0): "cfg", (1.0, 0.5): "nag", (1.5, 0.5): "cfg+nag"}


class Compared(NamedTuple):
    """The folders of a comparison and of an evaluation under the same conditions, and the sampling programs of both."""

    folder: Path
    evaluation: Path
    programs: list[Program]


@pytest.fixture(scope="module")
def compared(finished: Path, runs, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """An evaluation and a comparison in a copy of the finished run, which other tests expect as it is."""
    workdir = epath.Path(tmp_path_factory.mktemp("compared") / "run")
    shutil.copytree(finished, workdir)
    values = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]("smoke")
    values.data.data_dir = str(runs.data_dir)
    values.eval.name = "mine"
    values.sampling.weights = "params"
    values.compare.nag_scales = (0.0, 0.5, 2.0)
    config, programs = from_config_dict(values), []

    class RecordedSampler(Sampler):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            programs.append(self.program)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*FLAG)
        patch.setattr(methods, "Sampler", RecordedSampler)
        evaluate.run(config, workdir, workdir)
        folder = compare.run(config, workdir, workdir)
    assert folder == workdir / "compare" / "mine"
    return Compared(Path(folder), Path(workdir / "eval" / "step_6" / "mine"), programs)


@pytest.fixture(scope="module")
def entries(compared: Compared) -> dict[tuple[float, float], dict[str, Any]]:
    content = json.loads((compared.folder / "compare.json").read_text())
    return {(entry["cfg_scale"], entry["nag_scale"]): entry for entry in content["entries"]}


def test_every_pair_of_weights_is_measured(compared: Compared, entries):
    assert set(entries) == {(cfg_scale, nag_scale) for cfg_scale in (1.0, 1.5) for nag_scale in (0.0, 0.5, 2.0)}
    assert {path.name for path in compared.folder.iterdir()} == {"conditions.json", "compare.json", "compare.png"}
    for folder in (compared.folder, compared.evaluation):
        assert json.loads((folder / "conditions.json").read_text())["compiler_flags"].items() >= {FLAG}
    assert (compared.folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    for (cfg_scale, nag_scale), entry in entries.items():
        # A branch that is off is not evaluated: 1, 2, 2 or 3 times the 5 evaluations of Heun's 3 steps.
        assert entry["evaluations_per_image"] == 5 * (1 + (cfg_scale != 1.0) + (nag_scale != 0.0))
        assert 0.0 <= entry["interval"][0] <= entry["interval"][1]
        size = entry["mean_absolute_shift"]
        assert size["estimate"] == pytest.approx(mean_absolute_shift(entry)) and size["low"] <= size["high"]
        difference = entry["difference_to_plain"]
        if (cfg_scale, nag_scale) == (1.0, 0.0):
            assert difference is None
        else:
            of_distances = entry["frechet_distance"] - entries[1.0, 0.0]["frechet_distance"]
            assert difference["value"] == pytest.approx(of_distances)
            assert difference["interval"][0] <= difference["interval"][1]
    # Every pair made states of its own.
    assert len({entry["mean_absolute_shift"]["estimate"] for entry in entries.values()}) == len(entries)


def test_the_same_weights_give_the_evaluation_s_numbers(compared: Compared, entries):
    metrics = json.loads((compared.evaluation / "metrics.json").read_text())
    noise_shift = json.loads((compared.evaluation / "noise_shift.json").read_text())
    for pair, name in EVALUATED.items():
        for key in ("frechet_distance", "interval", "evaluations_per_image"):
            assert entries[pair][key] == metrics["methods"][name][key], (name, key)
        assert entries[pair]["difference_to_plain"] == metrics["methods"][name].get("difference_to_plain")
        assert entries[pair]["shifts"] == noise_shift["methods"][name]["shifts"]
    content = json.loads((compared.folder / "compare.json").read_text())
    assert {key: content[key] for key in ("floor", "features", "num_samples", "num_reference")} == {
        key: metrics[key] for key in ("floor", "features", "num_samples", "num_reference")
    }


def test_a_finished_comparison_is_kept_and_its_name_is_refused_to_another(compared: Compared, runs):
    before = {path: path.stat().st_mtime_ns for path in compared.folder.iterdir()}
    workdir = compared.folder.parent.parent
    # The single weights of `sampling` take no part.
    output, _ = runs.finish(workdir, *COMPARE, "--config.sampling.nag_scale=3", "--config.sampling.cfg_scale=3")
    assert output.splitlines()[-1] == f"written: {compared.folder}"
    _, errors = runs.finish(workdir, *COMPARE, "--config.compare.cfg_scales=(1.0,4.0)", expect=2)
    assert "holds results under other conditions: methods differ" in errors
    assert {path: path.stat().st_mtime_ns for path in compared.folder.iterdir()} == before


def grid(**scales: tuple[float, ...]) -> Config:
    return Config(compare=CompareConfig(**scales))


def test_a_sweep_compiles_once(compared: Compared):
    """One program for six pairs of weights, and the same one that the evaluation with four methods had."""
    # Each job makes its samplers twice, first to refuse mistakes early.
    assert len(compared.programs) == 4 and len(set(compared.programs)) == 1


def test_methods_follow_the_config():
    sampling = SamplingConfig(cfg_interval=(0.1, 0.6), nag_interval=(0.2, 0.9), nag_null="posterior", guided_channels=3)
    config = dataclasses.replace(grid(nag_scales=(0.0, 0.5)), sampling=sampling)
    methods = {pair: compare.make_methods(config)[name] for name, pair in compare.weights(config).items()}
    guidance_tables = {pair: method.guidance.tables(np.linspace(0, 1, 11), 4) for pair, method in methods.items()}
    for (cfg_scale, nag_scale), tables in guidance_tables.items():
        expected = cfg(cfg_scale, interval=(0.1, 0.6), channels=3) + nag(
            nag_scale, null="posterior", interval=(0.2, 0.9), channels=3
        )
        np.testing.assert_equal(tables, expected.tables(np.linspace(0, 1, 11), 4))
    np.testing.assert_equal(guidance_tables[1.0, 0.0], plain().tables(np.linspace(0, 1, 11), 4))
    assert methods[1.0, 0.5].needs_estimator


def test_a_grid_without_weights_is_refused():
    assert list(compare.weights(grid(cfg_scales=(1.5,), nag_scales=(0.5,)))) == ["cfg 1.5 + nag 0.5"]
    with pytest.raises(UserError, match="at least one scale each"):
        compare.make_methods(grid(nag_scales=()))
