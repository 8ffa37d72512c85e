"""A report says what its numbers say, whichever way they went, in one HTML file that needs no other."""

import base64
import html.parser
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nag_jax import figures, storage
from nag_jax.config import Config, to_dict
from nag_jax.errors import UserError
from nag_jax.report import write_report

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Checker(html.parser.HTMLParser):
    """Collects tags and text, and fails on elements that are not closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def make_config(**data: Any) -> dict[str, Any]:
    config = to_dict(Config(num_steps=400, batch_size=128))
    config["data"] |= data
    return config


def make_metrics(distances: dict[str, float], width: float = 0.5) -> dict[str, Any]:
    """metrics.json with intervals of +- `width` around every distance and every difference to plain."""
    methods: dict[str, Any] = {}
    for name, distance in distances.items():
        methods[name] = {
            "guidance": f"{name} guidance",
            "frechet_distance": distance,
            "interval": [distance - width, distance + width],
            "evaluations_per_image": 20 * (1 + ("cfg" in name) + ("nag" in name)),
        }
        if name != "plain":
            difference = distance - distances["plain"]
            methods[name]["difference_to_plain"] = {
                "value": difference,
                "interval": [difference - width, difference + width],
            }
    return {
        "methods": methods,
        "floor": {
            "frechet_distance": 2.0,
            "interval": [1.5, 2.5],
            "description": "training images against held-out images",
            "num_a": 1000,
            "num_b": 500,
        },
        "features": {"name": "digits-classifier", "held_out_accuracy": 0.982, "dimension": 64},
        "num_samples": 1000,
        "num_reference": 500,
    }


def make_noise_shift(shifts: dict[str, float], width: float = 0.002) -> dict[str, Any]:
    """noise_shift.json with the same calibrated shift, +- `width`, at each time."""

    def around(value: float) -> dict[str, float]:
        return {"estimate": value, "low": value - width, "high": value + width}

    return {
        "methods": {
            name: {
                "confidence_level": 0.95,
                "num_resamples": 200,
                "num_forward": 500,
                "num_sampled": 1000,
                "shifts": [
                    {
                        "t": t,
                        "forward_answer": around(t),
                        "sampled_answer": around(t + 0.8 * shift),
                        "raw_shift": around(0.8 * shift),
                        "calibrated_shift": around(shift),
                        "forward_deviation": 0.05,
                        "sampled_deviation": 0.05,
                    }
                    for t in TIMES
                ],
            }
            for name, shift in shifts.items()
        }
    }


def make_lines() -> list[dict[str, float]]:
    lines = []
    for step in range(25, 401, 25):
        kept, dropped = 0.3 + 20.0 / step, 0.33 + 21.0 / step
        line = {"step": step, "loss": kept, "loss/noise_kept": kept, "loss/noise_dropped": dropped}
        for i in range(5):
            line |= {f"loss_by_level/{i}": kept + 0.1 * i, f"loss_by_level_noise_dropped/{i}": dropped + 0.1 * i}
        lines.append(line)
    return lines


DISTANCES = {"plain": 12.0, "cfg": 12.2, "nag": 8.0, "cfg+nag": 14.0}
SHIFTS = {"plain": 0.02, "cfg": 0.02, "nag": 0.005, "cfg+nag": 0.03}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A finished work folder."""
    storage.write_json(tmp_path / "config.json", make_config())
    storage.write_json(
        tmp_path / "environment.json",
        {
            "versions": {"jax": "0.10.2"},
            "device": "cpu x1",
            "commit": "0123abcd",
            "command": "python -m nag_jax.main --config=configs/digits.py",
            "seconds": {"compile": 20.0, "training": 80.0},
            "parameters": {"network": 812_345, "null_noise_embedding": 128},
        },
    )
    lines = "".join(storage.json.dumps(line) + "\n" for line in make_lines())
    (tmp_path / "metrics.jsonl").write_text(lines)
    write_evaluation(tmp_path, "step_400/euler", make_metrics(DISTANCES), make_noise_shift(SHIFTS))
    return tmp_path


def write_evaluation(
    workdir: Path, name: str, metrics: dict[str, Any], noise_shift: dict[str, Any] | None = None
) -> Path:
    folder = workdir / "eval" / name
    labels = np.arange(4) % 2
    images = np.zeros((4, 8, 8, 1), np.uint8)
    grid = figures.sample_grid({name: (images, labels) for name in metrics["methods"]}, per_class=2)
    conditions = {"sampling": {"stepper": "heun", "num_steps": 10, "weights": "ema"}, "seed": 0, "commit": None}
    storage.write_json(folder / "conditions.json", conditions)
    storage.write_bytes(folder / "samples.png", grid)
    if noise_shift is not None:
        storage.write_json(folder / "noise_shift.json", noise_shift)
        storage.write_bytes(folder / "noise_shift.png", grid)
    storage.write_json(folder / "metrics.json", metrics)
    return folder


def read(workdir: Path, evaluation: Path | None = None) -> tuple[str, Checker]:
    """The report's source, and its parsed content with white space made even."""
    source = Path(write_report(workdir, evaluation)).read_text()
    checker = Checker()
    checker.feed(source)
    checker.close()
    assert checker.open == []
    checker.text = re.sub(r"\s+", " ", checker.text)
    return source, checker


def test_page_needs_nothing_but_itself(workdir: Path) -> None:
    source, page = read(workdir)
    assert source.startswith("<!DOCTYPE html>")
    assert "http:" not in source and "https:" not in source and "@import" not in source and "url(" not in source
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any("href" in attributes for _, attributes in page.tags)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5
    for attributes in images:
        assert attributes["alt"]
        kind, _, content = (attributes["src"] or "").partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
            image.load()
            assert image.format == "PNG"


def test_page_holds_the_folders_own_images_and_numbers(workdir: Path) -> None:
    source, page = read(workdir)
    samples = (workdir / "eval/step_400/euler/samples.png").read_bytes()
    assert base64.b64encode(samples).decode() in source
    for expected in (
        "Noise Awareness Guidance on digits",
        "812,345 parameters",
        "Trained for 400 steps of 128 examples; 10% of them without their noise condition.",
        "heun, 10 steps, weights “ema”",
        "98.2% of held-out images",
        "training images against held-out images (1,000 against 500)",
        "95% bootstrap interval",
        "data.image_size",
        "git checkout 0123abcd python -m nag_jax.main --config=configs/digits.py",
        "jax",
        "cpu x1",
    ):
        assert expected in page.text
    assert not re.search(r"\bFID\b", page.text)


def test_rebuilding_gives_the_same_report(workdir: Path) -> None:
    assert read(workdir)[0] == read(workdir)[0]


def test_what_was_seen_comes_from_the_numbers(workdir: Path) -> None:
    def seen() -> str:
        return read(workdir)[1].text.split("What was seen")[1].split("Samples")[0]

    first = seen()
    assert "at a Fréchet distance of 12.0" in first
    assert "nag (8.00) is closer than plain sampling" in first
    assert "smaller with NAG" in first
    metrics, noise_shift = make_metrics({"plain": 12.0, "nag": 14.0}), make_noise_shift({"plain": 0.005, "nag": 0.02})
    write_evaluation(workdir, "step_500/euler", metrics, noise_shift)
    second = seen()
    assert "nag (14.0) is farther than plain sampling" in second and "closer than" not in second
    assert "larger with NAG" in second and "smaller with NAG" not in second


def test_tables_hold_the_intervals(workdir: Path) -> None:
    text = read(workdir)[1].text
    assert "nag guidance8.007.50 to 8.50−4.00−4.50 to −3.50closer" in text
    assert "cfg guidance12.2011.70 to 12.70+0.20−0.30 to +0.70undecided" in text
    assert "mean |shift|0.02000.02000.00500.0300" in text
    assert "+0.0200+0.0180 to +0.0220" in text
    assert "cfg+nag603 ×" in text


def test_caveat_depends_on_the_data(workdir: Path) -> None:
    assert "too easy to prove NAG right or wrong" in read(workdir)[1].text
    storage.write_json(workdir / "config.json", make_config(name="imagenet2012"))
    text = read(workdir)[1].text
    assert "too easy" not in text and "random" not in text.split("Samples")[0]
    storage.write_json(workdir / "config.json", make_config(name="imagenet2012", mock_examples=64))
    assert "the images are random" in read(workdir)[1].text


def test_everything_from_files_is_escaped(workdir: Path) -> None:
    evil = "<script>alert('&')</script>"
    config = make_config(name=evil)
    config[evil] = evil
    storage.write_json(workdir / "config.json", config)
    storage.write_json(
        workdir / "environment.json",
        {"device": evil, "command": evil, "commit": evil, "seconds": {evil: 1.0}, "versions": {evil: evil}},
    )
    metrics = make_metrics({"plain": 12.0, "nag": 8.0})
    metrics["features"]["name"] = metrics["floor"]["description"] = metrics["methods"]["nag"]["guidance"] = evil
    metrics["methods"][evil] = metrics["methods"]["nag"]
    noise_shift = make_noise_shift({"plain": 0.02, evil: 0.01})
    folder = write_evaluation(workdir, "step_500/euler", metrics, noise_shift)
    sampling = {"stepper": evil, "num_steps": evil, "weights": evil}
    storage.write_json(folder / "conditions.json", {"sampling": sampling, evil: evil})
    source, page = read(workdir)
    assert "<script" not in source
    assert page.text.count(evil) >= 15


def test_newest_evaluation_is_reported(workdir: Path) -> None:
    write_evaluation(workdir, "step_1000/euler", make_metrics({"plain": 33.3}))
    write_evaluation(workdir, "step_1000/heun", make_metrics({"plain": 44.4}))
    storage.write_json(workdir / "eval/step_2000/unfinished/conditions.json", {})
    os.utime(workdir / "eval/step_1000/euler/metrics.json", (2e9, 2e9))
    text = read(workdir)[1].text
    assert "at a Fréchet distance of 33.3" in text and "eval/step_1000/euler" in text


def test_evaluation_that_was_asked_for_is_reported(workdir: Path) -> None:
    write_evaluation(workdir, "step_1000/euler", make_metrics({"plain": 33.3}))
    text = read(workdir, workdir / "eval/step_400/euler")[1].text
    assert "at a Fréchet distance of 12.0" in text and "Trained for 400 steps" in text
    assert "eval/step_400/euler" in text and "33.3" not in text
    storage.write_json(workdir / "eval/step_2000/unfinished/conditions.json", {})
    for other in ("eval/step_2000/unfinished", "eval/step_400", "eval/missing"):
        with pytest.raises(UserError, match="no finished evaluation"):
            write_report(workdir, workdir / other)


def test_every_stage_has_its_command(workdir: Path) -> None:
    training = {"command": "train it", "commit": "aaaa", "versions": {"jax": "0.10.2"}, "device": "cpu x1"}
    evaluation = training | {"command": "evaluate it", "commit": "bbbb+changes", "device": "tpu x4"}

    def reproduce(**stages: Any) -> str:
        storage.write_json(workdir / "environment.json", stages | {"seconds": {"training": 1.0}})
        text = read(workdir)[1].text
        assert "its environment active (source .venv/bin/activate)" in text
        return text

    text = reproduce(training=training, evaluation=evaluation)
    assert "git checkout aaaa train it git checkout bbbb evaluate it The source tree differed" in text
    assert "Wall time on cpu x1 and tpu x4" in text
    same_commit = reproduce(training=training, evaluation=training | {"command": "evaluate it"})
    assert "git checkout aaaa train it evaluate it" in same_commit and "differed from a commit" not in same_commit
    in_one = reproduce(training=training, evaluation=training).split("How to reproduce")[1]
    assert "train it train it" not in in_one and "Wall time on cpu x1" in reproduce(training=training)
    assert "git checkout bbbb evaluate it" in reproduce(evaluation=evaluation)


def test_speed_and_goodput_are_those_of_the_last_line_that_has_them(workdir: Path) -> None:
    assert "Goodput" not in read(workdir)[1].text
    speeds = [(1, {"examples_per_second": 10.0}), (2, {"examples_per_second": 1234.5, "goodput": 0.832}), (3, {})]
    lines = [make_lines()[-1] | {"step": 400 + after} | speed for after, speed in speeds]
    with (workdir / "metrics.jsonl").open("a") as file:
        file.writelines(storage.json.dumps(line) + "\n" for line in lines)
    text = read(workdir)[1].text
    assert "Training up to step 402: 1,234 examples a second. Goodput 83%:" in text
    assert text.count("examples a second") == 1


def test_estimator_calls_are_a_cost(workdir: Path) -> None:
    assert "estimator calls" not in read(workdir)[1].text
    metrics = make_metrics(DISTANCES)
    for name, result in metrics["methods"].items():
        result["estimator_calls_per_image"] = 17 if name == "nag" else 0
    write_evaluation(workdir, "step_500/euler", metrics)
    text = read(workdir)[1].text
    assert "of plainestimator calls" in text
    assert "nag402 ×17" in text and "cfg402 ×0" in text


def test_sizes_of_shifts_are_compared_in_pairs(workdir: Path) -> None:
    noise_shift = make_noise_shift({"plain": 0.02, "nag": 0.019}, width=0.01)
    for name, size in (("plain", 0.02), ("nag", 0.019)):
        noise_shift["methods"][name]["mean_absolute_shift"] = {"estimate": size, "low": 0.015, "high": 0.025}
    around = {"estimate": -0.001, "low": -0.0015, "high": -0.0005}
    by_time = [{"t": t} | around for t in TIMES]
    noise_shift["differences"] = {"nag": {"against": "plain", "mean_absolute": around, "by_time": by_time}}
    write_evaluation(workdir, "step_500/euler", make_metrics({"plain": 12.0, "nag": 8.0}), noise_shift)
    text = read(workdir)[1].text
    assert "nag against plain−0.0010−0.0015 to −0.0005smaller5 of 50 of 5" in text
    assert "mean |shift|0.02000.0150 to 0.02500.01900.0150 to 0.0250" in text
    assert "smaller with NAG, for the interval of the paired difference" in text


def test_folder_without_an_evaluation(workdir: Path) -> None:
    (workdir / "eval").rename(workdir / "elsewhere")
    text = read(workdir)[1].text
    assert "no finished evaluation yet" in text and "step 400 of 400" in text
    assert "No samples in this folder yet." in text


def test_evaluation_without_noise_shift_floor_or_samples(workdir: Path) -> None:
    metrics = make_metrics(DISTANCES)
    del metrics["floor"]
    folder = write_evaluation(workdir, "step_500/euler", metrics)
    (folder / "samples.png").unlink()
    (folder / "conditions.json").unlink()
    text = read(workdir)[1].text
    assert "Noise shift. It was not measured." in text
    assert "The distance between two sets of real images was not measured." in text
    assert "No samples in this folder yet." in text


def test_folder_with_nothing_but_its_config(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "config.json", {})
    text = read(tmp_path)[1].text
    assert "No training step was logged." in text and "The command was not recorded" in text


@pytest.mark.parametrize("content", [None, "{", "[1, 2]"])
def test_missing_or_damaged_config_is_a_users_error(workdir: Path, content: str | None) -> None:
    (workdir / "config.json").unlink()
    if content is not None:
        (workdir / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json"):
        write_report(workdir)


@pytest.mark.parametrize("content", ["{", "[]", '{"methods": 3}', '{"methods": {}}'])
def test_damaged_metrics_are_a_users_error(workdir: Path, content: str) -> None:
    (workdir / "eval/step_400/euler/metrics.json").write_text(content)
    with pytest.raises(UserError, match="metrics.json.* damaged"):
        write_report(workdir)
