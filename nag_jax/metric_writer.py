"""Numbers over training steps: `metrics.jsonl` for programs and TensorBoard files for people.

Called by the main process only, at log steps only. Final results are JSON files of their own (`storage.py`). Object
stores do not append: there both files are kept in memory and sent whole, now and then.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from nag_jax import storage

SECONDS_BETWEEN_SENDS = 30.0  # of metrics.jsonl to an object store; TensorBoard's writer sends every two minutes


class MetricWriter:
    """Appends scalars to `metrics.jsonl` and to TensorBoard files in a work folder.

    Args:
        workdir: the work folder.
        first_step: the step that the run goes on from. Lines of later steps, which a killed run wrote after its last
            checkpoint, are dropped, so that every step stands once.
    """

    def __init__(self, workdir: epath.Path, first_step: int):
        from tensorboardX import SummaryWriter, record_writer

        self._path = epath.Path(workdir) / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= first_step]
        content = "".join(json.dumps(line) + "\n" for line in kept).encode()
        storage.write_bytes(self._path, content)
        self._object = storage.GrowingObject(self._path, content) if storage.is_object_store(self._path) else None
        self._last_send = time.monotonic()
        if self._object is not None:
            scheme = os.fspath(self._path).partition(":")[0]
            record_writer.register_writer_factory(scheme, _TensorboardObjects())
        self._tensorboard = SummaryWriter(str(epath.Path(workdir) / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line: {"step": step, name: value, ...}. Raises NagJaxError if it cannot be written."""
        line = json.dumps({"step": step, **scalars}) + "\n"
        if self._object is None:
            with storage.explained(self._path), self._path.open("a") as file:
                file.write(line)
        else:
            self._object.write(line.encode())
            if time.monotonic() - self._last_send > SECONDS_BETWEEN_SENDS:
                self.flush()
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)

    def flush(self) -> None:
        """Every line is in `metrics.jsonl`; called before a checkpoint, so that a resumed run misses none."""
        if self._object is not None:
            self._object.flush()
            self._last_send = time.monotonic()

    def close(self) -> None:
        """Flushes both files."""
        self.flush()
        self._tensorboard.close()


class _TensorboardObjects:
    """Makes tensorboardX write to object stores as everything else here does, through epath."""

    def open(self, path: str) -> storage.GrowingObject:
        return storage.GrowingObject(path)

    def directory_check(self, path: str) -> None:
        """Object stores have no folders."""


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a work folder's `metrics.jsonl`; empty without the file. A last line cut by a kill is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
