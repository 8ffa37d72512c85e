"""A TFDS builder of ArtBench-10 at 256 x 256 pixels, from its public archive; needs no TensorFlow.

The archive, ten styles, 5,000 training and 1,000 test images of each: README of github.com/liaopeiyuan/artbench, its
"256x256 ImageFolder with train-test split"; Liao et al. 2022, arXiv 2206.11404. Inside it are
artbench-10-imagefolder-split/{train,test}/STYLE/FILE.jpg, as users of the archive read it.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from nag_jax.data.builders import archives
from nag_jax.errors import UserError

ARCHIVE = ("artbench-10-imagefolder-split.tar", "artbench-10-imagefolder-split")
STYLES = (
    "art_nouveau",
    "baroque",
    "expressionism",
    "impressionism",
    "post_impressionism",
    "realism",
    "renaissance",
    "romanticism",
    "surrealism",
    "ukiyo_e",
)


class Artbench10(tfds.core.GeneratorBasedBuilder):
    """The data set "artbench10": splits `train` and `test`; `image` (bytes as downloaded), `label` and `file_name`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download artbench-10-imagefolder-split.tar by the link '256x256 ImageFolder with train-test split' in the "
        "README of github.com/liaopeiyuan/artbench; its unpacked folder serves too."
    )
    # Nothing is downloaded. Said here, TFDS need not search for a checksum file, for which it wants
    # importlib_resources.
    url_infos: ClassVar[dict[str, Any]] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="ArtBench-10: artworks of ten styles, 256 x 256 pixels.",
            homepage="https://github.com/liaopeiyuan/artbench",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(STYLES)),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        archive = archives.find(dl_manager.manual_dir, ARCHIVE)
        return {split: _examples(archive, split) for split in ("train", "test")}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        raise NotImplementedError("the splits carry their own generators")


def _examples(archive: epath.Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Keys with their examples. Raises UserError at the end if a style has no image, and nothing is kept then."""
    seen: set[str] = set()
    for path, content in archives.read_files(archive, lambda path: _split_and_style(path)[0] == split):
        style, file_name = _split_and_style(path)[1], path.split("/")[-1]
        if style not in STYLES:
            raise UserError(f"{archive} has a style {style!r} in {split!r}; ArtBench-10 has {', '.join(STYLES)}.")
        seen.add(style)
        yield f"{style}/{file_name}", {"image": content, "label": style, "file_name": file_name}
    missing = [style for style in STYLES if style not in seen]
    if missing:
        raise UserError(
            f"{archive} has no images of {', '.join(missing)} in split {split!r}. Download or unpack it again."
        )


def _split_and_style(path: str) -> tuple[str, str]:
    """Of PREFIX/SPLIT/STYLE/FILE.jpg; two empty strings for any other file."""
    parts = path.split("/")
    return (parts[-3], parts[-2]) if len(parts) >= 3 and path.lower().endswith((".jpg", ".jpeg", ".png")) else ("", "")
