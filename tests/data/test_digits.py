"""The prepared digits are scikit-learn's, every one of them, once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from nag_jax.data.builders.digits import held_out_mask, levels_to_uint8, uint8_to_levels
from nag_jax.data.sources import DataConfig, open_source

REPOSITORY = Path(__file__).parents[2]

# One child is killed in the middle of the work; two others then do it at the same time.
KILL_ONE_THEN_RACE_TWO = """
import os, signal, sys
from nag_jax.data import sources
from nag_jax.data.builders import digits

whole = digits._examples

def cut_short(*args):
    for number, example in enumerate(whole(*args)):
        if number == 300:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example

def prepare_in_child(examples):
    pid = os.fork()
    if pid == 0:
        digits._examples = examples
        sources.prepare_digits(sys.argv[1])
        os._exit(0)
    return pid

def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

print(exit_code(prepare_in_child(cut_short)), os.listdir(os.path.join(sys.argv[1], "digits")))
both = [prepare_in_child(whole) for _ in range(2)]
print([exit_code(pid) for pid in both])
"""


def test_grey_levels_are_recovered_exactly():
    levels = np.arange(17)
    pixels = levels_to_uint8(levels)
    assert pixels[0] == 0 and pixels[16] == 255
    np.testing.assert_array_equal(uint8_to_levels(pixels), levels)


def test_splits_hold_every_digit_of_scikit_learn_once(config: DataConfig):
    digits = load_digits()
    held_out = held_out_mask(digits.target)
    for split, indices in (("train", np.flatnonzero(~held_out)), ("test", np.flatnonzero(held_out))):
        source = open_source(config, split)
        records = [source[i] for i in range(len(source))]
        levels = uint8_to_levels(np.stack([record["image"] for record in records]))[..., 0]
        np.testing.assert_array_equal(levels, digits.images[indices])
        np.testing.assert_array_equal([record["label"] for record in records], digits.target[indices])
        assert source.num_classes == 10
        assert records[0]["image"].dtype == np.uint8 and records[0]["image"].shape == (8, 8, 1)


def test_held_out_split_is_stratified():
    labels = load_digits().target
    held_out = held_out_mask(labels)
    assert held_out.sum() == 500
    share = 500 * np.bincount(labels) / len(labels)
    assert np.abs(np.bincount(labels[held_out]) - share).max() < 1


def test_held_out_records_are_spread_over_each_class():
    labels = load_digits().target
    held_out = held_out_mask(labels)
    for label in range(10):
        gaps = np.diff(np.flatnonzero(held_out[labels == label]))
        assert set(gaps) <= {3, 4}  # 1797 / 500 = 3.594 records of the class from one to the next


def test_killed_and_simultaneous_preparations_leave_a_whole_data_set(tmp_path: Path):
    command = [sys.executable, "-c", KILL_ONE_THEN_RACE_TWO, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    killed, raced = done.stdout.splitlines()
    assert killed.startswith("-9 ['incomplete.") and raced == "[0, 0]"
    config = DataConfig(data_dir=str(tmp_path))
    assert len(open_source(config, "train")) + len(open_source(config, "test")) == 1797
