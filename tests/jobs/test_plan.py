"""`--mode=plan`: on this machine, for TPUs where their compiler is installed, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.sharding import SingleDeviceSharding

from nag_jax import flops
from nag_jax.config import Config, SamplingConfig
from nag_jax.data.sources import DataConfig
from nag_jax.diffusion.objective import Objective
from nag_jax.errors import UserError
from nag_jax.jobs import plan
from nag_jax.jobs.plan_programs import Memory, Program, needed_bytes
from nag_jax.models.dit import REMAT_POLICIES, ModelConfig
from nag_jax.parallel import ParallelConfig
from nag_jax.plan.topologies import CHIPS, GIB, Topology, open_topology

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = Config(
    batch_size=16,
    data=DataConfig(name="imagenet2012", image_size=64, channels=3, latents="nowhere"),
    model=ModelConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2),
    objective=Objective(label_dropout=0.1, noise_dropout=0.1),
    sampling=SamplingConfig(num_steps=3, batch_size=8),
)
HALF = "--config.model.dtype=bfloat16"
# launch/environment.sh installs it there, see the reason there.
sys.path.append(str(Path(sys.prefix) / "tpu_compiler"))
HAS_TPU_COMPILER = importlib.util.find_spec("libtpu") is not None


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nag_jax.main", "--mode=plan", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def test_this_machine_end_to_end(tmp_path: Path):
    arguments = ("--config=configs/digits.py:smoke", "--topology=local", f"--workdir={tmp_path}")
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.splitlines()[-1].removeprefix("written: "))
    assert folder.parent == tmp_path / "plan"
    content = json.loads((folder / "plan.json").read_text())
    conditions = json.loads((folder / "conditions.json").read_text())
    assert content["training"]["fits"] and content["sampling"]["fits"]
    assert content["training"]["collectives"] == {}
    model = ModelConfig(depth=1, hidden_size=16, num_heads=2)
    assert content["training"]["flops"] == 16 * 3 * flops.dit_forward(model, (8, 8, 1))
    # Heun makes 2 n - 1 evaluations, CFG with NAG takes three branches.
    assert content["sampling"]["method"].startswith("cfg+nag")
    assert content["sampling"]["flops"] == 50 * 5 * 3 * flops.dit_forward(model, (8, 8, 1))
    assert conditions["topology"] == "local" and conditions["network"]["num_classes"] == 10
    assert "compiling" not in run(*arguments).stderr, "a finished plan is read back"
    assert not (tmp_path / "config.json").exists(), "the folder can still be trained in"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--mode=plan and --topology go together"),
        (["--topology=local", "--mode=train"], "--mode=plan and --topology go together"),
        (["--topology=local", "--checkpoint=x"], "--mode=plan has no --checkpoint"),
        (["--topology=v5e:4by4"], "Nearest: v5e:4x4"),
        (["--topology=local", "--config.parallel.fsdp=3"], "does not use the 1 device(s) exactly"),
        (["--topology=local", "--config.parallel.mode=pmap"], "Set config.parallel.mode = 'jit'"),
        (["--topology=local", "--config.model.attention=cudnn", HALF], "'cudnn' needs an NVIDIA GPU"),
        (["--topology=local", "--config.data.name=image_folder"], "number of classes of an image folder"),
    ],
)
def test_a_users_mistake_gives_one_sentence(arguments: list[str], message: str, tmp_path: Path):
    result = run(*arguments, f"--workdir={tmp_path / 'w'}")
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.returncode == 2
    assert not (tmp_path / "w").exists()


def test_a_dry_run_compiles_and_writes_nothing(tmp_path: Path):
    result = run(
        "--config=configs/digits.py:smoke", "--topology=local", "--dry_run", f"--workdir={tmp_path / 'w'}"
    )
    assert result.returncode == 0, result.stderr
    assert "batches of 16" in result.stdout and "compiling" not in result.stderr
    assert not (tmp_path / "w").exists()


def test_latents_that_are_not_there_are_those_of_stable_diffusion():
    described = plan.describe_network(TINY)
    assert described.sample_shape == (8, 8, 4) and described.num_classes == 1000
    assert described.latent is not None and described.latent.encoder_hash == ""
    with pytest.raises(UserError, match="multiple of 8"):
        plan.describe_network(dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, image_size=60)))


def test_a_plan_is_of_the_flags_that_the_compiler_is_given(monkeypatch: pytest.MonkeyPatch):
    topology, description = plan.open_plan(dataclasses.replace(TINY, batch_size=1), "local")

    def folder() -> str:
        return plan.folder_name(topology, plan.plan_conditions(TINY, description, topology))

    without = folder()
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "--xla_some_flag=true")
            assert folder() != without
    assert folder() == without


def test_remat_policies_are_ordered_all():
    assert sorted(plan.REMAT_ORDER) == sorted(REMAT_POLICIES)


def test_alternatives_split_first_then_keep_less():
    config = dataclasses.replace(TINY, batch_size=64, model=dataclasses.replace(TINY.model, remat="dots"))
    tried = [(c.parallel.fsdp, c.model.remat, c.batch_size) for c in plan.alternatives(config, 16, "xla")]
    assert tried == [(16, "dots", 64), (16, "dots_no_batch", 64), (16, "full", 64)]
    halves = dataclasses.replace(config, parallel=ParallelConfig(tensor=2))
    for candidate in plan.alternatives(halves, 16, "xla"):
        assert (candidate.parallel.data, candidate.parallel.fsdp, candidate.parallel.tensor) == (1, 8, 2)
    least = dataclasses.replace(config, parallel=ParallelConfig(data=1, fsdp=16))
    assert list(plan.alternatives(dataclasses.replace(least, model=ModelConfig(remat="full")), 16, "xla")) == []


@pytest.mark.parametrize(("attention", "is_suggested"), [("xla", False), ("cudnn", True), ("pallas", True)])
def test_to_keep_a_fused_attention_is_suggested_only_where_there_is_one(attention: str, is_suggested: bool):
    policies = {candidate.model.remat for candidate in plan.alternatives(TINY, 16, attention)}
    assert ("dots_flash" in policies) == is_suggested


def refusal(topology: Topology, function: Callable[[jax.Array], jax.Array], mebibytes: int, **options: object) -> str:
    """What the TPU compiler says of a program that takes [mebibytes, 2**18] float32 on one device."""
    place = SingleDeviceSharding(topology.devices[0])
    argument = jax.ShapeDtypeStruct((mebibytes, 2**18), jnp.float32, sharding=place)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as raised:
        jax.jit(function, **options).lower(argument).compile()
    return str(raised.value)


class SmallMachine:
    """Stands in for compilation: a device needs `bytes_per_row` for each of its rows, and all its state.

    Rematerialisation leaves a part of the bytes of a row. To sample, the parameters are a quarter of the state.
    """

    def __init__(self, bytes_per_row: float, limit: float):
        chip = dataclasses.replace(CHIPS["v5e"], hbm_bytes=limit)
        devices = tuple(SimpleNamespace(device_kind="made up", platform="cpu") for _ in range(16))
        self.topology = Topology("made up", devices, chip)
        self.bytes_per_row = bytes_per_row
        self.batches: list[int] = []

    def compile(self, config: Config, *_: object) -> Program:
        parts = {"none": 1.0, "dots": 0.5, "dots_no_batch": 0.25, "full": 0.125}
        return self.program(1600 // config.parallel.fsdp, config.batch_size, parts[config.model.remat])

    def sample(self, config: Config, description: object, topology: object, methods: dict) -> tuple[str, Program]:
        return next(iter(methods)), self.program(400 // config.parallel.fsdp, config.sampling.batch_size, 1.0)

    def program(self, fixed: int, batch_size: int, part: float) -> Program:
        self.batches.append(batch_size)
        rows = batch_size / 16 * self.bytes_per_row * part
        memory = Memory(arguments=fixed, outputs=0, temporaries=int(rows), code=0, peak=fixed + int(rows))
        return Program(memory, memory.peak, (), 0.0, 1e12, 1.0, batch_size)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> SmallMachine:
    machine = SmallMachine(bytes_per_row=100.0, limit=500.0)
    monkeypatch.setattr(plan, "compile_training", machine.compile)

    def mesh(parallel: ParallelConfig, _: object) -> SimpleNamespace:
        return SimpleNamespace(shape={"data": 16 // parallel.fsdp, "fsdp": parallel.fsdp, "tensor": 1})

    monkeypatch.setattr(plan, "make_mesh", mesh)
    monkeypatch.setattr(plan, "state_bytes", lambda config, *_: 1600 // config.parallel.fsdp)
    monkeypatch.setattr(plan, "compile_sampling", machine.sample)
    monkeypatch.setattr(plan, "parameter_bytes", lambda _, mesh: 400 // mesh.shape["fsdp"])
    return machine


def suggestion(machine: SmallMachine, config: Config) -> dict[str, Any] | None:
    """The suggestion for a config that does not fit, and in `machine.batches` the batches that were compiled for it."""
    first = machine.compile(config)
    assert not first.fits(machine.topology)
    machine.batches.clear()
    return plan.suggest(config, plan.describe_network(config).with_attention("xla"), machine.topology, first)


def test_the_first_alternative_that_fits_is_suggested(small_machine: SmallMachine):
    """1600 bytes of state fit only if split: 100 a device, which leaves 400 for 8 rows of at most 50 bytes."""
    config = dataclasses.replace(TINY, batch_size=128)
    found = suggestion(small_machine, config)
    assert found is not None and found["fits"]
    assert (found["fsdp"], found["remat"], found["batch_size"]) == (16, "dots", 128)


@pytest.mark.parametrize(("batch_size", "largest"), [(1024, 512), (16 * 512, 512), (16 * 4096, 512)])
def test_where_no_setting_fits_the_batch_that_would_is_found(small_machine: SmallMachine, batch_size, largest):
    """400 bytes are left for rows of 12.5 at least: 32 on each of sixteen devices, whatever was asked for."""
    found = suggestion(small_machine, dataclasses.replace(TINY, batch_size=batch_size))
    assert found is not None and found["fits"]
    assert (found["fsdp"], found["remat"], found["batch_size"]) == (16, "full", largest)
    assert [size for size in small_machine.batches if size != batch_size] == [largest, largest + 64]


def test_of_settings_that_need_least_already_the_batch_is_searched(small_machine: SmallMachine):
    model = dataclasses.replace(TINY.model, remat="full")
    parallel = ParallelConfig(data=1, fsdp=16)
    found = suggestion(small_machine, dataclasses.replace(TINY, batch_size=1024, model=model, parallel=parallel))
    assert found is not None and (found["fits"], found["batch_size"]) == (True, 512)


def test_where_nothing_fits_the_smallest_that_was_tried_is_named(small_machine: SmallMachine):
    """One row for each device is the least; with rows 100 times as large it does not fit either."""
    small_machine.bytes_per_row *= 100
    found = suggestion(small_machine, dataclasses.replace(TINY, batch_size=128))
    assert found is not None and not found["fits"]
    assert found["batch_size"] == min(small_machine.batches) == 16


def test_a_state_that_fits_in_no_layout_is_not_compiled(small_machine: SmallMachine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "state_bytes", lambda *_: 501)
    assert suggestion(small_machine, dataclasses.replace(TINY, batch_size=1024)) is None
    assert small_machine.batches == []


def test_a_sampler_that_does_not_fit_gets_a_smaller_batch_or_split_parameters(small_machine: SmallMachine):
    """400 bytes of parameters leave 100 for one row of a device; split they are 25, which leave 475 for four."""

    def planned(batch_size: int) -> dict[str, Any]:
        sampling = dataclasses.replace(TINY.sampling, batch_size=batch_size)
        config = dataclasses.replace(TINY, sampling=sampling)
        found = plan.plan_sampling(config, plan.describe_network(config), small_machine.topology)
        assert found is not None
        return found

    assert planned(16)["fits"] and planned(16)["suggestions"] == []
    tried = planned(64)
    assert not tried["fits"] and tried["batch_size"] == 64
    assert [(one["fits"], one["fsdp"], one["batch_size"]) for one in tried["suggestions"]] == [
        (True, 1, 16),
        (True, 16, 64),
    ]
    assert [one["batch_size"] for one in planned(1024)["suggestions"]] == [16, 64]
    small_machine.bytes_per_row *= 100
    small_machine.batches.clear()
    assert [(one["fits"], one["batch_size"]) for one in planned(64)["suggestions"]] == [(False, 16), (False, 16)]


def test_the_largest_batch_is_a_multiple_of_the_devices(small_machine: SmallMachine):
    """400 bytes are left for rows of 100: four on each of sixteen devices."""
    config = dataclasses.replace(TINY, batch_size=16, parallel=ParallelConfig(data=1, fsdp=16))
    first = small_machine.compile(config)
    found = plan.largest_batch(config, plan.describe_network(config), small_machine.topology, first)
    assert (found["fits"], found["too_large"]) == (64, 80)


def test_where_the_state_does_not_fit_no_batch_is_tried(small_machine: SmallMachine, monkeypatch: pytest.MonkeyPatch):
    """1600 bytes of state on every device of 500; sixteen is the smallest batch of sixteen devices."""
    first = small_machine.compile(TINY)
    monkeypatch.setattr(plan, "compile_training", lambda *_: pytest.fail("compiled in vain"))
    found = plan.largest_batch(TINY, plan.describe_network(TINY), small_machine.topology, first)
    assert found == {"fits": 0, "too_large": 16, "compilations": 0}


@pytest.mark.parametrize(
    ("message", "gibibytes"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 39.95G of 15.75G hbm. Exceeded", 39.95),
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (47.11G) exceeds available", 47.11),
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (1.5T) exceeds available", 1536),
        ("something else", None),
    ],
)
def test_what_the_compiler_says_it_needs(message: str, gibibytes: float | None):
    assert needed_bytes(message) == pytest.approx(None if gibibytes is None else gibibytes * 2**30)


def test_the_tpu_compiler_has_the_last_word_and_others_none(small_machine: SmallMachine):
    """Parts of 600 bytes on a device of 500."""
    memory = Memory(arguments=200, outputs=0, temporaries=400, code=0, peak=400)
    program = Program(memory, memory.total, (), 0.0, 1.0, 1.0, images=1)
    assert not program.fits(small_machine.topology)
    tpu = dataclasses.replace(small_machine.topology, devices=(SimpleNamespace(platform="tpu"),))
    assert program.fits(tpu) and not dataclasses.replace(program, memory=None).fits(tpu)


@pytest.mark.skipif(HAS_TPU_COMPILER, reason="the TPU compiler is installed")
def test_without_the_tpu_compiler_the_extra_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"pip install 'nag_jax\[plan\]'"):
        plan.run(TINY, "v5e:2x2", epath.Path(tmp_path))


@pytest.mark.serial
@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="the TPU compiler, libtpu, is not installed (extra: plan)")
def test_a_tiny_config_is_compiled_for_a_tpu(tmp_path: Path):
    config = dataclasses.replace(TINY, parallel=ParallelConfig(fsdp=2))
    topology, description = plan.open_plan(config, "v5e:2x2")
    assert len(topology.devices) == 4 and {device.platform for device in topology.devices} == {"tpu"}
    program = plan.compile_training(config, description, topology)
    assert program.fits(topology) and program.memory is not None
    assert program.memory.arguments < program.memory.peak <= program.memory.total
    assert sum(each.received_bytes for each in program.collectives) > 0
    sampling = plan.plan_sampling(config, description, topology)
    assert sampling is not None and sampling["fits"]
    least, most = sampling["roofline"]["communication_share"]
    assert 0.0 <= least <= most < 1.0


@pytest.mark.serial
@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="the TPU compiler, libtpu, is not installed (extra: plan)")
@pytest.mark.parametrize("generation", CHIPS)
def test_the_memory_of_a_chip_is_what_its_compiler_says_of_too_large_a_program(generation: str):
    """The message has two decimals of a GiB."""
    topology = open_topology(f"{generation}:{'2x2' if generation in ('v5e', 'v6e') else '2x2x1'}")
    message = refusal(topology, jnp.sum, 2**20)
    said = re.search(r"available HBM \(([\d.]+)G\)|of ([\d.]+)G hbm", message)
    assert said is not None and topology.chip is not None
    assert topology.chip.hbm_bytes / GIB == float(said[1] or said[2])


@pytest.mark.serial
@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="the TPU compiler, libtpu, is not installed (extra: plan)")
def test_pallas_attention_is_compiled_for_a_tpu_on_every_axis_of_the_mesh():
    """256 tokens in two heads of 72 numbers, as wide as those of XL."""
    model = ModelConfig(depth=2, hidden_size=144, num_heads=2, dtype="bfloat16", attention="pallas", remat="dots_flash")
    config = dataclasses.replace(
        TINY,
        data=dataclasses.replace(TINY.data, image_size=256),
        model=model,
        parallel=ParallelConfig(fsdp=2, tensor=2),
    )
    topology, description = plan.open_plan(config, "v5e:2x2")
    assert description.model.attention == "pallas"
    assert plan.compile_training(config, description, topology).fits(topology)
    sampling = plan.plan_sampling(config, description, topology)
    assert sampling is not None and sampling["fits"]


@pytest.mark.serial
@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="the TPU compiler, libtpu, is not installed (extra: plan)")
def test_a_tpu_has_no_cudnn_and_takes_xla_by_itself():
    half = dataclasses.replace(TINY.model, dtype="bfloat16")
    _, description = plan.open_plan(dataclasses.replace(TINY, model=half), "v5e:2x2")
    assert description.model.attention == "xla"
    asked = dataclasses.replace(TINY, model=dataclasses.replace(half, attention="cudnn"))
    with pytest.raises(UserError, match="'cudnn' needs an NVIDIA GPU.*not TPU v5"):
        plan.open_plan(asked, "v5e:2x2")


@pytest.mark.serial
@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="the TPU compiler, libtpu, is not installed (extra: plan)")
def test_what_a_refused_program_would_need_is_said_with_its_arguments_and_results():
    """A sum of 20 GiB needs these; sorting 8 GiB where they lie takes as much again."""
    topology = open_topology("v5e:2x2")
    assert needed_bytes(refusal(topology, jnp.sum, 20 * 2**10)) == pytest.approx(20 * GIB, rel=1e-3)
    assert needed_bytes(refusal(topology, jnp.sort, 8 * 2**10, donate_argnums=0)) == pytest.approx(16 * GIB, rel=1e-3)


@pytest.mark.serial
@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="the TPU compiler, libtpu, is not installed (extra: plan)")
def test_a_shape_that_no_slice_has_is_refused():
    with pytest.raises(UserError, match="v5e:3x5 is not a slice that the TPU compiler knows"):
        plan.open_plan(TINY, "v5e:3x5")
