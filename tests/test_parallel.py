import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nag_jax import parallel
from nag_jax.errors import UserError
from nag_jax.parallel import ParallelConfig, make_mesh, partition_spec


def mesh_of(data, fsdp, tensor):
    """Stands in for a mesh where only the sizes of its axes matter."""
    return SimpleNamespace(shape={"data": data, "fsdp": fsdp, "tensor": tensor})


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("params/blocks/attn/qkv/kernel", (4, 128, 384), (None, "fsdp", "tensor")),
        ("params/blocks/attn/proj/kernel", (4, 128, 128), (None, "tensor", "fsdp")),
        ("params/blocks_3/mlp/fc1/kernel", (128, 512), ("fsdp", "tensor")),
        ("params/blocks_3/mlp/fc2/kernel", (512, 128), ("tensor", "fsdp")),
        ("opt_state/0/mu/blocks/mlp/fc2/kernel", (4, 512, 128), (None, "tensor", "fsdp")),
        ("ema/ema/final_layer/adaLN_modulation/kernel", (128, 256), (None, "fsdp")),
        ("params/t_embedder/mlp_0/kernel", (256, 128), ("fsdp", None)),
        ("params/y_embedder/embedding", (1001, 128), (None, "fsdp")),
        ("params/blocks/mlp/fc1/bias", (4, 512), ()),
        ("params/blocks/mlp/fc1/bias", (64, 512), (None, "fsdp")),
        ("params/null_noise_embedding", (8192,), ()),
        ("params/odd/kernel", (99, 101), (None, None)),
        ("step", (), ()),
    ],
)
def test_rules(path, shape, spec):
    assert partition_spec(mesh_of(2, 4, 2), path, shape) == PartitionSpec(*spec)


def test_a_mesh_takes_the_devices_that_are_left():
    mesh = make_mesh(ParallelConfig())
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("axes", [{"data": 3}, {"fsdp": 2}, {"data": 0}, {"data": -2}, {"tensor": 0}, {"tensor": -1}])
def test_an_impossible_mesh_names_the_devices_and_what_fits(axes):
    assert jax.device_count() == 1
    with pytest.raises(UserError, match=r"1 device\(s\) exactly. What fits: 1x1x1\."):
        make_mesh(ParallelConfig(**axes))


@dataclasses.dataclass(frozen=True)
class Chip:
    """Stands in for a device of one of several slices."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "chip"


CHIPS = [Chip(id, slice_index=id // 4) for id in range(8)]


@pytest.mark.parametrize(
    "axes, shape", [({}, (8, 1, 1)), ({"fsdp": 2}, (4, 2, 1)), ({"fsdp": 2, "tensor": 2}, (2, 2, 2))]
)
@pytest.mark.parametrize("chips", [CHIPS, CHIPS[::-1], CHIPS[::2] + CHIPS[1::2]])
def test_data_alone_goes_across_slices(axes, shape, chips):
    placed = make_mesh(ParallelConfig(**axes), chips).devices
    assert placed.shape == shape and set(placed.flat) == set(CHIPS)
    slices = np.vectorize(lambda chip: chip.slice_index)(placed)
    for number, of_slice in enumerate(np.split(slices, 2)):
        assert (of_slice == number).all(), "a slice has its own part of the data axis and all of the others"


def test_a_mesh_that_does_not_fit_into_the_slices_is_refused():
    with pytest.raises(UserError, match="8 devices are 2 slices of 4.*parallel.data = 1 must be a multiple of 2"):
        make_mesh(ParallelConfig(fsdp=8), CHIPS)


def test_impossible_settings():
    with pytest.raises(UserError, match="parallel.mode"):
        ParallelConfig(mode="pjit")
    with pytest.raises(UserError, match="pmap"):
        ParallelConfig(mode="pmap", fsdp=2)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="batch of 10 examples.* = 4.*multiple of 4, such as 8 or 12"):
        parallel.check_batch_size(10, 4, "devices")
    with pytest.raises(UserError, match="batch of 0.*such as 4\\."):
        parallel.check_batch_size(0, 4, "devices")


def test_batches_arrive_unchanged():
    batch = {"image": np.arange(12.0, dtype=np.float32).reshape(4, 3), "label": np.arange(4, dtype=np.int32)}
    mesh = make_mesh(ParallelConfig())
    for name, value in parallel.shard_batch(mesh, batch).items():
        np.testing.assert_array_equal(value, batch[name])
        assert value.dtype == batch[name].dtype
    assert parallel.split_batch(batch)["image"].shape == (1, 4, 3)
    assert parallel.local_rows(mesh, 4) == slice(0, 4)


def test_rows_are_kept_apart_only_where_there_is_a_mesh_that_they_divide_over():
    x = jnp.ones((4, 3))
    assert parallel.keep_rows_apart(x) is x
    mesh = make_mesh(ParallelConfig())
    text = jax.jit(parallel.on_mesh(parallel.keep_rows_apart, mesh)).lower(x).as_text()
    assert "sharding_constraint" in text or "Sharding" in text
    np.testing.assert_array_equal(jax.jit(parallel.on_mesh(parallel.keep_rows_apart, mesh))(x), x)


def test_rows_and_heads_stay_together_without_a_mesh():
    shapes = []
    parallel.on_own_rows_and_heads(lambda x: shapes.append(x.shape) or x)(jnp.ones((4, 2, 6, 3)))
    assert shapes == [(4, 2, 6, 3)]


def test_a_mesh_is_made_of_the_devices_that_are_given():
    devices = jax.devices()[:1]
    assert make_mesh(ParallelConfig(), devices).devices.flat[0] is devices[0]
    with pytest.raises(UserError, match="does not use the 2 device"):
        make_mesh(ParallelConfig(data=3), devices * 2)


def test_sharded_initialisation_is_the_initialisation():
    def init(key):
        return {"a": jax.random.normal(key, (64, 128)), "b": jnp.zeros(3)}

    params, shardings = parallel.init_sharded(init, make_mesh(ParallelConfig()), jax.random.key(0))
    np.testing.assert_array_equal(params["a"], jax.jit(init)(jax.random.key(0))["a"])
    assert shardings["a"].spec == PartitionSpec(None, "fsdp")


@pytest.fixture(scope="module")
def eight(on_eight_devices, tmp_path_factory):
    # Seven programs are compiled and run a few times each: compile them fast, not well.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    checkpoints = str(tmp_path_factory.mktemp("checkpoints"))
    return on_eight_devices(Path(__file__).with_name("eight_devices.py"), checkpoints, flags=flags)


@pytest.mark.serial
def test_eight_devices_compute_what_one_does(eight):
    assert eight["devices"] == 8
    assert eight["init_difference"] < 1e-6
    for name in ("data", "fsdp", "all", "pmap"):
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose(eight[key][name], eight[key]["one"], rtol=2e-5, err_msg=f"{key} {name}")
        assert eight["params"][name] < 1e-4, name
    assert all(eight["count"].values())
    assert [name for name, is_donated in eight["donated"].items() if not is_donated] == ["one"]
    assert eight["same_draws"]
    assert eight["local_rows"] == [0, 16]


@pytest.mark.serial
def test_a_device_gets_its_own_rows_and_heads_where_they_divide(eight):
    """Four parts of rows, two of heads."""
    assert eight["own_rows_and_heads"] == {"8 x 4": [2, 2, 2, 5], "3 x 4": [3, 2, 2, 5], "8 x 3": [2, 2, 3, 5]}


@pytest.mark.serial
def test_latents_are_drawn_and_decoded_alike_on_a_mesh(eight):
    assert eight["latent_difference"] < 1e-5
    assert eight["decode_all"] <= 1 and eight["decode"] <= 1  # bytes; a rounding may fall on the other side

@pytest.mark.serial
def test_parameters_moments_and_averages_are_split(eight):
    assert eight["fsdp_share_per_device"] < 0.2
    assert eight["sharding_kept"] and eight["state_rules"]


@pytest.mark.serial
def test_checkpoints_move_between_meshes_and_modes_bit_for_bit(eight):
    assert all(eight["restored"].values()), eight["restored"]
    losses = list(eight["next_loss"].values())
    np.testing.assert_allclose(losses, losses[0], rtol=2e-5)
