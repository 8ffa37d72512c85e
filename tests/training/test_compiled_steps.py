"""The compiled step of scanned blocks on a 2 x 2 x 2 mesh: what it computes, gives back and never asks the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ON_THE_MESH = ["all", "together", "bfloat16"]
# Relative, of losses and gradient norms, and absolute, of parameters of about 0.1. The unit of bfloat16 is 0.4 %.
TOLERANCES = {"all": (2e-5, 1e-5), "together": (2e-5, 1e-5), "bfloat16": (4e-3, 4e-3)}


@pytest.fixture(scope="module")
def eight(on_eight_devices: Any) -> dict[str, Any]:
    # Four programs are compiled and run a few times each: compile them fast, not well.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return on_eight_devices(Path(__file__).with_name("eight_devices.py"), flags=flags)


@pytest.mark.serial
@pytest.mark.parametrize("name", ON_THE_MESH)
def test_a_mesh_computes_what_one_device_does(eight: dict[str, Any], name: str):
    relative, absolute = TOLERANCES[name]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(eight[name][key], eight["one"][key], rtol=relative, err_msg=key)
    assert eight[name]["params_difference"] < absolute


@pytest.mark.serial
@pytest.mark.parametrize("name", ["one", *ON_THE_MESH])
def test_the_new_state_is_written_over_the_old_one(eight: dict[str, Any], name: str):
    """On each device; the old state is gone after the step."""
    assert eight[name]["alias_bytes"] == eight[name]["state_bytes"]
    assert eight[name]["donated"]


@pytest.mark.serial
@pytest.mark.parametrize("name", ["one", *ON_THE_MESH])
def test_nothing_in_a_step_asks_the_host(eight: dict[str, Any], name: str):
    """No callback, feed or transfer; this CPU's programs have no custom call at all."""
    assert eight[name]["host_work"] == []
    assert eight["a_call_to_the_host"], "a step that prints is found out"
