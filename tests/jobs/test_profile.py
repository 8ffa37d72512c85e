"""Which steps are traced, and where the trace goes; the profiler itself is JAX's, and here a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath

from nag_jax.jobs.profile import StepProfiler


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The folders that traces were made in; every trace is one file."""
    folders: list[Path] = []

    def start(folder: str, profiler_options: Any) -> None:
        assert profiler_options.python_tracer_level == 0, "it crashes beside a save"
        folders.append(Path(folder))

    def stop() -> None:
        (folders[-1] / "plugins").mkdir()
        (folders[-1] / "plugins" / "trace").write_text("of this machine")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    return folders


@pytest.mark.parametrize(
    ("asked", "together", "expected"),
    [
        ((3, 3), 1, [3]),
        ((3, 3), 2, [3, 4]),
        ((4, 4), 2, [3, 4]),
        ((2, 5), 4, [1, 2, 3, 4, 5, 6, 7, 8]),
        ((4, 5), 2, [3, 4, 5, 6]),
        ((7, 20), 2, [7, 8]),
        ((9, 20), 2, []),
        ((), 2, []),
    ],
)
def test_the_dispatches_that_hold_a_step_asked_for_are_traced(
    traced: list[Path], tmp_path: Path, asked: tuple[int, ...], together: int, expected: list[int]
):
    steps = []
    with StepProfiler(asked, epath.Path(tmp_path)) as profiler:
        for last in range(together, 9, together):
            of_dispatch = range(last - together + 1, last + 1)
            profiler.before(of_dispatch[0], last)
            steps += of_dispatch if profiler.traced_to else []
            profiler.after(last, ())
    assert steps == expected and len(traced) == bool(expected)
    assert (tmp_path / "profile" / "plugins" / "trace").exists() == bool(expected)
    assert not any(folder.exists() for folder in traced)


def test_a_trace_goes_to_an_object_store_and_is_kept_after_an_error(traced: list[Path], object_store):
    with pytest.raises(ZeroDivisionError), StepProfiler((1, 5), epath.Path("gs://bucket/run")) as profiler:
        profiler.before(1, 1)
        raise ZeroDivisionError
    assert object_store.objects == {"bucket/run/profile/plugins/trace": b"of this machine"}
    assert not traced[0].exists()
