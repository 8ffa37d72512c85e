"""Goodput on a clock that only moves when a test says so: the stopwatch alone, and what the training loop tells it."""

from __future__ import annotations

import runpy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from nag_jax.checkpoint import Checkpoints
from nag_jax.config import from_config_dict
from nag_jax.jobs import evaluate, train
from nag_jax.jobs.goodput import TRAINING, WAITING, Goodput
from nag_jax.metric_writer import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class Running:
    """Arrays that the devices are computing until they are told that they have finished."""

    def __init__(self) -> None:
        self.finished = threading.Event()

    def block_until_ready(self) -> None:
        self.finished.wait(60)


def noticed(goodput: Goodput) -> None:
    """Returns when the stopwatch has seen that the devices have finished."""
    goodput._watcher.submit(int).result(60)


def test_every_second_is_of_one_stage():
    clock = Clock()
    with Goodput(90.0, clock) as goodput:
        assert goodput.spend("start") == 10.0
        clock.time += 30.0
        assert goodput.spend(TRAINING) == 30.0
        assert goodput.value == 30.0 / 40.0
        clock.time += 60.0
        goodput.spend("save")
        assert goodput.value == 30.0 / 100.0
    assert goodput.seconds == {"start": 10.0, TRAINING: 30.0, "save": 60.0, WAITING: 0.0}


@pytest.mark.parametrize(("finished_after", "starved"), [(0.0, 8.0), (3.0, 5.0), (None, 0.0)])
def test_only_what_starves_the_devices_is_waiting(finished_after: float | None, starved: float):
    clock, running = Clock(), Running()
    if finished_after == 0.0:
        running.finished.set()

    def slow() -> str:
        if finished_after is not None:
            clock.time += finished_after
            running.finished.set()
            noticed(goodput)
        clock.time += 8.0 - (finished_after or 0.0)
        return "batch"

    with Goodput(clock.time, clock) as goodput:
        assert goodput.read(slow, running) == "batch"
        clock.time += 2.0
        assert goodput.spend(TRAINING) == 10.0
        running.finished.set()
    assert goodput.seconds == {TRAINING: 10.0 - starved, WAITING: starved}


def test_the_loop_tells_training_from_slow_data_saves_and_evaluations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    clock = Clock()
    start, read, train_two_steps, save, evaluation = 50.0, 10.0, 100.0, 1000.0, 5000.0
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    watches: list[Goodput] = []

    def watch(_: float) -> Goodput:
        watches.append(Goodput(clock.time - start, clock))
        return watches[0]

    def slow_batches(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in make_batches(*arguments, **options):
            noticed(watches[0])
            clock.time += read
            yield batch

    def slower(seconds: float, function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            clock.time += seconds
            return function(*arguments, **options)

        return wrapped

    make_batches = train.make_batches
    monkeypatch.setattr(train, "Goodput", watch)
    monkeypatch.setattr(train, "make_batches", slow_batches)
    monkeypatch.setattr(train, "read_metrics", slower(train_two_steps, train.read_metrics))
    monkeypatch.setattr(Checkpoints, "save", slower(save, Checkpoints.save))
    monkeypatch.setattr(evaluate, "evaluate", slower(evaluation, lambda *_: None))
    monkeypatch.setattr(evaluate, "evaluate_and_report", lambda experiment, _: experiment.workdir)
    settings = runpy.run_path(str(ROOT / "configs/digits.py"))["get_config"]("smoke")
    settings.log.every_steps, settings.checkpoint.every_steps, settings.eval.every_steps = 2, 4, 4
    config = from_config_dict(settings)
    train.run(config, epath.Path(tmp_path / "run"))

    # Steps 1 to 6; the data of the first belong to no log line. Saved at 4 and 6, evaluated at 4.
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6]
    speeds = [config.batch_size * steps / (train_two_steps + steps * read) for steps in (1, 2, 2)]
    assert [line["examples_per_second"] for line in lines] == pytest.approx(speeds)
    at_two = start + 2 * read + train_two_steps
    at_four = at_two + 2 * read + train_two_steps
    at_six = at_four + save + evaluation + 2 * read + train_two_steps
    goodputs = [lines * train_two_steps / time for lines, time in ((1, at_two), (2, at_four), (3, at_six))]
    assert [line["goodput"] for line in lines] == pytest.approx(goodputs)
    seconds = watches[0].seconds
    assert seconds[WAITING] == 6 * read and seconds[TRAINING] == 3 * train_two_steps
    assert seconds[train.SAVING] == 2 * save and seconds[train.EVALUATING] == evaluation
    assert seconds[train.STARTING] == start and seconds[train.COMPILING] == 0.0
