"""What a fit has to say about itself: records with a code, a severity, the numbers and a remedy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

NOT_FINITE: dict[Any, float] = {None: math.nan, "inf": math.inf, "-inf": -math.inf}
SEVERITIES = ("note", "warning", "error")


@dataclasses.dataclass(frozen=True)
class Notice:
    """One finding. `error` means that the numbers must not be used: no interval is given for such a fit."""

    code: str
    severity: str
    message: str
    remedy: str
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity {self.severity!r} is none of {SEVERITIES}")

    @classmethod
    def restore(cls, document: dict[str, Any]) -> Notice:
        """From a file, in which numbers that are not finite are null and text."""
        return cls(**{**document, "numbers": _numbers(document["numbers"])})

    def __str__(self) -> str:
        return f"{self.severity} [{self.code}] {self.message} Remedy: {self.remedy}"


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numbers(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return NOT_FINITE.get(value, value)


def name_rows(labels: Iterable[Any], most: int = 5) -> str:
    """`3, 7, 12, ... (40 rows)`"""
    labels = [str(label) for label in labels]
    shown = ", ".join(labels[:most])
    return shown if len(labels) <= most else f"{shown}, ... ({len(labels)} rows)"
