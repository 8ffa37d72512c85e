"""Keeps a trained estimator as files, and gives it back only to whom it was trained for.

For each role a folder holds ROLE.npz (parameters) and ROLE.json: the conditions (trunk hash, configuration, seed, ...),
the calibration of one that measures, and the parameters' hash. The JSON file is removed first and written last, so an
estimator is there when it is; that holds on an object store too.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from typing import Any, NamedTuple

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
    model: NoiseEstimator,
    trunk_hash: str,
    process: Process,
    config: EstimatorConfig,
    seed: int,
    *,
    training_data: Any = None,
    calibration: Any = None,
) -> dict[str, Any]:
    """Everything that an estimator and its calibration are functions of.

    Args:
        model: the estimator's module.
        trunk_hash: `params_hash` of the denoiser's parameters.
        process: the noising process.
        config: how it is trained.
        seed: the one given to `train_estimator`.
        training_data: names the images that it is trained on, as JSON can hold it.
        calibration: names the images and the noise that it is calibrated on, as JSON can hold it.

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
        "training_data": training_data,
        "calibration": calibration,
    }
    return json.loads(json.dumps(conditions))


def save_estimator(
    folder: epath.PathLike, role: Role, params: Params, calibration: Calibration | None, conditions: dict[str, Any]
) -> None:
    """Writes an estimator, in the place of another one of the same role.

    Args:
        folder: a local or object-store folder; made if missing.
        role: "measure" or "guide".
        params: the trained parameters, a nested dict of arrays.
        calibration: measured on held-out data; None for one that is not to measure.
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
        "calibration": None if calibration is None else calibration.to_json(),
        "params_hash": params_hash(host_params),
    }
    storage.write_json(manifest, content)


def load_estimator(
    folder: epath.PathLike, role: Role, conditions: dict[str, Any]
) -> tuple[Params, Calibration | None] | None:
    """Reads an estimator if the one in `folder` was trained under exactly these conditions.

    Args:
        folder: where `save_estimator` wrote.
        role: "measure" or "guide".
        conditions: as given to `save_estimator`.

    Returns:
        (parameters, calibration); (parameters, None) if the estimator is the same, and has no calibration or one under
        another "calibration"; None if there is no estimator, or it was trained under other conditions: train one.

    Raises:
        UserError: a file is missing or damaged.
    """
    manifest = _read_manifest(epath.Path(folder), role)
    if manifest is None or _of_training(manifest.conditions) != _of_training(conditions):
        return None
    params = _read_params(epath.Path(folder), role, manifest)
    is_calibrated = manifest.conditions.get("calibration") == conditions.get("calibration")
    return params, manifest.calibration if is_calibrated else None


def read_estimator(folder: epath.PathLike, role: Role) -> tuple[Params, Calibration | None] | None:
    """Reads the estimator in `folder`, whatever it was trained under, with its calibration; None if there is none.

    Raises:
        UserError: a file is missing or damaged.
    """
    manifest = _read_manifest(epath.Path(folder), role)
    return None if manifest is None else (_read_params(epath.Path(folder), role, manifest), manifest.calibration)


class _Manifest(NamedTuple):
    conditions: dict[str, Any]
    calibration: Calibration | None
    params_hash: str


def _read_manifest(folder: epath.Path, role: Role) -> _Manifest | None:
    path = folder / f"{role}.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        stored = content["calibration"]
        calibration = None if stored is None else Calibration.from_json(stored)
        return _Manifest(dict(content["conditions"]), calibration, content["params_hash"])
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise _damaged(path, error) from error


def _read_params(folder: epath.Path, role: Role, manifest: _Manifest) -> Params:
    path = folder / f"{role}.npz"
    try:
        with np.load(io.BytesIO(path.read_bytes())) as archive:
            params = unflatten_dict({name: archive[name] for name in archive.files}, sep="/")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    if params_hash(params) != manifest.params_hash:
        raise _damaged(path, f"its content is not what {role}.json promises")
    return params


def _of_training(conditions: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in conditions.items() if key != "calibration"}


def _damaged(path: epath.Path, why: Exception | str) -> UserError:
    return UserError(
        f"The noise-level estimator's file {path} is missing or damaged ({why}). Delete {path.with_suffix('.json')} "
        "and run again: the estimator is then trained anew."
    )
