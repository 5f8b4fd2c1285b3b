"""Whatever the table: a fit with finite parameters and its findings, or one line that says what is wrong."""

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scalelab import laws
from scalelab.errors import BadInput

number = st.floats(-3, 3).map(lambda x: float(np.exp(x)))
special = st.sampled_from([1.0, 2.0, 1e-30, 1e30, 0.0, -1.0, float("nan"), float("inf")])
wide = st.floats(-60, 60).map(lambda x: float(np.exp(x)))
column = st.sampled_from([number, number | wide, number | special]).flatmap(
    lambda values: st.lists(values, min_size=12, max_size=12)
)


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(N=column, D=column, loss=column, rows=st.integers(1, 12), drop=st.booleans())
def test_any_table_gives_a_fit_or_one_line(N, D, loss, rows, drop):
    table = {"params": N[:rows], "tokens": D[:rows], "loss": loss[:rows]}
    try:
        fit = laws.fit("chinchilla", table, bootstrap=4, drop=drop)
    except BadInput as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
    if message:
        return
    assert np.isfinite(fit.record["value"])
    assert fit.ok or fit.conf_int().isna().all().all()
    assert fit.summary()
    fit.optimal(1e3)


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    N=st.lists(number, min_size=12, max_size=12),
    loss=st.lists(number, min_size=12, max_size=12),
    spread=st.floats(0, 0.05),
)
def test_any_sweep_gives_vertices_or_refusals(N, loss, spread):
    flops = np.repeat([1e3, 1e4, 1e5], 4) * np.exp(spread * np.linspace(-1, 1, 12))
    table = {"params": N, "tokens": flops / (6 * np.array(N)), "flops": flops, "loss": loss}
    fit = laws.isoflop(table, bootstrap=10)
    v = fit.vertices
    assert (v.used == v.params.notna()).all()
    assert (v.reason == "").tolist() == v.used.tolist()
    inside = v[v.used]
    assert ((inside.lowest_params < inside.params) & (inside.params < inside.highest_params)).all()
    assert fit.params.notna().all() == (v.used.sum() >= 2)
    assert fit.summary()
