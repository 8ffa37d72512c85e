"""Files of a manual folder: an archive, or the folder that it was unpacked to, read alike and without unpacking."""

import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from nag_jax.errors import UserError

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)


def find(manual_dir: epath.PathLike, names: Sequence[str]) -> epath.Path:
    """The first of several files or folders that is there.

    Args:
      manual_dir: where the user put the downloads.
      names: under which names they may lie there, the preferred first.

    Returns:
      Its path.

    Raises:
      UserError: none of them; it says what is there instead.
    """
    folder = epath.Path(manual_dir)
    for name in names:
        if (folder / name).exists():
            return folder / name
    present = sorted(path.name for path in folder.iterdir())
    raise UserError(
        f"none of {', '.join(names)} is in the manual folder {folder}. It holds: {', '.join(present[:8]) or 'nothing'}"
    )


def read_files(source: epath.PathLike, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The files of a folder, a zip or a tar of any compression.

    A tar is read from front to end in one pass, so that 12 GB of it need neither memory nor disk.

    Args:
      source: what `find` found.
      wanted: called with a file's path inside, with "/"; only wanted files are read. Hidden files are never offered.

    Yields:
      (path inside, content); those of a folder in sorted order.

    Raises:
      UserError: the archive is damaged or of another kind.
    """
    source = epath.Path(source)
    try:
        if source.is_dir():
            yield from _read_folder(source, wanted)
        elif source.suffix == ".zip":
            yield from _read_zip(source, wanted)
        else:
            yield from _read_tar(source, wanted)
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{source} is damaged or cut short ({reason}). Download it again.") from error


def _read_folder(folder: epath.Path, wanted: Callable[[str], bool], inside: str = "") -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.iterdir()):
        name = f"{inside}{path.name}"
        if _is_hidden(name):
            continue
        if path.is_dir():
            yield from _read_folder(path, wanted, f"{name}/")
        elif wanted(name):
            yield name, path.read_bytes()


def _read_zip(path: epath.Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir() and not _is_hidden(member.filename) and wanted(member.filename):
                yield member.filename, archive.read(member)


def _read_tar(path: epath.Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        # tarfile's own reading of gzip does not compare the checksum, GzipFile does where it is read to its end.
        stream: Any = gzip.GzipFile(fileobj=file) if path.suffix in (".gz", ".tgz") else file
        with tarfile.open(fileobj=stream, mode="r|*" if stream is file else "r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None and not _is_hidden(name) and wanted(name):
                    yield name, content.read()
        while stream.read(2**20):
            pass


def _is_hidden(name: str) -> bool:
    """Also what macOS adds to archives: ._FILE and __MACOSX/."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
