"""Arithmetic of the roofline, on round numbers."""

import dataclasses

import pytest

from nag_jax.plan.roofline import Roofline, roofline
from nag_jax.plan.topologies import Chip

CHIP = Chip("made up", flops=100.0, hbm_bytes=1.0, hbm_bandwidth=10.0, ici_bandwidth=2.0, devices=1, source="")


def test_each_resource_takes_its_amount_over_its_rate():
    line = roofline(CHIP, flops=200.0, memory_bytes=10.0, received_bytes=2.0)
    assert dataclasses.astuple(line) == (2.0, 1.0, 1.0)


def test_overlapped_or_not():
    line = Roofline(compute_seconds=2.0, memory_seconds=1.0, communication_seconds=1.0)
    assert (line.seconds, line.seconds_without_overlap) == (2.0, 3.0)
    assert line.communication_share == pytest.approx((0.0, 1 / 3))
    bound = Roofline(compute_seconds=1.0, memory_seconds=0.5, communication_seconds=4.0)
    assert (bound.seconds, bound.seconds_without_overlap) == (4.0, 5.0)
    assert bound.communication_share == pytest.approx((0.75, 0.8))


def test_nothing_takes_no_time():
    assert Roofline(0.0, 0.0, 0.0).communication_share == (0.0, 0.0)
