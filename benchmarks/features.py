"""How many images a second does FID's Inception-v3 judge, beside torch-fidelity's extractor on the same random weights?

    python benchmarks/features.py                                  on a CPU: results/features_cpu.json, half a minute
    python benchmarks/features.py --images=4096 --batch_size=256   on a GPU: results/features_gpu.json

Both start from uint8 images of 256 x 256 pixels on the host and end with pool3 there, resize to 299 included. Ours is
float32 at the highest precision; torch-fidelity runs as it comes, in which a GPU's convolutions are TF32, and once more
in full float32. The largest difference of pool3 from ours stands beside each rate, in parts of the largest value.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import jax
import numpy as np

from nag_jax import storage
from nag_jax.convert.feature_nets import import_params, torch_table
from nag_jax.data.images import to_float
from nag_jax.jobs.experiment import environment
from nag_jax.metrics.features import FID_NETWORK, features
from nag_jax.models import inception

SIDE = 256
# torch-fidelity imports these; nothing that is used here does.
TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets")

Extract = Callable[[np.ndarray], np.ndarray]


def random_state() -> dict[str, np.ndarray]:
    """Weights that keep the signal's size through the depth, by torch's names."""
    rng = np.random.default_rng(0)
    state = {}
    for name, entry in torch_table(FID_NETWORK).items():
        values = rng.standard_normal(entry.shape, np.float32)
        if name.endswith("running_var"):
            state[name] = np.ones_like(values)
        elif len(entry.shape) == 1:
            state[name] = 0.1 * values + np.float32(name.endswith("bn.weight"))
        else:
            state[name] = values * np.float32(np.sqrt(2 / np.prod(entry.shape[1:])))
    return state


def ours(state: dict[str, np.ndarray], batch_size: int) -> Extract:
    params = import_params(state, torch_table(FID_NETWORK), source="random")
    feature_net = inception.make_feature_net(params)
    return lambda images: features(feature_net, to_float(images), batch_size)


def torch_fidelity(state: dict[str, np.ndarray], batch_size: int, *, tf32: bool) -> Extract:
    """torch-fidelity's extractor, on the GPU if torch has one."""
    import torch

    for name in TORCHVISION:
        sys.modules.setdefault(name, MagicMock(__path__=[]))
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, file)
        network = module.FeatureExtractorInceptionV3("peer", ["2048"], feature_extractor_weights_path=str(file))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device).eval()

    def extract(images: np.ndarray) -> np.ndarray:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        found = []
        with torch.no_grad():
            for first in range(0, len(images), batch_size):
                batch = torch.from_numpy(images[first : first + batch_size].transpose(0, 3, 1, 2).copy())
                found.append(network(batch.to(device))[0].cpu().numpy())
        return np.concatenate(found)

    return extract


def measure(extract: Extract, images: np.ndarray, batch_size: int) -> tuple[float, np.ndarray]:
    """Images a second, once everything is compiled, and the features."""
    extract(images[:batch_size])
    begin = time.perf_counter()
    found = extract(images)
    return len(images) / (time.perf_counter() - begin), found


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=64, help="images that are timed")
    parser.add_argument("--batch_size", type=int, default=16, help="images per call of the network")
    parser.add_argument("--results", type=Path, help="JSON file; default results/features_gpu.json or _cpu.json")
    arguments = parser.parse_args()
    state = random_state()
    images = np.random.default_rng(0).integers(0, 256, (arguments.images, SIDE, SIDE, 3), dtype=np.uint8)
    makers: dict[str, Callable[[], Extract]] = {"ours": lambda: ours(state, arguments.batch_size)}
    peers = {"torch-fidelity": True, "torch-fidelity in full float32": False}
    for name, tf32 in peers.items() if jax.default_backend() == "gpu" else list(peers.items())[:1]:
        makers[name] = lambda tf32=tf32: torch_fidelity(state, arguments.batch_size, tf32=tf32)  # type: ignore[misc]
    rows: dict[str, Any] = {}
    expected: np.ndarray | None = None
    for name, make in makers.items():
        rate, found = measure(make(), images, arguments.batch_size)
        expected = found if expected is None else expected
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        rows[name] = {"images_per_second": rate, "largest_difference_from_ours": difference}
        print(f"{name:32s} {rate:9.1f} images/s   difference {difference:.1e}", flush=True)
    path = arguments.results or root / f"results/features_{jax.default_backend()}.json"
    content = {
        "environment": environment() | {"command": " ".join(["python", *map(shlex.quote, sys.argv)])},
        "images": arguments.images,
        "image_size": SIDE,
        "batch_size": arguments.batch_size,
        "rows": rows,
        "times_as_fast_as_torch_fidelity": rows["ours"]["images_per_second"]
        / rows["torch-fidelity"]["images_per_second"],
    }
    storage.write_json(path, content)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
