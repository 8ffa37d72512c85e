"""What "auto" settles on: the faster of injected times, once, recorded with the work folder; and that a name wins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from etils import epath

from nag_jax import storage
from nag_jax.config import Config
from nag_jax.diffusion.process import ProcessConfig
from nag_jax.errors import UserError
from nag_jax.jobs import attention_choice
from nag_jax.jobs.attention_choice import fastest, measure, settled
from nag_jax.jobs.drawing import sampled_network
from nag_jax.jobs.experiment import ENVIRONMENT_FILE, Experiment, check_network
from nag_jax.loading import ModelDescription
from nag_jax.models.attention import AttentionShape
from nag_jax.models.dit import ModelConfig

HALF = ModelConfig(depth=1, hidden_size=64, num_heads=4, dtype="bfloat16")
H100 = SimpleNamespace(platform="gpu", device_kind="H100", compute_capability="9.0")
A100 = SimpleNamespace(platform="gpu", device_kind="A100", compute_capability="8.0")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


class Machine:
    """Stands in for a device: its kind, the times of its attentions, and what was measured there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.device, self.seconds = H100, {"cudnn": 1e-3, "xla": 2e-3}
        self.measured: list[tuple] = []
        monkeypatch.setattr(attention_choice.jax, "local_devices", lambda: [self.device])
        monkeypatch.setattr(attention_choice, "measure", self.measure)

    def measure(self, names, shape, rows, *, with_gradient):
        self.measured.append((names, shape, rows, with_gradient))
        return self.seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def experiment(workdir: Path, model: ModelConfig = HALF, *, data: int = 2, tensor: int = 1) -> Experiment:
    mesh = SimpleNamespace(shape={"data": data, "fsdp": 1, "tensor": tensor})
    description = ModelDescription(model, ProcessConfig("linear"), num_classes=3, sample_shape=(8, 16, 4))
    return Experiment(Config(), epath.Path(workdir), mesh, description, epath.Path(workdir))  # type: ignore[arg-type]


def chosen(workdir: Path, job: str = "training", model: ModelConfig = HALF) -> str:
    return settled(experiment(workdir, model), job, rows=8).model.attention


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"cudnn": 1.0, "xla": 2.0}, "cudnn"),
        ({"cudnn": 2.0, "xla": 1.0}, "xla"),
        ({"cudnn": 1.04, "xla": 1.0}, "cudnn"),  # a tie, and clocks are noisy
        ({"cudnn": 1.0, "xla": 1.0}, "cudnn"),
        ({"xla": 5.0}, "xla"),  # cuDNN's did not run
        ({}, "xla"),
    ],
)
def test_the_fastest_is_taken_and_the_first_of_equals(seconds: dict, expected: str):
    assert fastest(("cudnn", "xla"), seconds) == expected


@pytest.mark.parametrize("fast", ["cudnn", "xla"])
def test_the_faster_is_taken_said_and_recorded(machine: Machine, tmp_path: Path, capsys, fast: str):
    machine.seconds = {"cudnn": 2e-3, "xla": 2e-3} | {fast: 1e-3}
    assert chosen(tmp_path) == fast
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"training on H100: {fast}" in said and f"{fast} 1 ms" in said and "2 ms" in said
    record = storage.read_json(epath.Path(tmp_path) / ENVIRONMENT_FILE)["attention"]["training on H100"]
    assert record["name"] == fast and record["seconds"] == machine.seconds
    assert (record["tokens"], record["heads"], record["head_dim"], record["rows"]) == (32, 4, 16, 8)


def test_a_resumed_run_keeps_the_choice_whatever_is_faster_now(machine: Machine, tmp_path: Path, capsys):
    assert chosen(tmp_path) == "cudnn"
    machine.seconds = {"cudnn": 2e-3, "xla": 1e-3}
    capsys.readouterr()
    assert chosen(tmp_path) == "cudnn"
    assert len(machine.measured) == 1 and not capsys.readouterr().err


def test_each_job_and_each_kind_of_device_has_its_own(machine: Machine, tmp_path: Path, capsys):
    chosen(tmp_path)
    machine.seconds = {"cudnn": 2e-3, "xla": 1e-3}
    assert chosen(tmp_path, "sampling") == "xla"
    assert [with_gradient for *_, with_gradient in machine.measured] == [True, False]
    capsys.readouterr()
    machine.device = A100
    assert chosen(tmp_path) == "xla"
    assert "training on A100: xla" in (said := capsys.readouterr().err) and "training on H100 took cudnn" in said
    machine.device = H100
    assert chosen(tmp_path) == "cudnn" and len(machine.measured) == 3


def test_what_was_chosen_on_a_gpu_is_chosen_anew_on_a_cpu_and_said(machine: Machine, tmp_path: Path, capsys):
    chosen(tmp_path)
    capsys.readouterr()
    machine.device = CPU
    assert chosen(tmp_path) == "xla"
    assert "training on cpu: xla; training on H100 took cudnn" in capsys.readouterr().err
    assert len(machine.measured) == 1, "there is nothing to compare"


def test_where_there_is_one_it_is_recorded_without_a_word(machine: Machine, tmp_path: Path, capsys):
    machine.device = CPU
    assert chosen(tmp_path) == "xla"
    assert not capsys.readouterr().err and not machine.measured
    record = storage.read_json(epath.Path(tmp_path) / ENVIRONMENT_FILE)["attention"]["training on cpu"]
    assert record["name"] == "xla" and record["seconds"] == {}


def test_a_recorded_choice_that_another_dtype_excludes_is_not_taken(machine: Machine, tmp_path: Path):
    assert chosen(tmp_path) == "cudnn"
    assert chosen(tmp_path, model=dataclasses.replace(HALF, dtype="float32")) == "xla"


@pytest.mark.parametrize("name", ["xla", "cudnn"])
def test_a_name_wins_and_nothing_is_measured_or_recorded(machine: Machine, tmp_path: Path, name: str):
    assert chosen(tmp_path, model=dataclasses.replace(HALF, attention=name)) == name
    assert not machine.measured and not list(tmp_path.iterdir())


def test_the_shapes_are_those_of_one_device(machine: Machine, tmp_path: Path):
    """256 samples at once over two devices; four heads over two."""
    sampled_network(experiment(tmp_path, tensor=2))
    ((names, shape, rows, with_gradient),) = machine.measured
    assert names == ("cudnn", "xla") and rows == 128 and not with_gradient
    assert shape == AttentionShape(tokens=32, heads=2, head_dim=16, dtype="bfloat16")


@pytest.mark.parametrize("with_gradient", [False, True])
def test_what_does_not_run_here_is_left_out_and_said(capsys, with_gradient: bool):
    shape = AttentionShape(tokens=16, heads=2, head_dim=8, dtype="bfloat16")
    seconds = measure(("cudnn", "xla"), shape, 2, with_gradient=with_gradient)
    assert list(seconds) == ["xla"] and seconds["xla"] > 0.0
    assert "'cudnn' does not run here" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "words"), [("cudnn", "an NVIDIA GPU"), ("pallas", "a TPU")])
def test_a_named_attention_that_the_devices_do_not_have_is_refused(tmp_path: Path, name: str, words: str):
    model = dataclasses.replace(HALF, attention=name, patch_size=1)  # 128 tokens
    description = experiment(tmp_path, model).description
    mesh = SimpleNamespace(devices=SimpleNamespace(flat=[CPU]))
    with pytest.raises(UserError, match=f"model.attention = '{name}' needs {words}.*'auto'"):
        check_network(description, mesh)  # type: ignore[arg-type]
