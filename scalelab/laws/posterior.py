"""Bayesian posterior of a fit's parameters (NUTS in NumPyro), to stand beside the bootstrap. Extra `bayes`.

The posterior believes the law, its noise and independence of the rows; the bootstrap believes none of these. So the
posterior is usually the narrower of the two (about half as wide on the Chinchilla runs), and neither is shown alone.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput, FeatureMissing
from scalelab.laws.fit import Fit
from scalelab.laws.notices import Notice
from scalelab.laws.parameter import Parameter
from scalelab.laws.prior import checked
from scalelab.laws.regression import Constrained, FormRegression
from scalelab.laws.shown import Shown, worst_first
from scalelab.laws.traced import UNTRACEABLE, Traced

FREEDOM = 4.0  # of Student's t
NOISE = (math.log(0.01), 2.0)  # prior of ln sigma: one per cent of the target, within a factor of 50 (95 %)
R_HAT, ENOUGH = 1.01, 400.0  # Vehtari et al. 2021


def posterior(
    fit: Fit, draws: int = 1000, *, warmup: int = 1000, chains: int = 2, likelihood: str | None = None,
    priors: Mapping[str, tuple[float, float]] | None = None, seed: int = 0,
) -> Posterior:  # fmt: skip
    """Draws from the posterior of a fit's parameters, by the No-U-Turn sampler (Hoffman & Gelman 2014).

    Likelihood: residuals on the objective's scale (of logarithms, or of the target) are independent, sigma times
    Student's t with 4 degrees of freedom ("student"; where the objective is robust) or normal ("normal"; where it is
    squares); a row's weight multiplies its log-likelihood. Priors: each parameter's solver coordinate u (the logarithm
    of a parameter with a sign, the parameter itself without) is normal, centred in the law's search range, with half
    that range as standard deviation, and zero beyond its bounds; ln sigma is normal about one per cent of the target,
    standard deviation 2; or what `priors` says. Fixed and tied parameters stay so.

    Sampled in coordinates whitened by the fit's own covariance, compiled, in float64 within this call only.

    Args:
      draws, warmup: per chain.
      priors: parameter -> (mean, standard deviation) of a normal prior on the parameter itself, as what an earlier
        study found: {"E": (1.69, 0.05)}. The fit's own priors hold too.

    Raises `FeatureMissing` without NumPyro (pip install 'scalelab[bayes]'), `BadInput` for a fit without a likelihood
    or a formula that JAX cannot trace (one that looks at values).
    """
    goal = fit.options.objective
    kind = likelihood or ("normal" if goal.kind == "squares" else "student")
    if kind not in ("student", "normal"):
        raise BadInput("likelihood", likelihood, "must be 'student' or 'normal'")
    if goal.kind == "lower-edge":
        raise BadInput("fit", "lower-edge objective", "is no likelihood: its law is not the mean of the runs")
    if not fit.converged:
        raise BadInput("fit", "not converged", "has no optimum to sample around")
    for name, value, least in (("draws", draws, 10), ("warmup", warmup, 10), ("chains", chains, 1)):
        if value < least:
            raise BadInput(name, value, f"must be {least} or more")
    priors = {**fit.options.priors, **(priors or {})}
    density = Density(fit, kind, priors)
    z, divergences, diagnostics = _sample(density, draws, warmup, chains, seed)
    record: dict[str, Any] = {"draws": draws, "warmup": warmup, "chains": chains, "seed": seed}
    record["priors"] = {name: list(prior) for name, prior in priors.items()}
    sigma = np.exp(density.location[-1] + z @ density.scale[-1])
    return Posterior(fit, density.natural(z), sigma, kind, divergences, diagnostics, record)


class Density:
    """The log-posterior in whitened coordinates z: (free parameters' u, ln sigma) = location + scale z."""

    def __init__(self, fit: Fit, kind: str, priors: Mapping[str, tuple[float, float]] | None = None):
        law, options = fit.law, fit.options
        self.law, self.kind, self.on = law, kind, options.objective.on
        form = FormRegression(law, fit.rows.columns, self.on)
        names, specs = list(law.parameters), list(law.parameters.values())
        problem = (
            Constrained(form, names, specs, options.fixed, options.tied) if options.fixed or options.tied else form
        )
        self.names = names
        self.specs: list[Parameter] = specs
        self.free = problem.keep if isinstance(problem, Constrained) else list(range(len(specs)))
        P = len(specs)
        self.spread = problem.spread if isinstance(problem, Constrained) else np.eye(P)
        self.offset = problem.offset if isinstance(problem, Constrained) else np.zeros(P)
        self.columns, self.data, self.weights = form.columns, form.data, fit.rows.weights
        search = np.array([specs[i].search for i in self.free])
        level = 0.0 if self.on == "log" else math.log(float(np.median(np.abs(form.data))))
        self.mean = np.append(search.mean(1), NOISE[0] + level)
        self.sd = np.append(np.ptp(search, axis=1) / 2, NOISE[1])
        self.priors = [(*self._place(name), *prior) for name, prior in checked(priors).items()]
        for place, *_ in self.priors:
            self.sd[place] = np.inf  # the wide prior of its coordinate is off
        self.lower, self.upper = (
            np.append(ends, pad) for ends, pad in ((problem.lower, -np.inf), (problem.upper, np.inf))
        )
        u = problem.internal(fit.estimate[None])[0]
        residual = problem.model(u[None])[0] - form.data
        sigma = max(float(np.sqrt((residual**2).sum() / max(1, len(residual) - len(u)))), 1e-9 * math.exp(level))
        jacobian = problem.jacobian(u)
        precision = jacobian.T @ (self.weights[:, None] * jacobian) / sigma**2 + np.diag(self.sd[:-1] ** -2.0)
        for place, sign, _, sd in self.priors:
            precision[place, place] += (math.exp(u[place]) if sign else 1.0) ** 2 / sd**2
        self.location = np.append(u, math.log(sigma))
        self.scale = np.zeros((len(u) + 1, len(u) + 1))
        self.scale[:-1, :-1] = np.linalg.cholesky(np.linalg.inv(precision))
        self.scale[-1, -1] = 1 / math.sqrt(2 * len(residual))

    def _place(self, name: str) -> tuple[int, int]:
        """Which of the free coordinates a parameter is, and its sign."""
        free = [self.names[i] for i in self.free]
        if name not in free:
            remedy = f"has no prior of its own; the free parameters are {', '.join(free)}"
            raise BadInput("priors", name, remedy)
        return free.index(name), self.specs[self.names.index(name)].sign

    def natural(self, z: Float[np.ndarray, "R P+1"]) -> Float[np.ndarray, "R P"]:
        """The law's parameters."""
        u = (self.location + z @ self.scale.T)[:, :-1] @ self.spread.T + self.offset
        return np.stack([spec.to_p(u[:, i]) for i, spec in enumerate(self.specs)], axis=1)

    def log_density(self, z: Any) -> Any:
        """Up to a constant, of a JAX array (P + 1,); -inf outside the bounds."""
        import jax.numpy as jnp

        t = self.location + self.scale @ z
        u, log_sigma = self.spread @ t[:-1] + self.offset, t[-1]
        p = types.SimpleNamespace(
            **{
                n: spec.to_p(Traced(u[i].reshape(1, 1)))
                for i, (n, spec) in enumerate(zip(self.names, self.specs, strict=True))
            }
        )
        value = self.law.formula(p, self.columns)
        model = (np.log(value) if self.on == "log" else value).value
        r = (jnp.broadcast_to(model, (1, len(self.data)))[0] - self.data) * jnp.exp(-log_sigma)
        each = -0.5 * r**2 if self.kind == "normal" else -0.5 * (FREEDOM + 1) * jnp.log1p(r**2 / FREEDOM)
        inside = jnp.all((t >= self.lower) & (t <= self.upper))
        total = (self.weights * (each - log_sigma)).sum() - 0.5 * (((t - self.mean) / self.sd) ** 2).sum()
        for place, sign, mean, sd in self.priors:
            value = sign * jnp.exp(t[place]) if sign else t[place]
            # a density of p, in the coordinate u = ln |p|: dp/du = p
            total += -0.5 * ((value - mean) / sd) ** 2 + (t[place] if sign else 0.0)
        return jnp.where(inside & jnp.isfinite(total), total, -jnp.inf)


def _sample(
    density: Density, draws: int, warmup: int, chains: int, seed: int
) -> tuple[np.ndarray, int, dict[str, Any]]:
    """(chains x draws, P + 1) draws of z, the number of divergences, and R-hat and effective draws per quantity."""
    try:
        import jax
        from numpyro.diagnostics import effective_sample_size, split_gelman_rubin  # type: ignore
        from numpyro.infer import MCMC, NUTS  # type: ignore
    except ImportError:
        raise FeatureMissing("a posterior", "numpyro", "bayes") from None
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        kernel = NUTS(potential_fn=lambda z: -density.log_density(z), target_accept_prob=0.9)
        sampler = MCMC(
            kernel,
            num_warmup=warmup,
            num_samples=draws,
            num_chains=chains,
            chain_method="sequential",
            progress_bar=False,
        )
        first = 0.5 * np.random.default_rng(seed).standard_normal((chains, len(density.location)))
        try:
            known = np.isfinite(np.asarray(jax.jit(jax.vmap(density.log_density))(first)))
        except UNTRACEABLE:
            remedy = "its formula looks at values, or calls what JAX lacks: it has a bootstrap, and no posterior"
            raise BadInput("law", density.law.name, remedy) from None
        first = np.where(known[:, None], first, 0.0)  # beyond a bound: from the fit itself
        first = jax.numpy.asarray(first if chains > 1 else first[0])
        sampler.run(jax.random.key(seed), init_params=first, extra_fields=("diverging",))
        z = np.asarray(sampler.get_samples(group_by_chain=True), np.float64)
        divergences = int(np.asarray(sampler.get_extra_fields()["diverging"]).sum())
    flat = z.reshape(-1, z.shape[-1])
    natural = np.column_stack([density.natural(flat)[:, density.free], flat[:, -1]]).reshape(*z.shape)
    quantities = [*(density.names[i] for i in density.free), "sigma"]
    diagnostics = {
        name: {
            "r_hat": float(split_gelman_rubin(natural[:, :, i])),
            "effective": float(effective_sample_size(natural[:, :, i])),
        }
        for i, name in enumerate(quantities)
    }
    return flat, divergences, diagnostics


class Posterior(Shown):
    """Posterior draws of a fit's parameters.

    `draws` has a column per parameter and `sigma`, the scale of the noise on the objective's scale. `fit` is the same
    fit with these draws in place of the bootstrap's, so that everything derived (`optimal`, `get_prediction`, ...)
    comes with credible intervals. `diagnostics`: R-hat and effective draws of each parameter.
    """

    def __init__(
        self, fit: Fit, samples: np.ndarray, sigma: np.ndarray, likelihood: str, divergences: int,
        diagnostics: dict[str, Any], record: dict[str, Any],
    ):  # fmt: skip
        self.bootstrap, self.likelihood, self.divergences = fit, likelihood, divergences
        self.draws = pd.DataFrame(samples, columns=list(fit.names)).assign(sigma=sigma).rename_axis("draw")
        self.diagnostics = pd.DataFrame.from_dict(diagnostics, orient="index")
        self.record = record
        about = fit.record | {"bootstrap": f"posterior, {likelihood} noise", "draws": len(samples), "draws_failed": 0}
        self.fit = Fit(fit.law, fit.rows, fit.options, fit.estimate, samples, list(fit.notices), about, fit._solved)
        self.fit._examined = self.fit._studied = True
        for notice in self.warnings:
            self.fit.add(notice)

    @property
    def warnings(self) -> list[Notice]:
        """What speaks against these draws."""
        found = []
        worst = float(self.diagnostics["r_hat"].to_numpy().max())
        fewest = float(self.diagnostics["effective"].to_numpy().min())
        if not (worst <= R_HAT and fewest >= ENOUGH):
            found.append(
                Notice(
                    "posterior-not-mixed",
                    "error" if not worst <= 1.05 else "warning",
                    f"R-hat is up to {worst:.3f} and the effective draws down to {fewest:.0f}.",
                    f"draw more; R-hat should be at most {R_HAT} and {ENOUGH:.0f} draws effective.",
                    {"r_hat": worst, "effective": fewest},
                )
            )
        if self.divergences:
            found.append(
                Notice(
                    "posterior-divergent",
                    "warning",
                    f"{self.divergences} of {len(self.draws)} transitions diverged: a corner was missed.",
                    "fix or tie what the data do not determine.",
                    {"divergences": self.divergences},
                )
            )
        if self.bootstrap.rows.clusters is not None:
            found.append(
                Notice(
                    "dependent-rows",
                    "warning",
                    f"rows share a {self.bootstrap.rows.cluster}, which the posterior takes no account of: too narrow.",
                    "use the cluster bootstrap's interval.",
                )
            )
        return found

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """Bootstrap and posterior side by side: estimate, posterior mean, both intervals, and the ratio of widths."""
        boot, own = self.bootstrap.conf_int(level), self.draws[list(self.bootstrap.names)]
        tails = own.quantile([(1 - level) / 2, (1 + level) / 2]).to_numpy()
        table = pd.DataFrame({"estimate": self.bootstrap.params, "mean": own.mean()})
        table["bootstrap_lower"], table["bootstrap_upper"] = boot["lower"], boot["upper"]
        table["posterior_lower"], table["posterior_upper"] = tails
        with np.errstate(divide="ignore", invalid="ignore"):
            table["width_ratio"] = (tails[1] - tails[0]) / (boot["upper"] - boot["lower"])
        return table

    def summary(self, level: float = 0.95) -> str:
        """Likelihood, sampler, the table and the findings, as text."""
        r = self.record
        name = self.bootstrap.law.name
        lines = [
            f"posterior of {name}: {self.likelihood} noise, {r['chains']} chains of {r['draws']} draws "
            f"after {r['warmup']}; R-hat <= {self.diagnostics['r_hat'].max():.3f}, effective draws >= "
            f"{self.diagnostics['effective'].min():.0f}, {self.divergences} divergences",
            self.table(level).to_string(float_format=lambda v: f"{v:.5g}"),
            f"sigma: {self.draws['sigma'].mean():.4g}",
            *(f"prior of {name}: normal, {mean:g} +- {sd:g}" for name, (mean, sd) in r["priors"].items()),
        ]
        return "\n".join([*lines, "", str(worst_first(self.warnings))])

    def __repr__(self) -> str:
        return f"<Posterior of {self.bootstrap.law.name}, {len(self.draws)} draws, {self.divergences} divergences>"
