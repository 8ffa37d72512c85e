"""Writes `report.html` from the files of a work folder: one file that needs no other, and no network.

Nothing is measured here: a finished folder rebuilds its report at any time. The sentences on what was seen are
`findings.py`'s, the figures `figures.py`'s and `noise_shift/figure.py`'s, the HTML `html_page.py`'s.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from etils import epath

from nag_jax import figures, storage
from nag_jax.config import Config, key_paths, to_dict
from nag_jax.evaluation_files import (
    Evaluation,
    Json,
    newest_evaluation,
    read_evaluation,
    read_object,
    read_object_if_there,
)
from nag_jax.findings import (
    decimals,
    distance_findings,
    fixed,
    number,
    shift_findings,
    shift_size,
    side_of_zero,
    sides_by_time,
)
from nag_jax.html_page import Html, details, document, element, escaped, image, paragraph, section, side_by_side, table
from nag_jax.metric_writer import read_metrics

# The title of a metric, and where it stands in a method's entry of metrics.json.
OTHER_METRICS: dict[str, Callable[[Json], float | None]] = {
    "limit of the distance": lambda result: (result.get("curve") or {}).get("limit"),
    "sFID": lambda result: (result.get("spatial_frechet_distance") or {}).get("value"),
    "Inception Score": lambda result: (result.get("inception_score") or {}).get("mean"),
    "precision": lambda result: result.get("precision"),
    "recall": lambda result: result.get("recall"),
    "density": lambda result: result.get("density"),
    "coverage": lambda result: result.get("coverage"),
    "kernel distance": lambda result: (result.get("kernel_distance") or {}).get("mean"),
}
HELD_OUT = "held-out images"


def write_report(workdir: epath.PathLike, evaluation: epath.PathLike | None = None) -> epath.Path:
    """Writes WORKDIR/report.html from the folder's config.json, environment.json, metrics.jsonl and one evaluation.

    Args:
        workdir: a work folder, local or remote. All but config.json may be missing: the report says what is.
        evaluation: the eval/step_N/NAME folder to show; the newest if None.

    Returns:
        The path of the report.

    Raises:
        UserError: config.json is missing, a file is damaged, or `evaluation` is no finished evaluation.
        NagJaxError: the report cannot be written.
    """
    workdir = epath.Path(workdir)
    config = read_object(workdir / "config.json")
    environment = read_object_if_there(workdir / "environment.json")
    lines = read_metrics(workdir)
    shown = newest_evaluation(workdir) if evaluation is None else read_evaluation(epath.Path(evaluation))
    title = f"Noise Awareness Guidance on {config.get('data', {}).get('name', 'unnamed data')}"
    sections = [
        element("h1", title),
        paragraph(_setup(config, environment, lines, shown), "soft"),
        _seen(config, lines, shown),
        _samples(shown),
        _distances(shown),
        _shift(shown),
        _training(lines),
        _cost(shown, environment, lines),
        _settings(config, environment, shown),
    ]
    storage.write_bytes(workdir / "report.html", document(title, sections).encode())
    return workdir / "report.html"


def _setup(config: Json, environment: Json, lines: Sequence[Json], evaluation: Evaluation | None) -> str:
    """What was trained and sampled, in a few lines."""
    sentences = []
    parameters = environment.get("parameters")
    if parameters:
        sentences.append(
            f"A network of {_count(parameters['network'])} parameters, and "
            f"{_count(parameters['null_noise_embedding'])} for the null noise embedding."
        )
    step = evaluation.step if evaluation else lines[-1]["step"] if lines else 0
    if step:
        start = f" from {config['init_from']}" if config.get("init_from") else ""
        trained = f"Trained{start} for {_count(step)} steps of {_count(config.get('batch_size'))} examples"
        dropout = config.get("objective", {}).get("noise_dropout")
        without = f"; {dropout:.0%} of them without their noise condition" if dropout else ""
        sentences.append(f"{trained}{without}.")
    else:
        sentences.append("The network was converted, and not trained here.")
    sampling = evaluation.conditions.get("sampling") if evaluation else None
    if evaluation and sampling:
        sentences.append(
            f"{_count(evaluation.metrics.get('num_samples'))} samples a method, on the same noise and labels: "
            f"{sampling['stepper']}, {sampling['num_steps']} steps, weights “{sampling['weights']}”."
        )
        if evaluation.conditions.get("vae"):
            name = evaluation.conditions["vae"]["name"]
            sentences.append(f"Samples and held-out images are latents that the autoencoder “{name}” decoded.")
    return " ".join(sentences)


def _seen(config: Json, lines: Sequence[Json], evaluation: Evaluation | None) -> Html:
    """The answer first: what the numbers say, and how far they can be trusted."""
    if evaluation:
        seen = [_with_lead("Distance to real images.", distance_findings(evaluation.metrics))]
        shift = evaluation.noise_shift
        seen.append(_with_lead("Noise shift.", shift_findings(shift) if shift else ["It was not measured."]))
    else:
        seen = [paragraph("This folder holds no finished evaluation yet, so nothing can be said about NAG.")]
        if lines:
            step, loss = _count(lines[-1]["step"]), number(lines[-1].get("loss"))
            seen.append(paragraph(f"Training: step {step} of {_count(config.get('num_steps'))}, loss {loss}."))
    box = section("What was seen", *seen, css_class="seen")
    data = config.get("data", {})
    if data.get("mock_examples"):
        caveat = "These data are made up: the images are random. The numbers show that the code runs, nothing else."
    elif data.get("name") == "digits":
        caveat = (
            "Digits of 8 × 8 pixels are too easy to prove NAG right or wrong: a small network learns them almost "
            "fully, and the held-out set is small. Take this as a check that everything works, not as evidence about "
            "NAG."
        )
    else:
        return box
    return Html(f"{box}\n{paragraph(caveat, 'caveat')}")


def _samples(evaluation: Evaluation | None) -> Html:
    if not (evaluation and evaluation.samples_png):
        return section("Samples", _missing("No samples in this folder yet."))
    caption = (
        f"A block for each method, a row for each class (at most {figures.MAX_GRID_CLASSES} are shown). The same place "
        "in two blocks is the same noise and label, so it shows what a method changed."
    )
    return section("Samples", image(evaluation.samples_png, "Samples of each method, by class", caption))


def _distances(evaluation: Evaluation | None) -> Html:
    title = "Distance to real images"
    if not evaluation:
        return section(title, _missing("Not measured yet."))
    metrics = evaluation.metrics
    features, floor = metrics["features"], metrics.get("floor")
    accuracy = features.get("held_out_accuracy")
    known = f" (it labels {accuracy:.1%} of held-out images correctly)" if accuracy is not None else ""
    about = (
        f"The Fréchet distance compares the mean and covariance of {_count(features.get('dimension'))} features, those "
        f"of “{features['name']}”{known}, between {_count(metrics.get('num_samples'))} samples of a method and "
        f"{_reference(metrics)}. Fewer images make it larger, so it compares only with distances on the same features "
        "and counts."
    )
    figure = image(
        figures.frechet_figure(metrics),
        "Fréchet distance of each method with its interval",
        "Dots: distances. Bars, if any: their 95% intervals. Dashed line and band, if any: two sets of real images.",
    )
    places = decimals([result["frechet_distance"] for result in metrics["methods"].values()], digits=4)
    rows = []
    for name, result in metrics["methods"].items():
        row = [result.get("guidance", name), _measured(result["frechet_distance"], result.get("interval"), places)]
        difference = result.get("difference_to_plain")
        if difference:
            verdict = side_of_zero(difference["interval"], "closer", "farther")
            row += [_difference(difference["value"], difference["interval"], places), verdict]
        rows.append(row if difference else [*row, "", ""])
    real = [_measured(floor["frechet_distance"], floor.get("interval"), places), "", ""] if floor else []
    compared = table(
        ["method", "Fréchet distance", "difference to plain", "than plain"],
        rows,
        caption="Fréchet distance in squared units of the features, above 95% intervals if any; lower is closer",
        foot=["real against real", *real] if floor else (),
        numeric=(1, 2),
    )
    note = (
        "The interval of a number is a 95% bootstrap interval: how far it would move if other samples and other "
        "held-out images had been drawn in the same way. The network was trained once, so it says nothing about other "
        "training runs. Differences are paired, as both methods start from the same noise and labels: they can be "
        "certain even where the intervals of the distances overlap."
    )
    if floor:
        sizes = f"{_count(floor.get('num_a'))} against {_count(floor.get('num_b'))}"
        note += f" Real against real: {floor.get('description', 'two sets of real images')} ({sizes})."
    has_intervals = any(result.get("interval") for result in metrics["methods"].values())
    notes = [paragraph(note, "note soft")] if has_intervals else []
    return section(title, paragraph(about), figure, compared, *notes, *_other_metrics(metrics))


def _reference(metrics: Json) -> str:
    """What distances are measured to."""
    count, reference = metrics.get("num_reference"), metrics.get("reference", HELD_OUT)
    if reference == HELD_OUT:
        return f"{_count(count)} held-out images"
    return f"the stored statistics of {reference}" if count is None else f"{_count(count)} images of {reference}"


def _other_metrics(metrics: Json) -> list[Html]:
    """A table of the metrics that an evaluation has besides the distance; nothing where it has none."""
    methods = metrics["methods"]
    columns = {
        title: read
        for title, read in OTHER_METRICS.items()
        if any(read(result) is not None for result in methods.values())
    }
    if not columns:
        return []
    rows = [
        [result.get("guidance", name), *(number(read(result), 4) for read in columns.values())]
        for name, result in methods.items()
    ]
    caption = "Other metrics of the same features. Lower is better for the limit, sFID and the kernel distance"
    limit = (
        "The limit is the distance for infinitely many samples: a line through the distances of subsets over one over "
        "their size ends there. Where it is far below the distance, more samples are needed."
    )
    shown = table(["method", *columns], rows, caption=caption, numeric=range(1, len(columns) + 1))
    return [shown, paragraph(limit, "note soft")]


def _shift(evaluation: Evaluation | None) -> Html:
    if not (evaluation and evaluation.noise_shift):
        return section("Noise shift", _missing("Not measured." if evaluation else "Not measured yet."))
    methods = evaluation.noise_shift["methods"]
    names, control = list(methods), next(iter(methods.values()))
    about = (
        "A network that tells the noise level t from a state alone is asked about the sampler's states, and about "
        "held-out images with the right amount of noise at the same t (the forward control). A positive shift means "
        "that the sampler's states look noisier than they should. The calibrated shift is in units of t, with the "
        "network's own bias taken out."
    )
    parts = [paragraph(about)]
    if evaluation.noise_shift_png:
        caption = "Top: answers of the network at each t, on true and on sampled states. Bottom: the shift over t."
        parts.append(image(evaluation.noise_shift_png, "Noise shift of each method over t", caption))
    level = f"{100 * control['confidence_level']:g}%"
    of_times = [[methods[name]["shifts"][i] for name in names] for i in range(len(control["shifts"]))]
    sizes = [shift_size(methods[name]) for name in names]
    places = max(4, decimals([size["estimate"] for size in sizes], digits=2))
    parts.append(
        table(
            ["t", *names],
            [
                [f"{row[0]['t']:.3g}", *(_difference(*_ends(shift["calibrated_shift"]), places) for shift in row)]
                for row in of_times
            ],
            caption=f"Calibrated shift in units of t, with {level} intervals; bold where the interval excludes zero",
            foot=["mean |shift|", *(_measured(*_ends(size), places) for size in sizes)],
            numeric=range(1, len(names) + 1),
        )
    )
    differences = evaluation.noise_shift.get("differences")
    if differences:
        parts.append(_size_differences(differences, level, places))
    answers = table(
        ["t", "forward control", *names],
        [
            [
                f"{row[0]['t']:.3g}",
                _measured(*_ends(row[0]["forward_answer"]), places),
                *(_answer(shift, places) for shift in row),
            ]
            for row in of_times
        ],
        caption=f"Mean answer in units of t with its {level} interval, and its raw difference Δ to the control",
        numeric=range(1, len(names) + 2),
    )
    parts.append(details("The network's answers, not calibrated", answers))
    note = (
        f"Behind each number: {_count(control['num_sampled'])} sampled states and {_count(control['num_forward'])} "
        f"held-out images. {level} bootstrap intervals over both, each on its own, so a few of many may exclude zero "
        "by chance. The network's training is not in them. Sampling error adds to an absolute value, so mean |shift| "
        "is above zero without any shift."
    )
    return section("Noise shift", *parts, paragraph(note, "note soft"))


def _size_differences(differences: Json, level: str, places: int) -> Html:
    """Whether NAG makes the shift smaller: every method with it against the same without, in pairs."""
    rows = []
    for name, difference in differences.items():
        mean, count = difference["mean_absolute"], len(difference["by_time"])
        verdict = side_of_zero((mean["low"], mean["high"]), "smaller", "larger")
        times = [f"{side} of {count}" for side in sides_by_time(difference)]
        rows.append([f"{name} against {difference['against']}", _difference(*_ends(mean), places), verdict, *times])
    return table(
        ["method", "difference of mean |shift|", "with NAG", "times smaller", "times larger"],
        rows,
        caption=f"Paired difference of the shift's size in units of t, with {level} intervals; below zero, NAG made it "
        "smaller",
        numeric=(1, 3, 4),
    )


def _training(lines: Sequence[Json]) -> Html:
    if not lines:
        return section("Training", _missing("No training step was logged."))
    averaged = figures.last_lines(lines)
    steps = f"{_count(averaged[0]['step'])} to {_count(averaged[-1]['step'])}"
    curve = image(
        figures.loss_curve(lines),
        "Training loss over steps",
        "Training loss. Examples without their noise condition are fewer, so their curve is rougher.",
    )
    by_level = image(
        figures.loss_by_level(lines),
        "Loss at each noise level",
        f"Loss at each noise level, mean over steps {steps}. The gap between the curves is what knowing the noise "
        "level is worth to the network.",
    )
    return section("Training", side_by_side(curve, by_level))


def _cost(evaluation: Evaluation | None, environment: Json, lines: Sequence[Json]) -> Html:
    parts = []
    if evaluation:
        methods = evaluation.metrics["methods"]
        plain = methods.get("plain", {}).get("evaluations_per_image")
        header, caption = ["method", "evaluations", "of plain"], "Network evaluations behind one image"
        rows = []
        for name, result in methods.items():
            count = result["evaluations_per_image"]
            rows.append([name, _count(count), f"{count / plain:.3g} ×" if plain else ""])
        calls = [result.get("estimator_calls_per_image") or 0 for result in methods.values()]
        if any(calls):
            header = [*header, "estimator calls"]
            caption += ", and calls of the noise-level estimator that guides"
            rows = [[*row, _count(count)] for row, count in zip(rows, calls, strict=True)]
        parts.append(table(header, rows, caption=caption, numeric=(1, 2, 3)))
    seconds = environment.get("seconds")
    if seconds:
        rows = [[stage, fixed(value, 1)] for stage, value in seconds.items()]
        total = ["together", fixed(sum(value or 0.0 for value in seconds.values()), 1)]
        devices = [record["device"] for record in _stages(environment).values() if record.get("device")]
        caption = f"Wall time on {' and '.join(dict.fromkeys(devices)) or 'an unnamed device'}"
        parts.append(table(["stage", "seconds"], rows, caption=caption, foot=total, numeric=(1,)))
    shown = [side_by_side(*parts)] if parts else []
    shown += [paragraph(_speed(line), "note soft") for line in lines if line.get("examples_per_second")][-1:]
    return section("Cost", *(shown or [_missing("Not measured yet.")]))


def _speed(line: Json) -> str:
    """How fast a line of metrics.jsonl says that training was."""
    speed = f"Training up to step {_count(line['step'])}: {number(line['examples_per_second'])} examples a second."
    goodput = line.get("goodput")
    if goodput is None:
        return speed
    return (
        f"{speed} Goodput {goodput:.0%}: so much of the wall time of that process, from its start on, went into "
        "training steps; the rest into starting, compiling, waiting for data, saving and evaluating."
    )


def _settings(config: Json, environment: Json, evaluation: Evaluation | None) -> Html:
    defaults = dict(key_paths(storage.as_json(to_dict(Config()))))
    settings = dict(key_paths(config))
    changed = {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}
    parts = _commands(environment)
    parts.append(details("Settings that differ from the defaults", _values(changed)))
    parts.append(details("All settings", _values(settings)))
    if evaluation:
        parts.append(details("Conditions of the evaluation", _values(dict(key_paths(evaluation.conditions)))))
    about = {key: value for key, value in environment.items() if key not in ("seconds", "command")}
    parts.append(details("Environment", _values(dict(key_paths(about)))))
    if evaluation:
        where = f"eval/step_{evaluation.step}/{evaluation.folder.name}"
        parts.append(paragraph(f"The numbers above are in {where}, the losses in metrics.jsonl.", "note soft"))
    return section("How to reproduce", *parts)


def _stages(environment: Json) -> dict[str, Json]:
    """Where each stage ran: its command, commit, versions and device; one record of all without stages."""
    stages = {name: environment[name] for name in ("training", "evaluation") if environment.get(name)}
    return stages or {"": environment}


def _commands(environment: Json) -> list[Html]:
    """The recorded commands in their order, each once, with the commit before it where that changes."""
    lines: list[str] = []
    commands: list[str] = []
    commit = None
    for record in _stages(environment).values():
        command = record.get("command")
        if not command or command in commands:
            continue
        of_command = (record.get("commit") or "").removesuffix("+changes")
        if of_command and of_command != commit:
            commit = of_command
            lines.append(f"git checkout {commit}")
        commands.append(command)
        lines.append(command)
    if not commands:
        return [_missing("The command was not recorded; the settings below hold every value of the run.")]
    where = "In the project's folder, with its environment active (source .venv/bin/activate):"
    parts = [paragraph(where), element("pre", "\n".join(lines))]
    if any((record.get("commit") or "").endswith("+changes") for record in _stages(environment).values()):
        parts.append(paragraph("The source tree differed from a commit named here.", "note soft"))
    return parts


def _values(values: Json) -> Html:
    if not values:
        return _missing("None recorded.")
    rows = [[key, "null" if value is None else str(value)] for key, value in values.items()]
    return table(["key", "value"], rows, css_class="settings")


def _missing(text: str) -> Html:
    return paragraph(text, "soft")


def _with_lead(lead: str, sentences: Sequence[str]) -> Html:
    return paragraph(Html(f"{element('strong', lead)} {html.escape(' '.join(sentences))}"))


def _ends(interval: Json) -> tuple[float | None, Sequence[float | None]]:
    return interval["estimate"], (interval["low"], interval["high"])


def _answer(shift: Json, places: int) -> Html:
    raw = fixed(shift["raw_shift"]["estimate"], places, sign=True)
    answer = _measured(*_ends(shift["sampled_answer"]), places)
    return Html(answer + element("small", f"Δ {raw}"))


def _measured(value: float | None, interval: Sequence[float | None] | None, places: int) -> Html:
    """A number above its interval."""
    low, high = interval or (None, None)
    ends = element("small", f"{fixed(low, places)} to {fixed(high, places)}") if None not in (low, high) else ""
    return Html(escaped(fixed(value, places)) + ends)


def _difference(value: float | None, interval: Sequence[float | None], places: int) -> Html:
    """A number with its sign above its interval, in bold where the interval excludes zero."""
    low, high = (fixed(end, places, sign=True) for end in interval)
    is_seen = side_of_zero(interval, "below", "above") != "undecided"
    shown = element("strong" if is_seen else "span", fixed(value, places, sign=True))
    return Html(shown + element("small", f"{low} to {high}"))


def _count(value: int | None) -> str:
    return "an unknown number of" if value is None else f"{value:,}"
