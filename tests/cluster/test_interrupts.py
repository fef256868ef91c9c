"""What signals do, in every phase: in this process, and to a command that looks at none of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cluster.interrupts import Interrupts, held
from cluster.worker import noticing

TIMEOUT_S = 30.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_with_nothing_to_save_the_first_signal_ends_and_otherwise_the_second(number):
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    with Interrupts() as interrupts:
        take = noticing(interrupts, None)
        take('{"kind": "began"}')
        signal.raise_signal(number)
        assert interrupts.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    with Interrupts() as interrupts:
        take = noticing(interrupts, None)
        take('{"kind": "began"}')
        take('{"kind": "began", "has_begun": false}')  # another group of workers restores what is saved
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_what_is_held_is_brought_to_its_end_first():
    done = []

    def clean_up():
        with held():
            with held():
                signal.raise_signal(signal.SIGTERM)
            done.append("all of it")
        done.append("what comes after")

    with Interrupts(), pytest.raises(KeyboardInterrupt):
        clean_up()
    assert done == ["all of it"]


def test_sigusr1_wishes_for_a_checkpoint_also_one_that_comes_too_early():
    wished = threading.Semaphore(0)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGUSR1)
        interrupts.save_with(wished.release)
        assert wished.acquire(timeout=TIMEOUT_S)
        signal.raise_signal(signal.SIGUSR1)
        assert wished.acquire(timeout=TIMEOUT_S)
        assert not interrupts.requested
    assert not wished.acquire(blocking=False)


def test_a_run_that_is_to_outlive_its_terminal_does(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupts.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_are_left_alone():
    errors = []

    def run():
        try:
            with Interrupts(), held():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []


# In a call that looks at no signals, as a library's: another thread of the process gets them.
DEAF = """
import ctypes, signal
from cluster.interrupts import said_at_once
with said_at_once():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    print("deaf", flush=True)
    while True:
        try:
            ctypes.CDLL(None).sleep(3600)
        except KeyboardInterrupt:  # a signal that came before the call
            pass
"""


def test_a_command_says_at_once_that_it_stops_and_ends_soon_after_the_second_signal():
    with subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "deaf\n"
            process.send_signal(signal.SIGTERM)
            assert (process.stderr.readline(), process.stderr.readline()) == ("\n", "stopping (once more: at once)\n")
            started_s = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT_S) == 130
            assert time.monotonic() - started_s < 10
        finally:
            process.kill()


# Blocked as the driver's children have it, and started by something that lets signals through on the way.
CHILD = """
import multiprocessing, signal
from cluster.local_processes import _helper_environment

if __name__ == "__main__":
    with _helper_environment():
        from multiprocessing import resource_tracker
        resource_tracker.ensure_running()
        print(signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= {signal.SIGINT, signal.SIGTERM}, flush=True)
"""


def test_a_helper_that_starts_with_the_workers_does_not_let_signals_for_the_driver_through():
    found = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert found.stdout == "True\n"
