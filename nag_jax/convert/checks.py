"""Whether a state dict holds the tensors that a network needs, in whoever's names; strict both ways."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import numpy as np

from nag_jax.errors import UserError


def check_tensors(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Raises UserError unless there are exactly the expected tensors, of the expected shapes and in float32."""
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(missing_tensor(source, name, tensors.keys() - expected.keys()))
        if tensors[name].shape != shape:
            raise UserError(f"{source}: {name} has shape {tensors[name].shape}, but {shape} is expected.")
        if tensors[name].dtype != np.float32:
            raise UserError(
                f"{source}: {name} is {tensors[name].dtype}, but float32 is expected. Give the weights as they were "
                "trained; rounded ones are another network."
            )
    unexpected = [name for name in tensors if name not in expected]
    if unexpected:
        raise UserError(
            f"{source}: {unexpected[0]} is no tensor of this network ({len(unexpected)} unexpected in all)."
        )


def missing_tensor(source: str, name: str, candidates: Iterable[str]) -> str:
    """The message that a tensor is missing, with the nearest of the names that are there."""
    nearest = difflib.get_close_matches(name, list(candidates), n=1)
    hint = f" The nearest name there is {nearest[0]}." if nearest else " Is it the state dict of another network?"
    return f"{source}: tensor {name} is missing.{hint}"
