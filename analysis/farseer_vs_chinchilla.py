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
# # Which form extrapolates? Farseer against Chinchilla
#
# Chinchilla's law has five constants and one exponent of data for all sizes. Farseer (Li et al. 2025) lets floor,
# coefficient and data exponent each change with N: nine constants. More constants always fit better; the question is
# whether they *predict* better. The runs are Farseer's own: 25 sizes from 0.1 to 6.4 billion parameters without
# embeddings, losses in bits per character.

# %%
import os
import pathlib

import numpy as np
import pandas as pd
from IPython.display import Markdown

from scalelab import laws, plots, study_plots

pd.options.display.float_format = "{:.4g}".format
DATA = pathlib.Path(os.environ.get("SCALELAB_DATA", "../../shared/data"))
DRAWS = 100 if os.environ.get("SCALELAB_QUICK") else 1000

runs = laws.read_table(DATA / "farseer" / "points.csv")
columns = {"params": "params_non_embedding", "loss": "bpc"}
runs.groupby("params_non_embedding").agg(runs=("bpc", "size"), fewest=("tokens", "min"), most=("tokens", "max")).iloc[
    ::6
]

# %% [markdown]
# ## Inside the data
#
# Each form is fitted as its source does it: Chinchilla by Huber on log losses, Farseer by least squares of the loss.
# Sizes are resampled whole.

# %%
fits = {
    name: laws.fit(name, runs, columns=columns, cluster="params_non_embedding", bootstrap=DRAWS, seed=0)
    for name in ("farseer", "chinchilla")
}
farseer, chinchilla = fits.values()
squares = float((farseer.resid**2).sum())
farseer

# %%
axes = plots.new_figure((7.4, 3.3)).subplots(1, 2, sharey=True)
for ax, (name, fit) in zip(axes, fits.items(), strict=True):
    fit.plot.residuals(ax)
    ax.set_title(name, fontsize="medium")

# %%
inside = {name: float((fit.fittedvalues / fit.observed - 1).abs().mean()) for name, fit in fits.items()}
printed = laws.Farseer().predict("Li 2025", runs.rename(columns={"params_non_embedding": "params"}))
Markdown(
    f"Mean error inside the data: Farseer {inside['farseer']:.2%}, Chinchilla {inside['chinchilla']:.2%}. Farseer's "
    "sum of squares is "
    f"{squares:.3e} bits². The constants that its paper prints are rounded so much that they lie "
    f"{(printed / runs['bpc'] - 1).mean():+.1%} off on these runs: refit a law, do not retype it."
)

# %% [markdown]
# The bands of Chinchilla's residuals bend: small models at many tokens are worse than the law, large ones better.
# What bends inside goes astray outside.
#
# ## Held out
#
# **By compute**, the default: everything below the largest budgets is fitted, they are predicted. `laws.rank` does so
# for any number of forms, with two baselines that know no law, and a floor: no seeds were repeated, so the best
# form's own scatter stands in for the noise, and with it what a perfect law would still be off by.

# %%
ranking = laws.rank(runs, ["farseer", "chinchilla", "coupled", "multiplicative", "kaplan"], columns=columns)
ranking

# %%
ax = plots.new_axes(size=(4.4, 3.4))
for i, (name, fit) in enumerate(fits.items()):
    table = fit.holdout(ranking.cut).table
    low, high = (100 * (table[end] / table["loss"] - 1) for end in ("lower", "upper"))
    ax.vlines(table["params"], low, high, color=plots.COLOURS[i], alpha=0.35, linewidth=3)
    ax.plot(table["params"], 100 * table["error"], plots.MARKERS[i], color=plots.COLOURS[i], label=name)
ax.axhspan(-100 * ranking.floor, 100 * ranking.floor, color="#999999", alpha=0.25, linewidth=0, label="noise floor")
ax.set(xscale="log", xlabel="parameters N", ylabel="predicted above measured loss (%)")
plots.human_log(ax, "x")
legend = ax.legend(fontsize="small", frameon=False)

# %% [markdown]
# Chinchilla's band does not hold its own errors: intervals cover noise, never a wrong form. Only the hold-out shows
# that.
#
# **By size**, which is how a small study meets a large model: fitted below 2 billion parameters, all larger ones
# predicted.

# %%
small, large = (part for _, part in runs.groupby(runs["params_non_embedding"] >= 2e9))
by_size = {}
for name in fits:
    fit = laws.fit(name, small, columns=columns, bootstrap=0)
    by_size[name] = float((fit.predict(large) / large["bpc"] - 1).abs().mean())
Markdown(
    f"Fitted to {len(small)} runs of up to {small['params_non_embedding'].max():.2g} parameters, {len(large)} runs of "
    "up to "
    f"{large['params_non_embedding'].max():.2g}: Farseer is off by **{by_size['farseer']:.2%}**, Chinchilla by "
    f"**{by_size['chinchilla']:.2%}**."
)

# %% [markdown]
# ## How far, and from how much?
#
# An expanding window repeats the hold-out at many cuts. First from where there are data enough for nine constants:

# %%
cuts = np.geomspace(1e20, 3e21, 6)
ax = study_plots.expanding(fits, plots.new_axes(size=(4.4, 3.3)), cuts)
ax.axhline(100 * ranking.floor, color="black", linewidth=0.8)
note = ax.text(
    0.02, 100 * ranking.floor, "noise floor", transform=ax.get_yaxis_transform(), fontsize="small", va="bottom"
)

# %% [markdown]
# And now from less. A cut at low compute leaves few runs, of little range, and flexibility turns from a virtue into a
# trap:

# %%
early = np.geomspace(6e18, 1e21, 8)
windows = {name: fit.expanding(early).errors for name, fit in fits.items()}
less = pd.DataFrame({"runs": windows["farseer"]["fitted"]} | {n: w["law"] for n, w in windows.items()})
ax = plots.new_axes(size=(4.4, 3.3))
for i, name in enumerate(fits):
    ax.plot(less["runs"], 100 * less[name], plots.MARKERS[i] + "-", color=plots.COLOURS[i], label=name)
ax.set(yscale="log", ylim=(0.08, 100), xlabel="runs fitted", ylabel="mean error on all larger runs (%)")
plots.plain_log(ax, "y")
legend = ax.legend(frameon=False)

# %%
worse = less[less["farseer"] > less["chinchilla"]]["runs"].max()
last = less.iloc[-1]
Markdown(
    f"Up to {worse} runs Farseer may be the worse of the two, at the smallest cut by any number of digits; from more "
    "it is the better, at "
    f"the last cut {last['chinchilla'] / last['farseer']:.0f} times."
)

# %% [markdown]
# ## What it changes
#
# The choice of form is a choice of what to train. Beyond the data the two forms part, and Farseer may have no
# compute-optimal size at all, which `optimal` says instead of running to infinity.

# %%
compute = np.geomspace(1e20, 1e24, 25)
axes = plots.allocation(fits, compute, plots.new_figure((7.4, 3.3)).subplots(1, 2))

# %%
budgets = [1e20, 1e21, 1e22, 1e23]
ratios = pd.DataFrame({n: f.optimal(budgets).eval("tokens / params") for n, f in fits.items()}).set_axis(budgets)
ratios.rename_axis("C = 6 N D")

# %%
held = ranking.table["held_out"]
Markdown(
    f"At {budgets[-1]:.0e} FLOP Chinchilla's form asks for {ratios['chinchilla'].iloc[-1]:.0f} tokens per parameter, "
    "Farseer's for "
    f"{ratios['farseer'].iloc[-1]:.0f}. With a hold-out error {held['chinchilla'] / held['farseer']:.0f} times "
    "smaller, Farseer is "
    f"the one to ask here, within about a decade of the data. With {worse} runs it would not be."
)
