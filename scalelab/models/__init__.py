"""Language models: a stack of blocks, each a sequence mixer and a channel mixer by name."""

from scalelab.models import counters, registry
from scalelab.models.lm import LanguageModel, abstract, build, init, logits, merge, roles, rules, split, tensors
from scalelab.models.registry import validate, with_vocabulary

__all__ = [
    "LanguageModel",
    "abstract",
    "build",
    "counters",
    "init",
    "logits",
    "merge",
    "registry",
    "roles",
    "rules",
    "split",
    "tensors",
    "validate",
    "with_vocabulary",
]
