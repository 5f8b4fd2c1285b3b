"""Held-out loss with its standard error, and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from scalelab.data import HeldOut
from scalelab.sharding import put_rows


class Evaluator:
    """Scores the same held-out documents each time it is called.

    `nll(params, rows)` maps token rows (B, T + 1) to float32 nats (B, T); of a model with recursions to (nats, which of
    them updated each token (B, T, Nr)). The mean over sources is weighted as the training mixture is.
    """

    def __init__(
        self,
        held_out: Mapping[str, HeldOut],
        weights: Mapping[str, float],
        batch_size: int,
        mesh: Mesh,
        nll: Callable[[Any, Any], jax.Array],
    ):
        self.held_out, self.batch_size, self.mesh, self.nll = held_out, batch_size, mesh, nll
        total = sum(weights[name] for name in held_out)
        self.weights = {name: weights[name] / total for name in held_out}

    def __call__(self, params: Any) -> dict[str, Any]:
        """loss, loss_se (nats per token), bpb, bpb_se; `sources` has the same for each. Of recursions also `selected`:
        the share of the scored tokens that each updated."""
        sources = {name: self._score(params, held) for name, held in self.held_out.items()}
        mean: dict[str, Any] = {}
        for name in ("loss", "bpb"):
            mean[name] = sum(w * sources[s][name] for s, w in self.weights.items())
            mean[f"{name}_se"] = math.sqrt(sum((w * sources[s][f"{name}_se"]) ** 2 for s, w in self.weights.items()))
        if all("selected" in source for source in sources.values()):
            shares = [w * np.array(sources[s]["selected"]) for s, w in self.weights.items()]
            mean["selected"] = np.sum(shares, axis=0).tolist()
        return mean | {"sources": sources}

    def _batches(self, held: HeldOut) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(held.tokens), self.batch_size):
            rows, doc = held.tokens[start : start + self.batch_size], held.doc[start : start + self.batch_size]
            missing = self.batch_size - len(rows)
            if missing:  # one shape, one compilation; doc = -1 is not counted
                rows = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
                doc = np.concatenate([doc, np.full((missing, doc.shape[1]), -1, doc.dtype)])
            yield rows, doc

    def _score(self, params: Any, held: HeldOut) -> dict[str, Any]:
        documents = len(held.bytes)
        nats, tokens, selected = np.zeros(documents), np.zeros(documents), []
        # All batches are dispatched before the first result is read: the device never waits for the host.
        running = [(self.nll(params, put_rows(rows, self.mesh)), doc) for rows, doc in self._batches(held)]
        for nll, doc in running:
            kept = doc >= 0
            if isinstance(nll, tuple):
                nll, updated = nll
                selected.append(np.asarray(updated, np.float64)[kept].sum(axis=0))
            nats += np.bincount(doc[kept], np.asarray(nll, np.float64)[kept], documents)
            tokens += np.bincount(doc[kept], minlength=documents)
        loss, loss_se = ratio(nats, tokens)
        bpb, bpb_se = ratio(nats / math.log(2), np.asarray(held.bytes, np.float64))
        found: dict[str, Any] = {"loss": loss, "loss_se": loss_se, "bpb": bpb, "bpb_se": bpb_se}
        if selected:
            found["selected"] = (np.sum(selected, axis=0) / tokens.sum()).tolist()
        return found


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """sum / sum over documents, and its standard error with documents as the independent units.

    The linearised (Taylor) variance of a ratio estimator, Cochran 1977, section 6.4; nan for a single document.
    """
    value = float(numerator.sum() / denominator.sum())
    n = len(numerator)
    if n < 2:
        return value, math.nan
    residual = numerator - value * denominator
    return value, float(math.sqrt(n / (n - 1) * (residual**2).sum()) / denominator.sum())


def proportion(right: np.ndarray, asked: np.ndarray) -> tuple[float, float]:
    """Share of right answers, and its standard error with documents as the independent units: `ratio`, the binomial's
    where each has one answer.

    All right or all wrong is no certainty: there p = (right documents + 1) / (documents + 2) stands in the error.
    """
    value, error = ratio(right, asked)
    if value in (0.0, 1.0):
        n = len(right)  # of which one gives no spread either
        p = (value * n + 1) / (n + 2)
        error = math.sqrt(p * (1 - p) / n)
    return value, error
