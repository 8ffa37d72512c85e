"""Random words on the host, addressed by what they are for (stream, seed, epoch, record); there is no state.

The words are those of NumPy's Philox bit generator, a counter-based cipher whose raw stream NumPy promises
never to change (NEP 19). `Generator.permutation` and its kin carry no such promise, so they are not used: a
run resumed after an upgrade must see the same order. Draws on the device (noise, t, dropout) are not here;
they are JAX keys.
"""

import enum
from functools import lru_cache

import numpy as np


class Stream(enum.IntEnum):
    """What a draw is for; two streams never share a word."""

    ORDER = 0
    FLIP = 1
    BALANCED_LABELS = 2
    RANDOM_LABELS = 3


def words(
    stream: Stream, count: int, *, seed: int, epoch: int = 0, record: int = 0, start: int = 0
) -> np.ndarray:
    """`count` random words, from word number `start` of the sequence that the other arguments name.

    Args:
      stream: the purpose.
      count: how many, >= 0.
      seed, epoch, record: the address, each in [0, 2**64).
      start: the first word's place in the sequence; words [a, b) are the same however they are asked for.

    Returns:
      uint64[count], uniform over all 64-bit values.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([start // 4, record, 0, stream], dtype=np.uint64)  # one count yields four words
    skip = start % 4
    return np.random.Philox(key=key, counter=counter).random_raw(skip + count)[skip:]


def permutation(stream: Stream, length: int, *, seed: int, epoch: int = 0) -> np.ndarray:
    """A uniform permutation: the order of `length` random words.

    Args:
      stream: the purpose.
      length: how many things are put in order, >= 0.
      seed, epoch: the address.

    Returns:
      int64[length] that holds each of 0 .. length - 1 once.
    """
    return np.argsort(words(stream, length, seed=seed, epoch=epoch), kind="stable")


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which an epoch visits the records; kept for the few epochs that batches in flight need.

    Args:
      seed: the run's data seed.
      epoch: 0, 1, ….
      length: number of records.

    Returns:
      int64[length], read-only: record of each place in the epoch.
    """
    order = permutation(Stream.ORDER, length, seed=seed, epoch=epoch)
    order.flags.writeable = False
    return order


def flip(seed: int, epoch: int, record: int) -> bool:
    """Whether a record's image is mirrored in an epoch; a fair coin that depends on nothing else."""
    return bool(words(Stream.FLIP, 1, seed=seed, epoch=epoch, record=record)[0] >> np.uint64(63))
