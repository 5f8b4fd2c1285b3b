"""Eight devices: the same run. In processes of their own, since devices are fixed once JAX has started."""

import json
import subprocess
import sys

import pytest

from tests.helpers import environment, small_corpus, with_devices

RUN = """
import json, sys
import jax
from scalelab import train
from tests.helpers import tiny_spec
corpus, root, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
record = train.run(tiny_spec(corpus, **changes), root)
print(json.dumps([jax.device_count(), record.loss, record.train_loss, record.status]))
"""

HOST = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from scalelab import train
from scalelab.errors import BadInput
from tests.helpers import tiny_spec
try:
    train.run(tiny_spec(sys.argv[3]), sys.argv[4])
except BadInput as error:
    print(error)
"""


def result(process: subprocess.CompletedProcess) -> list:
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.strip().splitlines()[-1])


def run(corpus, root, devices: int, **changes) -> list:
    env = with_devices(devices)
    command = [sys.executable, "-c", RUN, str(corpus), str(root), json.dumps(changes)]
    return result(subprocess.run(command, env=env, capture_output=True, text=True, timeout=300))


@pytest.mark.parametrize("parts", [1, 2])
def test_eight_devices_give_the_run_of_one(tmp_path, parts):
    corpus = small_corpus(tmp_path / "corpus")
    changes = {"data__batch_size": 16, "train__steps": 10, "train__accum_steps": parts}
    one = run(corpus, tmp_path / "one", 1, **changes)
    eight = run(corpus, tmp_path / "eight", 8, **changes)
    assert (one[0], eight[0]) == (1, 8)
    assert eight[1] == pytest.approx(one[1], rel=1e-5)
    assert eight[2] == pytest.approx(one[2], rel=1e-5)


def test_a_batch_that_eight_devices_cannot_share(tmp_path):
    corpus = small_corpus(tmp_path / "corpus")
    env = with_devices(8)
    command = [sys.executable, "-c", RUN, str(corpus), str(tmp_path / "runs"), json.dumps({"data__batch_size": 12})]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "config.data.batch_size = 12" in done.stderr
    assert "divisible by 8 device(s); config.mesh.data takes fewer" in done.stderr


def test_two_processes_are_refused_before_anything_is_written(tmp_path):
    import socket

    corpus = small_corpus(tmp_path / "corpus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(host), str(corpus), str(tmp_path / "runs")], env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for host in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert all("jax.process_count() = 2: a run is trained by one process" in line for line in said)
    assert not (tmp_path / "runs").exists()
