"""Data mixtures: loss against the proportions of domains in the training data, and the best proportions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.fit import Fit
from scalelab.laws.law import Law
from scalelab.laws.parameter import free, positive


class DataMixture(Law):
    """L(r) = c + k exp(sum_j t_j r_j), one validation domain (Ye et al. 2024, arXiv 2403.16952).

        laws.DataMixture("web", "code", "books").fit(table)     # columns web, code, books: the proportions

    r_j: share of domain j in the training data (columns named as the domains; they add up to 1), L: loss on one
    validation set (nats per token) at one size and one number of tokens. c: the loss that no mixture reduces; t_j: how
    domain j moves the rest. Because the shares add up to 1, k and all t_j cannot be told apart: t of the last domain is
    0 here, and k the reducible loss of training on it alone (to compare with constants of others, subtract their last
    t_j from all and multiply k by its exponential).

    For validation on several domains fit each, and ask `best_mixture` for the proportions.

    Objective: Huber, delta = 1e-3, on log losses (the source fits boosted regressors).
    """

    name = "data-mixture"
    source = "Ye et al. 2024 (arXiv 2403.16952)"

    def __init__(self, *domains: str):
        domains = domains or ("r_1", "r_2", "r_3")
        if len(domains) < 2 or len(set(domains)) < len(domains):
            raise BadInput("domains", domains, "name two or more different columns of proportions")
        self.domains = self.inputs = self.may_be_zero = self.arguments = domains
        self.parameters = {
            "c": positive(1e-2, 10, linear=True),
            "k": positive(1e-3, 10, linear=True),
        } | {f"t_{domain}": free(-6.0, 6.0, lower=-100.0, upper=100.0) for domain in domains[:-1]}
        self.equation = f"L = c + k exp({' + '.join(f't_{d} {d}' for d in domains[:-1])})"

    def columns_of(self, columns):
        shares = {domain: columns[domain] for domain in self.domains}
        total = np.sum(list(shares.values()), axis=0)
        wrong = (np.abs(total - 1) > 1e-3) | (np.min(list(shares.values()), axis=0) < 0)
        if wrong.any():
            raise BadInput(
                f"columns {', '.join(self.domains)}",
                {domain: float(share[wrong][0]) for domain, share in shares.items()},
                "must be proportions: none below 0, adding up to 1 in each row",
            )
        return shares

    def size(self, columns):
        return np.max([columns[domain] for domain in self.domains], axis=0), "the largest share"

    def formula(self, p, x):
        return p.c + p.k * np.exp(sum(getattr(p, f"t_{d}") * getattr(x, d) for d in self.domains[:-1]))


def best_mixture(
    fits: Fit | Sequence[Fit], weights: Sequence[float] | None = None, level: float = 0.95
) -> pd.DataFrame:
    """The proportions with the lowest weighted validation loss, sum_i s_i L_i(r), and that loss.

    fits: of `DataMixture`, one per validation domain, of the same training domains. weights: s_i, by default all
    1 / len(fits). Rows: the domains, then `loss`; columns estimate, lower, upper (percentiles over draws, paired across
    fits to the same rows with the same seed). The sum is convex in r, so the minimum is the only one; for a single
    validation domain it is the domain with the lowest t alone.

    Raises `BadInput` for fits of other laws, of other domains or with other numbers of draws.
    """
    fits = [fits] if isinstance(fits, Fit) else list(fits)
    laws = [fit.law for fit in fits]
    if not fits or any(not isinstance(law, DataMixture) or law.inputs != laws[0].inputs for law in laws):
        raise BadInput("fits", [law.name for law in laws], "must be of DataMixture with the same domains")
    if len({len(fit.samples) for fit in fits}) > 1:
        raise BadInput("fits", [len(fit.samples) for fit in fits], "must have the same number of bootstrap draws")
    share = np.full(len(fits), 1 / len(fits)) if weights is None else np.asarray(weights, float)
    if share.shape != (len(fits),) or not (np.isfinite(share).all() and (share >= 0).all() and share.any()):
        raise BadInput("weights", weights, f"must be {len(fits)} numbers, none below 0 and not all 0")

    def optimum(params: list[Float[np.ndarray, "R P"]]) -> Float[np.ndarray, "R domains+1"]:
        stacked = np.stack(params, axis=1)  # draws, fits, parameters
        out = np.full((len(stacked), len(laws[0].inputs) + 1), np.nan)
        sound = np.isfinite(stacked).all((1, 2))
        c, k = stacked[sound, :, 0], stacked[sound, :, 1]
        t = np.concatenate([stacked[sound, :, 2:], np.zeros((*k.shape, 1))], axis=2)
        r = simplex_minimum(share * k, t)
        loss = (share * (c + k * np.exp(np.einsum("rij,rj->ri", t, r)))).sum(1)
        out[sound] = np.concatenate([r, loss[:, None]], axis=1)
        return out

    point = optimum([fit.estimate[None] for fit in fits])[0]
    drawn = optimum([fit.samples for fit in fits])
    ends = np.array([fit.interval(drawn, level) for fit in fits])  # NaN where any fit must not be used
    lower, upper = np.where(np.isnan(ends).any(0), np.nan, ends[0])
    return pd.DataFrame({"estimate": point, "lower": lower, "upper": upper}, index=[*laws[0].inputs, "loss"])


def simplex_minimum(k: Float[np.ndarray, "R I"], t: Float[np.ndarray, "R I M"]) -> Float[np.ndarray, "R M"]:
    """The r >= 0 with sum_j r_j = 1 that minimises sum_i k_i exp(t_i . r), k >= 0, for each of R problems.

    Newton's method with a logarithmic barrier that is taken away in steps (Boyd & Vandenberghe 2004, ch. 11); it ends
    where the duality gap, the number of domains times the barrier, is 1e-11 of the objective at equal shares.
    """
    R, _, M = t.shape
    r = np.full((R, M), 1.0 / M)

    def value(r: np.ndarray, barrier: np.ndarray) -> np.ndarray:
        return (k * np.exp(np.einsum("rij,rj->ri", t, r))).sum(1) - barrier * np.log(r).sum(1)

    scale = value(r, np.zeros(R))
    for barrier in scale * np.geomspace(1.0, 1e-11 / M, 25)[:, None]:
        for _ in range(30):
            e = k * np.exp(np.einsum("rij,rj->ri", t, r))
            # in steps relative to r, in which the barrier's curvature is the identity
            slope = np.einsum("ri,rij->rj", e, t) * r - barrier[:, None]
            bent = t * r[:, None, :]
            curvature = np.einsum("ri,rij,rik->rjk", e, bent, bent) + barrier[:, None, None] * np.eye(M)
            both = np.linalg.solve(curvature, np.stack([slope, r], axis=-1))
            price = (r * both[..., 0]).sum(1) / (r * both[..., 1]).sum(1)  # keeps the sum of the shares
            step = -(both[..., 0] - price[:, None] * both[..., 1])
            promise = -(slope * step).sum(1)
            if (promise <= 1e-6 * barrier).all():
                break
            length = np.minimum(1.0, 0.9 / np.maximum(-step.min(1), 1e-300))
            now = value(r, barrier)
            for _ in range(40):
                longer = value(r * (1 + length[:, None] * step), barrier) > now - 0.1 * length * promise
                if not (longer & (promise > 1e-6 * barrier)).any():
                    break
                length = np.where(longer, 0.5 * length, length)
            r = r * (1 + length[:, None] * step)
    return r / r.sum(1, keepdims=True)
