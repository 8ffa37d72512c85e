"""Reference files: statistics and images of real data in an .npz file, as the ADM evaluator's are.

    mu [d], sigma [d, d]        mean and covariance of pooled Inception features: FID
    mu_s [d'], sigma_s [d', d'] of spatial ones: sFID
    arr_0 [N, H, W, C] uint8    images: precision and recall, or all where a file has no statistics
    count                       how many images the statistics are of; only files that `write_reference` wrote say it
An .npz of samples, with arr_0 alone, reads the same way. What features are is the feature nets'.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from etils import epath
from numpy.typing import NDArray

from nag_jax import storage
from nag_jax.errors import UserError
from nag_jax.metrics.checks import check_vectors
from nag_jax.metrics.frechet import Moments
from nag_jax.params_hash import params_hash

# How far sigma[i, j] may lie from sigma[j, i], in parts of the largest entry: files may be of float32 sums.
ASYMMETRY = 1e-4


@dataclass(frozen=True, eq=False)
class Reference:
    """What a reference file holds.

    Attributes:
        pool: moments of pooled features, None without.
        spatial: moments of spatial features, None without.
        image_shape: (N, H, W, C) of its images, None without; `image_batches` reads them.
        fingerprint: `params_hash` of the statistics, to stand beside every number; None without statistics.
    """

    pool: Moments | None
    spatial: Moments | None
    image_shape: tuple[int, int, int, int] | None
    fingerprint: str | None


def read_reference(path: epath.PathLike) -> Reference:
    """Reads a reference file; of its images only their shape.

    Raises:
        UserError: the file is missing, damaged or holds neither statistics nor images, or these are of a wrong shape or
            not finite.
    """
    with _opened(path) as file:
        names = _names(file)
        count = int(_read(file, "count")) if "count" in names else None
        pool = _read_moments(file, path, "mu", "sigma", count)
        spatial = _read_moments(file, path, "mu_s", "sigma_s", count)
        image_shape = None
        if "arr_0" in names:
            with file.open("arr_0.npy") as member:
                image_shape = _image_shape(member, path)
    if pool is None and spatial is None and image_shape is None:
        raise UserError(
            f"{path} holds {', '.join(names) or 'nothing'}; a reference needs mu and sigma, for sFID mu_s and sigma_s, "
            "or images as arr_0."
        )
    moments = {"pool": pool, "spatial": spatial}
    statistics = {name: [m.mean, m.covariance] for name, m in moments.items() if m is not None}
    return Reference(pool, spatial, image_shape, params_hash(statistics) if statistics else None)


def write_reference(path: epath.PathLike, pool: Moments, spatial: Moments | None = None) -> None:
    """Writes statistics as a reference file, which ADM's evaluator reads too if it has both kinds.

    Args:
        path: the .npz file.
        pool: moments of pooled features.
        spatial: moments of the same images' spatial features.

    Raises:
        UserError: the two are of different numbers of images.
    """
    if spatial is not None and spatial.count != pool.count:
        raise UserError(f"{path}: mu is of {pool.count} images, mu_s of {spatial.count}; use the same images for both.")
    arrays: dict[str, Any] = {"mu": pool.mean, "sigma": pool.covariance}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if pool.count is not None:
        arrays["count"] = np.array(pool.count)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.write_bytes(path, buffer.getvalue())


def image_batches(path: epath.PathLike, batch_size: int) -> Iterator[NDArray[np.uint8]]:
    """The images of a file (arr_0), batch by batch and never all in memory.

    Args:
        path: a reference or an .npz of samples, compressed or not.
        batch_size: images a batch, at least 1; the last may have fewer.

    Yields:
        uint8 [up to batch_size, H, W, C].

    Raises:
        UserError: the file is missing, damaged or has no such images.
    """
    if batch_size < 1:
        raise UserError(f"Images of {path}: batch_size is {batch_size}; use at least 1.")
    with _opened(path) as file:
        if "arr_0" not in _names(file):
            raise UserError(f"{path} has no images: it holds {', '.join(_names(file)) or 'nothing'}, but no arr_0.")
        with file.open("arr_0.npy") as member:
            num_images, *shape = _image_shape(member, path)
            for begin in range(0, num_images, batch_size):
                size = min(batch_size, num_images - begin)
                content = member.read(size * math.prod(shape))
                if len(content) < size * math.prod(shape):
                    raise EOFError("arr_0 ends early")
                yield np.frombuffer(content, np.uint8).reshape(size, *shape)


@contextlib.contextmanager
def _opened(path: epath.PathLike) -> Iterator[zipfile.ZipFile]:
    """The file as a zip; what its bytes make fail becomes a UserError."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{path} is no .npz file, or is damaged or incomplete ({error}). Copy or download it again."
        ) from error


def _names(file: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in file.namelist()]


def _read(file: zipfile.ZipFile, name: str) -> NDArray:
    with file.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _read_moments(
    file: zipfile.ZipFile, path: epath.PathLike, mean_name: str, covariance_name: str, count: int | None
) -> Moments | None:
    names = _names(file)
    if mean_name not in names and covariance_name not in names:
        return None
    if mean_name not in names or covariance_name not in names:
        raise UserError(f"{path} needs both {mean_name} and {covariance_name}; it holds {', '.join(names)}.")
    mean, covariance = _read(file, mean_name), _read(file, covariance_name)
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise UserError(
            f"{path}: {mean_name} has shape {list(mean.shape)}, {covariance_name} {list(covariance.shape)}; expected "
            "[d] and [d, d]."
        )
    check_vectors(mean[None], f"{path}, {mean_name}")
    sigma = check_vectors(covariance, f"{path}, {covariance_name}").astype(np.float64)
    if np.abs(sigma - sigma.T).max() > ASYMMETRY * np.abs(sigma).max():
        raise UserError(f"{path}: {covariance_name} is not symmetric, so it is no covariance. Compute it again.")
    return Moments(count, mean.astype(np.float64), 0.5 * (sigma + sigma.T))


def _image_shape(member: IO[bytes], path: epath.PathLike) -> tuple[int, int, int, int]:
    """Reads the header of arr_0, so that the images' bytes come next."""
    version = np.lib.format.read_magic(member)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(member)
    if len(shape) != 4 or dtype != np.uint8 or is_fortran or 0 in shape:
        raise UserError(f"{path}: arr_0 is {dtype} of shape {list(shape)}; expected images, uint8 [N, H, W, C].")
    return shape
