"""The table of memory: the count of parameters, the theory against the TPU compiler's published figures, its text.

The TPU compiler is not needed.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from nag_jax.models.dit import ModelConfig, build_model, init_params
from nag_jax.parallel import SPLIT_COLUMNS, SPLIT_ROWS
from nag_jax.plan.topologies import CHIPS, topology_name

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "results/memory_tpu.json").read_text())["cells"]
COMPILED = {name: cell for name, cell in RESULTS.items() if "memory" in cell}


@pytest.fixture(scope="module")
def memory_table(load_benchmark):
    return load_benchmark("memory_table")


@pytest.mark.parametrize("size", ["S", "XL", "3B"])
def test_the_count_of_parameters_is_that_of_the_network(memory_table, size: str):
    model = build_model(ModelConfig(size=size, learn_sigma=True), input_shape=(32, 32, 4), num_classes=1000)
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    counted = memory_table.count_parameters(size)
    assert counted.wide + counted.others == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    layers = {**shapes["blocks"]["attn"], **shapes["blocks"]["mlp"]}
    assert counted.wide == sum(layers[name]["kernel"].size for name in SPLIT_COLUMNS + SPLIT_ROWS)


@pytest.mark.parametrize("name", COMPILED)
def test_the_compiler_gives_a_device_the_state_that_theory_says(memory_table, name: str):
    """What theory leaves out, small parameters that are not split and the batch, is less than 1% more."""
    cell = COMPILED[name]
    theory = memory_table.state_by_theory(cell["size"], cell["fsdp"], cell["tensor"])
    assert 1.0 <= cell["memory"]["arguments"] / theory < 1.01


@pytest.mark.parametrize("name", COMPILED)
def test_all_memory_falls_with_every_doubling_of_fsdp(name: str):
    cell = COMPILED[name]
    double = COMPILED.get(name.replace(f"fsdp {cell['fsdp']}", f"fsdp {2 * cell['fsdp']}"))
    if double is not None:
        assert double["memory"]["arguments"] < 0.51 * cell["memory"]["arguments"]
        assert double["memory"]["temporaries"] < cell["memory"]["temporaries"]


@pytest.mark.parametrize("name", COMPILED)
def test_what_fits_is_what_is_smaller_than_the_memory_of_a_device(name: str):
    cell = COMPILED[name]
    memory = cell["memory"]
    assert memory["total"] == sum(memory[part] for part in ("arguments", "temporaries", "outputs", "code"))
    chip = CHIPS[topology_name(cell["machine"]).partition(":")[0]].of_one_device()
    assert cell["fits"] == (memory["total"] <= chip.hbm_bytes)


def test_what_the_compiler_refused_would_have_needed_more_than_there_is():
    for cell in RESULTS.values():
        if "memory" not in cell and "error" not in cell:
            chip = CHIPS[topology_name(cell["machine"]).partition(":")[0]].of_one_device()
            assert not cell["fits"] and cell["needed_bytes"] > chip.hbm_bytes


def test_the_documented_table_is_that_of_the_results():
    command = [sys.executable, "benchmarks/memory_table.py", "--table"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout in (ROOT / "docs/plan.md").read_text()
