"""Batches by step: which records batch s holds, read ahead by grain.

Rows [sB, (s+1)B) of an endless sequence, the epochs' permutations one after the other, are batch s; process p
of P reads the p-th of its P equal parts. So the position in the data *is* the training step: a run resumes at
any step, with any number of processes, and nothing about the data need be saved.

A source holds images or latents; a batch has "image" or "moments" accordingly, and all else is the same.
"""

import dataclasses
import sys
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax.data import draws
from nag_jax.data.images import to_float
from nag_jax.data.latents import LatentSource, sample_states
from nag_jax.data.sources import DataConfig, Source, load_example
from nag_jax.errors import UserError
from nag_jax.parallel import check_batch_size

Batches: TypeAlias = Generator[dict[str, np.ndarray], None, None]
AnySource: TypeAlias = Source | LatentSource

# Batches read ahead, each by a thread of its own: enough to hide a slow read, few enough for 256-pixel batches
# in memory.
READ_AHEAD = 4

# The noise of held-out latents is the same in every run, whatever its seed, as held-out images are.
HELD_OUT_NOISE_SEED = 0


def make_batches(
    source: AnySource,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """The endless training batches from `start_step` on; this process's rows of each.

    Args:
      source: the records.
      config: `image_size`, `channels` and `random_flip` are read here.
      batch_size: B, rows of a batch over all processes.
      seed: >= 0; with the epoch's number it keys the epoch's permutation and each record's mirroring.
      start_step: the step of the first batch; starting late costs nothing.
      process_index, process_count: this process, and of how many; each reads B / process_count rows.

    Returns:
      An iterator of {"image": float32 [B_local, H, W, C] in [-1, 1], "label": int32 [B_local], "index": int64
      [B_local], the records' numbers}; of latents {"moments": float16 [B_local, h, w, 2 C], unscaled mean and
      log-variance of the image or of the mirrored one, "label", "index"}. Its `close()` stops the reading.

    Raises:
      UserError: the batch cannot be shared out, a negative seed, or (while iterating) a damaged record.
    """
    import grain

    check_batch_size(batch_size, process_count, "the processes that read it")
    if seed < 0:
        raise UserError(f"the data seed is {seed}; it must be 0 or more")
    rows = batch_size // process_count
    read_batch = _ReadTrainingBatch(
        source=source,
        config=config,
        seed=seed,
        batch_size=batch_size,
        first_row=process_index * rows,
        rows=rows,
    )
    steps = grain.MapDataset.range(start_step, sys.maxsize)
    return _read_ahead(steps.map(read_batch))


def ordered_batches(
    source: AnySource, config: DataConfig, *, batch_size: int, limit: int | None = None
) -> Batches:
    """Every record once, in the source's order, unaugmented; for evaluation.

    Args:
      source: the records.
      config: `image_size` and `channels` are read here.
      batch_size: rows of a batch; the last batch may have fewer.
      limit: stop after that many records; None for all.

    Returns:
      An iterator of batches as `make_batches` gives them.

    Raises:
      UserError: while iterating, a damaged record.
    """
    total = len(source) if limit is None else min(limit, len(source))
    return batches_of(source, config, parts_of(range(total), batch_size))


def batches_of(source: AnySource, config: DataConfig, ranges: Sequence[range]) -> Batches:
    """A batch of each of the given ranges of records, unaugmented.

    Args:
      source: the records.
      config: `image_size` and `channels` are read here.
      ranges: the records of each batch.

    Returns:
      An iterator of batches as `make_batches` gives them.

    Raises:
      UserError: while iterating, a damaged record.
    """
    import grain

    numbers = grain.MapDataset.range(len(ranges))
    return _read_ahead(numbers.map(_ReadRange(source, config, ranges)))


def parts_of(records: range, size: int) -> list[range]:
    """A range in consecutive parts of `size`; the last may be shorter."""
    return [records[first : first + size] for first in range(0, len(records), size)]


def eval_arrays(
    source: AnySource, config: DataConfig, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A small held-out set as two arrays, in the source's order, unaugmented.

    Args:
      source: the records.
      config: `image_size` and `channels` are read here.
      limit: the first that many, at least 1; None for all.

    Returns:
      (float32 [N, H, W, C], labels int32 [N]): images in [-1, 1], or scaled latents, drawn from each record's moments
      with noise that depends on the record's number alone.

    Raises:
      UserError: a damaged record.
    """
    batches = list(ordered_batches(source, config, batch_size=256, limit=limit))
    labels = np.concatenate([b["label"] for b in batches])
    if isinstance(source, Source):
        return np.concatenate([b["image"] for b in batches]), labels
    key = jax.random.key(HELD_OUT_NOISE_SEED, impl="threefry2x32")
    states = []
    for batch in batches:
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(batch["index"], jnp.uint32))
        states.append(sample_states(jnp.asarray(batch["moments"]), keys, source.latent.scaling_factor))
    return np.concatenate(states), labels


@dataclasses.dataclass(frozen=True)
class _ReadTrainingBatch:
    """Step -> this process's part of the batch."""

    source: AnySource
    config: DataConfig
    seed: int
    batch_size: int
    first_row: int
    rows: int

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        length = len(self.source)
        first = step * self.batch_size + self.first_row
        places = [divmod(position, length) for position in range(first, first + self.rows)]
        records = [int(draws.epoch_order(self.seed, epoch, length)[place]) for epoch, place in places]
        mirror = [
            self.config.random_flip and draws.flip(self.seed, epoch, record)
            for (epoch, _), record in zip(places, records, strict=True)
        ]
        return _read_records(self.source, self.config, records, mirror)


@dataclasses.dataclass(frozen=True)
class _ReadRange:
    """A batch's number -> the batch of its range of records."""

    source: AnySource
    config: DataConfig
    ranges: Sequence[range]

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        records = list(self.ranges[number])
        return _read_records(self.source, self.config, records, [False] * len(records))


def _read_records(
    source: AnySource, config: DataConfig, records: list[int], mirror: list[bool]
) -> dict[str, np.ndarray]:
    labels = np.empty(len(records), np.int32)
    index = np.asarray(records, np.int64)
    if isinstance(source, LatentSource):
        height, width, channels = source.image_shape
        moments = np.empty((len(records), height, width, 2 * channels), np.float16)
        for row, (record, mirrored) in enumerate(zip(records, mirror, strict=True)):
            stored = source[record]
            moments[row], labels[row] = stored["moments"][int(mirrored)], stored["label"]
        return {"moments": moments, "label": labels, "index": index}
    pixels = np.empty((len(records), config.image_size, config.image_size, config.channels), np.uint8)
    for row, (record, mirrored) in enumerate(zip(records, mirror, strict=True)):
        image, labels[row] = load_example(source, config, record)
        pixels[row] = image[:, ::-1] if mirrored else image
    return {"image": to_float(pixels), "label": labels, "index": index}


def _read_ahead(batches: Any) -> Batches:
    """Iterate over a grain MapDataset of batches while threads read the later ones."""
    import grain

    options = grain.ReadOptions(num_threads=READ_AHEAD, prefetch_buffer_size=READ_AHEAD)
    iterator = iter(batches.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
