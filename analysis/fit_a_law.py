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
# # Fit a law to a sweep
#
# What a fit of the Chinchilla surface says, how sure it is of it, and where to stop believing it. The runs are those
# of `experiments/2026-11-22-known-entropy`: Transformers on a synthetic language whose entropy is known, so the
# fitted irreducible loss can be checked against the truth. Any table with parameters, tokens and loss does as well:
# `laws.read_table("points.csv")`.

# %%
import os
import pathlib

from scalelab import laws, plots

DRAWS = 200 if os.environ.get("SCALELAB_QUICK") else 1000
root = next(p for p in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (p / "experiments").is_dir())
runs = laws.read_table(root / "experiments" / "2026-11-22-known-entropy" / "runs.csv")
runs[["id", "params", "tokens", "flops", "loss"]].head()

# %% [markdown]
# The fit: Huber loss on log residuals (Hoffmann et al. 2022), all starts solved at once, refits of resampled runs.
# Read the warnings before the numbers.

# %%
fit = laws.fit("chinchilla", runs, bootstrap=DRAWS, seed=0)
fit

# %%
fit.warnings

# %% [markdown]
# **Does it find the floor?** The entropy of the language stands in the records; the interval of E should hold it.

# %%
interval = fit.conf_int(level=0.95).loc["E"]
entropy = runs["entropy"].iloc[0]
print(f"entropy {entropy:.4f}, E {fit.params['E']:.4f} [{interval['lower']:.4f}, {interval['upper']:.4f}]")

# %% [markdown]
# **What should I train?** FLOPs per token come from the runs themselves, not from 6ND.

# %%
cost = laws.flops_per_token(runs["params"], runs["tokens"], runs["flops"])
fit.optimal([1e12, 1e13], cost)

# %% [markdown]
# **Would it have known?** Fitted below the largest budget, it predicts that budget, beside two guesses that need no
# law.

# %%
fit.holdout()

# %% [markdown]
# **Do the parabolas agree?** They assume less, use only the runs near each minimum, and say which minima they refuse.

# %%
parabolas = laws.isoflop(runs, bootstrap=DRAWS, seed=0)
parabolas.vertices

# %%
ax = plots.isoflop(runs, parabolas)
