"""The laws, one file per family. `ALL` is what `laws.available()` names."""

from scalelab.laws.forms.batch import CriticalBatch, CriticalBatchOfLoss
from scalelab.laws.forms.chinchilla import Chinchilla
from scalelab.laws.forms.distillation import M4, Distillation, Transfer
from scalelab.laws.forms.farseer import Farseer
from scalelab.laws.forms.kaplan import Kaplan, KaplanSteps
from scalelab.laws.forms.ladder import Ladder, LossToAccuracy, TaskLoss
from scalelab.laws.forms.mixtures import DataMixture, best_mixture
from scalelab.laws.forms.moe import EfficiencyLeverage, FineGrainedMoE, JointMoE, MoESparsity, fine_grained_flops
from scalelab.laws.forms.overtraining import LossToError, OverTraining
from scalelab.laws.forms.parscale import ParScale
from scalelab.laws.forms.power import BrokenPower, PowerFloor, PowerLaw
from scalelab.laws.forms.precision import FloatPrecision, PostTraining, Precision
from scalelab.laws.forms.repetition import DataConstrained, RepeatedPools, UtilityDecay
from scalelab.laws.forms.routing import Routing
from scalelab.laws.forms.rules import AdamWTimescale, DeepSeekBatch, DeepSeekLr, StepLawBatch, StepLawLr
from scalelab.laws.forms.sampling import (
    Coverage,
    RLCompute,
    Speculative,
    TrainTestCompute,
    speculative_speedup,
    tokens_per_verification,
)
from scalelab.laws.forms.schedules import Annealing, MultiPower
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
    Routing,
    FineGrainedMoE,
    JointMoE,
    MoESparsity,
    EfficiencyLeverage,
    Coverage,
    TrainTestCompute,
    Speculative,
    RLCompute,
    Distillation,
    Transfer,
    M4,
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
    CriticalBatch,
    CriticalBatchOfLoss,
    StepLawLr,
    StepLawBatch,
    DeepSeekLr,
    DeepSeekBatch,
    AdamWTimescale,
    Annealing,
    MultiPower,
)

__all__ = [
    "M4",
    "AdamWTimescale",
    "Annealing",
    "BrokenPower",
    "Chinchilla",
    "ChinchillaGamma",
    "Coupled",
    "Coverage",
    "CriticalBatch",
    "CriticalBatchOfLoss",
    "DataConstrained",
    "DataMixture",
    "DeepSeekBatch",
    "DeepSeekLr",
    "Distillation",
    "EfficiencyLeverage",
    "Farseer",
    "FineGrainedMoE",
    "FloatPrecision",
    "JointMoE",
    "Kaplan",
    "KaplanSteps",
    "Ladder",
    "LossToAccuracy",
    "LossToError",
    "MoESparsity",
    "MultiPower",
    "Multiplicative",
    "OverTraining",
    "ParScale",
    "PostTraining",
    "PowerFloor",
    "PowerLaw",
    "Precision",
    "RLCompute",
    "RepeatedPools",
    "Routing",
    "Speculative",
    "StepLawBatch",
    "StepLawLr",
    "TaskLoss",
    "TrainTestCompute",
    "Transfer",
    "UtilityDecay",
    "Vocabulary",
    "best_mixture",
    "fine_grained_flops",
    "speculative_speedup",
    "tokens_per_verification",
]
