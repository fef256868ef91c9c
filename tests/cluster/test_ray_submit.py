"""Jobs of a real Ray head on loopback: followed through a network that breaks, and submitted again when lost."""

from __future__ import annotations

import dataclasses
import socket
import sys
import threading
import time

import pytest
from ray_head import RayHead
from tcp_proxy import TcpProxy

from cluster.job import JobRefusedError, JobsError, Verdict
from cluster.ray_jobs import RayJobs, runtime_env
from cluster.ray_submit import End, HeadLostError, JobSpec, Submission

NUM_LINES = 120
COUNT = f"import time\nfor i in range({NUM_LINES}): print('line', i, flush=True); time.sleep(0.05)"


@pytest.fixture(scope="module")
def head():
    with RayHead(num_cpus=1) as running, pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "NO_PROXY"):
            patch.setenv(name, running.environment[name])
        reread_token()
        yield running
    reread_token()


def reread_token():
    """Ray keeps what it read first in this process."""
    from cluster.ray_session import _reread_token

    _reread_token()


class Followed:
    """A submission at work in a thread, and what it told."""

    def __init__(self, address, code, name, *, checkpoint=lambda: None, patience_s=60.0):
        self.text, self.told = "", []
        self.end: End | BaseException | None = None
        self.submission = Submission(
            RayJobs(address),
            JobSpec(name=name, run=f"run of {name}", entrypoint=f'{sys.executable} -c "{code}"'),
            checkpoint=checkpoint,
            on_text=self._add,
            on_event=lambda event: self.told.append(event["text"]),
            patience_s=patience_s,
        )
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _add(self, text):
        self.text += text

    def _run(self):
        try:
            self.submission.start()
            self.end = self.submission.finish()
        except BaseException as error:
            self.end = error

    def start(self):
        self._thread.start()
        return self

    def wait_for(self, text, timeout_s=60.0):
        deadline = time.monotonic() + timeout_s
        while text not in self.text:
            assert self._thread.is_alive(), self.end
            assert time.monotonic() < deadline, (self.text, self.told)
            time.sleep(0.02)

    def join(self, timeout_s=90.0):
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), (self.text, self.told)
        return self.end


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith("line ")]


def test_a_log_is_followed_through_cut_connections_without_a_line_lost_or_twice(head):
    with TcpProxy(head.ports[1]) as proxy:
        followed = Followed(f"http://127.0.0.1:{proxy.port}", COUNT, "cut").start()
        for seen in ("line 5\n", "line 60\n"):
            followed.wait_for(seen)
            proxy.cut()
            time.sleep(1.5)
            proxy.mend()
        end = followed.join()
    assert lines_of(followed.text) == [f"line {i}" for i in range(NUM_LINES)]
    assert (end.verdict, end.ids) == (Verdict.SUCCEEDED, ("cut-1",))
    # The job may end during the second cut, or the log come back before the job is asked for.
    assert any("answers again" in told for told in followed.told), followed.told
    assert any("waiting for the head" in told and "refused" in told for told in followed.told)


@pytest.mark.slow
def test_a_second_submission_of_a_run_follows_its_job_and_another_command_is_refused(head):
    first = Followed(head.dashboard, COUNT, "twice").start()
    first.wait_for("line 1\n")
    second = Followed(head.dashboard, COUNT, "twice").start()
    other = Followed(head.dashboard, COUNT + "\n0", "twice").start()
    refused = other.join()
    assert isinstance(refused, JobRefusedError)
    assert "twice-1" in str(refused)
    assert "another command" in str(refused)
    assert first.join().ids == second.join().ids == ("twice-1",)
    assert lines_of(first.text) == lines_of(second.text) == [f"line {i}" for i in range(NUM_LINES)]
    assert any("following it" in told for told in second.told)


MISTAKE = "import sys; print('before'); print('instdisc: error: no such recipe'); sys.exit(2)"


def test_a_mistake_is_not_submitted_again(head):
    end = Followed(head.dashboard, MISTAKE, "mistake").start().join()
    assert (end.verdict, end.ids, end.exit_code) == (Verdict.MISTAKE, ("mistake-1",), 2)
    assert end.cause == "instdisc: error: no such recipe"


@pytest.mark.slow
def test_what_looks_like_a_mistake_after_training_is_submitted_again(head):
    checkpoints = iter([0, 1, 1, 1, 1])
    end = Followed(head.dashboard, MISTAKE, "later", checkpoint=lambda: next(checkpoints)).start().join(180)
    assert (end.verdict, len(end.ids)) == (Verdict.LOST, 4)


@pytest.mark.slow
def test_it_gives_up_after_three_submissions_without_a_new_checkpoint(head, tmp_path):
    checkpoints = iter([0, 1, 2, 2, 2, 2])  # before the first submission, and after each
    code = "import sys; print('it broke'); sys.exit(1)"
    end = Followed(head.dashboard, code, "broken", checkpoint=lambda: next(checkpoints)).start().join(180)
    assert end.verdict is Verdict.LOST
    assert end.ids == tuple(f"broken-{n}" for n in range(1, 6))
    assert "gave up after 3 submissions in a row without a new checkpoint" in end.cause
    assert "exit code 1" in end.cause
    assert "it broke" in end.cause


@pytest.mark.slow
def test_a_run_that_cannot_be_read_from_here_has_three_submissions(head):
    def unreadable():
        raise PermissionError("no right to read the bucket")

    end = Followed(head.dashboard, "raise SystemExit(1)", "unreadable", checkpoint=unreadable).start().join(180)
    assert len(end.ids) == 3
    assert "cannot be seen" in end.cause


@pytest.mark.slow
def test_a_head_that_stays_away_is_given_up_and_the_job_is_not_harmed(head):
    with TcpProxy(head.ports[1]) as proxy:
        followed = Followed(f"http://127.0.0.1:{proxy.port}", COUNT, "away", patience_s=2.0).start()
        followed.wait_for("line 5\n")
        proxy.cut()
        lost = followed.join()
    assert isinstance(lost, HeadLostError)
    assert "has been away for" in str(lost)
    again = Followed(head.dashboard, COUNT, "away").start()
    assert again.join().ids == ("away-1",)
    assert lines_of(again.text) == [f"line {i}" for i in range(NUM_LINES)]


@pytest.mark.slow
def test_a_connection_that_goes_silent_is_made_anew(head, monkeypatch):
    monkeypatch.setattr("cluster.ray_jobs.ANSWER_TIMEOUT_S", 2.0)
    with TcpProxy(head.ports[1]) as proxy:
        followed = Followed(f"http://127.0.0.1:{proxy.port}", COUNT, "silent").start()
        followed.wait_for("line 5\n")
        proxy.silence()
        time.sleep(4.0)
        proxy.cut()
        proxy.mend()
        assert followed.join().verdict is Verdict.SUCCEEDED
    assert lines_of(followed.text) == [f"line {i}" for i in range(NUM_LINES)]


@pytest.mark.slow
def test_a_log_is_followed_behind_a_gateway_that_passes_no_web_sockets(head):
    with TcpProxy(head.ports[1], passes_web_sockets=False) as proxy:
        followed = Followed(f"http://127.0.0.1:{proxy.port}", COUNT + "\ntime.sleep(8)", "polled").start()
        followed.wait_for(f"line {NUM_LINES - 1}\n")
        assert followed.end is None, "the log was shown only at the end"
        assert followed.join().verdict is Verdict.SUCCEEDED
    assert lines_of(followed.text) == [f"line {i}" for i in range(NUM_LINES)]


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_gets_ctrl_c_and_time(head):
    code = "\n".join(
        [
            "import time",
            "try:",
            "    print('ready', flush=True); time.sleep(60)",
            "except KeyboardInterrupt:",
            "    time.sleep(5); print('saved', flush=True)",
        ]
    )
    followed = Followed(head.dashboard, code, "stopped")
    followed.submission._spec = dataclasses.replace(followed.submission._spec, runtime_env=runtime_env({}))
    followed.start().wait_for("ready")
    followed.submission._jobs._client.stop_job("stopped-1")
    end = followed.join()
    assert (end.verdict, end.ids) == (Verdict.STOPPED, ("stopped-1",))
    assert "saved\n" in followed.text


def test_a_wrong_and_a_missing_token_are_told_apart_and_never_shown(head, monkeypatch, tmp_path):
    wrong = "0" * 64
    monkeypatch.setenv("RAY_AUTH_TOKEN", wrong)
    reread_token()
    try:
        with pytest.raises(JobsError, match="refuses the authentication token") as refused:
            RayJobs(head.dashboard)
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        monkeypatch.setenv("HOME", str(tmp_path))
        reread_token()
        with pytest.raises(JobsError, match="asks for an authentication token, and none was found") as missing:
            RayJobs(head.dashboard)
        monkeypatch.delenv("RAY_AUTH_MODE")
        reread_token()
        with pytest.raises(JobsError, match="asks for an authentication token, and none was found"):
            RayJobs(head.dashboard)
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text(head.token)
        reread_token()
        assert RayJobs(head.dashboard).host_names() == {socket.gethostname()}
    finally:
        monkeypatch.undo()
        reread_token()
    for error in (refused, missing):
        assert wrong not in str(error.value)
        assert head.token not in str(error.value)


@pytest.mark.parametrize("address", ["", "head:8265", "ray://head:10001", "http://", "127.0.0.1:6379"])
def test_a_malformed_address_is_refused(address):
    with pytest.raises(JobRefusedError, match="expected the dashboard's"):
        RayJobs(address)


def test_a_password_in_the_address_is_refused_without_showing_it():
    with pytest.raises(JobRefusedError, match="user name or password") as refused:
        RayJobs("http://me:secret@head:8265")
    assert "secret" not in str(refused.value)


def test_an_unused_port_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray's own client would go there instead
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(JobsError, match=rf"no Ray cluster at http://127.0.0.1:{port}: .*refused"):
        RayJobs(f"http://127.0.0.1:{port}")
