"""Converts public DiT and SiT weights to a folder that nag_jax loads, and back.

    python -m nag_jax.convert SiT-XL-2-256x256.pt FOLDER             a folder for nag_jax.load
    python -m nag_jax.convert FOLDER weights.pt --to=sit             the official state dict

SOURCE may also be a training checkpoint of the official code, of which the average is taken. No torch is needed, and
nothing that stands in a file is run.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, Literal

import numpy as np
from etils import epath

from nag_jax import loading
from nag_jax.checkpoint import Checkpoints
from nag_jax.convert import tables, torch_file
from nag_jax.errors import NagJaxError, UserError
from nag_jax.training.state import TrainState


def import_network(
    source: epath.PathLike,
    target: epath.PathLike,
    kind: tables.Kind | Literal["auto"] = "auto",
    *,
    weights: torch_file.Weights = "ema",
    num_heads: int | None = None,
) -> loading.ModelDescription:
    """Converts a weight file to a folder for `nag_jax.load`, which finds the same weights as "ema" and "params".

    Args:
        source: an official state dict or training checkpoint.
        target: folder to make.
        kind: "dit", "sit", or "auto" for what the file's settings or its name say.
        weights: which weights of a training checkpoint.
        num_heads: attention heads of a network of no published size.

    Returns:
        The description that was written.

    Raises:
        UserError: the file is damaged or another one than expected, or the target holds a network already.
    """
    target = epath.Path(target)
    if (target / loading.MODEL_FILE).exists() or (target / "checkpoints").exists():
        raise UserError(f"{target} holds a network already. Choose another folder, or delete it.")
    tensors = torch_file.state_dict(source, weights)
    chosen = recognise_kind(source, torch_file.settings(source)) if kind == "auto" else kind
    description = tables.recognise(tensors, chosen, source=str(source), num_heads=num_heads)
    params = tables.import_params(tensors, description, source=str(source))
    step: Any = np.zeros((), np.int32)
    with Checkpoints(target / "checkpoints") as checkpoints:
        checkpoints.save(TrainState(step=step, params=params, opt_state=(), ema={"ema": params}, frozen={}))
    loading.write_description(target, description)  # last: a folder without it is not taken for a network
    return description


def export_network(
    source: epath.PathLike,
    target: epath.PathLike,
    kind: tables.Kind,
    *,
    weights: torch_file.Weights = "ema",
    keep_null_noise: bool = False,
) -> None:
    """Writes a network as an official state dict.

    Args:
        source: a converted or training folder.
        target: file to write.
        kind: whose convention the network has.
        weights: "ema", or "model" for the parameters themselves.
        keep_null_noise: also write the null noise embedding.

    Raises:
        UserError: the folder cannot be read, or its network is not of that kind.
    """
    if epath.Path(target).exists():
        raise UserError(f"{target} exists already. Choose another file, or delete it.")
    description = loading.read_description(source)
    params = loading.read_params(source, "params" if weights == "model" else weights)
    tensors = tables.export_params(params, description, kind, source=str(source), keep_null_noise=keep_null_noise)
    torch_file.write_state_dict(target, tensors)


def recognise_kind(source: epath.PathLike, settings: dict[str, Any]) -> tables.Kind:
    """The kind that a file's settings or else its name say, for names and shapes of both kinds are the same.

    Raises:
        UserError: they say nothing, or a SiT of another path or prediction than the published ones.
    """
    said = {"path_type": "Linear", "prediction": "velocity"}
    for key, value in said.items():
        if settings.get(key, value) != value:
            raise UserError(f"{source} was trained with {key} {settings[key]}; only {value} can be converted.")
    if "path_type" in settings:
        return "sit"
    for text in (str(settings.get("model", "")), epath.Path(source).name):
        found = re.search(r"(?<![a-z])(dit|sit)(?![a-z])", text.lower())
        if found:
            return "dit" if found[1] == "dit" else "sit"
    raise UserError(f"Nothing in {source} or its name tells a DiT from a SiT. Give --kind=dit or --kind=sit.")


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nag_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a weight file (.pt, .pth); with --to a folder of a network")
    parser.add_argument("target", help="the folder to make; with --to the file to write")
    parser.add_argument("--kind", choices=("auto", *tables.KINDS), default="auto", help="what the weights are")
    parser.add_argument("--to", choices=tables.KINDS, help="write official weights of this kind")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="the average, or what was trained")
    parser.add_argument("--num_heads", type=int, help="attention heads, for a network of no published size")
    parser.add_argument("--keep_null_noise", action="store_true", help="with --to, write null_noise_embedding too")
    given = parser.parse_args(arguments)
    try:
        if given.to:
            if given.kind != "auto" or given.num_heads is not None:
                raise UserError("--kind and --num_heads are for reading a weight file, not for --to.")
            export_network(
                given.source, given.target, given.to, weights=given.weights, keep_null_noise=given.keep_null_noise
            )
        else:
            if given.keep_null_noise:
                raise UserError("--keep_null_noise goes with --to; a null noise embedding is always read.")
            import_network(given.source, given.target, given.kind, weights=given.weights, num_heads=given.num_heads)
    except NagJaxError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    print(f"written: {given.target}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
