"""Parallel maps: over processes of this machine, and over a Ray cluster."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cluster.parallel import MapProcessDied, ProcessMap

ON_RAY = """
import json
from cluster.ray_map import RayMap
from cluster.ray_session import ray_session
from dataloading.pack_unit import look_at
with ray_session(None, 2, True):
    looked = list(RayMap(None)(look_at, (bytes([number]) for number in range(30))))
    try:
        list(RayMap(None)(json.loads, ["1", "x", "2"]))
    except ValueError as error:
        print(json.dumps([len(looked), looked[0].reason, str(error)]))
"""


def square(number):
    return number * number


def fail_at_three(number):
    if number == 3:
        raise ValueError("three")
    return number


def exit_at_three(number):
    if number == 3:
        os._exit(9)
    return number


@pytest.mark.parametrize("num_processes", [0, 1, 3])
def test_every_item_comes_out_once(num_processes):
    assert sorted(ProcessMap(num_processes)(square, range(50))) == sorted(n * n for n in range(50))


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    results = ProcessMap(2)(square, items())
    next(results)
    # Two for each process, and as many again where all of them were done at the first look.
    assert len(taken) <= 2 * (2 * 2)
    results.close()


@pytest.mark.parametrize("num_processes", [0, 2])
def test_what_the_function_raises_ends_the_map(num_processes):
    with pytest.raises(ValueError, match="three"):
        list(ProcessMap(num_processes)(fail_at_three, range(10)))


def test_a_process_that_is_killed_is_told():
    with pytest.raises(MapProcessDied, match="goes on"):
        list(ProcessMap(2)(exit_at_three, range(10)))


SLEEPERS = """
import time
from cluster.parallel import ProcessMap
import sys
sys.path.insert(0, sys.argv[1])
from test_maps import sleep
if __name__ == "__main__":
    for done in ProcessMap(2)(sleep, range(4)):
        print(done, flush=True)
"""


def sleep(number):
    if number > 1:
        time.sleep(100)
    return number


def test_the_processes_end_with_the_one_that_started_them(tmp_path):
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    parent = subprocess.Popen([sys.executable, str(script), os.path.dirname(__file__)], stdout=subprocess.PIPE)
    parent.stdout.readline()
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_map_on_ray_yields_everything_and_raises_what_the_function_raised():
    process = subprocess.run([sys.executable, "-c", ON_RAY], capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip().splitlines()[-1] == (
        '[30, "no image in a known format", "Expecting value: line 1 column 1 (char 0)"]'
    )
