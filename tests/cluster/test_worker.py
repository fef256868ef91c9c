import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster.failures import WorkerError, describe
from cluster.outbox import Outbox
from cluster.worker import Worker, WorkerDied, run_local, threads_for

SOON_S = 5.0


class TwoPartError(ValueError):
    """An exception that pickle can write but not read back."""

    def __init__(self, what: str, why: str):
        super().__init__(f"{what}: {why}")


def report(worker: Worker, text: str) -> dict:
    gathered = worker.all_gather_object({"rank": worker.rank, "text": text * (worker.rank + 1)})
    total = worker.rank
    if worker.world_size > 1:
        import torch
        import torch.distributed as dist

        sum_1 = torch.tensor([worker.rank])
        dist.all_reduce(sum_1)
        total = int(sum_1)
        assert torch.get_num_threads() == worker.num_threads
    return {"rank": worker.rank, "gathered": gathered, "sum": total, "openmp": os.environ.get("OMP_WAIT_POLICY")}


def wait_in_a_collective(worker: Worker, pid_folder: str, failure: str) -> None:
    """Rank 1 fails in the given way while the others wait for it in an all-reduce."""
    import torch
    import torch.distributed as dist

    (Path(pid_folder) / str(worker.rank)).write_text(str(os.getpid()))
    worker.all_gather_object("every rank has started")
    if worker.rank == 1 and failure == "raise":
        raise ValueError("the recipe has no encoder")
    if worker.rank == 1 and failure == "leave the group, then raise":
        dist.destroy_process_group()
        time.sleep(0.3)
        raise ValueError("the recipe has no encoder")
    if worker.rank == 1 and failure == "exit":
        os._exit(3)
    if worker.rank == 1:
        time.sleep(600)
    dist.all_reduce(torch.zeros(1))


def raise_two_part(worker: Worker) -> None:
    raise TwoPartError("row 7", "not an image")


def leave_python(worker: Worker) -> None:
    sys.exit(5)


def return_a_lock(worker: Worker) -> object:
    return threading.Lock()


def emit_many(worker: Worker, num_events: int) -> None:
    for number in range(num_events):
        worker.emit({"number": number, "keep": number % 1000 == 0})


def emit_then_wait(worker: Worker) -> str:
    worker.emit({"seen": "first"})
    deadline = time.monotonic() + 60
    while not worker.stop_requested():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return "stopped"


def wait_for_stop(worker: Worker, folder: str) -> str:
    (Path(folder) / f"pid-{worker.rank}").write_text(str(os.getpid()))
    while True:
        stop = worker.all_gather_object(worker.stop_requested())[0]
        if stop:
            return "stopped"
        time.sleep(0.02)


def pids_in(folder: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        texts = [path.read_text() for path in folder.iterdir()]
        if len(texts) == count and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.05)
    raise AssertionError(f"{count} workers did not start")


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + SOON_S
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        if not alive:
            return
        time.sleep(0.05)
    raise AssertionError(f"still alive after {SOON_S} s: {alive}")


@contextlib.contextmanager
def driver_process(folder: Path, num_workers: int):
    """A Python process of its own that runs `wait_for_stop` and prints the results."""
    code = (
        "import sys; from cluster.worker import run_local; from test_worker import wait_for_stop\n"
        "if __name__ == '__main__': print(run_local(wait_for_stop, int(sys.argv[1]), sys.argv[2]))"
    )
    script = folder.with_suffix(".py")
    script.write_text(code)
    folder.mkdir()
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    process = subprocess.Popen(
        [sys.executable, str(script), str(num_workers), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_by_rank_and_collectives_see_every_rank(num_workers):
    results = run_local(report, num_workers, "é")
    ranks = range(max(1, num_workers))
    expected = [{"rank": rank, "text": "é" * (rank + 1)} for rank in ranks]
    assert [result["rank"] for result in results] == list(ranks)
    assert all(result["gathered"] == expected for result in results)
    assert all(result["sum"] == sum(ranks) for result in results)
    if num_workers > 0:
        assert all(result["openmp"] == "PASSIVE" for result in results)


def test_the_fork_server_has_one_thread_so_that_forking_is_safe():
    run_local(report, 1, "x")
    helper = psutil.Process(psutil.Process().pid)
    servers = [child for child in helper.children() if "multiprocessing.forkserver" in " ".join(child.cmdline())]
    assert [server.num_threads() for server in servers] == [1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_events_reach_the_caller_while_the_workers_run(num_workers):
    def stop_at_the_first(event):
        events.append(event)
        signal.raise_signal(signal.SIGINT)

    events: list[dict] = []
    handler = signal.getsignal(signal.SIGINT)
    results = run_local(emit_then_wait, num_workers, on_event=stop_at_the_first)
    assert events == [{"seen": "first"}]
    assert results == ["stopped"] * max(1, num_workers)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    def interrupt_twice(event):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_local(emit_then_wait, 2, on_event=interrupt_twice)
    assert time.monotonic() - started < 30


def test_a_slow_caller_loses_old_events_but_none_that_must_be_kept():
    def slow(event):
        if not events:
            time.sleep(1.0)
        events.append(event["number"])

    events: list[int] = []
    run_local(emit_many, 1, 20_000, on_event=slow)
    assert events == sorted(events)
    assert set(range(0, 20_000, 1000)) <= set(events)
    assert len(events) < 20_000
    assert events[-1] == 19_999


def test_an_outbox_hands_out_kept_and_droppable_events_in_the_order_of_their_arrival():
    outbox = Outbox(max_pending=2)
    for number in range(5):
        outbox.put(f'{{"n": {number}, "keep": {"true" if number == 1 else "false"}}}')
    outbox.close()
    assert ['"n": 1' in outbox.take_all()[0], list(outbox.drain())] == [True, []]


@pytest.mark.parametrize("failure", ["raise", "leave the group, then raise"])
def test_an_error_on_one_rank_ends_the_others_and_names_the_rank(failure, tmp_path):
    started = time.monotonic()
    with pytest.raises(ValueError, match="the recipe has no encoder") as caught:
        run_local(wait_in_a_collective, 3, str(tmp_path), failure)
    assert "raised by rank 1 of 3" in caught.value.__notes__[0]
    assert "wait_in_a_collective" in caught.value.__notes__[0]
    assert time.monotonic() - started < 30
    assert_gone(pids_in(tmp_path, 3))


def test_a_rank_that_leaves_without_a_result_is_named(tmp_path):
    with pytest.raises(WorkerDied, match="rank 1 exited with code 3"):
        run_local(wait_in_a_collective, 2, str(tmp_path), "exit")


def test_a_killed_rank_is_named_with_its_signal(tmp_path):
    def kill_rank_1():
        pids_in(tmp_path, 3)
        os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
        killed.append(time.monotonic())

    killed: list[float] = []
    killer = threading.Thread(target=kill_rank_1)
    killer.start()
    with pytest.raises(WorkerDied, match="rank 1 was killed by SIGKILL") as caught:
        run_local(wait_in_a_collective, 3, str(tmp_path), "wait")
    killer.join()
    assert (caught.value.rank, caught.value.signal) == (1, signal.SIGKILL)
    assert time.monotonic() - killed[0] < SOON_S
    assert_gone(pids_in(tmp_path, 3))


def test_an_error_that_cannot_be_rebuilt_here_still_says_what_happened():
    with pytest.raises(WorkerError, match=r"rank 0: .*TwoPartError: row 7: not an image"):
        run_local(raise_two_part, 1)


def test_a_worker_that_calls_sys_exit_does_not_end_the_caller():
    with pytest.raises(WorkerError, match="rank 0: SystemExit: 5"):
        run_local(leave_python, 1)


def test_a_result_that_cannot_be_sent_is_refused_by_name():
    with pytest.raises(TypeError, match="rank 0 returned a lock"):
        run_local(return_a_lock, 1)


def test_a_function_that_cannot_be_sent_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="top level of a module"):
        run_local(lambda worker: None, 2)


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(ValueError, match="num_workers is -1"):
        run_local(report, -1, "x")


def test_an_event_that_is_not_json_is_refused_where_it_is_emitted():
    with pytest.raises(TypeError, match="not JSON serializable"):
        Worker(device=None).emit({"loss": object()})  # type: ignore[arg-type]


def test_threads_are_divided_among_the_workers():
    cores = len(os.sched_getaffinity(0))
    assert [threads_for(0), threads_for(1), threads_for(cores + 1)] == [cores, cores, 1]
    assert threads_for(4, 3) == 3
    with pytest.raises(ValueError, match="threads_per_worker is 0"):
        threads_for(1, 0)


@pytest.mark.parametrize("error", [WorkerDied(2, -11), WorkerDied(0, 3), WorkerError("rank 1: x")])
def test_the_errors_of_this_package_survive_the_way_to_the_caller(error):
    restored = describe(error, 0, 1).to_exception()
    assert (type(restored), str(restored)) == (type(error), str(error))


@pytest.mark.parametrize(("num_workers", "number"), [(0, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_the_driver_and_all_its_processes_lets_the_workers_return(num_workers, number, tmp_path):
    with driver_process(tmp_path / "run", num_workers) as driver:
        pids_in(tmp_path / "run", max(1, num_workers))
        os.killpg(driver.pid, number)  # as a terminal and `timeout` do
        out, err = driver.communicate(timeout=30)
    assert (out.strip(), err) == (str(["stopped"] * max(1, num_workers)), "")
    assert driver.returncode == 0


def test_workers_end_when_their_driver_is_killed(tmp_path):
    with driver_process(tmp_path / "run", 2) as driver:
        pids = pids_in(tmp_path / "run", 2)
        descendants = [child.pid for child in psutil.Process(driver.pid).children(recursive=True)]
        driver.kill()
        assert_gone([*pids, *descendants])


def test_a_script_from_standard_input_starts_workers_of_functions_that_are_in_modules(tmp_path):
    script = "import operator\nfrom cluster.worker import run_local\nprint(run_local(operator.attrgetter('rank'), 1))\n"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-"], input=script, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.returncode) == ("[0]\n", 0), done.stderr
