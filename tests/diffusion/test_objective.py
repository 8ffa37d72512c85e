import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from nag_jax.denoiser import Denoiser, Prediction, from_function
from nag_jax.diffusion import objective as objective_lib
from nag_jax.diffusion.objective import Draws, Objective
from nag_jax.diffusion.process import DDPM, GVP, Linear
from nag_jax.errors import UserError

KEY = jax.random.key(3)
NO_DROPOUT = Objective(label_dropout=0.0, noise_dropout=0.0)


def draw(objective, process=None, rows=4096, step=0, shape=(1,)):
    return objective_lib.draw(objective, process or Linear(), KEY, step, jnp.arange(rows), shape)


def ddpm_denoiser(value, variance):
    """A denoiser that answers the arrays it is given as parameters."""

    def apply(params, x, t, labels, drop_label, drop_noise, time_embedding_offset):
        return Prediction(*params)

    return Denoiser(apply, None, DDPM(), "noise", 10, value.shape[1:])


# Draws


def test_draws_depend_on_the_position_and_not_on_the_batch():
    objective = Objective(label_dropout=0.5, noise_dropout=0.5)
    whole = objective_lib.draw(objective, Linear(), KEY, 7, jnp.arange(16), (3, 2))
    rows = jnp.array([5, 11, 2])
    some = jax.jit(objective_lib.draw, static_argnums=(0, 1, 5))(objective, Linear(), KEY, 7, rows, (3, 2))
    for one, other in zip(whole, some, strict=True):
        np.testing.assert_array_equal(one[rows], other)


def test_streams_steps_and_keys_are_different():
    keys = [
        objective_lib.row_keys(key, stream, step, jnp.arange(8))
        for key in (KEY, jax.random.key(4))
        for stream in ("time", "noise")
        for step in (0, 1)
    ]
    data = np.concatenate([np.asarray(jax.random.key_data(key)) for key in keys])
    assert len(np.unique(data, axis=0)) == len(data)


def test_uniform_times():
    assert scipy.stats.kstest(np.asarray(draw(Objective()).t), "uniform").pvalue > 0.01


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.8, 0.6)])
def test_logit_normal_times(mean, std):
    t = np.asarray(draw(Objective(time_sampling="logit_normal", logit_mean=mean, logit_std=std)).t, np.float64)
    assert scipy.stats.kstest((np.log(t / (1 - t)) - mean) / std, "norm").pvalue > 0.01


def test_discrete_process_draws_its_levels_evenly():
    t = np.asarray(draw(Objective(), DDPM(num_levels=8)).t)
    levels, counts = np.unique(t, return_counts=True)
    np.testing.assert_array_equal(levels, np.float32(np.arange(1, 9) / 8))
    assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_noise_is_standard_normal():
    assert scipy.stats.kstest(np.asarray(draw(Objective(), rows=512, shape=(8,)).noise).ravel(), "norm").pvalue > 0.01


def test_independent_dropout():
    draws = draw(Objective(label_dropout=0.1, noise_dropout=0.2))
    label, noise = np.asarray(draws.drop_label), np.asarray(draws.drop_noise)
    for coin, rate in ((label, 0.1), (noise, 0.2), (label & noise, 0.02)):
        assert scipy.stats.binomtest(int(coin.sum()), coin.size, rate).pvalue > 0.01


def test_joint_dropout_drops_both():
    draws = draw(Objective(label_dropout=0.2, noise_dropout=0.2, dropout="joint"))
    np.testing.assert_array_equal(draws.drop_label, draws.drop_noise)
    assert scipy.stats.binomtest(int(draws.drop_label.sum()), 4096, 0.2).pvalue > 0.01


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_dropout_never_and_always(rate):
    draws = draw(Objective(label_dropout=rate, noise_dropout=rate), rows=256)
    assert bool((draws.drop_label == bool(rate)).all() and (draws.drop_noise == bool(rate)).all())


# Losses


@pytest.mark.parametrize("process", [Linear(), GVP()], ids=lambda process: process.name)
def test_velocity_loss_of_the_exact_answer_for_one_data_point_is_zero(process):
    point = 0.3

    def velocity(x, t, labels):
        a, b = process.conversion(t[:, None], "data", "velocity")
        return a * x + b * point

    denoiser = from_function(velocity, process, "velocity", num_classes=1, sample_shape=(2,))
    draws = draw(NO_DROPOUT, process, rows=64, shape=(2,))
    batch = {"image": jnp.full((64, 2), point), "label": jnp.zeros(64, jnp.int32)}
    losses = objective_lib.loss(NO_DROPOUT, denoiser, {}, batch, draws)
    np.testing.assert_allclose(losses.total, 0.0, atol=1e-6)
    assert losses.variational is None


def test_velocity_loss_of_the_exact_answer_for_gaussian_data_is_the_conditional_variance():
    # x_0 ~ N(0, 1) on the linear path: E[v | x_t] = (2t - 1) x_t / q and Var[v | x_t] = 1 / q, q = (1-t)^2 + t^2.
    def velocity(x, t, labels):
        t = t[:, None]
        return (2 * t - 1) / ((1 - t) ** 2 + t**2) * x

    denoiser = from_function(velocity, Linear(), "velocity", num_classes=1, sample_shape=(40_000,))
    t = jnp.array([0.05, 0.3, 0.5, 0.9])
    draws = draw(NO_DROPOUT, rows=4, shape=(40_000,))._replace(t=t)
    batch = {"image": jax.random.normal(KEY, (4, 40_000)), "label": jnp.zeros(4, jnp.int32)}
    losses = objective_lib.loss(NO_DROPOUT, denoiser, {}, batch, draws)
    np.testing.assert_allclose(losses.simple, 1 / ((1 - t) ** 2 + t**2), rtol=0.03)


def test_velocity_and_noise_losses_are_related_by_the_conversion():
    # On the linear path v - v' = (eps - eps') / (1 - t) for the same state.
    def noise(x, t, labels):
        return jnp.tanh(x)

    def velocity(x, t, labels):
        a, b = Linear().conversion(t[:, None], "noise", "velocity")
        return a * x + b * noise(x, t, labels)

    batch = {"image": jax.random.normal(KEY, (32, 3)), "label": jnp.zeros(32, jnp.int32)}
    draws = draw(NO_DROPOUT, rows=32, shape=(3,))
    losses = {}
    for kind, function in (("noise", noise), ("velocity", velocity)):
        denoiser = from_function(function, Linear(), kind, num_classes=1, sample_shape=(3,))
        losses[kind] = objective_lib.loss(
            dataclasses.replace(NO_DROPOUT, prediction=kind), denoiser, {}, batch, draws
        ).simple
    np.testing.assert_allclose(losses["velocity"], losses["noise"] / (1 - draws.t) ** 2, rtol=1e-3)


def hybrid_inputs(seed=0):
    """Data with both edges of the 8-bit range, levels with both ends, and arbitrary network outputs."""
    rng = np.random.default_rng(seed)
    shape = (12, 4, 3, 2)
    image = np.clip(rng.normal(0, 0.8, shape), -1, 1)
    image = (np.round((image + 1) * 127.5) / 127.5 - 1).astype(np.float32)
    noise, value, variance = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    value = noise + 0.3 * value
    level = np.array([0, 0, 0, 1, 2, 5, 40, 200, 499, 800, 998, 999])
    return image, noise, value, variance, level


@pytest.mark.parity
def test_hybrid_loss_and_its_gradients_against_the_definition_with_betas():
    torch = pytest.importorskip("torch")
    image, noise, value, variance, level = hybrid_inputs()

    # The published definition (betas and cumulative products), written in torch, double precision.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    posterior = betas * (1 - previous) / (1 - alpha_bar)
    log_posterior = torch.log(torch.cat([posterior[1:2], posterior[1:]]))

    def at_level(table):
        return table[torch.from_numpy(level)].reshape(-1, 1, 1, 1)

    x_0, eps = torch.from_numpy(image).double(), torch.from_numpy(noise).double()
    out = torch.from_numpy(value).double().requires_grad_()
    var = torch.from_numpy(variance).double().requires_grad_()
    x_t = at_level(alpha_bar.sqrt()) * x_0 + at_level((1 - alpha_bar).sqrt()) * eps
    predicted = at_level((1 / alpha_bar).sqrt()) * x_t - at_level((1 / alpha_bar - 1).sqrt()) * out.detach()

    def mean(x):
        return at_level(betas * previous.sqrt() / (1 - alpha_bar)) * x + at_level(
            (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar)
        ) * x_t

    fraction = (var + 1) / 2
    log_model = fraction * at_level(torch.log(betas)) + (1 - fraction) * at_level(log_posterior)
    gap = mean(x_0) - mean(predicted)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(gap, (0.5 * at_level(log_posterior)).exp()),
        torch.distributions.Normal(torch.zeros_like(gap), (0.5 * log_model).exp()),
    )

    def cdf(x):
        return 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    scaled = [cdf((x_0 - mean(predicted) + side / 255) * (-0.5 * log_model).exp()) for side in (-1, 1)]
    probability = torch.where(x_0 < -0.999, scaled[1], torch.where(x_0 > 0.999, 1 - scaled[0], scaled[1] - scaled[0]))
    nats = torch.where(torch.from_numpy(level == 0).reshape(-1, 1, 1, 1), -probability.clamp(min=1e-12).log(), kl)
    variational = nats.flatten(1).mean(1) / np.log(2)
    total = (out - eps).square().flatten(1).mean(1) + variational
    total.sum().backward()

    objective = Objective(prediction="noise", learn_variance=True)
    no = jnp.zeros(len(level), bool)
    draws = Draws(jnp.asarray((level + 1) / 1000, jnp.float32), jnp.asarray(noise), no, no)
    batch = {"image": jnp.asarray(image), "label": jnp.zeros(len(level), jnp.int32)}

    def losses(params):
        return objective_lib.loss(objective, ddpm_denoiser(value, variance), params, batch, draws)

    params = (jnp.asarray(value), jnp.asarray(variance))
    got = losses(params)
    np.testing.assert_allclose(got.variational, variational.detach(), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(got.total, total.detach(), rtol=2e-4)
    gradients = jax.grad(lambda params: losses(params).total.sum())(params)
    np.testing.assert_allclose(gradients[0], out.grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients[1], var.grad, rtol=1e-3, atol=1e-6)


def test_variational_term_is_zero_for_the_true_posterior():
    image, noise, _, _, level = hybrid_inputs()
    level = level[3:]
    t = jnp.asarray((level + 1) / 1000, jnp.float32)
    image = jnp.asarray(image[3:])
    term = objective_lib.variational_term(DDPM(), image, image, -jnp.ones_like(image), t)
    np.testing.assert_allclose(term, 0.0, atol=1e-6)


def test_first_level_is_a_probability_over_the_256_values():
    values = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)[:, None]
    data = jnp.full_like(values, 0.02)
    bits = objective_lib.variational_term(
        DDPM(), values, data, jnp.full_like(values, 0.4), jnp.full((256,), 1 / 1000, jnp.float32)
    )
    assert float((2.0**-bits).sum()) == pytest.approx(1.0, abs=1e-4)


def test_variance_on_dropped_rows_is_optional():
    image, noise, value, variance, level = hybrid_inputs()
    drop = jnp.arange(len(level)) % 2 == 0
    draws = Draws(jnp.asarray((level + 1) / 1000, jnp.float32), jnp.asarray(noise), ~drop, drop)
    batch = {"image": jnp.asarray(image), "label": jnp.zeros(len(level), jnp.int32)}
    with_term, without = (
        objective_lib.loss(
            Objective(prediction="noise", learn_variance=True, variance_on_dropped=keep),
            ddpm_denoiser(value, variance),
            (value, variance),
            batch,
            draws,
        )
        for keep in (True, False)
    )
    assert bool((with_term.variational > 0).all())
    np.testing.assert_array_equal(without.variational, jnp.where(drop, 0.0, with_term.variational))
    np.testing.assert_array_equal(without.total, without.simple + without.variational)


def test_conditions_reach_the_denoiser():
    seen = {}

    def apply(params, x, t, labels, drop_label, drop_noise, time_embedding_offset):
        seen.update(drop_label=drop_label, drop_noise=drop_noise, labels=labels, t=t)
        return Prediction(x)

    objective = Objective(label_dropout=0.5, noise_dropout=0.5)
    denoiser = Denoiser(apply, None, Linear(), "velocity", 10, (2,))
    draws = draw(objective, rows=16, shape=(2,))
    objective_lib.loss(objective, denoiser, None, {"image": jnp.ones((16, 2)), "label": jnp.arange(16)}, draws)
    np.testing.assert_array_equal(seen["labels"], np.arange(16))
    for name in ("drop_label", "drop_noise", "t"):
        np.testing.assert_array_equal(seen[name], getattr(draws, name))


# Sums by noise level


def test_bucket_metrics_against_a_loop():
    objective = Objective(num_buckets=4, label_dropout=0.3, noise_dropout=0.3)
    draws = draw(objective, rows=200)
    simple = np.random.default_rng(0).uniform(size=200).astype(np.float32)
    halves = [
        objective_lib.bucket_metrics(
            objective,
            objective_lib.Losses(simple[part], simple[part], None),
            jax.tree.map(lambda x, part=part: np.asarray(x)[part], draws),
        )
        for part in (slice(0, 80), slice(80, 200))
    ]
    means = objective_lib.summarize_buckets(jax.tree.map(jnp.add, *halves))
    t, label, noise = (np.asarray(x) for x in (draws.t, draws.drop_label, draws.drop_noise))
    want = {
        "loss/simple": simple.mean(),
        "loss/label_kept": simple[~label].mean(),
        "loss/label_dropped": simple[label].mean(),
        "loss/noise_kept": simple[~noise].mean(),
        "loss/noise_dropped": simple[noise].mean(),
        "dropped/label": label.mean(),
        "dropped/noise": noise.mean(),
    }
    for i in range(4):
        inside = (t > i / 4) & (t <= (i + 1) / 4)
        want[f"loss_by_level/{i}"] = simple[inside & ~noise].mean()
        want[f"loss_by_level_noise_dropped/{i}"] = simple[inside & noise].mean()
    assert means == {name: pytest.approx(float(value), rel=1e-5) for name, value in want.items()}


@pytest.mark.parametrize("num_buckets", [1, 7, 10])
def test_every_discrete_level_falls_into_one_bucket(num_buckets):
    t = jnp.asarray(DDPM(num_levels=70).levels(70), jnp.float32)
    no = jnp.zeros(70, bool)
    losses = objective_lib.Losses(jnp.ones(70), jnp.ones(70), None)
    sums = objective_lib.bucket_metrics(Objective(num_buckets=num_buckets), losses, Draws(t, t, no, no))
    np.testing.assert_array_equal(sums["count"][0, 0], np.full(num_buckets, 70 // num_buckets))


def test_means_over_no_examples_are_left_out():
    draws = draw(NO_DROPOUT, rows=8)
    sums = objective_lib.bucket_metrics(NO_DROPOUT, objective_lib.Losses(draws.t, draws.t, draws.t), draws)
    means = objective_lib.summarize_buckets(sums)
    assert "loss/noise_dropped" not in means and means["dropped/noise"] == 0.0
    assert means["loss/variational"] == pytest.approx(means["loss/simple"])


# A user's mistakes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prediction": "data"}, "objective.prediction"),
        ({"time_sampling": "cosine"}, "objective.time_sampling"),
        ({"dropout": "both"}, "objective.dropout"),
        ({"label_dropout": 1.5}, "objective.label_dropout"),
        ({"dropout": "joint", "label_dropout": 0.1, "noise_dropout": 0.2}, "equal"),
        ({"logit_std": 0.0}, "logit_std"),
        ({"num_buckets": 0}, "num_buckets"),
    ],
)
def test_impossible_objectives_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Objective(**change)


def test_objective_and_denoiser_must_agree():
    plain = from_function(lambda x, t, y: x, Linear(), "velocity", num_classes=1, sample_shape=(2,))
    objective_lib.check_objective(NO_DROPOUT, plain)
    for objective, message in (
        (Objective(label_dropout=0.0), "noise_dropout"),
        (Objective(noise_dropout=0.0), "label_dropout"),
        (dataclasses.replace(NO_DROPOUT, prediction="noise"), "prediction"),
        (dataclasses.replace(NO_DROPOUT, learn_variance=True), "learn_variance"),
    ):
        with pytest.raises(UserError, match=message):
            objective_lib.check_objective(objective, plain)


def test_learned_variance_needs_a_variance_output():
    denoiser = ddpm_denoiser(jnp.ones((2, 1)), None)
    objective = Objective(prediction="noise", learn_variance=True)
    batch = {"image": jnp.ones((2, 1)), "label": jnp.zeros(2, jnp.int32)}
    with pytest.raises(UserError, match="variance output"):
        objective_lib.loss(objective, denoiser, (jnp.ones((2, 1)),), batch, draw(objective, DDPM(), rows=2))
