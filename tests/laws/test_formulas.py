"""Every form's formula, called in the ways that searches for an optimum (a parameter vector per row) and the posterior
(JAX) call it."""

import types

import jax
import numpy as np
import pytest
from planted import case

from scalelab.laws.forms import ALL
from scalelab.laws.traced import UNTRACEABLE, Traced

# m4 iterates until its equation is solved; the curve laws sum over steps with derivatives of their own
UNTRACED = {"m4", "annealing", "multi-power"}
TRACED = [form for form in ALL if form.name not in UNTRACED]


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
