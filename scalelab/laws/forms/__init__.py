"""The laws, one file per family. `ALL` is what `laws.available()` names."""

from scalelab.laws.forms.chinchilla import Chinchilla

ALL = (Chinchilla,)

__all__ = ["ALL", "Chinchilla"]
