"""Draws are addressed, not consumed."""

import numpy as np

from nag_jax.data.draws import Stream, epoch_order, flip, permutation, words


def test_any_stretch_of_words_is_the_same_stretch():
    whole = words(Stream.ORDER, 40, seed=3, epoch=2)
    for start in range(9):
        np.testing.assert_array_equal(
            words(Stream.ORDER, 10, seed=3, epoch=2, start=start), whole[start : start + 10]
        )


def test_every_part_of_the_address_counts():
    base = {"seed": 1, "epoch": 0, "record": 0}
    drawn = {tuple(words(Stream.FLIP, 4, **base))}
    for change in ({"seed": 0, "epoch": 1}, {"seed": 2}, {"epoch": 1}, {"record": 1}):
        drawn.add(tuple(words(Stream.FLIP, 4, **(base | change))))
    drawn.add(tuple(words(Stream.ORDER, 4, **base)))
    assert len(drawn) == 6


def test_permutation_is_complete_and_uniform():
    counts = np.zeros((4, 4))
    trials = 2000
    for seed in range(trials):
        order = permutation(Stream.ORDER, 4, seed=seed)
        assert sorted(order) == [0, 1, 2, 3]
        counts[np.arange(4), order] += 1
    deviation = np.sqrt(trials * 0.25 * 0.75)
    assert np.abs(counts - trials / 4).max() < 4.5 * deviation


def test_epochs_are_ordered_differently():
    orders = {tuple(epoch_order(seed, epoch, 100)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_flip_is_a_fair_coin():
    flips = [flip(seed, epoch, record) for seed in range(5) for epoch in range(5) for record in range(80)]
    assert abs(np.mean(flips) - 0.5) < 4.5 * 0.5 / np.sqrt(len(flips))
