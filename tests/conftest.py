"""What every test shares. Eight CPU devices are asked for by the tests that need them, in processes of their own."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("XLA_FLAGS", None)
