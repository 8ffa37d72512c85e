"""The table of plans: its text, which cells are of older source, and whether the published ones hang together.

The TPU compiler is not needed.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "results/plan_tpu.json").read_text())["cells"]
COMPILED = {name: cell for name, cell in RESULTS.items() if "memory" in cell}


COMMIT = {"environment": {"commit": 40 * "a"}}


def table(*arguments: str) -> str:
    command = [sys.executable, "benchmarks/plan_table.py", "--table", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plan_table(load_benchmark):
    return load_benchmark("plan_table")


@pytest.fixture(scope="module")
def plan_source(load_benchmark):
    return load_benchmark("plan_source")


def test_an_empty_table_says_so(tmp_path: Path):
    lines = table(f"--output={tmp_path / 'none.json'}").splitlines()
    assert len(lines) > 20 and all("not compiled yet" in line for line in lines[2:])


def test_a_cell_that_failed_gives_its_reason(tmp_path: Path):
    content = {"cells": {"training XL/2 v4-8 fsdp 4": COMMIT | {"batch_size": 256, "error": "took too long"}}}
    (tmp_path / "some.json").write_text(json.dumps(content))
    text = table(f"--output={tmp_path / 'some.json'}")
    assert "| training | XL/2 | v4-8 | 4 | 256 | | | | | took too long | aaaaaaa |" in text


def test_cells_of_other_source_are_named_and_compiled_anew(plan_table, tmp_path: Path, monkeypatch, capsys):
    first, second, third = plan_table.CELLS[:3]
    cells = sys.modules["plan_cells"]
    failed = COMMIT | {"batch_size": 256, "error": "took too long"}
    content = {"cells": {first.name: failed | {"digest": cells.digest_of(first)}, second.name: failed}}
    file = tmp_path / "some.json"
    file.write_text(json.dumps(content))
    filled = []

    def run_script(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan_table.py", f"--output={file}", *arguments])
        cells.run_script(
            "plan_table.py", None, plan_table.CELLS, lambda cell: filled.append(cell) or failed, plan_table.table, file
        )
        return capsys.readouterr().err

    warning = run_script("--table")
    assert second.name in warning and first.name not in warning and third.name not in warning
    run_script("--cells=3")
    assert filled == [second, third]
    run_script("--cells=3")
    assert filled == [second, third], "all are there"
    assert run_script("--table") == ""


def test_a_digest_is_of_code_and_settings_and_not_of_words(plan_table, plan_source):
    cells = sys.modules["plan_cells"]
    source = 'def double(x):\n    """Twice x."""\n    return 2 * x  # cheap\n'
    same = "def double( x ):\n    return (2 * x)\n"
    assert plan_source.code_of(source) == plan_source.code_of(same)
    assert plan_source.code_of(source) != plan_source.code_of(same.replace("2", "3"))
    assert len({cells.digest_of(cell) for cell in plan_table.CELLS if cell.machine == "v5e-16"}) > 3
    assert all((plan_source.PACKAGE / name).exists() for name in plan_source.SOURCE)


def test_the_documented_table_is_that_of_the_results():
    assert table() in (ROOT / "docs/plan.md").read_text()


@pytest.mark.parametrize("name", COMPILED)
def test_published_cells_hang_together(name: str):
    cell = COMPILED[name]
    memory, line = cell["memory"], cell["roofline"]
    assert memory["total"] == sum(memory[part] for part in ("arguments", "temporaries", "outputs", "code"))
    assert line["seconds"] <= line["seconds_without_overlap"]
    assert cell["received_bytes"] == pytest.approx(sum(kind["received"] for kind in cell["collectives"].values()))
    assert cell["environment"]["commit"] and cell["environment"]["libtpu"]
    if cell["job"] == "training":
        assert memory["arguments"] >= cell["state_bytes"]
        largest = cell["largest_batch"]
        assert "error" in largest or largest["fits"] % cell["devices"] == 0
        assert "error" in largest or not cell["fits"] or largest["fits"] >= cell["batch_size"]


def test_splitting_parameters_splits_the_state():
    """XL/2 on sixteen chips: the same network with and without fsdp."""
    whole, split = (RESULTS.get(f"training XL/2 v6e-16 fsdp {fsdp}", {}) for fsdp in (1, 16))
    if "state_bytes" not in whole or "state_bytes" not in split:
        pytest.skip("not compiled yet")
    assert 1 / 16 <= split["state_bytes"] / whole["state_bytes"] < 1 / 15
