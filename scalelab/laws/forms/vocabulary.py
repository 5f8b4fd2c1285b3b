"""The vocabulary law: non-vocabulary parameters, vocabulary parameters and data."""

from __future__ import annotations

from scalelab.laws.law import Law
from scalelab.laws.objective import Objective
from scalelab.laws.parameter import free, positive
from scalelab.laws.powersum import EXPONENTS

EXPONENT = free(0.05, 1.2, lower=EXPONENTS[0], upper=EXPONENTS[1])


class Vocabulary(Law):
    """L_u = -E + A1 / N_nv^alpha1 + A2 / (V d)^alpha2 + B / D^beta (Tao et al. 2024, arXiv 2407.13623, approach 3).

    L_u: unigram-normalised loss (nats per token): cross-entropy less that of the unigram distribution, so that models
    with different vocabularies compare; mostly negative. N_nv: parameters but those of the vocabulary
    (`params_non_embedding`), V: vocabulary (`vocab_size`), d: embedding width (`width`), D: training tokens, counts.
    E: how far below the unigram loss endless size, vocabulary and data come; A1, A2, B: what each shortage adds;
    alpha1, alpha2, beta: how fast it goes. A larger vocabulary at fixed text is fewer tokens: D must be counted in the
    run's own tokens.

    Objective: sum of w Huber_delta(L_model - L_u), delta = 1e-3, on the value because its sign changes; the authors
    also tie the exponents of size and data: `tied={"alpha1": "beta"}`.
    """

    name = "vocabulary"
    parameters = {
        "E": positive(1, 10, linear=True),
        "A1": positive(1, 1e5, linear=True),
        "A2": positive(1, 1e5, linear=True),
        "B": positive(1, 1e5, linear=True),
        "alpha1": EXPONENT,
        "alpha2": EXPONENT,
        "beta": EXPONENT,
    }
    inputs = ("params_non_embedding", "vocab_size", "width", "tokens")
    may_be_zero = ("loss",)
    equation = "L_u = -E + A1 / N_nv^alpha1 + A2 / (V d)^alpha2 + B / D^beta"
    source = "Tao et al. 2024 (arXiv 2407.13623), approach 3"
    objective = Objective("huber", "value", 1e-3)
    scale = ("params_non_embedding", "tokens")

    def columns_of(self, columns):
        return {
            "size": columns["params_non_embedding"],
            "vocabulary": columns["vocab_size"] * columns["width"],
            "tokens": columns["tokens"],
        }

    def formula(self, p, x):
        return -p.E + p.A1 * x.size**-p.alpha1 + p.A2 * x.vocabulary**-p.alpha2 + p.B * x.tokens**-p.beta
