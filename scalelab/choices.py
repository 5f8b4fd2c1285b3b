"""Multiple choice by likelihood: questions from JSONL, as rows that score nothing but the choices.

A line is {"context": ..., "choices": [...], "answer": index}; `question` is another name of `context`. The text of a
choice is context + choice, with a space between unless the context ends or the choice begins with white space.

**Where a choice begins.** Tokens need not end where the context does: a merge may reach over it, and one choice may
change how the context is cut. So the whole text of every choice is tokenised, and what all choices and the context
alone share at their beginning, in tokens, is what is given; the rest is scored. For all choices the given tokens are
the same, so log p(rest | given) orders them as the probabilities of their whole texts do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from scalelab.data.stream import labelled
from scalelab.data.tokenizers import Tokenizer
from scalelab.errors import BadInput
from scalelab.evaluate import proportion


@dataclasses.dataclass(frozen=True)
class Question:
    line: int
    context: str
    choices: tuple[str, ...]
    answer: int

    def texts(self) -> list[str]:
        between = [
            "" if not self.context or self.context[-1].isspace() or choice[0].isspace() else " "
            for choice in self.choices
        ]
        return [self.context + space + choice for space, choice in zip(between, self.choices, strict=True)]


@dataclasses.dataclass(frozen=True)
class Asked:
    """tokens: bos and the text, of each choice; the first `given` of them, the same for all, are not scored."""

    tokens: tuple[tuple[int, ...], ...]
    given: int
    bytes: tuple[int, ...]  # of each choice
    answer: int


def read(path: str, field: str = "--tasks") -> tuple[list[Question], str]:
    """The questions of a file, and the hash of its content. Raises `BadInput` that names the line of the first bad."""
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise BadInput(field, path, f"cannot be read: {error.strerror}") from None
    questions = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            questions.append(_question(number, line, f"{path}:{number}"))
    if not questions:
        raise BadInput(field, path, "holds no question")
    return questions, hashlib.sha256(content).hexdigest()


def _question(number: int, line: bytes, where: str) -> Question:
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(where, line[:60].decode(errors="replace"), f"is not JSON ({error})") from None
    if not isinstance(document, dict):
        raise BadInput(where, document, "must be an object with context (or question), choices and answer")
    names = [name for name in ("context", "question") if name in document]
    if len(names) != 1:
        raise BadInput(where, sorted(document), "must have one of context and question")
    context, choices, answer = document[names[0]], document.get("choices"), document.get("answer")
    if not _is_text(context):
        raise BadInput(f"{where}: {names[0]}", context, "must be text")
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadInput(f"{where}: choices", choices, "must be a list of at least two texts")
    for choice in choices:
        if not _is_text(choice) or not choice:
            raise BadInput(f"{where}: choices", choice, "must be texts that are not empty")
    if len(set(choices)) < len(choices):
        raise BadInput(f"{where}: choices", choices, "must be different")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise BadInput(f"{where}: answer", answer, f"must be the index of a choice, 0 to {len(choices) - 1}")
    return Question(number, context, tuple(choices), answer)


def _is_text(value: Any) -> bool:
    """JSON can spell halves of surrogate pairs, which no text has."""
    return isinstance(value, str) and not any(0xD800 <= ord(c) < 0xE000 for c in value)


def ask(questions: Sequence[Question], tokenizer: Tokenizer, path: str, most: int = 0) -> tuple[list[Asked], int]:
    """The questions in tokens, and how many contexts were cut: where a choice would be read beyond `most` tokens (0:
    no limit), all choices of its question lose as much of their shared beginning, from the left, after bos."""
    asked, cut = [], 0
    for question in questions:
        where = f"{path}:{question.line}"
        try:
            texts = [tokenizer.encode(text) for text in (question.context, *question.texts())]
        except (ValueError, TypeError):
            raise BadInput(where, question.context, "holds what the run's tokenizer cannot encode") from None
        given = _shared(texts)
        if any(len(text) == given for text in texts[1:]):
            raise BadInput(where, question.choices, "has a choice without a token of its own")
        over = max(0, max(map(len, texts[1:])) - most) if most else 0
        if over > given:
            raise BadInput(where, question.choices, f"has a choice beyond the {most} tokens that the model can read")
        cut += over > 0
        tokens = tuple((tokenizer.bos, *text[over:]) for text in texts[1:])
        sizes = tuple(len(choice.encode()) for choice in question.choices)
        asked.append(Asked(tokens, 1 + given - over, sizes, question.answer))
    return asked, cut


def rows(asked: Sequence[Asked], at_once: int) -> Iterator[tuple[np.ndarray, Int32[np.ndarray, "B T+1"]]]:
    """(numbers of the choices, counted over all questions; their rows) in batches of like length, of about `at_once`
    tokens. The rows that fill up the last batch of a length are empty and come without a number."""
    choices = [(text, question.given) for question in asked for text in question.tokens]
    lengths = np.array([_padded(len(text) - 1) for text, _ in choices])
    for length in np.unique(lengths).tolist():
        numbers = np.flatnonzero(lengths == length)
        B = max(1, at_once // length)
        for start in range(0, len(numbers), B):
            some = numbers[start : start + B]
            tokens = np.zeros((B, length + 1), np.int64)
            labels = np.full((B, length), -1, np.int64)
            for row, number in enumerate(some):
                text, given = choices[number]
                tokens[row, : len(text)] = text
                labels[row, given - 1 : len(text) - 1] = text[given:]
            yield some, labelled(tokens, labels)


def results(asked: Sequence[Asked], nats: np.ndarray) -> dict[str, float | int]:
    """Accuracies by log-likelihood and by log-likelihood per byte of the choice, from the nats of every choice in
    order; the error is the binomial's. A tie goes to the first."""
    sizes = [len(question.tokens) for question in asked]
    right = {"accuracy": [], "accuracy_per_byte": []}
    for question, cost in zip(asked, np.split(nats, np.cumsum(sizes)[:-1]), strict=True):
        right["accuracy"].append(np.argmin(cost) == question.answer)
        right["accuracy_per_byte"].append(np.argmin(cost / np.array(question.bytes)) == question.answer)
    found: dict[str, float | int] = {"questions": len(asked)}
    for name, values in right.items():
        value, error = proportion(np.array(values, np.float64), np.ones(len(asked)))
        found |= {name: value, f"{name}_se": error}
    return found | {"chance": float(np.mean([1 / size for size in sizes]))}


def _shared(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens they all begin with."""
    same = (len(set(tokens)) == 1 for tokens in zip(*texts, strict=False))  # as far as the shortest goes
    return sum(itertools.takewhile(bool, same))


def _padded(length: int) -> int:
    """Up to 16, powers of two and their three halves: few lengths to compile for, and little to waste."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
