"""Every form's formula, called in the ways that searches for an optimum (a parameter vector per row) and the posterior
(JAX) call it."""

import types

import jax
import numpy as np
import pytest

from scalelab.laws.forms import ALL
from scalelab.laws.traced import UNTRACEABLE, Traced

ROWS = 6
# where the middle of the search makes no sense together
GIVEN = {"m4": {"E": 0.1, "L0": 0.9, "alpha": 1.5, "B": 50.0, "c": 0.3}}
# m4 iterates until its equation is solved; the curve laws sum over steps with derivatives of their own
UNTRACED = {"m4", "annealing", "multi-power"}
TRACED = [form for form in ALL if form.name not in UNTRACED]


def case(form):
    """Published constants where there are any, else the middle of the search, and inputs of a sensible size."""
    rng = np.random.default_rng(0)
    specs = list(form.parameters.values())
    known = GIVEN.get(form.name) or (next(iter(form.published.values()), {}) if form.published else {})
    middle = [float(known.get(n, s.to_p(np.mean(s.search)))) for n, s in form.parameters.items()]
    params = np.array(middle) * (1 + 0.01 * rng.standard_normal((ROWS, len(specs))))
    columns = {}
    for role in (*form.inputs, *form.measured):
        low, high = form.ranges.get(role, (np.nan, np.nan))
        if role == form.group:
            columns[role] = np.zeros(ROWS)
        elif np.isfinite([low, high]).all():
            columns[role] = rng.uniform(low + 0.05 * (high - low), high - 0.05 * (high - low), ROWS)
        elif role in ("params", "params_active", "params_non_embedding", "tokens", "unique_tokens", "flops"):
            columns[role] = np.exp(rng.uniform(np.log(1e8), np.log(1e10), ROWS))
        else:
            columns[role] = rng.uniform(1.5, 6, ROWS)
    for role in columns:
        if role.startswith("unique_tokens") and "tokens" in columns:
            columns[role] = columns["tokens"] / rng.uniform(1.5, 6, ROWS)
    shares = [role for role in columns if role.startswith("r_")]
    total = np.sum([columns[role] for role in shares], axis=0)
    columns |= {role: columns[role] / total for role in shares}
    return params, columns


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.name)
def test_a_parameter_vector_per_row(form):
    law = form()
    params, columns = case(law)
    one_by_one = np.diag(law.evaluate(params, columns))
    assert np.isfinite(one_by_one).any()
    np.testing.assert_allclose(law.evaluate_each(params, columns), one_by_one, rtol=1e-12)


def under_jax(law, columns):
    x = types.SimpleNamespace(**law.columns_of(columns))

    def value(vector):
        p = {name: Traced(vector[i].reshape(1, 1)) for i, name in enumerate(law.parameters)}
        return law.formula(types.SimpleNamespace(**p), x).value

    return value


@pytest.mark.parametrize("form", [form for form in ALL if form.name in UNTRACED], ids=lambda form: form.name)
def test_a_formula_that_looks_at_values_is_refused(form):
    law = form()
    params, columns = case(law)
    with jax.enable_x64(True), pytest.raises(UNTRACEABLE):
        jax.eval_shape(under_jax(law, columns), params[0])


@pytest.mark.parametrize("form", TRACED, ids=lambda form: form.name)
def test_jax_computes_it(form):
    law = form()
    params, columns = case(law)
    with jax.enable_x64(True):
        values = np.asarray(jax.jit(under_jax(law, columns))(params[0]))
    expected = law.evaluate(params[[0]], columns)
    np.testing.assert_allclose(np.broadcast_to(values, expected.shape), expected, rtol=1e-10)
