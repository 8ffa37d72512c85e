"""Run by test_hosts.py in each of two processes: what they agree on, share and refuse, and short jobs.

Arguments: the coordinator's address, which process this is, a shared folder, the folder of a trained network. With no
address it is a lone process. Output: one line of JSON.
"""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
from etils import epath
from jax.sharding import PartitionSpec

from nag_jax import hosts, storage
from nag_jax.autoencoder import made_up_autoencoder, write_autoencoder
from nag_jax.config import CompareConfig, Config, from_config_dict
from nag_jax.data.sources import DataConfig
from nag_jax.errors import NagJaxError, UserError
from nag_jax.jobs import attention_choice, compare, encode, evaluate_samples, image_features, noise_shift, sample
from nag_jax.metrics.features import from_function
from nag_jax.models.vae import VaeConfig
from nag_jax.parallel import ParallelConfig, batch_part, local_part, local_rows, make_mesh, place, shard_batch, to_host

TINY = VaeConfig(channels=1, latent_channels=2, block_out_channels=(4, 4), layers_per_block=1, norm_groups=2)
RECORDS = 16  # a shard's, so that there are several


def message(function, *arguments):
    try:
        function(*arguments)
    except NagJaxError as error:
        return f"{type(error).__name__}: {error}"
    return None


def refuse():
    raise UserError("Not this one.")


def agreements(folder, which):
    private = epath.Path(folder) / f"private-{which}"
    private.mkdir()
    if which == 0:
        (private / "file").write_text("")
    return {
        "from_first": hosts.from_first(lambda: ["of", which]),
        "error_of_first": message(hosts.from_first, refuse),
        "same": message(hosts.check_same, "hat", "green"),
        "not_same": message(hosts.check_same, "hat", f"green {which}"),
        "shared": message(hosts.check_shared, epath.Path(folder) / "private-0"),
        "not_shared": message(hosts.check_shared, private / "file"),
    }


def arrays():
    """Rows of a batch, and global arrays there and back."""
    mesh = make_mesh(ParallelConfig(fsdp=2))
    rows = local_rows(mesh, 8)
    batch = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    placed = shard_batch(mesh, {"x": batch[rows]})["x"]
    split = place({"w": batch}, {"w": jax.NamedSharding(mesh, PartitionSpec("fsdp"))})
    return {
        "rows": [rows.start, rows.stop],
        "part": batch_part(mesh, 8),
        "local_part": local_part(placed).tolist() == batch[rows].tolist(),
        "to_host": np.array_equal(to_host(placed), batch) and np.array_equal(to_host(split)["w"], batch),
        "not_divisible": message(batch_part, mesh, 9),
    }


def quarters(images):
    return images.reshape(len(images), 2, 4, 2, 4, 3).mean(axis=(2, 4)).reshape(len(images), -1)


def judge_images(folder):
    net = from_function("quarters", quarters, 12, fingerprint="1")
    evaluate_samples.load_feature_net = lambda path: net
    image_features.MAX_BLOCK_ROWS = RECORDS
    config = Config(eval=dataclasses.replace(Config().eval, feature_net="ours"))
    workdir = epath.Path(folder) / f"judged-{jax.process_count()}"
    evaluate_samples.run(config, f"{folder}/samples.npz", f"{folder}/reference.npz", workdir)


def encode_digits(folder):
    made = encode.make_encoding
    encode.make_encoding = lambda *arguments: dataclasses.replace(made(*arguments), shard_records=RECORDS)
    vae = epath.Path(folder) / "vae"
    if hosts.is_first() and not vae.exists():
        write_autoencoder(vae, made_up_autoencoder(TINY))
    hosts.wait_for_all("autoencoder")
    latents = f"{folder}/latents-{jax.process_count()}"
    encode.run(Config(data=DataConfig(split="train[:100]", eval_split="test[:20]", vae=str(vae), latents=latents)))


def measure_attention(which):
    """Makes the processes measure opposite times; only XLA's attention runs here."""
    attention_choice.candidates = lambda *_: ("cudnn", "xla")
    seconds = {"cudnn": 2e-3, "xla": 1e-3} if which == 0 else {"cudnn": 1e-3, "xla": 2e-3}
    attention_choice.measure = lambda *_, **__: seconds


def trained_config(trained, methods):
    config = from_config_dict(storage.read_json(epath.Path(trained) / "config.json"))
    return dataclasses.replace(
        config,
        eval=dataclasses.replace(config.eval, methods=methods, num_samples=30, name="drawn"),
        sampling=dataclasses.replace(config.sampling, batch_size=8),
        compare=CompareConfig(cfg_scales=(1.0, 2.0), nag_scales=(0.0, 1.0)),
    )


def draw_samples(folder, trained):
    sample.run(
        trained_config(trained, ("nag",)), epath.Path(folder) / f"sampled-{jax.process_count()}", epath.Path(trained)
    )


def measure_and_compare(folder, trained):
    """Both with the estimator and the classifier of the trained network, as its own evaluation left them."""
    config = trained_config(trained, ("nag",))
    workdir = epath.Path(folder) / f"measured-{jax.process_count()}"
    if hosts.is_first():
        for name in ("estimator", "features"):
            shutil.copytree(f"{trained}/{name}", workdir / name)
    hosts.wait_for_all("estimator")
    noise_shift.run(config, workdir, epath.Path(trained))
    compare.run(config, workdir, epath.Path(trained))


def main(address, which, folder, trained):
    if address:
        hosts.start(address, 2, which)
    report = {"agreements": agreements(folder, which), "arrays": arrays()} if address else {}
    judge_images(folder)
    encode_digits(folder)
    measure_attention(which)
    draw_samples(folder, trained)
    measure_and_compare(folder, trained)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
