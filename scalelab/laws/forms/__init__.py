"""The laws, one file per family. `ALL` is what `laws.available()` names."""

from scalelab.laws.forms.chinchilla import Chinchilla
from scalelab.laws.forms.ladder import Ladder, LossToAccuracy, TaskLoss
from scalelab.laws.forms.mixtures import DataMixture, best_mixture
from scalelab.laws.forms.overtraining import LossToError, OverTraining
from scalelab.laws.forms.parscale import ParScale
from scalelab.laws.forms.precision import FloatPrecision, PostTraining, Precision
from scalelab.laws.forms.repetition import DataConstrained, RepeatedPools, UtilityDecay

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
)

__all__ = [
    "ALL",
    "Chinchilla",
    "DataConstrained",
    "DataMixture",
    "FloatPrecision",
    "Ladder",
    "LossToAccuracy",
    "LossToError",
    "OverTraining",
    "ParScale",
    "PostTraining",
    "Precision",
    "RepeatedPools",
    "TaskLoss",
    "UtilityDecay",
    "best_mixture",
]
