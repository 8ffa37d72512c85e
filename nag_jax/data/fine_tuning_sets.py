"""The seven data sets on which published guidance methods fine-tune DiT-XL/2: names, splits, sizes. A table only.

Domain Guidance (Zhong et al., ICLR 2025) and NAG (arXiv 2510.12497) report them as Food, SUN, Caltech, CUB, Cars,
DF-20M and ArtBench. Which images of each they trained on and compared with we do not know: the splits are TFDS's.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FineTuningSet:
    """One data set.

    Attributes:
      name: for `data.name`.
      split: to train on.
      eval_split: held out.
      num_classes: labels lie in [0, num_classes).
      num_train: published number of images in `split`.
      num_eval: published number of images in `eval_split`.
    """

    name: str
    split: str
    eval_split: str
    num_classes: int
    num_train: int
    num_eval: int


# Numbers of images: TFDS's catalogue for its own sets, else the papers named in the builders.
# TFDS splits SUN397 by chance 70/10/20, "sun397/standard-part1-120k" to "…part10-120k" are the official partitions of
# 50 + 50 images a class. Its Caltech-101 has the class `background_google` too, hence 102.
FINE_TUNING_SETS: dict[str, FineTuningSet] = {
    "food101": FineTuningSet("food101", "train", "validation", 101, 75_750, 25_250),
    "sun397": FineTuningSet("sun397", "train", "test", 397, 76_128, 21_750),
    "caltech101": FineTuningSet("caltech101", "train", "test", 102, 3_060, 6_084),
    "cub": FineTuningSet("caltech_birds2011", "train", "test", 200, 5_994, 5_794),
    "cars": FineTuningSet("cars196", "train", "test", 196, 8_144, 8_041),
    "df20m": FineTuningSet("df20m", "train", "test", 182, 32_753, 3_640),
    "artbench": FineTuningSet("artbench10", "train", "test", 10, 50_000, 10_000),
}
