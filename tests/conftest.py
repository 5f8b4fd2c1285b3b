"""What every test shares. Eight CPU devices are asked for by the tests that need them, in processes of their own."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compiling: less effort there, and what one test or process has compiled serves the others.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
