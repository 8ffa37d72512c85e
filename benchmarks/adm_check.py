"""Are our numbers those of ADM's evaluator? For whoever has its files; none of them can be had where this was written.

    python -m nag_jax.convert classify_image_graph_def.pb converted/inception
    python benchmarks/adm_check.py --samples=admnet_guided_upsampled_imagenet256.npz \\
        --reference=VIRTUAL_imagenet256_labeled.npz --feature_net=converted/inception

The evaluator's README (openai/guided-diffusion, evaluations/README.md) prints what it finds on these two files, 50,000
samples and 10,000 reference images with statistics. This judges them by `--mode=evaluate --samples --reference`, the
Inception Score in the order of the file, and puts both side by side. It ends with 1 if a number lies farther from the
evaluator's than its tolerance.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from nag_jax import storage
from nag_jax.config import Config, EvalConfig
from nag_jax.jobs import evaluate_samples


class Published(NamedTuple):
    """What the evaluator printed, and how far from it float32 features in another framework may lie."""

    value: float
    tolerance: float


PUBLISHED = {
    "Inception Score": Published(215.8370361328125, 0.2),
    "FID": Published(3.9425574129223264, 0.01),
    "sFID": Published(6.140433703346162, 0.02),
    "Precision": Published(0.8265, 0.002),
    "Recall": Published(0.5309, 0.002),
}


def measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Our numbers by the evaluator's names, from a metrics.json."""
    return {
        "Inception Score": metrics["inception_score"]["mean"],
        "FID": metrics["frechet_distance"]["value"],
        "sFID": metrics["spatial_frechet_distance"]["value"],
        "Precision": metrics["precision"],
        "Recall": metrics["recall"],
    }


def far_off(numbers: Mapping[str, float]) -> list[str]:
    """The names of the numbers that lie outside their tolerance."""
    return [name for name, (value, tolerance) in PUBLISHED.items() if not abs(numbers[name] - value) <= tolerance]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("samples", "reference", "feature_net"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--workdir", type=Path, default=Path("runs/adm_check"))
    given = parser.parse_args()
    evaluation = dataclasses.replace(EvalConfig(), feature_net=given.feature_net, inception_score_order="as_given")
    config = Config(eval=evaluation)
    folder = evaluate_samples.run(config, given.samples, given.reference, epath.Path(given.workdir))
    numbers = measured(storage.read_json(folder / "metrics.json"))
    print(f"{'':16s} {'ours':>12s} {'evaluator':>12s} {'tolerance':>10s}")
    for name, (value, tolerance) in PUBLISHED.items():
        print(f"{name:16s} {numbers[name]:12.4f} {value:12.4f} {tolerance:10.4f}")
    missed = far_off(numbers)
    if missed:
        sys.exit(f"Outside the tolerance: {', '.join(missed)}.")


if __name__ == "__main__":
    main()
