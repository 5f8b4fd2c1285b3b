"""The laws, one file per family. `ALL` is what `laws.available()` names."""

from scalelab.laws.forms.chinchilla import Chinchilla
from scalelab.laws.forms.farseer import Farseer
from scalelab.laws.forms.kaplan import Kaplan, KaplanSteps
from scalelab.laws.forms.ladder import Ladder, LossToAccuracy, TaskLoss
from scalelab.laws.forms.mixtures import DataMixture, best_mixture
from scalelab.laws.forms.overtraining import LossToError, OverTraining
from scalelab.laws.forms.parscale import ParScale
from scalelab.laws.forms.power import BrokenPower, PowerFloor, PowerLaw
from scalelab.laws.forms.precision import FloatPrecision, PostTraining, Precision
from scalelab.laws.forms.repetition import DataConstrained, RepeatedPools, UtilityDecay
from scalelab.laws.forms.surfaces import ChinchillaGamma, Coupled, Multiplicative
from scalelab.laws.forms.vocabulary import Vocabulary

ALL = (
    Chinchilla,
    OverTraining,
    LossToError,
    Ladder,
    TaskLoss,
    LossToAccuracy,
    DataConstrained,
    RepeatedPools,
    UtilityDecay,
    DataMixture,
    ParScale,
    Precision,
    PostTraining,
    FloatPrecision,
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
    "DataConstrained",
    "DataMixture",
    "Farseer",
    "FloatPrecision",
    "Kaplan",
    "KaplanSteps",
    "Ladder",
    "LossToAccuracy",
    "LossToError",
    "Multiplicative",
    "OverTraining",
    "ParScale",
    "PostTraining",
    "PowerFloor",
    "PowerLaw",
    "Precision",
    "RepeatedPools",
    "TaskLoss",
    "UtilityDecay",
    "Vocabulary",
    "best_mixture",
]
