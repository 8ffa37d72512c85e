"""Keeps a trained estimator as files, and gives it back only to whom it was trained for.

For each role a folder holds ROLE.npz (parameters) and ROLE.json: the conditions (trunk hash, configuration, seed, ...),
the calibration and the parameters' hash. The JSON file is removed first and written last, so an estimator is there when
it is; that holds on an object store too.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from nag_jax import storage
from nag_jax.denoiser import Params
from nag_jax.diffusion.process import Process
from nag_jax.errors import UserError
from nag_jax.models.noise_estimator import NoiseEstimator
from nag_jax.noise_shift.calibration import Calibration
from nag_jax.noise_shift.estimator import EstimatorConfig, Role
from nag_jax.params_hash import params_hash


def estimator_conditions(
    model: NoiseEstimator, trunk_hash: str, process: Process, config: EstimatorConfig, seed: int
) -> dict[str, Any]:
    """Everything that an estimator is a function of, but the data that its trunk was trained on too.

    Args:
        model: the estimator's module.
        trunk_hash: `params_hash` of the denoiser's parameters.
        process: the noising process.
        config: how it is trained.
        seed: the one given to `train_estimator`.

    Returns:
        A JSON object.
    """
    fields = {field.name for field in dataclasses.fields(model.trunk)} - {"parent", "name"}
    conditions = {
        "trunk_hash": trunk_hash,
        "model": {name: getattr(model.trunk, name) for name in sorted(fields)},
        "process": {"name": process.name, **dataclasses.asdict(process)},
        "config": dataclasses.asdict(config),
        "seed": seed,
    }
    return json.loads(json.dumps(conditions))


def save_estimator(
    folder: epath.PathLike, role: Role, params: Params, calibration: Calibration, conditions: dict[str, Any]
) -> None:
    """Writes an estimator, in the place of another one of the same role.

    Args:
        folder: a local or object-store folder; made if missing.
        role: "measure" or "guide".
        params: the trained parameters, a nested dict of arrays.
        calibration: measured on held-out data.
        conditions: from `estimator_conditions`.
    """
    folder = epath.Path(folder)
    manifest = folder / f"{role}.json"
    manifest.unlink(missing_ok=True)
    host_params = jax.tree.map(np.asarray, params)
    buffer = io.BytesIO()
    np.savez(buffer, **flatten_dict(host_params, sep="/"))
    storage.write_bytes(folder / f"{role}.npz", buffer.getvalue())
    content = {
        "conditions": conditions,
        "calibration": calibration.to_json(),
        "params_hash": params_hash(host_params),
    }
    storage.write_json(manifest, content)


def load_estimator(folder: epath.PathLike, role: Role, conditions: dict[str, Any]) -> tuple[Params, Calibration] | None:
    """Reads an estimator if the one in `folder` was trained under exactly these conditions.

    Args:
        folder: where `save_estimator` wrote.
        role: "measure" or "guide".
        conditions: from `estimator_conditions`.

    Returns:
        (parameters, calibration), or None: there is none, or it was trained under other conditions. Train one then.

    Raises:
        UserError: a file is missing or damaged.
    """
    folder = epath.Path(folder)
    manifest, arrays = folder / f"{role}.json", folder / f"{role}.npz"
    if not manifest.exists():
        return None
    try:
        content = json.loads(manifest.read_text())
        if content["conditions"] != conditions:
            return None
        calibration = Calibration.from_json(content["calibration"])
        expected_hash = content["params_hash"]
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise _damaged(manifest, error) from error
    try:
        with np.load(io.BytesIO(arrays.read_bytes())) as archive:
            params = unflatten_dict({name: archive[name] for name in archive.files}, sep="/")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(arrays, error) from error
    if params_hash(params) != expected_hash:
        raise _damaged(arrays, f"its content is not what {manifest.name} promises")
    return params, calibration


def _damaged(path: epath.Path, why: Exception | str) -> UserError:
    return UserError(
        f"The noise-level estimator's file {path} is missing or damaged ({why}). Delete {path.with_suffix('.json')} "
        "and run again: the estimator is then trained anew."
    )
