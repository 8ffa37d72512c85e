"""The pretrained feature nets of metrics: folders of their weights, read to the interface that metrics see.

A folder holds `feature_net.safetensors` (our tree, "/" between names) and `feature_net.json` (which network, the file
it was converted from, hashes), which is written last. `convert/feature_nets.py` makes one. The networks are
`models/inception.py` and `models/efficientnet.py`; one that is trained on the spot is `models/feature_classifier.py`,
and a user's own function becomes a feature net by `metrics.features.from_function`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from nag_jax import storage
from nag_jax.config import from_section
from nag_jax.denoiser import Params
from nag_jax.errors import UserError
from nag_jax.metrics.features import FID_NETWORK, FeatureNet
from nag_jax.models import efficientnet, inception

FEATURE_NET_FILE, WEIGHTS_FILE = "feature_net.json", "feature_net.safetensors"

# Each has `param_shapes() -> tree` and `make_feature_net(params) -> FeatureNet`.
NETWORKS: dict[str, ModuleType] = {FID_NETWORK: inception, efficientnet.NAME: efficientnet}


@dataclasses.dataclass(frozen=True)
class FeatureNetDescription:
    """The content of `feature_net.json`.

    Attributes:
        network: which of `NETWORKS`.
        source: name of the weight file that was converted.
        source_hash: SHA-256 (hex) of its bytes; the published weights bear the first eight digits in their names.
        fingerprint: content hash of the parameters, equal for all files that hold the same network.
    """

    network: str
    source: str
    source_hash: str
    fingerprint: str


def write_feature_net(folder: epath.PathLike, description: FeatureNetDescription, params: Params) -> None:
    """Writes a folder for `load_feature_net`.

    Raises:
        NagJaxError: it cannot be written.
    """
    folder = epath.Path(folder)
    (folder / FEATURE_NET_FILE).unlink(missing_ok=True)
    flat = flatten_dict(jax.tree.map(np.ascontiguousarray, params), sep="/")
    storage.write_bytes(folder / WEIGHTS_FILE, safetensors.numpy.save(flat))
    storage.write_json(folder / FEATURE_NET_FILE, dataclasses.asdict(description))


def load_feature_net(folder: epath.PathLike) -> FeatureNet:
    """Reads a converted feature net and checks its content.

    Returns:
        The network with its taps; its fingerprint is the one in the folder.

    Raises:
        UserError: the folder holds none, or a damaged or altered one.
    """
    folder = epath.Path(folder)
    if not (folder / FEATURE_NET_FILE).exists():
        raise UserError(
            f"{folder} holds no feature net: it has no {FEATURE_NET_FILE}. Make the folder from a weight file with "
            f"python -m nag_jax.convert SOURCE {folder} --kind=features"
        )
    file = folder / FEATURE_NET_FILE
    description = from_section(FeatureNetDescription, storage.read_json(file), str(file))
    if description.network not in NETWORKS:
        raise UserError(f"{file} names the network {description.network!r}; known are: {', '.join(NETWORKS)}.")
    try:
        flat = safetensors.numpy.load((folder / WEIGHTS_FILE).read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE} is missing or damaged ({error}). Convert it again.") from error
    network = NETWORKS[description.network]
    make: Callable[[Params], FeatureNet] = network.make_feature_net
    feature_net = make(unflatten_dict(flat, sep="/"))
    if feature_net.fingerprint != description.fingerprint:
        raise UserError(f"{folder / WEIGHTS_FILE} is not what {file.name} beside it describes. Convert it again.")
    return feature_net
