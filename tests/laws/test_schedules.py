"""Laws of whole loss curves: the blocks against step-by-step sums, planted truth, the published curves."""

import os
import pathlib

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws import residuals
from scalelab.laws.curves import DROP, NODES, curve_features
from scalelab.laws.forms import Annealing, MultiPower

ROOT = pathlib.Path(__file__).parents[2]
FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
PUBLISHED = {  # R2, MAE, RMSE, mean and worst relative error: means over the six test schedules
    "25m": (0.9988, 0.00376, 0.00465, 0.00110, 0.00409),
    "100m": (0.9983, 0.00435, 0.00592, 0.00142, 0.00583),
}
TISSUE = {"25m": (3.158, 0.514, 0.513, 0.402), "100m": (2.789, 0.593, 0.455, 0.481)}  # laws.md section 11


def schedule(name, steps=3000, warmup=150, peak=1e-3):
    """The rate of every step."""
    s = np.arange(steps + 1.0)
    share = np.clip((s - warmup) / (steps - warmup), 0, 1)
    main = {
        "constant": np.full(steps + 1, peak),
        "cosine": peak * (0.1 + 0.45 * (1 + np.cos(np.pi * share))),
        "linear-to-0": peak * (1 - share),
        "wsd": peak * 0.1 ** np.clip((s - 0.8 * steps) / (0.2 * steps), 0, 1),
        "two-stage": np.where(s < 0.5 * steps, peak, 0.3 * peak),
        "cycles": peak * (0.55 + 0.45 * np.cos(12 * np.pi * share)),
        "noisy": peak * (1 + 0.1 * np.sin(s * 1.7)),
    }[name]
    return np.where(s < warmup, peak * s / warmup, main)


def rows(name, every=50, **options):
    lr = schedule(name, **options)
    step = np.arange(len(lr))
    logged = (step % every == 0) & (step > options.get("warmup", 150))
    return pd.DataFrame({"schedule": name, "step": step, "lr": lr, "loss": np.where(logged, 1.0, np.nan)})


def by_steps(law, p, lr, at):
    """The laws as their papers write them."""
    total = np.cumsum(lr)
    drop = np.concatenate([[0.0], lr[:-1] - lr[1:]])
    out = []
    if law == "annealing":
        drop[: np.argmax(drop[1:] >= 0) + 1] = 0.0
        m, area = 0.0, []
        for d in drop:
            m = p["lam"] * m + d
            area.append(m)
        return p["L0"] + p["A"] * total[at] ** -p["alpha"] - p["C"] * np.cumsum(area)[at]
    for t in at:
        k = np.flatnonzero(drop[: t + 1])
        since = total[t] - total[k - 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            gone = np.where(since > 0, 1 - (1 + p["C"] * lr[k] ** -p["gamma"] * since) ** -p["beta"], 0.0)
        out.append(p["L0"] + p["A"] * total[t] ** -p["alpha"] - p["B"] * (drop[k] * gone).sum())
    return np.array(out)


TRUTH = {
    "annealing": {"L0": 2.6, "A": 0.5, "alpha": 0.45, "C": 0.35, "lam": 0.999},
    "multi-power": {"L0": 2.6, "A": 0.5, "alpha": 0.45, "B": 300.0, "C": 2.0, "beta": 0.55, "gamma": 0.6},
}


def planted(law, names=("constant", "cosine", "two-stage"), noise=0.0, seed=0):
    table = pd.concat([rows(name) for name in names], ignore_index=True)
    exact = laws.LAWS[law]().predict(TRUTH[law], curve_features(table, target="loss"))
    rng = np.random.default_rng(seed)
    table.loc[exact.index, "loss"] = exact * np.exp(noise * rng.standard_normal(len(exact)))
    return table


@pytest.mark.parametrize("law", TRUTH)
@pytest.mark.parametrize("name", ["constant", "cosine", "linear-to-0", "wsd", "two-stage", "cycles", "noisy"])
def test_blocks_equal_the_sum_over_steps(law, name):
    table = rows(name)
    features = curve_features(table, target="loss")
    lr, at = table.lr.to_numpy(), features.step.to_numpy()
    want = by_steps(law, TRUTH[law], lr, at)
    got = laws.LAWS[law]().predict(TRUTH[law], features)
    np.testing.assert_allclose(got, want, rtol=0, atol={"cycles": 6e-4, "noisy": 2e-3}.get(name, 3e-5))
    np.testing.assert_allclose(features.lr_sum, np.cumsum(lr)[at], rtol=1e-12)
    # the changes add up to the whole change, whatever the blocks
    np.testing.assert_allclose(features[list(DROP)].sum(axis=1), -lr[at], atol=1e-15)


def test_a_long_curve_stays_within_its_nodes():
    lr = schedule("cosine", steps=1_000_000, warmup=2000)
    table = pd.DataFrame({"schedule": "a", "step": [0, *range(1000, 1_000_001, 1000)]})
    table["lr"] = lr[table.step]
    features = curve_features(table)
    changes = (features[list(DROP)] != 0).sum(axis=1)
    assert 20 < changes.max() <= NODES
    p = TRUTH["multi-power"]
    got = MultiPower().predict(p, features.iloc[[-1]])
    want = by_steps("multi-power", p, np.interp(np.arange(1_000_001), table.step, table.lr), [1_000_000])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_rates_between_rows_are_linear():
    full = rows("wsd")
    cosine = rows("cosine")
    knots = full[full.step.isin([0, 150, 2400]) | full.loss.notna()].drop(index=0)  # from 0 it rises by itself
    p = TRUTH["multi-power"]
    law = MultiPower()
    dense, sparse = (law.predict(p, curve_features(t, target="loss")) for t in (full, knots))
    np.testing.assert_allclose(sparse, dense, atol=5e-4)  # a geometric decay between rows 50 steps apart
    few = cosine[(cosine.step == 150) | cosine.loss.notna()]
    dense, sparse = (law.predict(p, curve_features(t, target="loss")) for t in (cosine, few))
    np.testing.assert_allclose(sparse, dense, atol=5e-5)


@pytest.mark.parametrize("law", TRUTH)
def test_planted_truth(law, tmp_path):
    table = planted(law)
    fit = laws.fit(law, table, bootstrap=0)
    np.testing.assert_allclose(fit.params, pd.Series(TRUTH[law])[fit.params.index], rtol=1e-4)
    assert np.abs(fit.resid).max() < 1e-8
    assert fit.nobs == int(table.loss.notna().sum())
    new = rows("linear-to-0").drop(columns="loss").iloc[200::100]
    assert fit.predict(new).index.equals(new.index)
    assert fit.holdout().error < 1e-6
    full = rows("linear-to-0").drop(columns="loss").iloc[1:]  # every step, the rate at step 0 being 0
    want = by_steps(law, TRUTH[law], schedule("linear-to-0"), np.arange(200, 3001, 100))
    np.testing.assert_allclose(fit.predict(full).loc[200::100], want, atol=1e-5)
    again = laws.load(fit.save(tmp_path / "fit.json"))
    np.testing.assert_array_equal(again.predict(new), fit.predict(new))


def test_the_momentum_is_fitted_where_asked():
    truth = TRUTH["annealing"] | {"lam": 0.997}
    table = planted("annealing")
    features = curve_features(table, target="loss")
    table.loc[features.index, "loss"] = Annealing().predict(truth, features)
    held, free = (laws.fit("annealing", table, bootstrap=0, fixed=f) for f in (None, {}))
    assert held.params.lam == 0.999
    np.testing.assert_allclose(free.params, pd.Series(truth)[free.params.index], rtol=1e-5)
    assert free.record["value"] < 1e-6 * held.record["value"]


def test_intervals_hold_the_truth_and_curves_are_clusters():
    names = ("constant", "cosine", "two-stage", "wsd", "linear-to-0")
    table = planted("annealing", names, noise=0.002)
    assert laws.fit("annealing", table, bootstrap=20).record["cluster"] == "run"
    fit = laws.fit("annealing", table, bootstrap=200, cluster=None)  # this noise is each row's own
    interval, truth = fit.conf_int(0.999), pd.Series(TRUTH["annealing"])
    inside = (interval.lower <= truth) & (truth <= interval.upper)
    assert inside[["L0", "A", "alpha", "C"]].all(), interval
    new = rows("cycles").drop(columns="loss").iloc[200::200]
    frame = fit.get_prediction(new).summary_frame(0.99)
    assert (frame.mean_ci_lower < frame.mean_ci_upper).all()


def test_curves_that_share_a_trunk_are_no_copies():
    table = planted("annealing", ("constant", "two-stage"))
    fit = laws.fit("annealing", table, bootstrap=0)
    assert fit.nobs == int(table.loss.notna().sum())
    assert not any(n.code == "duplicate-rows" for n in fit.notices)


def test_limits_of_the_formulas():
    table = rows("constant")
    features = curve_features(table, target="loss")
    for law in (Annealing(), MultiPower()):
        p = TRUTH[law.name]
        S1 = features.lr_sum.to_numpy()
        at_constant = p["L0"] + p["A"] * S1 ** -p["alpha"]
        if law.name == "multi-power":  # the warm-up's rise counts: the whole of it, long after
            slow = law.predict(p | {"C": 1e-12}, features)
            np.testing.assert_allclose(slow, at_constant, rtol=1e-6)  # C -> 0: no change ever takes effect
            fast = law.predict(p | {"C": 1e30}, features)
            np.testing.assert_allclose(fast, at_constant + p["B"] * 1e-3, rtol=1e-6)  # C -> inf: all at once
        else:
            np.testing.assert_allclose(law.predict(p, features), at_constant, rtol=1e-12)


def test_bad_curves():
    good = rows("cosine")
    with pytest.raises(BadInput, match=r"needs a? ?lr|needs lr"):
        curve_features(good.drop(columns="lr"))
    with pytest.raises(BadInput, match="two rows at step 100"):
        curve_features(pd.concat([good, good[good.step == 100]]))
    with pytest.raises(BadInput, match=r"column lr.*-1"):
        curve_features(good.assign(lr=-1.0))
    with pytest.raises(BadInput, match="counts of steps"):
        curve_features(good.assign(step=good.step + 0.5))
    with pytest.raises(BadInput, match="names no curve"):
        curve_features(good.assign(schedule=None))
    with pytest.raises(BadInput, match="1048576"):
        curve_features(good.assign(step=good.step * 1000))
    many = pd.DataFrame({"schedule": np.repeat([1, 2, 3], 100_000), "step": np.tile(np.arange(100_000), 3), "lr": 1e-3})
    with pytest.raises(BadInput, match="leave rows out"):
        curve_features(many)
    with pytest.raises(BadInput, match="nonpositive"):
        laws.fit("annealing", planted("annealing").assign(loss=-1.0))


def test_columns_may_have_other_names():
    table = planted("annealing")
    plain = laws.fit("annealing", table, bootstrap=0)
    names = {"schedule": "curve", "step": "s", "lr": "eta", "loss": "L"}
    other = table.rename(columns=names)
    fit = laws.fit("annealing", other, columns=names, bootstrap=0)
    np.testing.assert_array_equal(fit.estimate, plain.estimate)
    few = other.s % 10 == 0
    predicted = fit.predict(other[few])
    np.testing.assert_array_equal(predicted, plain.predict(table[few]))
    assert list(other.index[few].difference(predicted.index)) == [0, 3001, 6002]  # step 0 of each curve


# ------------------------------------------------------------------------------------------------ published curves


@pytest.fixture(scope="module")
def published():
    folder = pathlib.Path(os.environ.get("SCALELAB_DATA", ROOT.parent / "shared" / "data")) / "multipower_lr"
    if not folder.is_dir():
        pytest.skip(f"NOT CHECKED against published curves: {folder} is missing; set SCALELAB_DATA")
    return {size: _features(pd.read_csv(folder / f"curves_{size}.csv")) for size in PUBLISHED}


def _features(table):
    """The curves with every step's rate, as their README describes the schedules."""
    parts = []
    for name, logged in table.groupby("schedule"):
        kind, *numbers = name.split("_")
        numbers = [int(n) for n in numbers]
        T = 16000 if kind == "wsdcon" else numbers[-1]
        s, peak, last = np.arange(T), 3e-4, 3e-5
        share = np.clip((s - 20000) / 4000, 0, 1)
        lr = {
            "constant": np.full(T, peak),
            "cosine": last + (peak - last) * 0.5 * (1 + np.cos(np.pi * (s - 2160) / (T - 2160))),
            "wsd": peak * (last / peak) ** share,
            "wsdld": peak + (last - peak) * share,
            "wsdcon": np.where(s < 8000, peak, numbers[0] * 1e-5),
        }[kind]
        lr[:2160] = np.linspace(0, peak, 2160)
        loss = np.full(T, np.nan)
        logged = logged[logged.step < T]  # drops the point at step 24,000 of 24,000
        np.testing.assert_allclose(lr[logged.step], logged.lr, rtol=1e-9)
        loss[logged.step] = logged.loss
        parts.append(pd.DataFrame({"schedule": name, "step": s, "lr": lr, "loss": loss}))
    return curve_features(pd.concat(parts, ignore_index=True), target="loss")


def metrics(features, predicted):
    out = []
    for name, curve in features.groupby("schedule"):
        if name in FITTED:
            continue
        y = curve.loss
        r = y - predicted[curve.index]
        out.append((1 - (r**2).sum() / ((y - y.mean()) ** 2).sum(), r.abs().mean(), np.sqrt((r**2).mean()),
                    (r.abs() / y).mean(), (r.abs() / y).max()))  # fmt: skip
    return np.mean(out, axis=0)


def huber(features, predicted, delta=1e-3):
    r = np.log(predicted / features.loss).abs()
    return float(np.where(r < delta, 0.5 * r * r, delta * (r - 0.5 * delta)).sum())


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_constants_and_refits(published, size):
    features = published[size]
    law = MultiPower()
    at_published = law.predict(f"Luo 2025, {size.upper()}", features)
    got = metrics(features, at_published)
    np.testing.assert_allclose(got, PUBLISHED[size], atol=1e-4)
    np.testing.assert_allclose(got[1:4], PUBLISHED[size][1:4], atol=5.001e-6)
    fitted = features[features.schedule.isin(FITTED)]
    theirs = huber(fitted, at_published[fitted.index])
    # All seven constants: less than half of the published objective on three curves; but these do not determine how
    # annealing saturates, and the optimum extrapolates to the three times longer cosine less well than theirs.
    fit = law.fit(fitted, bootstrap=0)
    assert fit.converged
    assert fit.record["value"] < 0.5 * theirs
    assert huber(fitted, fit.fittedvalues) == pytest.approx(fit.record["value"], rel=1e-9)
    assert metrics(features, law.predict(fit.params.to_dict(), features))[0] > 0.997
    # Its two exponents held at the source's values, the rest refitted: lower objective, and R2 above 0.998.
    constants = law.published[f"Luo 2025, {size.upper()}"]
    held = law.fit(fitted, bootstrap=0, fixed={k: constants[k] for k in ("beta", "gamma")})
    assert fit.record["value"] < held.record["value"] < 0.7 * theirs
    assert metrics(features, law.predict(held.params.to_dict(), features))[0] > 0.998


@pytest.mark.parametrize("size", PUBLISHED)
def test_annealing_law_on_the_published_curves(published, size):
    features = published[size]
    fit = laws.fit("annealing", features[features.schedule.isin(FITTED)], bootstrap=0)
    np.testing.assert_allclose(fit.params[["L0", "A", "alpha", "C"]], TISSUE[size], atol=1e-3)
    r2 = metrics(features, Annealing().predict(fit.params.to_dict(), features))[0]
    assert round(r2, 4) == {"25m": 0.9979, "100m": 0.9978}[size]
    freed = laws.fit("annealing", features[features.schedule.isin(FITTED)], bootstrap=0, fixed={})
    assert freed.record["value"] < fit.record["value"]
    assert 0.99 < freed.params.lam < 0.9995


def test_findings_speak_of_what_a_reader_knows():
    """Several schedules are what such a law is for; its computed features are no order to look for trends in."""
    table = pd.concat([rows(name) for name in ("cosine", "wsd", "two-stage")], ignore_index=True)
    law = Annealing()
    truth = {"L0": 2.5, "A": 0.4, "alpha": 0.5, "C": 0.5, "lam": 0.999}
    value = law.predict(truth, table.assign(loss=np.nan)).reindex(table.index)
    fit = law.fit(table.assign(loss=table.loss * value), bootstrap=0)
    assert "mixed-schedules" not in {n.code for n in fit.warnings}
    assert list(residuals.orders(fit)) == ["lr_sum"]
