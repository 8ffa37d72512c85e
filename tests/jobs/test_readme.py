"""The README's Python, run as it stands on a finished run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_library_section_runs(finished: Path, runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(runs.data_dir))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {"velocity": lambda x, t, labels: x}
    for block in blocks:
        exec(block.replace("runs/digits", str(finished)), names)  # noqa: S102
    assert names["images"].shape == (80, 8, 8, 1)  # type: ignore[attr-defined]
    assert names["samples"].evaluations_per_image == 150  # type: ignore[attr-defined]
    assert set(names["shifts"]) == {"plain", "NAG"}  # type: ignore[call-overload]


def test_every_file_that_it_names_exists():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = document.read_text()
        links = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
        quoted = re.findall(r"`((?:nag_jax|configs|docs|launch|tests|benchmarks|results)/[\w./]*)`", text)
        for name in links:
            assert (document.parent / name).exists(), (document.name, name)
        for name in quoted:
            assert (ROOT / name).exists(), (document.name, name)
