"""Progress on the terminal with an estimate of the time left, of several hosts the first one's.

It knows no jobs and writes no files.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from nag_jax.hosts import is_first

ProgressFunction = Callable[[int, str], None]


@contextlib.contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[ProgressFunction]:
    """A bar for one piece of work; on a log file a line every ten seconds.

    Args:
        title: what is done.
        total: units of work.
        done: units that an earlier run did; they do not count in the estimate.

    Yields:
        update(done, note): tells how many units are done and a short note beside them.
    """
    is_terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=done,
        desc=title,
        file=sys.stderr,
        mininterval=0.2 if is_terminal else 10.0,
        maxinterval=10.0,
        dynamic_ncols=is_terminal,
        ncols=None if is_terminal else 90,
        leave=True,
        disable=not is_first(),
    ) as bar:

        def update(done: int, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield update


@contextlib.contextmanager
def stage(title: str) -> Iterator[None]:
    """Says that a stage without countable units begins, and how long it took."""
    if not is_first():
        yield
        return
    print(f"{title} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    print(f"{title}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
