"""Arguments that no form of an operation takes: refused by name, before shapes inside of it fail."""

from __future__ import annotations


def check_chunk(chunk: int, power_of_two: bool = False) -> None:
    if chunk < 1 or (power_of_two and chunk & (chunk - 1)):
        raise ValueError(f"chunk = {chunk}: must be {'a power of two' if power_of_two else 'at least 1'}")


def check_groups(G: int, H: int) -> None:
    if G < 1 or H % G:
        raise ValueError(f"keys of {G} groups for {H} heads: the groups must divide the heads")
