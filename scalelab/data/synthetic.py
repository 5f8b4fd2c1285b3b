"""The `synthetic` source: a language whose entropy is known exactly, and whose loss falls as a power law.

**Construction.** A dictionary of R words, word r drawn with the Zipf-Mandelbrot probability p_r ~ (r + q)^-s; text is
words drawn independently, each spelled in letters and ended by a space. Spelling is a random digital search tree
(Coffman and Eve, CACM 13, 1970): words come in the order of their rank, each walks down from the root by random letters
and settles on the first node that no earlier word has taken. So a word is a node, its spelling is the way to it,
frequent words are short, and a word may begin another. Letters follow a random order-1 chain, so that short contexts
say something too. A document is a row: bos, then exactly T tokens, starting a word and cut wherever T falls.

**Why the entropy is what it says.** The space makes the text uniquely decodable from its start: the tokens since the
last space, or since bos, are a path from the root to a node v, and nothing before them matters. With m(v) the summed
probability of the words at and below v, the next token is a space with probability p(v) / m(v) and leads to child c
with probability m(c) / m(v). So H(X_t | X_<t) is the mean, over nodes, of the entropy of that distribution, and v has
probability u(t - depth(v)) m(v), where u(t) is the probability that a word starts at t: the renewal equation
u(t) = sum_l f(l) u(t - l), u(0) = 1, f(l) the probability that a word and its space have l tokens. The sum over t < T
is H(X_1..X_T), to rounding; H / T is `entropy(T)`, which tends to the rate H(p) / E[l] as T grows. No model's expected
loss on rows lies below it, and the true distribution reaches it.

**Why the loss falls as a power law.** A learner gains a node's share of the loss by knowing that node, and node masses
have the tail of p. One that knows the n most frequent nodes has an excess over the entropy of about n^-(s - 1): 0.40
at the default s = 1.4; measured local slopes are 0.37 to 0.46 from n = 10 to 3000 of 262144 (0.51 at 10^4: words run
out). One that counts (Krichevsky-Trofimov at each node) has met, after D tokens, some D^(1/s) words, so its excess
falls about as D^-(1 - 1/s) = D^-0.29; measured 0.297 from 3 10^3 to 3 10^6 tokens, within 10 % of a straight line in
log-log.

Rows are pure functions of (seed, index): Philox (Salmon et al., SC 2011), keyed by a hash of the language and the seed,
with the index in its counter, draws the words of a row; held-out rows have a key of their own. Rows for a shorter T are
prefixes of rows for a longer one.
"""

from __future__ import annotations

import functools
import hashlib
import string
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, Int64

from scalelab import config
from scalelab.data import draws
from scalelab.data.stream import HeldOut
from scalelab.errors import BadInput

DEFAULTS = {"vocab": 27, "words": 2**18, "s": 1.4, "q": 2.0, "seed": 0}
_SYMBOLS = " " + string.ascii_letters + string.digits + string.punctuation
END = 255
_VERSION = "synthetic-1"  # changes whenever rows of the same spec do


def parse(spec: str, field: str) -> dict[str, Any]:
    """`"vocab=27,words=262144,s=1.4,q=2,seed=0"`, or any part of it, over the defaults. Raises `BadInput`."""
    try:
        values = config.parse_arg(spec, **DEFAULTS).to_dict()
    except BadInput as error:
        raise BadInput(field, spec, f"{error.field}: {error.remedy}") from None
    limits = {"vocab": (3, len(_SYMBOLS)), "words": (2, 2**22), "s": (0.0, 20.0), "q": (0.0, 1e6), "seed": (0, 2**32)}
    for name, (low, high) in limits.items():
        if not low <= values[name] <= high:
            raise BadInput(field, spec, f"{name} must lie in [{low}, {high}]")
    return values


def content(spec: str, field: str) -> str:
    """Hash of all that determines the language."""
    text = _VERSION + config.canonical_json(parse(spec, field))
    return hashlib.sha256(text.encode()).hexdigest()


class Symbols:
    """Tokenizer of a synthetic language: token = one ASCII character, 0 the space; `bos` is the last id."""

    lossless = True

    def __init__(self, symbols: int):
        self.bos, self.vocab_size, self.fingerprint = symbols, symbols + 1, f"symbols-{symbols}"

    def encode(self, text: str) -> list[int]:
        alphabet = _SYMBOLS[: self.bos]
        return [alphabet.index(symbol) for symbol in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(_SYMBOLS[i] for i in ids if i != self.bos)

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        return [np.array(self.encode(document.decode()), np.uint16) for document in documents]


class Language:
    """The dictionary and its tree.

    p: (R,) probability of each word. lengths: (R,) tokens, the space included. spelling: (R, longest) tokens, `END`
    after the space. mass, own, depth, parent, letter: (R + 1,) of the tree's nodes, root first: probability
    of the words at and below it; of the word at it; its depth; its parent; the letter that leads to it.
    """

    def __init__(self, vocab: int, words: int, s: float, q: float, seed: int):
        self.vocab = vocab
        weights = (np.arange(1, words + 1) + q) ** -s
        self.p: Float[np.ndarray, " R"] = weights / weights.sum()
        self._grow(vocab, words, draws.key(_VERSION, vocab, words, seed))
        self.own = np.zeros(words + 1)
        self.own[self._node] = self.p
        self.mass = self.own.copy()
        for depth in range(self.depth.max(), 0, -1):
            level = np.flatnonzero(self.depth == depth)
            np.add.at(self.mass, self.parent[level], self.mass[level])
        self._cdf = np.cumsum(self.p)
        self._cdf[-1] = 1.0

    def _grow(self, vocab: int, words: int, key: tuple[int, int]) -> None:
        """All words descend together, level by level; at a new node the one of lowest rank settles."""
        philox = np.random.Philox(key=np.array(key, np.uint64))
        letters = vocab - 1
        zipf = np.cumsum(1 / np.arange(1, letters + 1))
        # After letter a (0: at the start), the letters stand in a random order, with Zipf probabilities in that order.
        order = np.argsort(draws.uniform(philox, vocab * letters).reshape(vocab, letters), axis=1, kind="stable") + 1
        parent, letter, depth = [np.array([-1])], [np.array([0])], [np.array([0])]
        walking, at, previous = np.arange(words), np.zeros(words, np.int64), np.zeros(words, np.int64)
        self._node, levels, nodes = np.empty(words, np.int64), [], 1
        while len(walking):
            pick = np.searchsorted(zipf / zipf[-1], draws.uniform(philox, len(walking)), "right")
            previous = order[previous, np.minimum(pick, letters - 1)]
            column = np.zeros(words, np.uint8)
            column[walking] = previous
            levels.append(column)
            new, first, which = np.unique(at * vocab + previous, return_index=True, return_inverse=True)
            parent.append(new // vocab)
            letter.append(new % vocab)
            depth.append(np.full(len(new), len(levels)))
            self._node[walking[first]] = nodes + np.arange(len(new))
            stays = np.ones(len(walking), bool)
            stays[first] = False
            at = (nodes + which)[stays]
            walking, previous, nodes = walking[stays], previous[stays], nodes + len(new)
        self.parent, self.letter, self.depth = map(np.concatenate, (parent, letter, depth))
        self.lengths = self.depth[self._node] + 1
        self.spelling = np.stack([*levels, np.zeros(words, np.uint8)], axis=1)
        self.spelling[np.arange(len(levels) + 1) >= self.lengths[:, None]] = END

    def entropy(self, T: int) -> float:
        """H(X_1..X_T) / T in nats per token of a row (see the module)."""
        levels = int(self.depth.max()) + 1
        below = np.bincount(self.depth, _xlogx(self.mass), levels + 1)  # sum of m log m over the nodes of a depth
        # m(v) times the entropy at v, summed: m log m - own log own - (m log m of its children).
        gain = below[:levels] - np.bincount(self.depth, _xlogx(self.own), levels) - below[1:]
        f = np.bincount(self.lengths, self.p, levels + 1)
        u = np.zeros(T)
        u[0] = 1.0
        for t in range(1, T):
            back = np.arange(1, min(t, levels) + 1)
            u[t] = f[back] @ u[t - back]
        return float(np.convolve(u, gain)[:T].sum() / T)

    @property
    def rate(self) -> float:
        """H(p) / E[l]: the limit of `entropy`, in nats per token."""
        return float(-_xlogx(self.p).sum() / (self.p @ self.lengths))

    def rows(self, key: tuple[int, int], indices: Int64[np.ndarray, " n"], T: int) -> Int32[np.ndarray, "n T+1"]:
        """Row i is bos and T tokens, from the words that Philox draws with this key and counter i * 2^128."""
        most = T // 2 + 1  # words are two tokens at least
        words = np.searchsorted(self._cdf, draws.rows(key, indices, most), "right")
        tokens = self.spelling[words]
        tokens = tokens[tokens != END]
        starts = np.concatenate(([0], np.cumsum(self.lengths[words].sum(1))[:-1]))
        out = np.full((len(indices), T + 1), self.vocab, np.int32)
        out[:, 1:] = tokens[starts[:, None] + np.arange(T)]
        return out


def _xlogx(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1.0))


@functools.lru_cache(maxsize=4)
def _language(vocab: int, words: int, s: float, q: float, seed: int) -> Language:
    return Language(vocab, words, s, q, seed)


class Synthetic:
    """The source: endless rows by number, for a sequence length (see `corpus.Source`)."""

    examples = None

    def __init__(self, spec: str, seq_len: int, field: str):
        self._values, self._seq_len = parse(spec, field), seq_len
        self.content = content(spec, field)
        self.language = _language(**self._values)
        self.tokenizer = Symbols(self.language.vocab)
        self.entropy = self.language.entropy(seq_len)

    def rows(self, seed: int, indices: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, "n T+1"]:
        return self.language.rows(draws.key(self.content, "train", seed), indices, self._seq_len)

    def held_out(self, limit: int) -> HeldOut:
        """As many rows as fit the limit; each is a document of T targets, T bytes when spelled out."""
        n, T = max(1, limit // self._seq_len), self._seq_len
        tokens = self.language.rows(draws.key(self.content, "held out"), np.arange(n), T)
        doc = np.repeat(np.arange(n, dtype=np.int32)[:, None], T, axis=1)
        return HeldOut(tokens, doc, np.full(n, T, np.int64))

    def describe(self) -> dict[str, Any]:
        return {
            "spec": self._values,
            "entropy": self.entropy,
            "entropy_rate": self.language.rate,
            "unique_tokens": None,
        }
