"""How notebooks show results: as their text, in lines that wrap."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod

from scalelab.laws.notices import Notice


def pre(text: str) -> str:
    """Text as HTML: columns stay aligned, long findings wrap."""
    return f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'


def percent(error: float) -> str:
    """0.0123 -> 1.23%. A flexible law that is fitted to too little can be off by any number of digits."""
    return "over 1000%" if error > 10 else f"{error:.2%}"


class Shown(ABC):
    """A result that a notebook shows by its `summary()`."""

    @abstractmethod
    def summary(self) -> str: ...

    def _repr_html_(self) -> str:
        return pre(self.summary())


class Notices(list[Notice]):
    """Findings, worst first; as text, one a line."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no warnings"

    def _repr_html_(self) -> str:
        return pre(str(self))


def worst_first(notices: list[Notice]) -> Notices:
    rank = {"error": 0, "warning": 1, "note": 2}
    return Notices(sorted(notices, key=lambda n: rank[n.severity]))
