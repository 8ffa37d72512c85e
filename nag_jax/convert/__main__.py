"""Converts public weights to folders of this project, and networks back to official files.

    python -m nag_jax.convert SiT-XL-2-256x256.pt FOLDER             a folder for nag_jax.load
    python -m nag_jax.convert DiT-XL-2-256 FOLDER                    diffusers' DiT or its whole pipeline, the same
    python -m nag_jax.convert sd-vae-ft-ema FOLDER                   diffusers' AutoencoderKL, for latents
    python -m nag_jax.convert pt_inception-2015-12-05-6726825d.pth FOLDER    FID's feature net
    python -m nag_jax.convert FOLDER weights.pt --to=sit             the official state dict

SOURCE is an official DiT or SiT state dict (.pt, .pth or .safetensors), a training checkpoint of the official code, of
which the average is taken, or a folder that diffusers wrote, in one file or several (.safetensors or .bin). What it
holds is recognised from the names and shapes of its tensors. No torch is needed, and nothing that stands in a file is
run. Numbers are carried as they are, in float32: what goes in comes out of --to bit for bit.

A DiT of diffusers becomes the official network, which the published weights were trained as. Diffusers' own class
computes the time features with other frequencies and so gives other answers; a network that was trained in it is not
what comes out here.
"""

from __future__ import annotations

import argparse
import sys

from etils import epath

from nag_jax import loading
from nag_jax.convert import tables
from nag_jax.convert.diffusers_vae import import_autoencoder
from nag_jax.convert.feature_nets import import_feature_net
from nag_jax.convert.network import export_network, import_network
from nag_jax.convert.source import Part, read_source
from nag_jax.errors import NagJaxError, UserError

PIPELINE_PARTS: dict[str, Part | None] = {
    "auto": None,
    "dit": "network",
    "sit": "network",
    "vae": "autoencoder",
    "features": None,
}


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments; those that are left out are None, so that one in the wrong place is noticed."""
    parser = argparse.ArgumentParser(
        prog="python -m nag_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a weight file or a folder of diffusers; with --to a folder of a network")
    parser.add_argument("target", help="the folder to make; with --to the file to write")
    parser.add_argument("--to", choices=tables.KINDS, help="write official weights of this kind")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="the average, or what was trained")
    parser.add_argument(
        "--keep_null_noise", action="store_true", help="with --to: write the null noise embedding too, under its name"
    )
    parser.add_argument(
        "--kind",
        choices=tuple(PIPELINE_PARTS),
        default="auto",
        help="what the weights are; auto: by their names, DiT or SiT by the file's settings or name, of a pipeline "
        "the network",
    )
    parser.add_argument("--num_heads", type=int, help="attention heads, for an official file of no published size")
    parser.add_argument(
        "--init",
        choices=loading.NULL_NOISE_INITS,
        help="how the new null noise embedding starts: the mean output of the time MLP over the training levels "
        "(default), N(0, 0.02^2) with a fixed seed, or zeros; an error where the file holds one",
    )
    parser.add_argument(
        "--vae", help="folder of the converted autoencoder that made the network's latents; kept in its model.json"
    )
    parser.add_argument("--name", help="name of an autoencoder's weights; by default ema, mse or the folder's name")
    return parser


def import_weights(given: argparse.Namespace) -> str:
    """Makes the folder and says what it holds. Raises UserError if it cannot be made."""
    target = epath.Path(given.target)
    if given.keep_null_noise:
        raise UserError("--keep_null_noise goes with --to; a null noise embedding is always read.")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists already. Choose another folder, or delete it.")
    if given.kind == "features" or epath.Path(given.source).suffix == ".pb":
        return _import_feature_net(given, target)
    source = read_source(given.source, weights=given.weights, part=PIPELINE_PARTS[given.kind])
    if given.kind == "auto" and source.layout == "feature net":
        return _import_feature_net(given, target)
    if given.kind == "vae" or (given.kind == "auto" and source.layout == "autoencoder"):
        _refuse(given, ("num_heads", "init", "vae"), "a DiT or SiT, not for an autoencoder")
        autoencoder = import_autoencoder(source, target, given.name)
        return f"autoencoder {autoencoder.name}, latents of {autoencoder.config.latent_channels} channels"
    _refuse(given, ("name",), "an autoencoder, not for a DiT or SiT")
    network, params = import_network(source, given.kind, num_heads=given.num_heads, init=given.init, vae=given.vae)
    del source  # its tensors take as much memory as the parameters
    loading.write_network(target, network, params)
    height, width, channels = network.sample_shape
    size = network.model.size or f"of {network.model.depth} blocks"
    return f"network {size}, {network.num_classes} classes, states {height} x {width} x {channels}"


def _import_feature_net(given: argparse.Namespace, target: epath.Path) -> str:
    _refuse(given, ("num_heads", "init", "vae", "name"), "other weights, not for a feature net")
    description = import_feature_net(given.source, target)
    return f"feature net {description.network}"


def export_weights(given: argparse.Namespace) -> str:
    """Writes the official file and says what it holds. Raises UserError if it cannot be written."""
    _refuse(given, ("num_heads", "init", "vae", "name"), "reading weights, not for --to")
    if given.kind != "auto":
        raise UserError("--kind is for reading weights, not for --to.")
    if epath.Path(given.target).exists():
        raise UserError(f"{given.target} exists already. Choose another file, or delete it.")
    export_network(given.source, given.target, given.to, weights=given.weights, keep_null_noise=given.keep_null_noise)
    return f"official {given.to}, {'with' if given.keep_null_noise else 'without'} the null noise embedding"


def _refuse(given: argparse.Namespace, names: tuple[str, ...], purpose: str) -> None:
    for name in names:
        if getattr(given, name) is not None:
            raise UserError(f"--{name} is for {purpose}.")


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    given = make_parser().parse_args(arguments)
    try:
        content = export_weights(given) if given.to else import_weights(given)
    except NagJaxError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    print(f"written: {given.target} ({content})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
