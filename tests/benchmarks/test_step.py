"""The benchmark of the step: what it derives from times, how it survives failures, and a run at a tiny size."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nag_jax.errors import UserError
from nag_jax.flops import dit_forward, dit_training
from nag_jax.models.dit import ModelConfig

ROOT = Path(__file__).parents[2]
MODULES = ("step", "step_variants", "step_jax")
H100 = {"kind": "NVIDIA H100 80GB HBM3", "matmul_flops_per_second": 700e12}
TINY_MODEL = ModelConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, learn_sigma=True)
TINY_SHAPE = (8, 8, 4)


@pytest.fixture(scope="module")
def step():
    """benchmarks/step.py as a module; it imports its neighbours by name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("step")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny(step):
    return step.SIZES["tiny"]


# What follows from times


def test_peaks_are_those_of_the_device(step):
    assert step.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert step.peak_flops("TPU v5 lite") == 197e12 and step.peak_flops("TPU v5p") == step.peak_flops("TPU v5")
    assert step.peak_flops("cpu") is None


def test_training_rates(step, tiny):
    variant = step.Variant("jax", "train", 4, {})
    found = step.with_rates(tiny, variant, {"seconds_per_step": 0.5}, H100)
    assert found["images_per_second"] == 8.0
    assert found["of_peak"] == pytest.approx(8 * dit_training(TINY_MODEL, TINY_SHAPE) / 989.4e12)
    assert found["of_matmul"] == pytest.approx(8 * dit_training(TINY_MODEL, TINY_SHAPE) / 700e12)
    assert "of_peak" not in step.with_rates(tiny, variant, {"seconds_per_step": 0.5}, {**H100, "kind": "cpu"})


def test_sampling_rates(step, tiny):
    times = {
        "plain": {"seconds_per_row": 0.5, "evaluations_per_row": 1.0},
        "cfg": {"seconds_per_row": 0.75, "evaluations_per_row": 2.0},
    }
    found = step.with_rates(tiny, step.Variant("jax", "sample", 2, {}), {"guidances": times}, H100)["guidances"]
    assert (found["plain"]["ratio_to_plain"], found["cfg"]["ratio_to_plain"]) == (1.0, 1.5)
    assert found["plain"]["of_peak"] == pytest.approx(4 * dit_forward(TINY_MODEL, TINY_SHAPE) / 989.4e12)
    assert found["cfg"]["of_peak"] == pytest.approx(found["plain"]["of_peak"] * 2 / 1.5)


def test_the_summary_compares_the_best_of_both_and_forgets_failures(step):
    def variant(framework, job, result):
        return {"framework": framework, "job": job, "result": result}

    def sampling(seconds):
        return {"guidances": {"cfg": {"seconds_per_row": seconds}}}

    variants = [
        variant("jax", "train", {"error": "out of memory"}),
        variant("jax", "train", {"images_per_second": 3.0}),
        variant("jax", "train", {"images_per_second": 6.0}),
        variant("jax", "sample", sampling(2.0)),
        variant("torch", "sample", sampling(3.0)),
        variant("torch", "sample", {"error": "no"}),
    ]
    summary = step.summarize(variants)
    assert summary["jax train"] is variants[2] and "torch train" not in summary
    assert "train: times as fast as torch" not in summary
    assert summary["sample: times as fast as torch"] == 1.5


# Workers


def test_a_worker_takes_what_needs_no_other_process(step):
    kinds = [("jax", "train", ""), ("jax", "train", ""), ("jax", "train", "--f"), ("torch", "train", "")]
    variants = tuple(step.Variant(framework, job, 1, {}, flags) for framework, job, flags in kinds)
    assert step.next_group(variants, [0, 1, 2, 3]) == [0, 1]
    assert step.next_group(variants, [1, 2, 3]) == [1]
    assert step.next_group(variants, [2, 3]) == [2]


def test_reports_of_workers_that_end_die_and_hang(step):
    def reports(program, seconds=60.0):
        return list(step.reports([sys.executable, "-c", program], "--some_flag", seconds))

    told = f"import os; print('noise'); print({step.MARK!r} + '{{\"flags\": \"' + os.environ['XLA_FLAGS'] + '\"}}')"
    (only,) = reports(told.replace("{{", "{").replace("}}", "}"))
    assert only["flags"].endswith("--some_flag")
    (died,) = reports("import sys; sys.exit('the device is lost')")
    assert "code 1" in died["result"]["error"] and "the device is lost" in died["result"]["error"]
    (hung,) = reports("import time; time.sleep(60)", seconds=0.5)
    assert "code -9" in hung["result"]["error"]


def run_with(step, monkeypatch, output, budget_seconds, failing=None):
    """`run` at the tiny size with workers that answer at once; returns what is written, and the workers' shares."""
    shares = []

    def reports(command, xla_flags, variant_seconds):
        given = dict(part.removeprefix("--").split("=", 1) for part in command[2:])
        indices = [int(index) for index in given["indices"].split(",")]
        shares.append(indices)
        yield {"environment": {"of": given["worker"]}, "device": H100}
        for index in indices:
            yield {"started": index}
            if index == failing:
                yield {"result": {"error": "out of memory"}}
                return
            row = {"seconds_per_row": 1.0, "evaluations_per_row": 1.0}
            is_training = step.SIZES["tiny"].variants[index].job == "train"
            yield {"result": {"seconds_per_step": 1.0} if is_training else {"guidances": {"plain": row, "cfg": row}}}

    monkeypatch.setattr(step, "reports", reports)
    content = step.run("tiny", output, budget_seconds, variant_seconds=60.0)
    assert json.loads(output.read_text()) == json.loads(json.dumps(content))
    return content, shares


def test_a_failing_variant_is_recorded_and_the_rest_goes_on(step, tiny, monkeypatch, tmp_path):
    content, shares = run_with(step, monkeypatch, tmp_path / "step.json", 60.0, failing=0)
    assert [share[0] for share in shares] == [0, 1, 2, 3, 4, 5]
    assert [variant["result"].get("error") for variant in content["variants"]] == ["out of memory"] + 5 * [None]
    for variant, wanted in zip(content["variants"], tiny.variants, strict=True):
        assert {name: variant[name] for name in dataclasses.asdict(wanted)} == dataclasses.asdict(wanted)
    assert content["not_measured"] == [] and content["environment"] == {"jax": {"of": "jax"}, "torch": {"of": "torch"}}


def test_nothing_is_started_when_the_budget_is_spent(step, tiny, monkeypatch, tmp_path):
    content, shares = run_with(step, monkeypatch, tmp_path / "step.json", budget_seconds=0.0)
    assert shares == [] and content["variants"] == [] and content["summary"] == {}
    assert content["not_measured"] == [step.label(variant) for variant in tiny.variants]


# Measurements


def test_our_side_measures_training(step, tiny):
    step_jax = importlib.import_module("step_jax")
    size = dataclasses.replace(tiny, steps=1, repeats=1)
    measured = step_jax.measure(size, step.Variant("jax", "train", 4, {"scan_blocks": False}))
    assert measured["seconds_per_step"] > 0
    assert measured["images_per_second"] == pytest.approx(4 / measured["seconds_per_step"])
    memory = measured["compiler_memory_bytes"]
    assert 0 < memory["alias"] <= memory["argument"]
    with pytest.raises(UserError, match="cudnn"):
        step_jax.measure(size, tiny.variants[-1])


@pytest.mark.slow
@pytest.mark.slow_sample
@pytest.mark.parity
def test_a_tiny_run_measures_both_sides(tiny, tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "step.json"
    command = [sys.executable, "benchmarks/step.py", "--size=tiny", f"--output={output}", "--budget_seconds=300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    content = json.loads(output.read_text())
    assert set(content["environment"]) == set(content["devices"]) == {"jax", "torch"}
    assert content["not_measured"] == [] and len(content["variants"]) == len(tiny.variants)
    *measured, refused = content["variants"]
    assert "cudnn" in refused["result"]["error"] and not any("error" in variant["result"] for variant in measured)
    (sampling,) = (v["result"] for v in measured if (v["framework"], v["job"]) == ("jax", "sample"))
    evaluations = {name: times["evaluations_per_row"] for name, times in sampling["guidances"].items()}
    assert evaluations == {"plain": 1.0, "cfg": 2.0, "nag": 2.0, "cfg+nag": 3.0}
    assert {"train: times as fast as torch", "sample: times as fast as torch"} <= set(content["summary"])
