"""The laws, one file per family. `ALL` is what `laws.available()` names."""

from scalelab.laws.forms.chinchilla import Chinchilla
from scalelab.laws.forms.farseer import Farseer

ALL = (Chinchilla, Farseer)

__all__ = ["ALL", "Chinchilla", "Farseer"]
