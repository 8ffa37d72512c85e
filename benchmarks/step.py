"""How fast are a training step and guided sampling, beside the same network in PyTorch?

    python benchmarks/step.py --size=small                         on a CPU: results/step_cpu.json, a minute
    python benchmarks/step.py --size=full --budget_seconds=500     XL/2 on a GPU: results/step_gpu.json

Variants (benchmarks/step_variants.py) run in worker processes, one for each framework and job: step_jax.py is this
project, step_torch.py the peer. One that fails (out of memory, attention that the device does not have) is recorded
with its message, and a new worker goes on with the next. Results are written after every variant; when the budget is
spent no further one is started. What the figures mean stands in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from step_variants import SIZES, Size, Variant

from nag_jax import storage
from nag_jax.flops import dit_forward, dit_training
from nag_jax.models.dit import ModelConfig
from nag_jax.plan.topologies import CHIPS, GENERATIONS

ROOT = Path(__file__).resolve().parent.parent
MARK = "step benchmark: "  # of the lines in which a worker reports
LONGEST_MESSAGE = 1500

# Dense bfloat16 peaks of GPUs in FLOP/s, from the vendor's data sheets, by a part of JAX's `device_kind`.
PEAKS = {
    "H100": 989.4e12,
    "H200": 989.4e12,
    "A100": 312e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s; None for one that is not known here."""
    if device_kind in GENERATIONS:
        return CHIPS[GENERATIONS[device_kind]].of_one_device().flops
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)


# The worker.


def work(framework: str, size: Size, indices: list[int], deadline: float) -> None:
    """Measures variants one after the other and reports each as a line of JSON; ends after the first that fails."""
    side = importlib.import_module(f"step_{framework}")
    device = {"kind": side.device_kind(), "matmul_flops_per_second": side.measured_flops(size)}
    report(environment=side.environment(), device=device)
    for index in indices:
        if time.time() > deadline:
            return
        report(started=index)
        begin = time.perf_counter()
        try:
            result = side.measure(size, size.variants[index])
        except Exception as error:
            traceback.print_exc()
            report(result={"error": shorten(f"{type(error).__name__}: {error}")})
            return
        report(result=result | {"total_seconds": time.perf_counter() - begin})


def report(**content: Any) -> None:
    print(MARK + json.dumps(storage.as_json(content)), flush=True)


def shorten(message: str) -> str:
    message = message.strip()
    return message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + " ..."


# The parent, which must not touch the device.


def reports(command: list[str], xla_flags: str, variant_seconds: float) -> Iterator[dict[str, Any]]:
    """What a worker reports; an error at last if it did not end by itself or was silent for too long."""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        alarm = threading.Timer(variant_seconds, process.kill)
        alarm.start()
        for line in process.stdout:
            if line.startswith(MARK):
                alarm.cancel()
                yield json.loads(line.removeprefix(MARK))
                alarm = threading.Timer(variant_seconds, process.kill)
                alarm.start()
        alarm.cancel()
        code = process.wait()
        log.seek(0)
        errors = log.read()
        sys.stderr.write(errors)
        if code:
            yield {"result": {"error": f"the worker ended with code {code}: {errors[-LONGEST_MESSAGE:].strip()}"}}


def label(variant: Variant) -> str:
    options = " ".join(f"{name}={value}" for name, value in variant.options.items())
    return f"{variant.framework} {variant.job} {variant.batch_size} {options} {variant.xla_flags}".strip()


def next_group(variants: tuple[Variant, ...], pending: list[int]) -> list[int]:
    """The first pending variant and those right after it of the same framework, job and flags: one worker's share."""

    def kind(index: int) -> tuple[str, str, str]:
        return variants[index].framework, variants[index].job, variants[index].xla_flags

    return list(itertools.takewhile(lambda index: kind(index) == kind(pending[0]), pending))


def run(size_name: str, output: Path, budget_seconds: float, variant_seconds: float) -> dict[str, Any]:
    """Measures the variants of a size in their order and writes `output` after each; returns what was written."""
    size = SIZES[size_name]
    begin = time.time()
    deadline = begin + budget_seconds
    content: dict[str, Any] = {
        "size": size_name,
        "settings": {name: value for name, value in dataclasses.asdict(size).items() if name != "variants"},
        "command": " ".join(["python", *map(shlex.quote, sys.argv)]),
        "environment": {},
        "devices": {},
        "variants": [],
        "seconds": 0.0,
        "summary": {},
        "not_measured": [label(variant) for variant in size.variants],
    }
    storage.write_json(output, content)
    pending = list(range(len(size.variants)))
    while pending and time.time() < deadline:
        group = next_group(size.variants, pending)
        framework, xla_flags = size.variants[group[0]].framework, size.variants[group[0]].xla_flags
        command = [sys.executable, __file__, f"--size={size_name}", f"--worker={framework}", f"--deadline={deadline}"]
        running = group[0]
        command += [f"--indices={','.join(map(str, group))}"]
        for message in reports(command, xla_flags, variant_seconds):
            if "environment" in message:
                content["environment"][framework] = message["environment"]
                content["devices"][framework] = message["device"]
                continue
            if "started" in message:
                running = message["started"]
                continue
            variant, result = size.variants[running], message["result"]
            if "error" not in result:
                result = with_rates(size, variant, result, content["devices"][framework])
            pending.remove(running)
            content["variants"].append(dataclasses.asdict(variant) | {"result": result})
            content |= {"seconds": time.time() - begin, "summary": summarize(content["variants"])}
            content["not_measured"] = [label(size.variants[index]) for index in pending]
            storage.write_json(output, content)
            print(f"{label(variant)}: {json.dumps(result)}", flush=True)
    return content


def with_rates(size: Size, variant: Variant, result: dict[str, Any], device: dict[str, Any]) -> dict[str, Any]:
    """A worker's times with what follows from them: FLOP/s as shares of the device's, and ratios to no guidance."""
    model = ModelConfig("", size.depth, size.hidden_size, size.num_heads, patch_size=2, learn_sigma=True)
    shape = (size.side, size.side, 4)
    rates = {"of_peak": peak_flops(device["kind"]), "of_matmul": device["matmul_flops_per_second"]}

    def shares(flops_per_second: float) -> dict[str, float]:
        return {name: flops_per_second / rate for name, rate in rates.items() if rate}

    if variant.job == "train":
        images_per_second = variant.batch_size / result["seconds_per_step"]
        mine = {"images_per_second": images_per_second} | shares(images_per_second * dit_training(model, shape))
        return mine | result
    guidances = {}
    for name, times in result["guidances"].items():
        evaluations_per_second = variant.batch_size * times["evaluations_per_row"] / times["seconds_per_row"]
        ratio = times["seconds_per_row"] / result["guidances"]["plain"]["seconds_per_row"]
        mine = {"ratio_to_plain": ratio} | shares(evaluations_per_second * dit_forward(model, shape))
        guidances[name] = mine | times
    return result | {"guidances": guidances}


def summarize(variants: list[dict[str, Any]]) -> dict[str, Any]:
    """The best variant of each side and job, and how many times as fast ours is, of what has been measured so far."""
    summary: dict[str, Any] = {}
    for job, speed in SPEEDS.items():
        for framework in ("jax", "torch"):
            done = [
                variant
                for variant in variants
                if (variant["framework"], variant["job"]) == (framework, job) and "error" not in variant["result"]
            ]
            if done:
                summary[f"{framework} {job}"] = max(done, key=lambda variant: speed(variant["result"]))
        if f"jax {job}" in summary and f"torch {job}" in summary:
            ours, theirs = (speed(summary[f"{framework} {job}"]["result"]) for framework in ("jax", "torch"))
            summary[f"{job}: times as fast as torch"] = ours / theirs
    return summary


# What the best variant of a job is the best in; sampling is compared under CFG, which both sides have.
SPEEDS: dict[str, Callable[[dict[str, Any]], float]] = {
    "train": lambda result: result["images_per_second"],
    "sample": lambda result: 1.0 / result["guidances"]["cfg"]["seconds_per_row"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="full is DiT-XL/2 on latents of 32 x 32 x 4")
    parser.add_argument("--output", type=Path, help="JSON file; default results/step_gpu.json (full), step_cpu.json")
    parser.add_argument("--budget_seconds", type=float, default=3600.0, help="start no variant after so long")
    parser.add_argument("--variant_seconds", type=float, default=240.0, help="end a worker that is silent for so long")
    for name in ("worker", "indices", "deadline"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        indices = [int(index) for index in given.indices.split(",")]
        work(given.worker, SIZES[given.size], indices, float(given.deadline))
        return
    output = given.output or ROOT / f"results/step_{'gpu' if given.size == 'full' else 'cpu'}.json"
    content = run(given.size, output, given.budget_seconds, given.variant_seconds)
    print(json.dumps(content["summary"], indent=2))
    print(f"written: {output} ({content['seconds']:.0f} s)")


if __name__ == "__main__":
    main()
