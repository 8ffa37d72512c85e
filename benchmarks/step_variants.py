"""What benchmarks/step.py measures: the sizes, and for each size the variants, the most important first."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing to measure.

    Attributes:
        framework: "jax" is this project, "torch" the same network in PyTorch.
        job: "train" (optimizer steps) or "sample" (guided sampling).
        batch_size: images of a training step, or images that are sampled together.
        options: fields of `ModelConfig` to change (jax), or {"compile": bool} (torch).
        xla_flags: added to the environment's XLA_FLAGS (jax).
    """

    framework: Literal["jax", "torch"]
    job: Literal["train", "sample"]
    batch_size: int
    options: dict[str, Any]
    xla_flags: str = ""


@dataclasses.dataclass(frozen=True)
class Size:
    """A network and how long it is measured.

    Attributes:
        depth, hidden_size, num_heads: the network; patches are 2 x 2 and it learns a variance, as DiT-XL/2 does.
        side: height and width of a state of 4 channels.
        num_classes: classes.
        dtype: of the computation.
        matmul_size: n of the n x n matrix product that measures the device.
        steps: training steps, or steps of the sampler, that are timed as one chain.
        repeats: chains, of which the median counts.
        variants: what is measured.
    """

    depth: int
    hidden_size: int
    num_heads: int
    side: int
    num_classes: int
    dtype: Literal["float32", "bfloat16"]
    matmul_size: int
    steps: int
    repeats: int
    variants: tuple[Variant, ...]


def _cpu_variants(batch_size: int, num_images: int) -> tuple[Variant, ...]:
    return (
        Variant("jax", "train", batch_size, {"scan_blocks": True}),
        Variant("torch", "train", batch_size, {"compile": False}),
        Variant("jax", "train", batch_size, {"scan_blocks": False}),
        Variant("jax", "sample", num_images, {}),
        Variant("torch", "sample", num_images, {"compile": False}),
    )


# Products go to cuBLAS; otherwise the compiler makes kernels of its own out of some of them and what surrounds them.
# Faster for sampling, and compiled in a third of the time; slower where it was tried on blocks of a training step.
NO_TRITON_PRODUCTS = "--xla_gpu_enable_triton_gemm=false"

SIZES = {
    "full": Size(
        depth=28,
        hidden_size=1152,
        num_heads=16,
        side=32,
        num_classes=1000,
        dtype="bfloat16",
        matmul_size=8192,
        steps=6,
        repeats=3,
        variants=(
            Variant("jax", "train", 128, {"attention": "cudnn", "scan_blocks": True, "remat": "dots_flash"}),
            # Moves the least memory of all that gpu_traffic.py counted, in this program; by XLA's default it did not
            # compile within 120 s.
            Variant(
                "jax", "train", 128, {"attention": "cudnn", "scan_blocks": False, "remat": "none"}, NO_TRITON_PRODUCTS
            ),
            Variant("jax", "sample", 64, {"attention": "cudnn", "scan_blocks": True}, NO_TRITON_PRODUCTS),
            Variant("torch", "train", 128, {"compile": True}),
            Variant("torch", "sample", 64, {"compile": True}),
            Variant("jax", "train", 256, {"attention": "cudnn", "scan_blocks": True, "remat": "dots_flash"}),
            Variant("jax", "sample", 64, {"attention": "cudnn", "scan_blocks": True}),
            Variant("jax", "train", 128, {"attention": "xla", "scan_blocks": True, "remat": "dots"}),
            Variant("jax", "sample", 64, {"attention": "xla", "scan_blocks": True}),
            Variant("torch", "train", 256, {"compile": True}),
            Variant("jax", "train", 256, {"attention": "cudnn", "scan_blocks": True, "remat": "full"}),
            Variant("torch", "train", 128, {"compile": False}),
            Variant("jax", "train", 128, {"attention": "cudnn", "scan_blocks": False, "remat": "none"}),
        ),
    ),
    "small": Size(
        depth=12,
        hidden_size=384,
        num_heads=6,
        side=16,
        num_classes=1000,
        dtype="float32",
        matmul_size=1024,
        steps=3,
        repeats=3,
        variants=_cpu_variants(batch_size=8, num_images=4),
    ),
    "tiny": Size(
        depth=2,
        hidden_size=32,
        num_heads=2,
        side=8,
        num_classes=10,
        dtype="float32",
        matmul_size=64,
        steps=2,
        repeats=2,
        # The last one is refused: float32 has no cuDNN attention.
        variants=(*_cpu_variants(batch_size=4, num_images=2), Variant("jax", "train", 4, {"attention": "cudnn"})),
    ),
}


def median_seconds(chain: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `chain`, which must wait for its result; one call before the first counts as warm-up."""
    chain()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        chain()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
