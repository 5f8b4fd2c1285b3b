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
# # From a CSV to the next runs
#
# A table of finished runs is all that a scaling law needs. This one is the best known: 245 runs that Epoch AI read
# off figure 4 of the Chinchilla paper (Hoffmann et al. 2022; Besiroglu et al. 2024). We fit the law, ask what it is
# worth, spend a budget with it, and let it choose the runs that would teach it most.
#
# The table is looked for in `$SCALELAB_DATA`. Your own goes in the same way: `laws.read_table("runs.csv")`.

# %%
import os
import pathlib
import tempfile

import numpy as np
import pandas as pd
from IPython.display import Markdown

from scalelab import laws, plots

DATA = pathlib.Path(os.environ.get("SCALELAB_DATA", "../../shared/data"))
pd.options.display.float_format = "{:.4g}".format
DRAWS = 200 if os.environ.get("SCALELAB_QUICK") else 1000

table = laws.read_table(DATA / "chinchilla_epoch" / "points.csv")
table.head()

# %% [markdown]
# ## Fit, and read the findings first
#
# `columns` says which column plays which role; `params` and `loss` have their names already. The objective is the
# paper's: Huber loss on log residuals, $\delta = 10^{-3}$. Every bootstrap refit is brought to its own optimum.

# %%
columns = {"tokens": "tokens_derived", "flops": "train_flop"}
everything = laws.fit("chinchilla", table, columns=columns, bootstrap=DRAWS, seed=0)
everything.warnings

# %% [markdown]
# A diverged run, outliers, and two objectives that disagree beyond their intervals: no fit to quote yet. Which runs
# are these?

# %%
odd = everything.resid.abs().nlargest(4)
table.loc[odd.index, ["params", "tokens_derived", "loss"]].assign(
    tokens_per_param=lambda t: t["tokens_derived"] / t["params"], residual=odd
)

# %% [markdown]
# Runs that saw a fraction of a token per parameter: still on the steep first part of training, where no power law
# holds. The published refit leaves the five highest losses out. So do we, and say so.

# %%
runs = table[table["outlier_top5_loss"] == 0]
fit = laws.fit("chinchilla", runs, columns=columns, bootstrap=DRAWS, seed=0)
fit

# %%
moved = everything.params["beta"] - fit.params["beta"]
size = everything.optimal(5.76e23), fit.optimal(5.76e23)
ratio = [best["tokens"] / best["params"] for best in size]
Markdown(
    f"**Five rows of {len(table)} moved β by {moved:.3f}**, and Chinchilla's own budget (5.76e23 FLOP) from "
    f"{ratio[0]:.0f} to {ratio[1]:.0f} tokens per parameter."
)

# %% [markdown]
# What others published for these runs, and how far each is off on them:

# %%
fit.published()

# %% [markdown]
# ## What to train
#
# The surface, the runs and the compute-optimal line; then sizes and tokens at several budgets, each with its
# interval. Beyond the data the background is grey.

# %%
ax = fit.plot.surface(plots.new_axes(size=(4.6, 3.6)))

# %%
budgets = [1e20, 1e21, 1e22, 5.76e23]
fit.optimal(budgets)

# %%
axes = fit.plot.frontier([1e18, 1e25], plots.new_figure((7.4, 3.3)).subplots(1, 2))

# %% [markdown]
# ## How sure?
#
# **Would it have known?** Fitted below the largest budgets, the law predicts them, beside two guesses that need no
# law. At many cuts, this shows how the error grows with the distance.

# %%
held = fit.holdout()
held

# %%
ax = fit.plot.expanding(plots.new_axes(size=(4.4, 3.2)))

# %% [markdown]
# **Which rows are independent?** Resampling runs one by one assumes that they are. Where the form misfits, all runs
# of a size or of a budget are off together; resampled whole, they give the interval that admits it.

# %%
PLANNED = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])  # the paper's nine budgets
nearest = np.abs(np.log(runs["train_flop"].to_numpy()[:, None] / PLANNED)).argmin(1)
grouped = runs.assign(budget=PLANNED[nearest])
by = {"run": fit} | {
    name: laws.fit("chinchilla", grouped, columns=columns, cluster=column, bootstrap=DRAWS, seed=0)
    for name, column in {"model size": "params", "budget": "budget"}.items()
}
intervals = pd.DataFrame(
    {
        name: {
            **f.conf_int().loc["beta"].add_prefix("beta "),
            **f.allocation().loc["a", ["lower", "upper"]].add_prefix("a "),
        }
        for name, f in by.items()
    }
).T.rename_axis("resampled by")
intervals

# %% [markdown]
# **What if I had chosen otherwise?** Every combination of rows left out and objective, as tokens per parameter at
# 5.76e23 FLOP. The interval of one fit knows nothing of this spread.

# %%
choices = fit.sensitivity(C=5.76e23)
answer = next(name for name in choices if name.startswith("D/N"))
ax = plots.new_axes(size=(4.4, 3.0))
for i, (objective, fits) in enumerate(choices.groupby(["objective", "delta"], dropna=False, sort=False)):
    delta = "" if np.isnan(objective[1]) else f", δ = {objective[1]:.2g}"
    ax.plot(
        fits["dropped"], fits[answer], plots.MARKERS[i] + "-", color=plots.COLOURS[i], label=f"{objective[0]}{delta}"
    )
ax.set(xlabel="highest losses left out, of 240", ylabel="D*/N* at 5.76e23 FLOP", ylim=(0, None))
legend = ax.legend(fontsize="small", frameon=False)

# %%
Markdown(
    f"One fit says {ratio[1]:.0f} tokens per parameter. The choices above span {choices[answer].min():.0f} to "
    f"{choices[answer].max():.0f}; the budgets' interval of the exponent a, "
    f"{intervals.loc['budget', 'a lower']:.2f} to {intervals.loc['budget', 'a upper']:.2f}, is "
    f"{(intervals.loc['budget'] @ [0, 0, -1, 1]) / (intervals.loc['run'] @ [0, 0, -1, 1]):.1f} times the runs'."
)

# %% [markdown]
# ## The next runs
#
# Imagine that only the runs below 1e20 FLOP existed, that 1e21 FLOP may be spent, and that the loss at 3e21 matters.
# Each design is scored by simulation: draw a truth from the fit, draw the old and the new runs from it, fit, and see
# by how much the prediction misses.

# %%
pilot = laws.fit("chinchilla", runs[runs["train_flop"] < 1e20], columns=columns, bootstrap=DRAWS, seed=0)
plan = laws.plan(pilot, budget=1e21, target=3e21, n=100 if DRAWS < 1000 else 400, seed=0)
plan.table

# %%
chosen = plan.table.loc[plan.recommended]
nothing = plan.table.loc["no new runs"]
before = pilot.optimal(3e21)
after = fit.optimal(3e21)
Markdown(
    f"**Recommended: {plan.recommended}.** Without new runs the loss at 3e21 FLOP is known to an interval of "
    f"{nothing['loss_width']:.3f} nats, with them to {chosen['loss_width']:.3f}. The pilot says {before['loss']:.3f} "
    f"({before['loss_lower']:.3f} to {before['loss_upper']:.3f}); all {fit.nobs} runs say {after['loss']:.3f}."
)

# %% [markdown]
# `plan.to_config("next.py")` writes the runs as a sweep that `scalelab plan --config` accepts. The fit is kept with
# its draws, options, findings and a hash of the data, and comes back bit for bit:

# %%
path = fit.save(pathlib.Path(tempfile.mkdtemp()) / "fit.json")
again = laws.load(path)
assert again.params.equals(fit.params)
assert again.draws.equals(fit.draws)
again.card()
