"""docs/pods.md: its hours are those of the planner's table, and its settings are those of the scripts and configs."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nag_jax import flops
from nag_jax.config import from_config_dict
from nag_jax.jobs.methods import make_method
from nag_jax.models.vae import VaeConfig

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/pods.md").read_text()
CELLS = json.loads((ROOT / "results/plan_tpu.json").read_text())["cells"]


def config(options: str) -> Any:
    return runpy.run_path(str(ROOT / "configs/imagenet256.py"))["get_config"](options)


@pytest.mark.parametrize(("machine", "fsdp"), [("v4-8", 4), ("v5e-16", 16), ("v6e-16", 1), ("v6e-16", 16)])
def test_hours_of_training_are_steps_times_the_roofline_time_of_a_step(machine: str, fsdp: int):
    cell = CELLS[f"training XL/2 {machine} fsdp {fsdp}"]
    tuned, scratch = config("sit_xl2,nag,finetune"), config("sit_xl2,nag")
    assert cell["batch_size"] == tuned.batch_size == scratch.batch_size
    bounds = (cell["roofline"]["seconds"], cell["roofline"]["seconds_without_overlap"])
    hours = [" to ".join(f"{c.num_steps * bound / 3600:.1f}" for bound in bounds) for c in (tuned, scratch)]
    assert f"| {machine} | {fsdp} | {hours[0]} | {hours[1]} |" in TEXT
    assert f"{tuned.num_steps:,} steps" in TEXT and f"{scratch.num_steps:,} steps" in TEXT


def evaluations_of(methods: tuple[str, ...]) -> dict[str, int]:
    """Network evaluations a step by method, where all guidance is on."""
    sampling = from_config_dict(config("sit_xl2,nag")).sampling
    return {name: len(make_method(name, sampling).guidance.branches) for name in methods}


def test_hours_of_sampling_are_those_of_each_runs_methods():
    """The cell is of CFG + NAG with all parameters on every chip, as step 5 samples."""
    cell = CELLS["sampling XL/2 v5e-16 fsdp 1"]
    assert cell["batch_size"] == config("sit_xl2").sampling.batch_size
    runs = [config(options).eval.methods for options in ("sit_xl2,nag,finetune", "sit_xl2,finetune")]
    nag, control = (evaluations_of(methods) for methods in runs)
    assert " + ".join(map(str, nag.values())) in TEXT and set(control) == {"plain", "cfg"}
    hour = 50_000 / cell["batch_size"] * cell["roofline"]["seconds"] / nag["cfg+nag"] / 3600
    hours = [f"{sum(each.values()) * hour:.1f}" for each in (nag, control)]
    assert f"{hours[0]} for NAG's four and {hours[1]} for the control's two on v5e-16" in TEXT
    assert len(nag) == 4 and len(control) == 2
    assert f"{cell['roofline']['seconds']:.1f} s at best for 64 images" in TEXT


def test_minutes_lost_to_a_stop_are_those_between_two_checkpoints():
    line, every = CELLS["training XL/2 v5e-16 fsdp 16"]["roofline"], config("sit_xl2,nag").checkpoint.every_steps
    least, most = (every * line[key] / 60 for key in ("seconds", "seconds_without_overlap"))
    assert re.search(rf"\({every:,}\) steps back: {least:.0f} to {most:.0f} minutes", TEXT)


STAND_INS = """
gcloud() { :; }
pip() { :; }
python() { printf 'python|%s|%s\\n' "${LIBTPU_INIT_ARGS:-}" "$*"; }
pod() { ./launch/tpu_pod.sh "$1" --dry-run "${@:2}"; }
"""


class Run(NamedTuple):
    """A run that tpu_pod.sh would start: the slice, and what the workers' shell would read."""

    name: str
    words: list[str]


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What the steps print where gcloud does nothing and tpu_pod.sh only says what it would run.

    After the last step come, as it says, those of steps 4 and 5 again, from the first call of the script on.
    """
    steps = TEXT[TEXT.index("## The steps") :].split("```bash\n")[1].split("```")[0]
    again = steps[steps.index("./launch/tpu_pod.sh all") : steps.index("# 6.")]
    lines = (steps + again).replace("./launch/tpu_pod.sh", "pod").replace("./launch/gpu_node.sh", "python")
    environment = {"PATH": "/usr/bin:/bin"}
    command = ["bash", "-euc", STAND_INS + lines]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def runs(printed: list[str]) -> list[Run]:
    commands = [shlex.split(line) for line in printed if "launch/local.sh" in line]
    return [Run(words[5], shlex.split(words[-1].removeprefix("--command="))) for words in commands]


def test_each_of_the_two_networks_is_trained_and_judged_in_its_own_folder_on_its_own_slice(runs: list[Run]):
    expected = [("nag", "sit_xl2,nag,finetune")] * 2 + [("control", "sit_xl2,finetune")] * 2
    for run, (name, options) in zip(runs, expected, strict=True):
        assert run.name == name
        assert f"--config=configs/imagenet256.py:{options}" in run.words
        assert f"--workdir=gs://my-bucket/runs/{name}" in run.words
        assert "JAX_COMPILATION_CACHE_DIR=gs://my-bucket/compiled;" in run.words
    assert ["--mode=evaluate" in run.words for run in runs] == [False, True, False, True]


def test_the_commands_have_the_meshes_of_the_tables(runs: list[Run]):
    """Training with fsdp over the sixteen chips; sampling without."""
    for run in runs:
        assert ("--config.parallel.fsdp=16" in run.words) == ("--mode=evaluate" not in run.words)


def test_every_slice_that_is_asked_for_is_deleted(printed: list[str]):
    calls = [shlex.split(line) for line in printed if " queued-resources " in line]
    made, deleted = ([call[5] for call in calls if call[4] == what] for what in ("create", "delete"))
    assert made == deleted == ["nag", "control"]


def test_it_is_planned_with_the_flags_that_runs_have(printed: list[str]):
    (planned,) = [line.split("|") for line in printed if line.startswith("python|") and "--mode=plan" in line]
    flags = subprocess.run(
        ["bash", "-c", '. launch/flags.sh; tpu_flags; printf "%s" "$LIBTPU_INIT_ARGS"'],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert planned[1] == flags != ""
    others = [line.split("|") for line in printed if line.startswith("python|") and "--mode=plan" not in line]
    assert {other[1] for other in others} == {""}


def test_it_says_how_the_showing_of_an_output_ends(printed: list[str]):
    """`all` and `follow` do not return; and while a training runs no evaluation can be started."""
    assert sum("tail -n +1 -F nag_jax.log" in line for line in printed) == 4
    assert 'does not end: Ctrl-C once it says "report:"' in TEXT


def test_latents_are_two_orientations_of_both_splits():
    """Float16 means and log-variances of the training images; operations for the 50,000 held-out images too."""
    images = runpy.run_path(str(ROOT / "configs/imagenet256.py"))["TRAINING_IMAGES"]
    operations = 2 * (images + 50_000) * flops.vae_encode(VaeConfig(), 256, 256)
    assert f"latents, {2 * images * 32 * 32 * 8 * 2 / 1e9:.0f} GB of training images" in TEXT
    assert f"both splits are {operations / 1e18:.2f} EFLOP" in TEXT


def test_its_links_and_scripts_exist():
    for name in re.findall(r"\]\(([\w./]+)\)", TEXT):
        assert (ROOT / "docs" / name).exists(), name
    for name in set(re.findall(r"launch/[\w.]+\w", TEXT)) | set(re.findall(r"tests/[\w/]+\.py", TEXT)):
        assert (ROOT / name).exists(), name


def test_its_variables_are_read_by_the_script():
    script = (ROOT / "launch/tpu_pod.sh").read_text()
    for name in re.findall(r"\b(TPU_POD_\w+|CLOUDSDK_\w+)=", TEXT):
        assert f"${{{name}:-" in script, name
