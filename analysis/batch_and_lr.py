# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Batch size and learning rate
#
# The best learning rate and batch move with model size and data, and their optima are broad: many settings are about
# as good as the best, and which of them *is* the best is noise. So rules are judged here by the loss that they give
# away. The data are Step Law's grids (Li et al. 2025): 11 cells of (N, D), each with about a hundred pairs of
# learning rate and batch, AdamW.

# %%
import os
import pathlib

import numpy as np
import pandas as pd
from IPython.display import Markdown

from scalelab import laws, plots

pd.options.display.float_format = "{:.4g}".format
DATA = pathlib.Path(os.environ.get("SCALELAB_DATA", "../../shared/data"))
DRAWS = 200 if os.environ.get("SCALELAB_QUICK") else 1000

grid = laws.read_table(DATA / "steplaw" / "dense_runs.csv")
grid["batch_tokens"] = 2048 * grid["batch_seqs"]  # sequences of 2,048 tokens
columns = {"params_non_embedding": "N", "tokens": "D", "loss": "smooth_loss"}
cells = grid.groupby(["N", "D"])
cells.agg(
    runs=("lr", "size"), rates=("lr", "nunique"), batches=("batch_tokens", "nunique"), best=("smooth_loss", "min")
)

# %% [markdown]
# ## How broad is an optimum?
#
# Two cells. Colour is the loss above the cell's best; ringed runs are within 0.25 % of it, the share that Step Law's
# authors keep. Stars are the minima of local quadratics (`laws.lr_optimum`, below) with 95 % intervals.

# %%
optima = laws.lr_optimum(grid, columns=columns, bootstrap=DRAWS, seed=0)
figure = plots.new_figure((7.4, 3.4))
axes = figure.subplots(1, 2, sharey=True)
for ax, at in zip(axes, (2, 10), strict=True):
    cell = optima.cells.iloc[at]
    runs = cells.get_group((cell["params_non_embedding"], cell["tokens"]))
    above = 100 * (runs["smooth_loss"] / runs["smooth_loss"].min() - 1)
    plots.new_axes(ax)
    edge = np.where(above <= 0.25, "black", "none")
    points = ax.scatter(
        runs["lr"], runs["batch_tokens"], c=above, vmin=0, vmax=3, cmap="viridis_r", edgecolors=edge, s=45
    )
    ends = {
        f"{way}err": [[cell[role] - cell[f"{role}_lower"]], [cell[f"{role}_upper"] - cell[role]]]
        for way, role in {"x": "lr", "y": "batch_tokens"}.items()
    }
    ax.errorbar(
        cell["lr"],
        cell["batch_tokens"],
        **ends,
        fmt="*",
        color=plots.COLOURS[1],
        ecolor="black",
        markersize=9,
        zorder=5,
        capsize=2,
    )
    title = f"N = {plots.human(cell['params_non_embedding'])}, D = {plots.human(cell['tokens'])}"
    ax.set(xscale="log", yscale="log", xlabel="peak learning rate")
    ax.set_title(title, fontsize="medium")
    plots.human_log(ax, "y")
axes[0].set_ylabel("batch (tokens)")
bar = figure.colorbar(points, ax=axes, extend="max", pad=0.01)
bar.set_label("loss above the best (%)")

# %% [markdown]
# ## Three rules
#
# The **published** Step Law; the same **procedure** on these cells (keep the runs within 0.25 %, pool, least squares
# in logs); and power laws through the **quadratic** optima. A quadratic counts only where its Hessian is positive
# definite and its vertex lies among the runs, and the law through the optima is always tested for a bend in N.

# %%
procedure = laws.step_law(grid, columns=columns, cluster="cell", bootstrap=DRAWS, seed=0)
procedure

# %%
optima


# %%
def published(N, D):
    return laws.step_law_lr(N, D), laws.step_law_batch(D)


rules = {"published": published, "procedure": procedure.rule, "quadratic": optima.rule}
excess = {name: laws.excess_loss(rule, grid, columns) for name, rule in rules.items()}
excess["procedure, cell held out"] = procedure.holdout()
given_away = pd.DataFrame({name: 100 * table["excess"] for name, table in excess.items()})
ax = plots.new_axes(size=(4.6, 3.4))
for i, (name, values) in enumerate(given_away.items()):
    ax.plot(
        values,
        np.arange(len(values)) + 0.15 * (i - 1.5),
        plots.MARKERS[i],
        color=plots.COLOURS[i],
        markersize=5,
        label=name,
    )
labels = [f"{plots.human(c.params_non_embedding)}, {plots.human(c.tokens)}" for c in procedure.cells.itertuples()]
ax.set(
    xlabel="loss above the cell's best (%)",
    yticks=range(len(labels)),
    yticklabels=labels,
    ylabel="N, D",
    xlim=(-0.01, None),
)
legend = ax.legend(fontsize="small", frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0))

# %%
a, b = procedure.lr.conf_int().loc["a"], procedure.batch.conf_int().loc["b"]
Markdown(
    "Mean loss given away: "
    + ", ".join(f"{name} {mean:.2f} %" for name, mean in given_away.mean().items())
    + f". The exponents are another matter: with cells resampled whole, that of N is anywhere in {a['lower']:.2f} to "
    f"{a['upper']:.2f}, "
    f"that of the batch in {b['lower']:.2f} to {b['upper']:.2f}. **Rules that disagree in their exponents give away "
    "the same loss.**"
)

# %% [markdown]
# **A rule for a new run**, with the interval that eleven cells warrant:

# %%
new = pd.DataFrame({"params_non_embedding": [1e9, 7e9], "tokens": [1e11, 1.4e12]})
procedure.predict(new).T.set_axis(["1B, 100B tokens", "7B, 1.4T tokens"], axis=1)

# %% [markdown]
# ## If the batch must change
#
# SGD's best rate grows linearly with the batch, Adam's with its square root (Malladi et al. 2022, Granziol et al.
# 2022), up to the critical batch. Within a cell, how does the best rate of each batch move?

# %%
best = grid.loc[grid.groupby(["N", "D", "batch_tokens"])["smooth_loss"].idxmin()]
best = best[best["smooth_loss"] <= 1.01 * best.groupby(["N", "D"])["smooth_loss"].transform("min")]
slopes = best.groupby(["N", "D"])[["batch_tokens", "lr"]].apply(
    lambda cell: np.polyfit(np.log(cell["batch_tokens"]), np.log(cell["lr"]), 1)[0]
)
rng = np.random.default_rng(0)
drawn = rng.choice(slopes, size=(DRAWS, len(slopes))).mean(1)
low, high = np.quantile(drawn, [0.025, 0.975])
moved = laws.scaled_lr(1e-3, 0.5e6, 2e6, rule="sqrt", critical=1e6)
Markdown(
    f"ln lr* grows by {slopes.mean():.2f} [{low:.2f}, {high:.2f}] per unit of ln B: nearer to Adam's 1/2 than to "
    "SGD's 1. "
    "`laws.scaled_lr` applies such a rule no further than the critical batch: 0.001 at 0.5M tokens becomes "
    f"{moved:.5f} at 2M, if "
    f"the critical batch is 1M."
)

# %% [markdown]
# ## The critical batch
#
# To a given loss, steps and examples trade along $(S/S_{min} - 1)(E/E_{min} - 1) = 1$ (McCandlish et al. 2018). At
# $B_{crit} = E_{min}/S_{min}$ both cost twice their least. Planted here, with 6 % noise, and recovered from eight
# batches:

# %%
truth = {"S_min": 4000.0, "B_crit": 1e6}
batches = pd.DataFrame({"batch_tokens": np.geomspace(6e4, 8e6, 8)})
steps = laws.simulate("critical-batch", batches, noise=0.06, params=truth, seed=0)
critical = laws.fit("critical-batch", steps, bootstrap=DRAWS, seed=0)
B = pd.DataFrame({"batch_tokens": np.geomspace(4e4, 1.2e7, 60)})
curve = critical.get_prediction(B).summary_frame()
ax = plots.new_axes(size=(4.4, 3.2))
for i, (label, per_step) in enumerate({"steps": 1.0, "examples (tokens)": B["batch_tokens"]}.items()):
    least = critical.params["S_min"] * (critical.params["B_crit"] if i else 1)
    middle, lower, upper = (curve[c] * per_step / least for c in ("mean", "mean_ci_lower", "mean_ci_upper"))
    ax.plot(B["batch_tokens"], middle, color=plots.COLOURS[i], label=label)
    ax.fill_between(B["batch_tokens"], lower, upper, color=plots.COLOURS[i], alpha=0.25, linewidth=0)
    seen = steps["steps"] * (steps["batch_tokens"] if i else 1) / least
    ax.plot(steps["batch_tokens"], seen, plots.MARKERS[i], color=plots.COLOURS[i])
ax.axvspan(*critical.conf_int().loc["B_crit"], color="#999999", alpha=0.3, linewidth=0)
ax.set(xscale="log", yscale="log", xlabel="batch B (tokens)", ylabel="times the least possible", ylim=(0.9, 20))
plots.human_log(ax, "x")
plots.plain_log(ax, "y")
legend = ax.legend(fontsize="small", frameon=False, loc="upper center")

# %%
B_crit, examples = critical.conf_int().loc["B_crit"], laws.least_examples(critical)
Markdown(
    f"B_crit = {critical.params['B_crit']:.3g} [{B_crit['lower']:.3g}, {B_crit['upper']:.3g}] for a truth of "
    f"{truth['B_crit']:.3g}; no fewer than "
    f"{examples['estimate']:.3g} tokens reach that loss. It grows as the loss falls: Kaplan et al. give "
    f"{laws.critical_batch(3.0):.2g} tokens at 3 nats "
    f"and {laws.critical_batch(2.5):.2g} at 2.5."
)

# %% [markdown]
# ## One number for batch, rate, decay and tokens
#
# AdamW averages its updates over the last $\tau D$ tokens, $\tau = B / (\eta \lambda D)$. Bergsma et al. (2025) find
# the best $\tau$ to follow $(D/N)^m$ with m about -0.527. Step Law's grids know nothing of this, and had one weight
# decay for all runs (0.1 is assumed here; it moves only the constant). Do their best runs follow it?

# %%
DECAY, M = 0.1, -0.527
good = procedure.selected
good = good.assign(
    tokens_per_param=good["tokens"] / good["params_non_embedding"],
    timescale=laws.adamw_timescale(good["batch_tokens"], good["lr"], DECAY, good["tokens"]),
)
timescale = laws.fit("adamw-timescale", good, cluster="cell", bootstrap=DRAWS, seed=0)
x = pd.DataFrame({"tokens_per_param": np.geomspace(good["tokens_per_param"].min(), good["tokens_per_param"].max(), 40)})
curve = timescale.get_prediction(x).summary_frame()
ax = plots.new_axes(size=(4.4, 3.2))
ax.plot(good["tokens_per_param"], good["timescale"], "o", color=plots.COLOURS[0], alpha=0.5, label="runs within 0.25 %")
ax.plot(x, curve["mean"], color=plots.COLOURS[1], label="fit, 95 % interval")
ax.fill_between(
    x["tokens_per_param"],
    curve["mean_ci_lower"],
    curve["mean_ci_upper"],
    color=plots.COLOURS[1],
    alpha=0.25,
    linewidth=0,
)
centre = np.exp(np.log(good[["tokens_per_param", "timescale"]]).mean())
theirs = centre["timescale"] * (x["tokens_per_param"] / centre["tokens_per_param"]) ** M
ax.plot(x, theirs, "--", color="black", linewidth=1, label="slope of Bergsma et al.")
ax.set(xscale="log", yscale="log", xlabel="tokens per parameter D/N", ylabel="τ = B / (η λ D)")
plots.plain_log(ax, "x")
plots.plain_log(ax, "y")
legend = ax.legend(fontsize="small", frameon=False)

# %%
m = timescale.conf_int().loc["m"]
N, D, lr, batch = 1e9, 1e11, *procedure.rule(1e9, 1e11)
tau = timescale.predict(pd.DataFrame({"tokens_per_param": [D / N]})).iloc[0]
Markdown(
    f"m = {timescale.params['m']:.3f} [{m['lower']:.3f}, {m['upper']:.3f}]: -0.527 lies "
    f"**{'inside' if m['lower'] <= M <= m['upper'] else 'outside'}**, and "
    f"these grids were swept with no thought of it. For 1B parameters on 100B tokens, with "
    f"the rate {lr:.2g} and the batch {batch:.2g} of the rule above, it gives a weight decay of "
    f"{laws.best_weight_decay(batch, lr, D, tau):.2f}."
)
