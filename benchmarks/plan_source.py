"""A digest of what decides a cell's program, so that a cell of older source can be told from one of this source.

Comments, docstrings and layout decide nothing and do not count; nor do versions of packages, which stand in a cell's
environment. The digest is of files, so it also changes where a file does and the program does not.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from nag_jax import storage
from nag_jax.config import Config, to_dict

PACKAGE = Path(__file__).resolve().parent.parent / "nag_jax"
# What is compiled, and what is read out of it. jobs/train.py is left out: it only hands settings to training/.
SOURCE = (
    "denoiser.py",
    "parallel.py",
    "flops.py",
    "data/latents.py",
    "diffusion",
    "models",
    "training",
    "plan",
    "jobs/methods.py",
    "jobs/plan_programs.py",
)
SECTIONS = ("batch_size", "ema", "model", "objective", "optimizer", "parallel", "process", "sampling")


def program_digest(config: Config) -> str:
    """Eight hexadecimal digits that differ where the source differs, or settings that a program depends on."""
    settings = to_dict(config)
    return storage.digest({"source": source_digest(), "settings": {name: settings[name] for name in SECTIONS}})


@functools.cache
def source_digest() -> str:
    """The digest of all files of `SOURCE`."""
    files = [file for name in SOURCE for file in sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / name]]
    return storage.digest({str(file.relative_to(PACKAGE)): code_of(file.read_text()) for file in files})


def code_of(source: str) -> str:
    """Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)
