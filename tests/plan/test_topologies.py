"""Names of machines, and numbers of chips. Compiling for a TPU is in tests/jobs/test_plan.py."""

import math
import re

import pytest

from nag_jax.errors import UserError
from nag_jax.plan import topologies
from nag_jax.plan.topologies import CHIPS, CUBIC, FLAT, NAMED_BY_CORES, open_topology, topology_name


def test_names_of_cloud_tpu_count_cores_or_chips():
    """Cloud TPU counts two cores a chip for v4, v5p and TPU7x, and chips for v5e and v6e."""
    assert topology_name("v4-8") == "v4:2x2x1"
    assert topology_name("v5p-128") == "v5p:4x4x4"
    assert topology_name("v5e-256") == "v5e:16x16"
    assert topology_name("v6e-16") == "v6e:4x4"
    for name, shape in topologies.known_topologies().items():
        if "-" in name:
            generation, _, count = name.partition("-")
            chips = math.prod(int(side) for side in shape.partition(":")[2].split("x"))
            assert int(count) == chips * (2 if generation in NAMED_BY_CORES else 1), name


def test_shapes_have_as_many_chips_as_they_say():
    for chips, shape in (FLAT | CUBIC).items():
        assert math.prod(int(side) for side in shape.split("x")) == chips


def test_other_shapes_of_known_chips_are_passed_on():
    assert topology_name("v5e:2x8") == "v5e:2x8"


@pytest.mark.parametrize(
    ("name", "nearest"), [("v5e:4by4", "v5e:4x4"), ("v4-9", "v4-8"), ("v6:4x4", "v6e:4x4"), ("loca", "local")]
)
def test_a_wrong_name_is_told_the_nearest(name, nearest):
    with pytest.raises(UserError, match=rf"--topology={name} is not a machine known here. Nearest: .*{nearest}"):
        topology_name(name)


def test_a_device_of_a_chip_with_two_has_half_of_it():
    half = CHIPS["tpu7x"].of_one_device()
    assert 2 * half.flops == CHIPS["tpu7x"].flops and 2 * half.hbm_bytes == CHIPS["tpu7x"].hbm_bytes
    assert CHIPS["v5e"].of_one_device() == CHIPS["v5e"]


def test_every_chip_names_its_source():
    for chip in CHIPS.values():
        assert re.match(r"https://\S+", chip.source)


def test_this_machine_has_no_known_chip():
    local = open_topology("local")
    assert local.devices[0].platform == "cpu" and local.chip is None
