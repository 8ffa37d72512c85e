"""The side of benchmarks/step.py that is the peer: the DiT architecture in PyTorch, as it is commonly trained.

bf16 autocast (on a GPU), `scaled_dot_product_attention`, `torch.compile`, fused AdamW, averages by `_foreach_lerp_`.
The network is the tests' twin of the published one; sampling is its classifier-free guidance, one batch of both halves.
"""

from __future__ import annotations

import copy
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from step_variants import Size, Variant, median_seconds
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests/models"))
from torch_dit import TorchDiT  # noqa: E402

EMA_DECAY, LABEL_DROPOUT, CFG_SCALE, GUIDED_CHANNELS = 0.9999, 0.1, 1.5, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# TF32 for what stays in float32, as the published training script has it.
torch.set_float32_matmul_precision("high")


def environment() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return {"versions": versions, "device": device_kind(), "threads": torch.get_num_threads()}


def device_kind() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def measured_flops(size: Size) -> float:
    """FLOP a second of one large matrix product of random numbers in the dtype of the computation."""
    dtype = getattr(torch, size.dtype)
    a, b = (torch.randn(size.matmul_size, size.matmul_size, device=DEVICE, dtype=dtype) for _ in range(2))
    count = 20

    def chain() -> None:
        for _ in range(count):
            a @ b
        synchronize()

    return count * 2 * size.matmul_size**3 / median_seconds(chain, repeats=3)


def measure(size: Size, variant: Variant) -> dict[str, Any]:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    return {"train": measure_training, "sample": measure_sampling}[variant.job](size, variant)


def make_network(size: Size) -> TorchDiT:
    """A network that is random in its gates too, as the JAX one is."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return TorchDiT(size.side, 4, 2, size.hidden_size, size.depth, size.num_heads, size.num_classes)


def autocast(size: Size) -> torch.autocast:
    return torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=size.dtype == "bfloat16")


def measure_training(size: Size, variant: Variant) -> dict[str, Any]:
    network = make_network(size)
    params = [param for param in network.parameters() if param.requires_grad]
    averages = [copy.deepcopy(param.detach()) for param in params]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)
    forward = torch.compile(network) if variant.options["compile"] else network
    batch = variant.batch_size
    latents = torch.randn(batch, 4, size.side, size.side, device=DEVICE)
    all_labels = torch.randint(size.num_classes, (batch,), device=DEVICE)
    loss = torch.zeros(())

    def step() -> torch.Tensor:
        t = torch.rand(batch, device=DEVICE)
        noise = torch.randn_like(latents)
        dropped = torch.rand(batch, device=DEVICE) < LABEL_DROPOUT
        labels = torch.where(dropped, size.num_classes, all_labels)
        level = t[:, None, None, None]
        with autocast(size):
            velocity = forward((1 - level) * latents + level * noise, t, labels)[:, :4]
        loss = F.mse_loss(velocity.float(), noise - latents)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, [param.detach() for param in params], 1 - EMA_DECAY)
        return loss.detach()

    def chain() -> None:
        nonlocal loss
        for _ in range(size.steps):
            loss = step()
        synchronize()

    begin = time.perf_counter()
    step()
    synchronize()
    first_step = time.perf_counter() - begin
    seconds = median_seconds(chain, size.repeats) / size.steps
    return {
        "seconds_per_step": seconds,
        "images_per_second": batch / seconds,
        "compile_seconds": first_step - seconds,
        "loss": float(loss),
        "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
    }


def measure_sampling(size: Size, variant: Variant) -> dict[str, Any]:
    network = make_network(size).eval()
    forward = torch.compile(network) if variant.options["compile"] else network
    count = variant.batch_size
    labels = torch.arange(count, device=DEVICE) % size.num_classes
    both = torch.cat([labels, torch.full_like(labels, size.num_classes)])
    x_1 = torch.randn(count, 4, size.side, size.side, device=DEVICE)

    def velocity(x: torch.Tensor, t: torch.Tensor, guided: bool) -> torch.Tensor:
        if not guided:
            return forward(x, t.expand(count), labels)[:, :4].float()
        conditional, null = forward(torch.cat([x, x]), t.expand(2 * count), both)[:, :4].float().chunk(2)
        mixed = null + CFG_SCALE * (conditional - null)
        return torch.cat([mixed[:, :GUIDED_CHANNELS], conditional[:, GUIDED_CHANNELS:]], dim=1)

    by_guidance = {}
    for name in ("plain", "cfg"):

        def chain(guided: bool = name == "cfg") -> None:
            x = x_1
            with torch.no_grad(), autocast(size):
                for i in range(size.steps):
                    t = torch.tensor(1 - i / size.steps, device=DEVICE)
                    x = x - velocity(x, t, guided) / size.steps
            synchronize()

        begin = time.perf_counter()
        chain()
        first_call = time.perf_counter() - begin
        seconds = median_seconds(chain, size.repeats)
        by_guidance[name] = {
            "seconds_per_row": seconds / size.steps,
            "evaluations_per_row": 2.0 if name == "cfg" else 1.0,
            "first_call_seconds": first_call,
        }
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
    return {"guidances": by_guidance, "peak_bytes": peak}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
