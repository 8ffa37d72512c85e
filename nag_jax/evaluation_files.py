"""The files of a work folder's evaluations, as its report reads them back. Writing them is the jobs'."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from nag_jax import storage
from nag_jax.errors import UserError

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The files of one eval/step_N/NAME folder; empty for one that is not there."""

    folder: epath.Path
    step: int
    conditions: Json
    metrics: Json
    noise_shift: Json
    samples_png: bytes
    noise_shift_png: bytes


def newest_evaluation(workdir: epath.Path) -> Evaluation | None:
    """The finished evaluation of the latest step, of several at one step the one written last; None without any.

    Raises:
        UserError: one of its files is damaged.
    """
    finished = []
    for path in workdir.glob("eval/step_*/*/metrics.json"):
        step = path.parent.parent.name.removeprefix("step_")
        if step.isdigit():
            finished.append((int(step), path.stat().mtime, path.parent.name))
    if not finished:
        return None
    step, _, name = max(finished)
    return read_evaluation(workdir / "eval" / f"step_{step}" / name)


def read_evaluation(folder: epath.Path) -> Evaluation:
    """The files of a finished evaluation, an eval/step_N/NAME folder.

    Raises:
        UserError: the folder holds none, or one of its files is damaged.
    """
    step = folder.parent.name.removeprefix("step_")
    if not step.isdigit() or not (folder / "metrics.json").exists():
        raise UserError(f"{folder} holds no finished evaluation; give an eval/step_N/NAME folder with metrics.json.")
    return Evaluation(
        folder=folder,
        step=int(step),
        conditions=read_object_if_there(folder / "conditions.json"),
        metrics=read_object(folder / "metrics.json", "methods", "features"),
        noise_shift=read_object_if_there(folder / "noise_shift.json", "methods"),
        samples_png=_read_bytes_if_there(folder / "samples.png"),
        noise_shift_png=_read_bytes_if_there(folder / "noise_shift.png"),
    )


def read_object(path: epath.Path, *needed: str) -> Json:
    """A JSON file that holds an object, with an object under each of the `needed` keys; UserError for another."""
    content = storage.read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in needed):
        raise UserError(f"{path} is damaged. Delete it, and run the command that wrote it again.")
    return content


def read_object_if_there(path: epath.Path, *needed: str) -> Json:
    """The same, and nothing in it where there is no file."""
    return read_object(path, *needed) if path.exists() else {}


def _read_bytes_if_there(path: epath.Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
