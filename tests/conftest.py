"""What every test shares. Eight CPU devices are asked for by the tests that need them, in processes of their own."""

import importlib.metadata
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compiling: less effort there, and what one test or process has compiled serves the others.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # half the time; newer ones abort at flags they dropped
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# A user's style sheet or list of fonts, perhaps of another matplotlib, changes no figure of a test.
os.environ["MPLCONFIGDIR"] = str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "matplotlib")

import jax  # after the settings that it reads
import pytest


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped():
    """What one file has compiled goes when its tests are done: a process that keeps everything runs into the system's
    limit of memory maps, and dies."""
    yield
    jax.clear_caches()
