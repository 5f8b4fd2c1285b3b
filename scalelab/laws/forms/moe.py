"""Mixture-of-experts laws: granularity, number of experts, sparsity, and the compute that experts save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scalelab.errors import BadInput
from scalelab.laws.forms.farseer import stretch
from scalelab.laws.forms.routing import saturating
from scalelab.laws.law import Law
from scalelab.laws.objective import LOG_SQUARES, Objective
from scalelab.laws.parameter import free, positive
from scalelab.laws.regression import FormRegression


class FineGrainedMoE(Law):
    """L(N, D, G) = c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024, arXiv 2402.07871, eq. 9).

    N: all parameters, experts included, without embeddings (count); D: training tokens; G: granularity, how many
    times smaller an expert's hidden layer is than the dense one (1: as wide); L: nats per token. c: the irreducible
    loss; a / N^alpha: what size leaves at the finest experts, g / G^gamma the share that granularity removes;
    b / D^beta: what data leave. One law holds for one expansion rate E (the source: 64), and N grows with E.

    In the law finer is always better. The best G exists because routing costs compute: give `optimal` the cost of such
    models, `fit.optimal(C, fine_grained_flops(G), granularity=G)`, and take the G with the lowest loss. 6 N D is not
    their cost: most of N is idle.

    Objective: Huber, delta 0.1, as in the source (which adds a weight decay of 5e-4 to the parameters; not here). The
    residual is taken of the logarithm.
    """

    name = "fine-grained-moe"
    parameters = {
        "c": positive(0.05, 5, linear=True),
        "a": positive(1, 1e4, linear=True),
        "g": positive(0.1, 1e3, linear=True),
        "gamma": free(0.1, 1.5, lower=0.0, upper=5.0),
        "alpha": free(0.03, 0.8),
        "b": positive(1, 1e5, linear=True),
        "beta": free(0.03, 0.8),
    }
    inputs = ("params", "tokens", "granularity")
    fewest_tokens = 1e-3  # of all parameters, most of them idle: compute-optimal models have fewer tokens than these
    equation = "L(N, D, G) = c + (g / G^gamma + a) / N^alpha + b / D^beta"
    source = "Krajewski et al. 2024 (arXiv 2402.07871)"
    objective = Objective("huber", "log", 0.1)
    published = {
        "Krajewski 2024": {
            "c": 0.47,
            "a": 18.1,
            "g": 2.1,
            "gamma": 0.58,
            "alpha": 0.115,
            "b": 30.8,
            "beta": 0.147,
        }
    }  # fmt: skip

    def formula(self, p, x):
        return p.c + (p.g * x.granularity**-p.gamma + p.a) * x.params**-p.alpha + p.b * x.tokens**-p.beta


def fine_grained_flops(
    granularity: float, expansion: float = 64.0, width_per_layer: float = 64.0
) -> Callable[[np.ndarray], np.ndarray]:
    """Training FLOPs per token as a function of all parameters N of a fine-grained mixture of experts.

    Counted from shapes, forward and backward (6 per weight that a token meets), attention scores left out: a block of
    width d has 4 d^2 weights of attention, 8 d^2 of each of E experts' worth of hidden layer (G times as many experts,
    of which G are active), and a router of d E G. Hence N = n d^2 (4 + 8 E) without the routers, which meet a token
    with 12 d^2 + d E G weights per block, at width d = `width_per_layer` x number of blocks n. The router's share
    grows with G; it is what makes the best granularity finite.

    granularity: G. expansion: E, all experts' hidden units over the dense layer's. Raises `BadInput` unless positive.
    """
    for field, value in (("granularity", granularity), ("expansion", expansion), ("width_per_layer", width_per_layer)):
        if not (np.isfinite(value) and value > 0):
            raise BadInput(field, value, "must be a finite number above 0")

    def flops_per_token(N: np.ndarray) -> np.ndarray:
        width = np.cbrt(np.asarray(N, float) * width_per_layer / (4 + 8 * expansion))
        return 6 * width / width_per_layer * (12 * width**2 + width * expansion * granularity)

    return flops_per_token


class JointMoE(Law):
    """L(N, D, E) = a / (Ehat^delta N^(alpha + gamma ln Ehat)) + b / (Ehat^omega D^(beta + zeta ln Ehat)) + c
    (Ludziejewski et al. 2025, arXiv 2502.05172).

    N: parameters that one token meets (count), E: experts (1: dense), D: training tokens, L: nats per token. Ehat: the
    saturating transform of E of the routing law (`routing`), E_start for dense models, at most E_max. Experts act on
    the coefficient of size (delta) and of data (omega) and on both exponents (gamma, zeta).

    Powers are read as denominators. The source's fit: a 35.91, delta 0.2285, alpha 0.1889, gamma -0.0098; b 35.98,
    omega -0.5529, beta 0.1775, zeta 0.0259; c 1.3637: numerators with these signs would make more experts, and more
    parameters, raise the loss. E_start and E_max of that fit are not known here, so `published` has no entry.

    `optimal(C, experts=E)` allocates C = 6 N D over active parameters and tokens.

    Objective: Huber, delta 1e-3, on log residuals.
    """

    name = "joint-moe"
    parameters = {
        "a": positive(1, 1e4, linear=True),
        "delta": free(-0.5, 0.8),
        "alpha": free(0.05, 0.6),
        "gamma": free(-0.03, 0.03),
        "b": positive(1, 1e5, linear=True),
        "omega": free(-0.8, 0.5),
        "beta": free(0.05, 0.6),
        "zeta": free(-0.03, 0.03),
        "c": positive(0.1, 5, linear=True),
        "E_start": positive(1.0, 5.0),
        "E_max": positive(60.0, 3000.0),
    }
    inputs = ("params_active", "tokens", "experts")
    paid = "params_active"
    scale = ("params_active", "tokens")
    ranges = {"experts": (1.0, np.inf)}
    equation = "L(N, D, E) = a / (Ehat^delta N^(alpha + gamma ln Ehat)) + b / (Ehat^omega D^(beta + zeta ln Ehat)) + c"
    source = "Ludziejewski et al. 2025 (arXiv 2502.05172)"

    def columns_of(self, columns):
        return {
            "n": np.log(columns["params_active"]),
            "d": np.log(columns["tokens"]),
            "more": columns["experts"] - 1.0,
        }

    def formula(self, p, x):
        e = np.log(saturating(x.more, p.E_start, p.E_max))
        size = np.exp(-p.delta * e - (p.alpha + p.gamma * e) * x.n)
        data = np.exp(-p.omega * e - (p.beta + p.zeta * e) * x.d)
        return p.a * size + p.b * data + p.c


class MoESparsity(Law):
    """L(N, D, S) = a / N^alpha + b / D^beta + c / (1 - S)^lambda + d / ((1 - S)^delta N^gamma) + e
    (Abnar et al. 2025, arXiv 2501.12370).

    N: all parameters (count), D: training tokens, S: sparsity, the share of experts that a token does not meet (0:
    dense; below 1), L: nats per token. c + e: irreducible loss of dense models; lambda (`lam`): how sparsity moves it,
    downwards where c lambda < 0; delta, gamma: sparsity costs more in small models.

    The source's fit reaches R2 0.99 on its own rows but 0.68 on a held-out sparsity: trust hold-out by sparsity, not
    residuals. c and e are told apart by the bend in S only, and run off to opposite infinities where lambda is 0. So
    inside, e + c / (1 - S)^lambda is t0 + t1 ((1 - S)^-lambda / g - 1) / lambda with g its geometric mean, which is a
    straight line in ln(1 - S) at lambda = 0; c and e may have either sign, and cannot be held or tied.

    Objective: Huber, delta 1e-3, on log residuals, as in the source.
    """

    name = "moe-sparsity"
    parameters = {
        "a": positive(1, 1e6, linear=True),
        "alpha": free(0.1, 1.0),
        "b": positive(1, 1e6, linear=True),
        "beta": free(0.1, 1.0),
        "c": free(-5, 5),
        "lam": free(-0.8, 0.3, lower=-4.0, upper=4.0),
        "d": positive(0.1, 1e3, linear=True),
        "delta": free(-0.2, 0.6),
        "gamma": free(0.03, 0.5),
        "e": free(-5, 5),
    }
    inputs = ("params", "tokens", "sparsity")
    may_be_zero = ("sparsity",)
    ranges = {"sparsity": (0.0, 1.0 - 1e-9)}
    fewest_tokens = 1e-3  # of all parameters, idle ones included
    equation = "L(N, D, S) = a / N^alpha + b / D^beta + c / (1 - S)^lam + d / ((1 - S)^delta N^gamma) + e"
    source = "Abnar et al. 2025 (arXiv 2501.12370)"
    published = {
        "Abnar 2025": {
            "a": 16612.50, "alpha": 0.5962, "b": 5455.67, "beta": 0.3954, "c": 0.4598, "lam": -0.1666,
            "d": 17.26, "delta": 0.1603, "gamma": 0.1595, "e": 0.94,
        }
    }  # fmt: skip

    def formula(self, p, x):
        return self.without_floor(p, x) + p.c * np.exp(p.lam * x.inactive) + p.e

    def without_floor(self, p: Any, x: Any) -> Any:
        size = p.a * np.exp(-p.alpha * x.n) + p.d * np.exp(p.delta * x.inactive - p.gamma * x.n)
        return size + p.b * np.exp(-p.beta * x.t)

    def columns_of(self, columns):
        return {
            "n": np.log(columns["params"]),
            "t": np.log(columns["tokens"]),
            "inactive": -np.log1p(-columns["sparsity"]),
        }

    def problem(self, columns, on):
        return StraightFloor(columns, on)

    def fit_rows(self, rows, options, bootstrap=0, about=None, near=None):
        held = {"c", "e"} & {*options.fixed, *options.tied, *options.tied.values()}
        if held:
            raise BadInput("fixed or tied", sorted(held), "c and e cannot be held or tied in this law; lam can")
        return super().fit_rows(rows, options, bootstrap, about, near)


class FloorAtMean(MoESparsity):
    """The sparsity law with its floor's slope t1 and value t0 at the rows' mean ln(1 - S) in the places of c and e."""

    parameters = {
        **MoESparsity.parameters,
        "c": free(-0.5, 0.5, linear=True),
        "e": free(0.0, 5.0, linear=True),
    }

    def __init__(self, inactive: np.ndarray):
        self.centre = float(inactive.mean())
        self.levels, self.level_of_row = np.unique(inactive - self.centre, return_inverse=True)

    def formula(self, p, x):
        bent = p.c * self.levels * stretch(p.lam * self.levels)
        return self.without_floor(p, x) + p.e + bent[..., self.level_of_row]


class StraightFloor(FormRegression):
    """The regression in t0 and t1. At lambda = 0 exactly c and e would be infinite: there lambda is given as 1e-7."""

    def __init__(self, columns: Mapping[str, np.ndarray], on: str):
        law = FloorAtMean(-np.log1p(-columns["sparsity"]))
        super().__init__(law, columns, on)
        self.centre = law.centre
        names = list(self.law.parameters)
        self.at = [names.index(name) for name in ("c", "lam", "e")]

    def natural(self, theta):
        out = super().natural(theta)
        c, lam, e = self.at
        t1, q, t0 = out[..., c], out[..., lam], out[..., e].copy()
        q = np.where(np.abs(q) < 1e-7, 1e-7, q)
        out[..., e], out[..., c], out[..., lam] = t0 - t1 / q, t1 / q * np.exp(-q * self.centre), q
        return out

    def internal(self, params):
        out = np.array(params, dtype=float)
        c, lam, e = self.at
        size = out[..., c] * np.exp(out[..., lam] * self.centre)
        out[..., e] += size
        out[..., c] = out[..., lam] * size
        return super().internal(out)


class EfficiencyLeverage(Law):
    """EL(C, A, G) = Ahat^(a + d log10 C + beta log2 G + gamma (log2 G)^2) (Tian et al. 2025, arXiv 2507.17702).

    EL: leverage, the compute of a dense model over that of a mixture of experts with the same loss; C: training FLOPs;
    A: activation ratio, active over all experts, shared ones counted in both (0 to 1); G: granularity. Ahat: A
    saturating at both ends, 1/Ahat = 1/(A + 1/(1/A_start - 1/A_max)) + 1/A_max: about A + A_start while A_max is far
    above 1, and then the data do not determine A_max: hold it, `fixed={"A_max": 5.28e16}`.

    The source does not say which logarithms; base 10 for C with base 2 for G gives what it claims (leverage above 7 at
    1e22 FLOP, A = 3.1 %, G = 12; best G of 8 to 12), natural logarithms give 5,000.

    Objective: least squares on log EL (the text at hand does not name the source's).
    """

    name = "efficiency-leverage"
    target = "leverage"
    parameters = {
        "a": free(-2, 4),
        "d": free(-0.3, 0.1),
        "beta": free(-0.4, 0.2),
        "gamma": free(-0.02, 0.06),
        "A_start": positive(1e-3, 0.2),
        "A_max": positive(1.0, 1e17),
    }
    inputs = ("flops", "activation", "granularity")
    ranges = {"activation": (0.0, 1.0)}
    equation = "EL(C, A, G) = Ahat^(a + d log10 C + beta log2 G + gamma (log2 G)^2)"
    source = "Tian et al. 2025 (arXiv 2507.17702)"
    objective = LOG_SQUARES
    published = {
        "Tian 2025": {
            "a": 1.23,
            "d": -7.61e-2,
            "beta": -1.17e-1,
            "gamma": 1.67e-2,
            "A_start": 1.63e-2,
            "A_max": 5.28e16,
        }
    }  # fmt: skip

    def formula(self, p, x):
        g = np.log2(x.granularity)
        exponent = p.a + p.d * np.log10(x.flops) + p.beta * g + p.gamma * g**2
        return np.exp(exponent * np.log(saturating(x.activation, p.A_start, p.A_max)))

    @staticmethod
    def best_granularity(p: Any) -> Any:
        """G = 2^(-beta / (2 gamma)) with the highest leverage (where Ahat < 1); NaN where there is none (gamma <= 0).

        p: anything with p.beta and p.gamma (`fit.params`, `fit.draws`, constants as a Series).
        """
        beta, gamma = np.asarray(p.beta, float), np.asarray(p.gamma, float)
        with np.errstate(all="ignore"):
            return np.where(gamma > 0, 2.0 ** (-beta / (2 * gamma)), np.nan)[()]
