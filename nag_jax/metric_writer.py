"""Numbers over training steps: `metrics.jsonl` for programs and TensorBoard files for people.

Called by the main process only, at log steps only. Final results are JSON files of their own (`storage.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from nag_jax import storage


class MetricWriter:
    """Appends scalars to `metrics.jsonl` and to TensorBoard files in a work folder.

    Args:
        workdir: the work folder.
        first_step: the step that the run goes on from. Lines of later steps, which a killed run wrote after its last
            checkpoint, are dropped, so that every step stands once.
    """

    def __init__(self, workdir: epath.Path, first_step: int):
        from tensorboardX import SummaryWriter

        self._path = epath.Path(workdir) / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= first_step]
        storage.write_bytes(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._tensorboard = SummaryWriter(str(epath.Path(workdir) / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line: {"step": step, name: value, ...}."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the TensorBoard file."""
        self._tensorboard.close()


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
