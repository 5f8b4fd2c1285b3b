"""The posterior: its density against the jets', its draws against a conjugate case, its place beside the bootstrap."""

import importlib.util
import sys

import jax
import numpy as np
import pandas as pd
import pytest
from planted import TRUTH, sweep

from scalelab import laws
from scalelab.errors import BadInput, FeatureMissing
from scalelab.laws.objective import SQUARES
from scalelab.laws.posterior import Density, Posterior, posterior
from scalelab.laws.traced import Traced

needs_numpyro = pytest.mark.skipif(
    importlib.util.find_spec("numpyro") is None, reason="NumPyro is not installed: pip install 'scalelab[bayes]'"
)
BUDGETS = np.geomspace(1e18, 1e20, 5)


@pytest.fixture(scope="module")
def fit():
    return laws.fit("chinchilla", sweep(BUDGETS, 5, 0.004, 1), bootstrap=300)


def line(bootstrap=0, n=40):
    """A law that is linear in its parameters, with normal noise: its posterior is known."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 3, n)
    table = {"params": x, "loss": 5 + 2 * x + 0.3 * rng.standard_normal(n)}
    law = laws.define(
        "line", lambda p, x: p.a + p.b * x.params, inputs=("params",), objective=SQUARES,
        a=laws.free(-1e3, 1e3, linear=True), b=laws.free(-1e3, 1e3, linear=True),
    )  # fmt: skip
    return laws.fit(law, table, bootstrap=bootstrap), table


def test_numpy_functions_reach_jax():
    x = np.linspace(0.5, 2, 5)

    def f(a, b):
        kinks = np.maximum(a * x, b) + np.clip(b * x, 0.4, 1.1) + np.where(x > 1, a, b * x)
        sums = np.sum(np.exp(-a[..., None] * np.outer(x, x)), axis=-1) + np.add.reduce(b[..., None] * x, axis=-1)
        return kinks + sums + np.log1p(np.square(a)) / np.sqrt(b) - x**a + 2.0**b + np.tanh(a - b) + np.abs(-a)

    a, b = np.array([[0.7], [1.3]]), np.array([[1.1], [0.6]])
    with jax.enable_x64(True):
        traced = jax.jit(lambda a, b: f(Traced(a), Traced(b)).value)(a, b)
    np.testing.assert_allclose(traced, f(a, b), rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"objective": "log-squares", "fixed": {"E": 1.7}, "tied": {"beta": "alpha"}}])
def test_the_density_is_the_formula_and_its_gradient_the_jets(options):
    fit = laws.fit("chinchilla", sweep(BUDGETS, 5, 0.004, 1), bootstrap=0, weights=np.linspace(0.5, 2, 25), **options)
    density = Density(fit, "normal" if options else "student")
    z = np.random.default_rng(0).standard_normal((3, len(density.location)))
    params = density.natural(z)
    log_sigma = (density.location + z @ density.scale.T)[:, -1]
    t = density.location + z @ density.scale.T
    model = np.log(fit.law.evaluate(params, fit.rows.columns))
    r = (model - np.log(fit.observed)) / np.exp(log_sigma)[:, None]
    each = -0.5 * r**2 if options else -2.5 * np.log1p(r**2 / 4)
    expected = (fit.rows.weights * (each - log_sigma[:, None])).sum(1) - 0.5 * (
        ((t - density.mean) / density.sd) ** 2
    ).sum(1)
    with jax.enable_x64(True):
        value, slope = map(np.asarray, jax.vmap(jax.value_and_grad(density.log_density))(z))
        value_of = jax.jit(jax.vmap(density.log_density))
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    step = 1e-6
    for i in range(z.shape[1]):
        e = step * np.eye(z.shape[1])[i]
        with jax.enable_x64(True):
            ends = [np.asarray(value_of(z + s * e)) for s in (1, -1)]
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), slope[:, i], rtol=1e-5, atol=1e-5)
    assert not jax.config.jax_enable_x64
    if options:
        np.testing.assert_allclose(params[:, 0], 1.7)
        np.testing.assert_allclose(params[:, 3], params[:, 4])


def test_outside_its_bounds_the_density_is_zero(fit):
    density = Density(fit, "student")
    far = np.zeros(6)
    far[3] = 1e6  # alpha beyond its bound
    with jax.enable_x64(True):
        assert density.log_density(far) == -np.inf


def test_without_numpyro_the_extra_is_named(fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpyro", None)
    monkeypatch.setitem(sys.modules, "numpyro.diagnostics", None)
    with pytest.raises(FeatureMissing, match=r"scalelab\[bayes\]"):
        posterior(fit)


def test_bad_input(fit):
    for changes, field in (
        ({"likelihood": "laplace"}, "likelihood"),
        ({"draws": 0}, "draws"),
        ({"chains": 0}, "chains"),
    ):
        with pytest.raises(BadInput) as error:
            posterior(fit, **changes)
        assert error.value.field == field
    edge = laws.fit("chinchilla", sweep(BUDGETS, 5, 0.004, 1), objective="lower-edge", bootstrap=0)
    with pytest.raises(BadInput, match="no likelihood"):
        posterior(edge)


@needs_numpyro
def test_a_formula_that_looks_at_values_has_no_posterior():
    def deciding(p, x):
        return p.a * x.params if np.all(p.a > 0) else p.a + x.params

    law = laws.define("deciding", deciding, inputs=("params",), a=laws.positive(0.1, 10))
    fit = laws.fit(law, {"params": np.arange(1.0, 9), "loss": np.arange(1.0, 9) * 1.01}, bootstrap=0)
    with pytest.raises(BadInput, match="looks at values"):
        posterior(fit)


@needs_numpyro
def test_a_line_with_normal_noise_has_the_known_posterior():
    fit, table = line()
    drawn = posterior(fit, 1500, warmup=300)
    X = np.column_stack([np.ones(40), table["params"]])
    estimate, squares = np.linalg.lstsq(X, table["loss"], rcond=None)[:2]
    # with flat priors and 1/sigma: Student's t with n - 2 degrees of freedom; ln sigma's prior is wide
    scale = np.sqrt(np.diag(np.linalg.inv(X.T @ X)) * squares[0] / 38 * 38 / 36)
    np.testing.assert_allclose(drawn.draws[["a", "b"]].mean(), estimate, atol=0.15 * scale.max())
    np.testing.assert_allclose(drawn.draws[["a", "b"]].std(), scale, rtol=0.1)
    assert drawn.draws["sigma"].mean() == pytest.approx(np.sqrt(squares[0] / 38), rel=0.05)
    assert drawn.divergences == 0
    assert not jax.config.jax_enable_x64
    again = posterior(fit, 1500, warmup=300)
    pd.testing.assert_frame_equal(again.draws, drawn.draws)


@needs_numpyro
def test_it_stands_beside_the_bootstrap(fit):
    drawn = fit.posterior(400, warmup=400, seed=1)
    assert isinstance(drawn, Posterior)
    table = drawn.table()
    assert list(table.index) == list(TRUTH)
    assert ((table["posterior_lower"] < pd.Series(TRUTH)) & (pd.Series(TRUTH) < table["posterior_upper"])).all()
    # section 7 of the fitting notes: 0.5 to 0.6 of the width of the row bootstrap on the Chinchilla runs
    assert table["width_ratio"].between(0.3, 1.1).all()
    assert drawn.diagnostics["r_hat"].max() < 1.05
    best = drawn.fit.optimal(1e21)
    plain = fit.optimal(1e21)
    assert plain["loss_lower"] < best["loss"] < plain["loss_upper"]
    assert best["loss_upper"] - best["loss_lower"] < plain["loss_upper"] - plain["loss_lower"]
    assert "width_ratio" in drawn.summary()
    assert "R-hat" in drawn.summary()


@needs_numpyro
def test_too_few_draws_and_dependent_rows_are_said(fit):
    table = sweep(BUDGETS, 5, 0.004, 1).assign(run=np.repeat(np.arange(5), 5))
    clustered = laws.fit("chinchilla", table, bootstrap=0)
    drawn = posterior(clustered, 20, warmup=20)
    assert {"posterior-not-mixed", "dependent-rows"} <= {n.code for n in drawn.warnings}


def test_import_stays_light():
    """Neither JAX nor NumPyro before a posterior is asked for."""
    import subprocess

    heavy = ("jax", "numpyro", "scipy", "matplotlib")
    code = f"import sys, scalelab.laws.posterior; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_priors_enter_the_density_as_densities_of_the_parameter(fit):
    plain, informed = Density(fit, "student"), Density(fit, "student", {"E": (1.7, 0.02), "alpha": (0.3, 0.1)})
    z = np.random.default_rng(0).standard_normal((4, len(plain.location)))
    with jax.enable_x64(True):
        t = informed.location + z @ informed.scale.T
        own = np.array([float(informed.log_density(row)) for row in z])
        without = np.array([float(plain.log_density(np.linalg.solve(plain.scale, row - plain.location))) for row in t])
    names, u = plain.names, t[:, :-1]
    for name, (mean, sd) in {"E": (1.7, 0.02), "alpha": (0.3, 0.1)}.items():
        i = names.index(name)
        sign = fit.law.parameters[name].sign
        p = np.exp(u[:, i]) if sign else u[:, i]
        without += -0.5 * ((p - mean) / sd) ** 2 + (u[:, i] if sign else 0)
        without += 0.5 * ((u[:, i] - plain.mean[i]) / plain.sd[i]) ** 2  # the wide prior is gone
    np.testing.assert_allclose(own, without, rtol=1e-9)


@pytest.mark.parametrize("priors", [{"F": (1, 1)}, {"E": (1.7, 0)}, {"E": 1.7}, {"E": (1.7, float("inf"))}])
def test_priors_that_are_none(fit, priors):
    with pytest.raises(BadInput, match="priors"):
        posterior(fit, 10, priors=priors)


@needs_numpyro
def test_a_prior_and_normal_data_meet_at_their_weighted_mean():
    """Linear law, normal noise: with a prior on one parameter the posterior is known, but for the noise's width."""
    fit, table = line()
    X = np.column_stack([np.ones(40), table["params"]])
    sigma2 = float((fit.resid**2).sum() / 38)
    precision = X.T @ X / sigma2 + np.diag([0, 0.05**-2])
    mean = np.linalg.solve(precision, X.T @ table["loss"] / sigma2 + [0, 2.3 / 0.05**2])
    found = posterior(fit, 2000, priors={"b": (2.3, 0.05)}, seed=3)
    sd = np.sqrt(np.diag(np.linalg.inv(precision)))
    for name, m, s in zip("ab", mean, sd, strict=True):
        assert found.draws[name].mean() == pytest.approx(m, abs=0.25 * s)
        assert found.draws[name].std() == pytest.approx(s, rel=0.15)
    assert "prior of b: normal, 2.3 +- 0.05" in found.summary()
