"""The benchmarks run and say what they measured; no test asserts a time."""

import re

from scalelab.bench import step


def test_step_benchmark_pairs_the_loop_with_the_bare_step(capsys):
    assert step.main(pairs=3) == 0
    out = capsys.readouterr().out
    assert re.search(r"the loop runs at \d+\.\d% of the bare step's rate \(95 % interval .* median of 2 ", out), out
