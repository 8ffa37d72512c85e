"""The benchmark of the input reads what it wrote, and training starts quickly on many records."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from nag_jax.data.latents import open_latents
from nag_jax.data.pipeline import make_batches

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark(load_benchmark):
    return load_benchmark("input")


def test_what_is_timed_is_training_s_input(benchmark, tmp_path: Path):
    config = benchmark.write_latents(tmp_path, 40, side=2, channels=3)
    reading = benchmark.measure_reading(config, batch_size=8, num_batches=4)
    assert (reading["records"], reading["record_bytes"]) == (40, 2 * 2 * 2 * 6 * 2)
    assert reading["rows_per_second"] > 0 and benchmark.best_step_rate() > 0


def test_an_epoch_of_fifty_thousand_records_is_global_and_exact(benchmark, tmp_path: Path):
    count, batch_size = 50_000, 1_000
    config = benchmark.write_latents(tmp_path, count, side=2, channels=3)
    start = benchmark.measure_start(config, batch_size)
    assert start["records"] == count and start["seconds_to_first_batch"] < 10
    seen: list[int] = []
    source = open_latents(config, "train")
    with closing(make_batches(source, config, batch_size=batch_size, seed=0, start_step=0)) as batches:
        for _, batch in zip(range(count // batch_size), batches, strict=False):
            seen += batch["index"].tolist()
    assert sorted(seen) == list(range(count))
    # The first batch comes from everywhere: the order is shuffled over all records and not within shards.
    assert min(seen[:batch_size]) < count // 50 and max(seen[:batch_size]) > count - count // 50


def test_the_documented_figures_are_those_of_the_run():
    found = json.loads((ROOT / "results/input_cpu.json").read_text())
    text = (ROOT / "docs/benchmarks.md").read_text().partition("## Input")[2]
    assert f"{found['reading']['rows_per_second']:,.0f} rows a second" in text
    assert f"{found['times_the_best_step']:.0f} times the {found['best_step_images_per_second']:.0f} images" in text
    assert f"{found['start']['records']:,} small" in text
    assert f"{found['start']['seconds_to_first_batch']:.1f} s after" in text
