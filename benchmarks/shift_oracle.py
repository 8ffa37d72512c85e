"""What noise shift does a wrong score cause, and does Noise Awareness Guidance reduce it? Without a trained network.

    python benchmarks/shift_oracle.py

Data N(0, lambda I), whose score is known, and a sampler that uses (1 + eta) times it. The squared radius of each state
then obeys an ordinary differential equation, with and without NAG (`nag_jax/diffusion/analytic_gaussian.py`). Beside
the equations runs the real sampler on the exact mixture. On both sides the noise shift, E[t | sampled] - E[t | true],
is read from the exact p(t | x). This over
    eta and NAG's scale w;
    the linear and the DDPM process;
    the null branches "posterior" (averages scores over p(t | x)) and "network" (averages what a network of that process
    predicts, velocities or noises, as one that was trained with noise-condition dropout does);
    data whose states tell their noise level badly (broad p(t | x)) and well (narrow p(t | x)).

Both processes are compared at the same sigma / alpha. A wrong score has no finite velocity where alpha = 0, so samplers
start at sigma / alpha = 9 (t = .9 on the linear path) from true states, and p(t) is uniform below that.

Writes results/shift_oracle.json and docs/shift_oracle.png and prints the tables of docs/method.md; half a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.special import softmax
from scipy.stats import chi2

from nag_jax import storage
from nag_jax.curve_styles import COLOURS, LINES, MARKERS
from nag_jax.denoiser import Denoiser, Params, Prediction
from nag_jax.diffusion.analytic import Mixture, MixtureFunction, MixtureTimePosterior, make_mixture
from nag_jax.diffusion.analytic_gaussian import perturbed_radius, perturbed_variance
from nag_jax.diffusion.guidance import nag, plain
from nag_jax.diffusion.process import DDPM, Linear, PredictionKind, Process, expand_like
from nag_jax.diffusion.sampler import Sampler
from nag_jax.diffusion.stepping import Heun
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.jobs.experiment import environment
from nag_jax.noise_shift.answers import answer

SCORE_ERRORS = (-0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1)
NAG_SCALES = (0.3, 1.0, 3.0)
# Times on the linear path; on another process the times of the same sigma / alpha.
START, TIMES, END = 0.9, (0.6, 0.4, 0.2, 0.1), 0.05
FIGURE_TIME = 0.2


@dataclasses.dataclass(frozen=True)
class Data:
    """N(0, variance I) in so many dimensions."""

    dimension: int
    variance: float


DATA = {"broad": Data(16, 0.1), "narrow": Data(64, 0.01)}
PROCESSES: tuple[tuple[Process, PredictionKind], ...] = ((Linear(), "velocity"), (DDPM(), "noise"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """How finely both sides are computed.

    Attributes:
        num_steps: steps of Heun's method; each but the last asks the denoiser twice.
        num_levels: quadrature nodes for p(t), denser near the data.
        num_radii: states of each eta, at the middles of equal parts of the distribution of |x|^2, with random
            directions.
        score_errors: eta.
        nag_scales: w.
    """

    num_steps: int = 85
    num_levels: int = 64
    num_radii: int = 6
    score_errors: tuple[float, ...] = SCORE_ERRORS
    nag_scales: tuple[float, ...] = NAG_SCALES


@dataclasses.dataclass(frozen=True)
class WrongScore:
    """The mixture's prediction if its score were 1 + eta times as large; label c asks for the c-th eta.

    A prediction is a(t) x + b(t) score, so it becomes (1 + eta) prediction - eta a(t) x. Without the noise level both
    terms are averaged over p(t | x).
    """

    mixture: Mixture
    prediction: PredictionKind

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        t: jax.Array,
        labels: jax.Array,
        drop_label: jax.Array,
        drop_noise: jax.Array,
        time_embedding_offset: jax.Array | None,
    ) -> Prediction:
        exact = MixtureFunction(self.mixture, self.prediction)
        no_class = jnp.zeros_like(labels)
        value = exact(params["mixture"], x, t, no_class, drop_label, drop_noise, time_embedding_offset).value

        def factor(t: jax.Array) -> jax.Array:
            return self.mixture.process.conversion(t, "score", self.prediction)[0]

        def averaged_where_dropped(known: jax.Array) -> jax.Array:
            num_levels = params["mixture"]["levels"].shape[0]
            nodes, weights = MixtureTimePosterior(self.mixture).quadrature(params["mixture"], x, num_levels)
            return jnp.where(drop_noise, jnp.sum(weights * factor(nodes), axis=0), known)

        a = jax.lax.cond(jnp.any(drop_noise), averaged_where_dropped, lambda known: known, factor(t))
        eta = params["score_errors"][labels]
        return Prediction(expand_like(1.0 + eta, x) * value - expand_like(eta * a, x) * x)


@dataclasses.dataclass(frozen=True)
class RadiusAndLevel:
    """An observer: |x|^2 and the exact posterior's mean of t, [B] each."""

    posterior: MixtureTimePosterior
    num_levels: int

    def __call__(self, params: Params, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(x**2, axis=1), answer(self.posterior, params, x, self.num_levels).mean


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of data on one process, with the grid on which both sides are computed."""

    data: Data
    process: Process
    prediction: PredictionKind
    settings: Settings

    def time(self, linear_time: float) -> float:
        """The time of the same sigma / alpha as `linear_time` on the linear path, rounded up to a level if discrete."""
        t = float(self.process.time_of_ratio(np.float64(linear_time / (1.0 - linear_time))))
        count = self.process.num_levels
        return t if count is None else float(np.ceil(t * count)) / count

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and weights of the prior p(t), uniform below the start."""
        u = (np.arange(self.settings.num_levels) + 0.5) / self.settings.num_levels
        return self.time(START) * u**2, u / u.sum()

    def variance(self, t: Any) -> Any:
        """Variance per dimension of true states."""
        return self.process.alpha(t) ** 2 * self.data.variance + self.process.sigma(t) ** 2

    def initial_radii(self) -> np.ndarray:
        """|x|^2 at the start [num_radii]."""
        middles = (np.arange(self.settings.num_radii) + 0.5) / self.settings.num_radii
        return self.variance(np.float64(self.time(START))) * chi2.ppf(middles, self.data.dimension)

    def mean_level(self, radii: np.ndarray) -> np.ndarray:
        """E[t | x], which depends on |x|^2 alone."""
        levels, weights = self.levels()
        variance = self.variance(levels)
        log_density = -0.5 * (radii[..., None] / variance + self.data.dimension * np.log(variance))
        return softmax(np.log(weights) + log_density, axis=-1) @ levels


def guidances(settings: Settings) -> dict[tuple[str, float], Any]:
    """(null branch, w) -> guidance."""
    every = {("none", 0.0): plain()}
    for w in settings.nag_scales:
        every |= {("posterior", w): nag(w, null="posterior"), ("network", w): nag(w)}
    return every


def measure(case: Case) -> tuple[np.ndarray, dict[tuple[str, float], tuple[np.ndarray, np.ndarray]]]:
    """Runs the sampler: the times [T], and for each guidance |x|^2 and E[t | x], both [T, eta, radius]."""
    settings, dimension = case.settings, case.data.dimension
    levels, level_weights = case.levels()
    mixture = make_mixture(
        case.process,
        np.zeros((1, dimension)),
        covariances=case.data.variance,
        levels=levels,
        level_weights=level_weights,
    )
    posterior, posterior_params = mixture.time_posterior()
    denoiser = Denoiser(
        WrongScore(mixture.without_params(), case.prediction),
        {"mixture": mixture.params, "score_errors": np.array(settings.score_errors, np.float32)},
        case.process,
        case.prediction,
        num_classes=len(settings.score_errors),
        sample_shape=(dimension,),
    )
    sampler = Sampler(
        denoiser,
        {f"{null} {w}": guidance for (null, w), guidance in guidances(settings).items()},
        stepper=Heun(t_max=case.time(START), t_min=case.time(END)),
        num_steps=settings.num_steps,
        estimator=Estimator(posterior, posterior_params),
        num_posterior_nodes=settings.num_levels,
        observer=RadiusAndLevel(posterior, settings.num_levels),
        observer_params=posterior_params,
        observe_times=[case.time(t) for t in (START, *TIMES)],
    )
    directions = np.random.default_rng(0).normal(size=(settings.num_radii, dimension))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    states = directions * np.sqrt(case.initial_radii())[:, None]
    labels = np.arange(len(settings.score_errors)).repeat(settings.num_radii)
    initial = jnp.asarray(np.tile(states, (len(settings.score_errors), 1)))
    observed = {}
    for null, w in guidances(settings):
        samples = sampler(f"{null} {w}", labels, seed=0, indices=np.arange(len(labels)), initial=initial)
        shape = (len(samples.times), len(settings.score_errors), settings.num_radii)
        radii, mean_levels = (np.asarray(leaf, np.float64).reshape(shape) for leaf in samples.observations)
        observed[null, w] = radii, mean_levels
    return sampler.observed_times, observed


def predict(case: Case, null: str, w: float, eta: float, times: np.ndarray) -> np.ndarray:
    """|x|^2 of the equations [T, radius]."""
    if w == 0.0:
        variance = perturbed_variance(case.process, case.data.variance, eta, times)
        return variance[:, None] / variance[0] * case.initial_radii()
    levels, level_weights = case.levels()
    columns = [
        perturbed_radius(
            case.process,
            case.data.variance,
            eta,
            w,
            case.data.dimension,
            radius,
            times,
            levels,
            level_weights,
            null_kind="score" if null == "posterior" else case.prediction,
        )
        for radius in case.initial_radii()
    ]
    return np.stack(columns, axis=1)


def run_case(case: Case) -> list[dict[str, Any]]:
    """Both sides for every guidance: tables [eta][time] without the start, where all are still true states."""
    times, observed = measure(case)
    true_radii = case.variance(times)[:, None] / case.variance(times[0]) * case.initial_radii()
    control = case.mean_level(true_radii).mean(axis=1)
    results = []
    for (null, w), (radii, mean_levels) in observed.items():
        equation = np.stack([predict(case, null, w, eta, times) for eta in case.settings.score_errors], axis=1)
        tables = {
            "shift": mean_levels.mean(axis=2) - control[:, None],
            "equation_shift": case.mean_level(equation).mean(axis=2) - control[:, None],
            "variance_ratio": radii.mean(axis=2) / true_radii.mean(axis=1)[:, None],
            "equation_variance_ratio": equation.mean(axis=2) / true_radii.mean(axis=1)[:, None],
        }
        results.append(
            {
                "null": null if null != "network" else f"network ({case.prediction})",
                "nag_scale": w,
                "times": times[1:],
                "true_mean_level": control[1:],
                **{name: table[1:].T for name, table in tables.items()},
            }
        )
    return results


def summarize(cases: list[dict[str, Any]], score_errors: tuple[float, ...]) -> list[dict[str, Any]]:
    """What each guidance did to the shift, over all eta but 0 and all times, as measured."""
    is_wrong = np.array(score_errors) != 0.0
    without = {(case["data"], case["process"]): case for case in cases if case["nag_scale"] == 0.0}
    rows = []
    for case in cases:
        shift, ratio = case["shift"], case["variance_ratio"]
        plain_case = without[case["data"], case["process"]]
        smaller = np.abs(shift[is_wrong]) < np.abs(plain_case["shift"][is_wrong])
        rows.append(
            {name: case[name] for name in ("data", "process", "null", "nag_scale")}
            | {
                "mean_absolute_shift": np.abs(shift[is_wrong]).mean(),
                "mean_absolute_log_variance_ratio": np.abs(np.log(ratio[is_wrong])).mean(),
                "largest_absolute_shift_of_the_right_score": np.abs(shift[~is_wrong]).max(initial=0.0),
            }
            | ({} if case is plain_case else {"smaller_shift": int(smaller.sum()), "compared": int(smaller.size)})
        )
    return rows


def tables(summary: list[dict[str, Any]]) -> str:
    """The summary as two Markdown tables: mean |shift| with how often it became smaller, and mean |log V / V_true|."""
    scales = sorted({row["nag_scale"] for row in summary})
    known = {(row["data"], row["process"], row["null"], row["nag_scale"]): row for row in summary}
    kinds = dict.fromkeys((row["data"], row["process"], row["null"]) for row in summary if row["null"] != "none")
    head = ["p(t given x)", "process", "null branch", "no guidance", *(f"w = {w:g}" for w in scales[1:])]
    shifts, variances = [[*head, "w = 1, right score"]], [head]
    for data, process, null in kinds:
        rows = [known[data, process, "none", 0.0], *(known[data, process, null, w] for w in scales[1:])]
        counts = ["", *(f" ({row['smaller_shift']} of {row['compared']})" for row in rows[1:])]
        cells = [f"{row['mean_absolute_shift']:.4f}{count}" for row, count in zip(rows, counts, strict=True)]
        right = known[data, process, null, 1.0]["largest_absolute_shift_of_the_right_score"]
        shifts.append([data, process, null, *cells, f"{right:.4f}"])
        variances.append([data, process, null, *(f"{row['mean_absolute_log_variance_ratio']:.3f}" for row in rows)])
    return "\n\n".join(
        "\n".join("| " + " | ".join(line) + " |" for line in [table[0], ["---"] * len(table[0]), *table[1:]])
        for table in (shifts, variances)
    )


def draw(cases: list[dict[str, Any]], score_errors: tuple[float, ...]) -> bytes:
    """The shift over eta at one level: lines are the equations, markers the sampler. A PNG file."""
    columns = list(dict.fromkeys((case["process"], case["null"]) for case in cases if case["nag_scale"] > 0.0))
    figure = Figure(figsize=(12.5, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(DATA), len(columns), sharex=True, squeeze=False)
    index = TIMES.index(FIGURE_TIME)
    for row, (name, data) in enumerate(DATA.items()):
        for column, (process, null) in enumerate(columns):
            axes = panels[row, column]
            axes.axhline(0.0, color="0.45", linewidth=0.8)
            axes.axvline(0.0, color="0.85", linewidth=0.8, zorder=0)
            shown = [
                case
                for case in cases
                if (case["data"], case["process"]) == (name, process) and case["null"] in ("none", null)
            ]
            for style, case in enumerate(shown):
                look = {"color": COLOURS[style], "linewidth": 1.6}
                axes.plot(score_errors, case["equation_shift"][:, index], linestyle=LINES[style], **look)
                axes.plot(score_errors, case["shift"][:, index], MARKERS[style], markersize=5, color=COLOURS[style])
            t = shown[0]["times"][index]
            axes.set_title(f"{process}, null branch: {null}\n{name} p(t|x), t = {t:.3g}", size=9.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8.5)
            if row == len(DATA) - 1:
                axes.set_xlabel("error η of the score", size=9)
        # One scale for both null branches of a process.
        for pair in (panels[row, :2], panels[row, 2:]):
            ends = [axes.get_ylim() for axes in pair]
            for axes in pair:
                axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        panels[row, 0].set_ylabel(f"noise shift\n({data.dimension} dimensions, variance {data.variance:g})", size=9)
    names = ["no guidance", *(f"NAG, w = {w:g}" for w in dict.fromkeys(c["nag_scale"] for c in cases) if w > 0.0)]
    handles = [
        panels[0, 0].plot([], [], color=COLOURS[i], linestyle=LINES[i], marker=MARKERS[i], label=name)[0]
        for i, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9.5)
    figure.suptitle("Noise shift if the score is 1 + η times the true one (lines: equations, markers: sampler)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def run(settings: Settings) -> list[dict[str, Any]]:
    """Every case, in the order of DATA and PROCESSES."""
    return [
        {"data": name, "process": process.name, **result}
        for name, data in DATA.items()
        for process, prediction in PROCESSES
        for result in run_case(Case(data, process, prediction, settings))
    ]


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=root / "results/shift_oracle.json", help="JSON file to write")
    parser.add_argument("--figure", type=Path, default=root / "docs/shift_oracle.png", help="PNG file to write")
    arguments = parser.parse_args()
    start = time.perf_counter()
    settings = Settings()
    cases = run(settings)
    summary = summarize(cases, settings.score_errors)
    difference = {
        name: max(float(np.abs(case[name] - case[f"equation_{name}"]).max()) for case in cases)
        for name in ("shift", "variance_ratio")
    }
    command = " ".join(["python", *map(shlex.quote, sys.argv)])
    content = {
        "settings": dataclasses.asdict(settings)
        | {
            "stepper": "Heun",
            "dtype": "float32",
            "start": START,
            "end": END,
            "data": {name: dataclasses.asdict(data) for name, data in DATA.items()},
        },
        "environment": environment() | {"command": command},
        "seconds": round(time.perf_counter() - start, 1),
        "largest_difference_of_sampler_and_equation": difference,
        "summary": summary,
        "cases": cases,
    }
    storage.write_json(arguments.results, content)
    storage.write_bytes(arguments.figure, draw(cases, settings.score_errors))
    print(f"largest difference of sampler and equation: {difference}")
    print(tables(summary))
    print(f"written: {arguments.results}, {arguments.figure} ({content['seconds']} s)")


if __name__ == "__main__":
    main()
