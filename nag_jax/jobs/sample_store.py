"""Samples that are drawn already, in blocks on disk, so that a killed evaluation goes on from its last block.

A block is a file FIRST-END.npz with what is known of the samples FIRST ... END - 1. Blocks may be of any size: a run
with another batch size, or another number of hosts, goes on where an earlier one stopped. What is in a block is the
drawing's affair; blocks are removed when the result that they belong to is written.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from etils import epath
from numpy.typing import NDArray

from nag_jax import storage
from nag_jax.errors import UserError
from nag_jax.hosts import from_first

Arrays = dict[str, NDArray]

_FILE_NAME = re.compile(r"(\d+)-(\d+)\.npz")


class _Block(NamedTuple):
    samples: range
    file: epath.Path


class SampleStore:
    """The blocks of one method, in a folder.

    Args:
        folder: where they are; it need not exist.
        count: number of samples in all.
    """

    def __init__(self, folder: epath.PathLike, count: int) -> None:
        self.folder = epath.Path(folder)
        self.count = count

    def missing(self) -> list[range]:
        """The samples that no block holds, as ranges in order."""
        return self._missing(self._blocks())

    def agreed_missing(self) -> list[range]:
        """The same, as the first of several processes sees it; every process must call."""
        return [range(*ends) for ends in from_first(lambda: [(each.start, each.stop) for each in self.missing()])]

    def _missing(self, blocks: list[_Block]) -> list[range]:
        missing, end = [], 0
        for block in blocks:
            if block.samples.start > end:
                missing.append(range(end, block.samples.start))
            end = max(end, block.samples.stop)
        return missing + [range(end, self.count)] if end < self.count else missing

    def write(self, first: int, size: int, arrays: Mapping[str, NDArray]) -> None:
        """Keeps the block of samples first ... first + size - 1.

        Raises:
            NagJaxError: it cannot be written.
        """
        buffer = io.BytesIO()
        np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
        storage.write_bytes(self.folder / f"{first:08d}-{first + size:08d}.npz", buffer.getvalue())

    def read(self, *names: str) -> Iterator[Arrays]:
        """The arrays `names` of every block, in the samples' order.

        Raises:
            UserError: samples are missing, or a file is damaged.
        """
        blocks = self._blocks()
        missing = self._missing(blocks)
        if missing:
            raise UserError(f"{self.folder} lacks samples {missing[0].start} to {missing[0].stop - 1}.")
        ends = [0, *(block.samples.stop for block in blocks)]
        for end, block in zip(ends, blocks, strict=False):
            if block.samples.start != end or block.samples.stop > self.count:
                raise UserError(
                    f"{block.file} overlaps with another block or with the end: two runs wrote into {self.folder}. "
                    "Delete the folder and run the command again, alone."
                )
        for block in blocks:
            try:
                with np.load(io.BytesIO(block.file.read_bytes()), allow_pickle=False) as arrays:
                    found = {name: arrays[name] for name in names}
            except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{block.file} is damaged ({error}). Delete it and run the command again."
                ) from error
            yield found

    def _blocks(self) -> list[_Block]:
        blocks = []
        for file in self.folder.glob("*.npz") if self.folder.exists() else ():
            match = _FILE_NAME.fullmatch(file.name)
            if match:
                blocks.append(_Block(range(int(match[1]), int(match[2])), file))
        return sorted(blocks, key=lambda block: block.samples.start)
