"""Do the latents come fast enough? Rows a second of the training input, and how long it takes to start.

    python benchmarks/input.py                                  results/input_cpu.json; 700 MB in a temporary folder
    python benchmarks/input.py --start_records=1281167          and the start with as many records as ImageNet has

Records are random and of full size (32 x 32 x 8 float16 in two orientations), read as training reads them: global
shuffling, a coin for the orientation, checksums, batches on the host; just written, they lie in the system's cache.
What a step consumes stands in results/step_gpu.json; the ratio to the best training rate there is printed beside. The
start is timed on records of 2 x 2 x 6, from opening the folder to the first batch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from nag_jax import storage
from nag_jax.data import latent_shards
from nag_jax.data.latents import open_latents
from nag_jax.data.pipeline import make_batches
from nag_jax.data.sources import DataConfig
from nag_jax.denoiser import LatentSpace
from nag_jax.jobs.experiment import environment

ROOT = Path(__file__).resolve().parent.parent
NUM_CLASSES = 1000
SPLIT = "train"


def write_latents(folder: Path, count: int, side: int, channels: int) -> DataConfig:
    """Random latents as `--mode=encode` writes them; the config that reads them."""
    encoding = latent_shards.Encoding(
        data="random",
        split=SPLIT,
        mock_examples=0,
        source=f"random {count}",
        count=count,
        num_classes=NUM_CLASSES,
        image_size=8 * side,
        channels=3,
        vae="none",
        vae_fingerprint="none",
        latent=LatentSpace(0.18215, 8, "none"),
        latent_channels=channels,
        shard_records=latent_shards.SHARD_RECORDS,
    )
    config = DataConfig(name="random", split=SPLIT, image_size=8 * side, channels=3, latents=str(folder))
    target = latent_shards.split_folder(config, SPLIT)
    latent_shards.begin(epath.Path(target), encoding)
    rng = np.random.default_rng(0)
    for shard in range(encoding.num_shards):
        numbers = np.asarray(encoding.shard_range(shard))
        moments = rng.standard_normal((len(numbers), 2, side, side, 2 * channels), np.float32).astype(np.float16)
        labels = rng.integers(NUM_CLASSES, size=len(numbers))
        latent_shards.write_shard(
            epath.Path(target), encoding, shard, latent_shards.make_records(numbers, labels, moments)
        )
    latent_shards.finish(epath.Path(target), encoding)
    return config


def measure_reading(config: DataConfig, batch_size: int, num_batches: int) -> dict[str, Any]:
    """Rows a second, from the second batch on."""
    source = open_latents(config, SPLIT)
    with contextlib.closing(make_batches(source, config, batch_size=batch_size, seed=0, start_step=0)) as batches:
        next(batches)
        begin = time.perf_counter()
        for _ in range(num_batches):
            batch = next(batches)
        seconds = time.perf_counter() - begin
    return {
        "records": len(source),
        "record_bytes": batch["moments"][0].nbytes * 2,
        "batch_size": batch_size,
        "batches": num_batches,
        "rows_per_second": batch_size * num_batches / seconds,
        "cpu_cores": os.cpu_count(),
    }


def measure_start(config: DataConfig, batch_size: int) -> dict[str, Any]:
    """Seconds from opening to the first batch."""
    begin = time.perf_counter()
    source = open_latents(config, SPLIT)
    opened = time.perf_counter()
    with contextlib.closing(make_batches(source, config, batch_size=batch_size, seed=0, start_step=0)) as batches:
        next(batches)
        first = time.perf_counter()
    return {"records": len(source), "seconds_to_open": opened - begin, "seconds_to_first_batch": first - begin}


def best_step_rate() -> float | None:
    """Images a second of the fastest training variant of this project in results/step_gpu.json."""
    path = ROOT / "results/step_gpu.json"
    if not path.exists():
        return None
    variants = [variant for call in json.loads(path.read_text())["calls"] for variant in call["variants"]]
    rates = [
        variant["result"]["images_per_second"]
        for variant in variants
        if (variant["framework"], variant["job"]) == ("jax", "train") and "error" not in variant["result"]
    ]
    return max(rates, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, default=20_000, help="records of full size")
    parser.add_argument("--start_records", type=int, default=50_000, help="small records that the start is timed on")
    parser.add_argument("--batch_size", type=int, default=256, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=60, help="batches that are timed")
    parser.add_argument("--results", type=Path, default=ROOT / "results/input_cpu.json", help="JSON file to write")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = write_latents(Path(folder) / "full", given.records, side=32, channels=4)
        reading = measure_reading(config, given.batch_size, given.batches)
        small = write_latents(Path(folder) / "small", given.start_records, side=2, channels=3)
        start = measure_start(small, given.batch_size)
    rate = best_step_rate()
    content = {
        "environment": environment() | {"command": " ".join(["python", *map(shlex.quote, sys.argv)])},
        "reading": reading,
        "best_step_images_per_second": rate,
        "times_the_best_step": None if rate is None else reading["rows_per_second"] / rate,
        "start": start,
    }
    storage.write_json(given.results, content)
    print(f"{reading['rows_per_second']:.0f} rows/s, {content['times_the_best_step'] or float('nan'):.1f} times a step")
    print(f"{start['records']:,} records: first batch after {start['seconds_to_first_batch']:.2f} s")
    print(f"written: {given.results}")


if __name__ == "__main__":
    main()
