"""Drawing in blocks: sample i is the same in any batch size and after any interruption, and its features with it."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from nag_jax import feature_nets, storage
from nag_jax.config import Config, NoiseShiftConfig, from_config_dict
from nag_jax.data.images import to_float
from nag_jax.data.sources import DataConfig
from nag_jax.errors import NagJaxError, UserError
from nag_jax.jobs import drawing, evaluate, results
from nag_jax.jobs.drawing import Drawn, draw, images
from nag_jax.jobs.experiment import Experiment, TrainedNetwork, open_trained
from nag_jax.jobs.scores import measure, real_side
from nag_jax.metrics.features import FeatureNet, from_function
from nag_jax.metrics.frechet import frechet_distance, moments
from nag_jax.metrics.inception_score import inception_score
from nag_jax.metrics.reference import write_reference

ROOT = Path(__file__).resolve().parent.parent.parent
COUNT = 30


def quarters(pictures: jax.Array) -> jax.Array:
    """Means of the four quarters of a grey picture, of one channel or three equal ones: [B, 4]."""
    return pictures[..., 0].reshape(len(pictures), 2, 4, 2, 4).mean(axis=(2, 4)).reshape(len(pictures), -1)


FEATURES: FeatureNet = from_function("quarters", quarters, 4, fingerprint="1")


@pytest.fixture(scope="module")
def opened(finished: Path, runs) -> tuple[Experiment, TrainedNetwork]:
    values = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]("smoke")
    values.data.data_dir = str(runs.data_dir)
    values.eval.num_samples, values.sampling.batch_size = COUNT, 8
    values.eval.methods = ("plain", "nag")
    values.sampling.stepper, values.sampling.weights = "euler_maruyama", "params"
    config = from_config_dict(values)
    return open_trained(
        config, epath.Path(finished), epath.Path(finished), evaluate.make_methods(config), needs_data=False
    )


def with_batch_size(experiment: Experiment, batch_size: int) -> Experiment:
    config: Config = experiment.config
    sampling = dataclasses.replace(config.sampling, batch_size=batch_size)
    return dataclasses.replace(experiment, config=dataclasses.replace(config, sampling=sampling))


def draw_all(opened: tuple[Experiment, TrainedNetwork], folder: Path, batch_size: int = 8) -> dict[str, Drawn]:
    experiment, network = opened
    methods = evaluate.make_methods(experiment.config)
    return draw(
        with_batch_size(experiment, batch_size),
        network,
        methods,
        epath.Path(folder),
        feature_net=FEATURES,
        keep_images=True,
    )


def pictures(drawn: Drawn) -> np.ndarray:
    return np.concatenate(list(images(drawn)))


@pytest.fixture(scope="module")
def whole(opened, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawn]:
    return draw_all(opened, tmp_path_factory.mktemp("whole"))


def test_features_and_shown_images_are_those_of_the_images(opened, whole):
    labels = drawing.sample_labels(opened[0])
    for drawn in whole.values():
        found = pictures(drawn)
        assert found.shape == (COUNT, 8, 8, 1) and found.dtype == np.uint8
        np.testing.assert_allclose(drawn.features["pool3"], quarters(to_float(found)), atol=1e-6)
        np.testing.assert_array_equal(drawn.shown, found[drawing.shown_samples(labels, drawing.SHOWN_PER_CLASS)])
        assert drawn.seconds > 0 and drawn.answers is None
    assert not np.array_equal(pictures(whole["plain"]), pictures(whole["nag"]))


@pytest.mark.parametrize("batch_size", [7, 64])
def test_samples_do_not_depend_on_the_batch(opened, whole, tmp_path: Path, batch_size: int):
    for name, drawn in draw_all(opened, tmp_path, batch_size).items():
        # Another batch shape may round otherwise, so a value half way between two bytes may fall to either side.
        difference = pictures(drawn).astype(int) - pictures(whole[name])
        assert np.abs(difference).max() <= 1 and np.count_nonzero(difference) <= 0.002 * difference.size


def test_the_devices_begin_a_batch_before_the_host_fetches_the_one_before(
    opened, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    sample, start, finish = drawing.Sampler.__call__, drawing._Look.start, drawing._Look.finish

    def recorded_sample(*arguments, **options):
        calls.append("sample")
        return sample(*arguments, **options)

    def recorded_start(*arguments):
        calls.append("decode and convert")
        started = start(*arguments)
        assert all(isinstance(array, jax.Array) for array in started.values()), "nothing is fetched yet"
        return started

    def recorded_finish(*arguments):
        calls.append("fetch")
        return finish(*arguments)

    monkeypatch.setattr(drawing.Sampler, "__call__", recorded_sample)
    monkeypatch.setattr(drawing._Look, "start", recorded_start)
    monkeypatch.setattr(drawing._Look, "finish", recorded_finish)
    draw_all(opened, tmp_path)
    begin = ["sample", "decode and convert"]
    of_method = begin + 3 * [*begin, "fetch"] + ["fetch"]  # 30 samples are 4 batches of 8
    assert calls == of_method + of_method


def test_a_killed_drawing_goes_on_bit_for_bit(opened, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[int] = []
    write = drawing.SampleStore.write

    def killed_at_the_sixth(store, first, size, arrays):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(first)
        write(store, first, size, arrays)

    monkeypatch.setattr(drawing.SampleStore, "write", killed_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        draw_all(opened, tmp_path)

    def counted(store, first, size, arrays):
        written.append(first)
        write(store, first, size, arrays)

    monkeypatch.setattr(drawing.SampleStore, "write", counted)
    found = draw_all(opened, tmp_path)
    assert sorted(written) == sorted([0, 8, 16, 24] * 2), "no batch twice"
    for name, drawn in whole.items():
        np.testing.assert_array_equal(pictures(found[name]), pictures(drawn))
        np.testing.assert_array_equal(found[name].features["pool3"], drawn.features["pool3"])
    draw_all(opened, tmp_path)
    assert len(written) == 8, "what is there is not drawn again"


def test_another_batch_size_fills_the_gaps(opened, whole, tmp_path: Path):
    draw_all(opened, tmp_path)
    for method in ("plain", "nag"):
        (tmp_path / method / "00000008-00000016.npz").unlink()
    for name, drawn in draw_all(opened, tmp_path, 3).items():
        assert np.abs(pictures(drawn).astype(int) - pictures(whole[name])).max() <= 1
        np.testing.assert_array_equal(pictures(drawn)[:8], pictures(whole[name])[:8])


def test_a_reference_file_takes_the_place_of_held_out_images(opened, tmp_path: Path, monkeypatch):
    """No data of the network's own are read where nothing needs them, and the numbers are those of the features."""
    experiment, network = opened
    reference = np.random.default_rng(0).random((40, 4)).astype(np.float32)
    write_reference(tmp_path / "reference.npz", moments(reference))
    config = experiment.config
    evaluation = dataclasses.replace(
        config.eval, reference=str(tmp_path / "reference.npz"), feature_net="ours", save_samples=True
    )
    config = dataclasses.replace(
        config, eval=evaluation, noise_shift=NoiseShiftConfig(times=()), data=DataConfig(data_dir="/nowhere")
    )
    assert not evaluate.needs_data(config)
    monkeypatch.setattr(feature_nets, "load_feature_net", lambda folder: FEATURES)
    experiment = Experiment(
        config, epath.Path(tmp_path / "w"), experiment.mesh, experiment.description, experiment.network_folder
    )
    folder = evaluate.evaluate(experiment, network)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["floor"] is None and metrics["num_reference"] == 40
    for method in ("plain", "nag"):
        with np.load(folder / f"samples-{method}.npz") as samples:
            vectors = np.asarray(quarters(to_float(samples["arr_0"])))
        expected = frechet_distance(moments(vectors), moments(reference))
        assert metrics["methods"][method]["frechet_distance"] == pytest.approx(expected, rel=1e-4)
        assert metrics["methods"][method]["curve"]["sizes"][-1] == COUNT
        assert "precision" not in metrics["methods"][method], "statistics have no images to be precise about"
    assert not (folder / "blocks").exists() and not (folder / "noise_shift.json").exists()
    assert evaluate.evaluate(experiment, network) == folder


def test_other_conditions_are_seen_from_both_sides(tmp_path: Path):
    folder = epath.Path(tmp_path)
    few, more = {"seed": 0, "commit": "a"}, {"seed": 0, "commit": "b", "judged_against": "x"}
    results.begin(folder, few)
    assert not results.is_finished(folder, few, last_file="metrics.json")
    with pytest.raises(UserError, match="judged_against differ"):
        results.is_finished(folder, more, last_file="metrics.json")
    storage.write_json(folder / "conditions.json", more)
    with pytest.raises(UserError, match="judged_against differ"):
        results.is_finished(folder, few, last_file="metrics.json")


def test_a_result_names_the_commits_that_it_was_drawn_with(tmp_path: Path):
    folder = epath.Path(tmp_path)
    for commit in ("a", "b", "b", "c"):
        conditions = results.begin(folder, {"seed": 0, "commit": commit})
    assert (conditions["earlier_commits"], conditions["commit"]) == (["a", "b"], "c")
    assert not results.is_finished(folder, {"seed": 0, "commit": "d"}, last_file="metrics.json")


def test_three_taps_give_fid_s_numbers(opened, tmp_path: Path):
    """A network of FID's taps: each goes through the blocks into its own metric."""

    def taps(_, pictures: jax.Array) -> dict[str, jax.Array]:
        values = quarters(pictures)
        return {"pool3": values, "spatial": values[:, :2] * 3, "logits_unbiased": values * 5, "other": values}

    widths = {"pool3": 4, "spatial": 2, "logits_unbiased": 4, "other": 4}
    net = dataclasses.replace(FEATURES, taps=widths, apply_taps=taps)
    experiment, network = opened
    methods = evaluate.make_methods(experiment.config)
    drawn = draw(experiment, network, methods, epath.Path(tmp_path), feature_net=net, keep_images=True)
    real = {"pool3": np.random.default_rng(0).random((40, 4), np.float32)}
    real["spatial"] = real["pool3"][:, :2] * 3
    for each in drawn.values():
        vectors = np.asarray(quarters(to_float(pictures(each))))
        assert each.features.keys() == {"pool3", "spatial", "logits_unbiased"}
        measured, _ = measure(experiment.config, net, each.features, real_side(real, None))
        assert measured["frechet_distance"]["value"] == pytest.approx(
            frechet_distance(moments(vectors), moments(real["pool3"])), rel=1e-4
        )
        assert measured["spatial_frechet_distance"]["value"] == pytest.approx(
            frechet_distance(moments(vectors[:, :2] * 3), moments(real["spatial"])), rel=1e-4
        )
        assert measured["inception_score"]["mean"] == pytest.approx(inception_score(vectors * 5).mean, rel=1e-4)
        few = {tap: values[:9] for tap, values in each.features.items()}
        assert "inception_score" not in measure(experiment.config, net, few, real_side(real, None))[0]


def test_a_sample_that_is_not_finite_is_named(opened, tmp_path: Path):
    experiment, network = opened
    spoilt = network._replace(params=jax.tree.map(lambda leaf: leaf * np.float32(np.inf), network.params))
    with pytest.raises(NagJaxError, match="Sample 0 of method 'plain' is not finite"):
        draw_all((experiment, spoilt), tmp_path)
    assert not list(tmp_path.glob("*/*.npz"))
