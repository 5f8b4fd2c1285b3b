"""The process around a run."""

import pathlib
import platform
import shutil
import subprocess
import sys

import pytest

from tests.helpers import arguments, environment, scalelab, small_corpus

ROOT = pathlib.Path(__file__).parent.parent


def test_git_state_is_that_of_the_code(tmp_path):
    shutil.copytree(ROOT / "scalelab", tmp_path / "scalelab", ignore=shutil.ignore_patterns("__pycache__"))
    env = environment() | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}

    def git(*command):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", "-C", tmp_path, *identity, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def state():
        code = "from scalelab.host import git_state; print(*git_state())"
        return subprocess.run(
            [sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True, check=True
        ).stdout.split()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    assert state() == [git("rev-parse", "HEAD"), "False"]
    with open(tmp_path / "scalelab" / "host.py", "a") as file:
        file.write("# changed\n")
    assert state() == [git("rev-parse", "HEAD"), "True"]


def test_compiled_programs_are_kept_for_the_next_run(tmp_path):
    """In the user's cache folder, where nothing else is asked for."""
    env = environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        env.pop(name, None)
    corpus = small_corpus(tmp_path / "corpus")
    for seed in (0, 1):
        done = scalelab("train", *arguments(corpus, train__steps=2, seed=seed), cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        kept = {path.name for path in (tmp_path / "cache" / "scalelab" / "xla").glob("*-cache")}
        if seed == 0:
            first = kept
    assert first <= kept  # small programs are kept where compiling them happened to take long

    def steps(names):
        return [name for name in names if "step" in name]

    assert len(steps(first)) == len(steps(kept)) == 1  # another seed compiles nothing new


FAULTS = """
import resource
import numpy as np
from scalelab import host

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        held = [np.ones(1 << 18) for _ in range(16)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
host.keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_not_fetched_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment(), capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < 0.01 * before
