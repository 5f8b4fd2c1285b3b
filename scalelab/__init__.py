"""scalelab: scaling-law experiments from config to confidence interval.

Importing the package loads nothing heavy: JAX comes in with the first module that computes.
"""

__version__ = "0.1.0"
