"""The laws, one file per family. `ALL` is what `laws.available()` names."""

from scalelab.laws.forms.chinchilla import Chinchilla
from scalelab.laws.forms.farseer import Farseer
from scalelab.laws.forms.kaplan import Kaplan, KaplanSteps
from scalelab.laws.forms.power import BrokenPower, PowerFloor, PowerLaw
from scalelab.laws.forms.surfaces import ChinchillaGamma, Coupled, Multiplicative
from scalelab.laws.forms.vocabulary import Vocabulary

ALL = (
    Chinchilla,
    PowerLaw,
    PowerFloor,
    BrokenPower,
    Kaplan,
    KaplanSteps,
    Coupled,
    ChinchillaGamma,
    Multiplicative,
    Farseer,
    Vocabulary,
)

__all__ = [
    "ALL",
    "BrokenPower",
    "Chinchilla",
    "ChinchillaGamma",
    "Coupled",
    "Farseer",
    "Kaplan",
    "KaplanSteps",
    "Multiplicative",
    "PowerFloor",
    "PowerLaw",
    "Vocabulary",
]
