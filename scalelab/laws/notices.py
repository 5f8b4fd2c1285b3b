"""What a fit has to say about itself: records with a code, a severity, the numbers and a remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

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

    def __str__(self) -> str:
        return f"{self.severity} [{self.code}] {self.message} Remedy: {self.remedy}"


def name_rows(labels: Iterable[Any], most: int = 5) -> str:
    """`3, 7, 12, ... (40 rows)`"""
    labels = [str(label) for label in labels]
    shown = ", ".join(labels[:most])
    return shown if len(labels) <= most else f"{shown}, ... ({len(labels)} rows)"
