"""The progress line, read back through a small terminal that wraps as real ones do."""

import fcntl
import io
import os
import pty
import struct
import termios

import pytest

from instdisc.progress import LOG_INTERVAL_S, Progress, duration


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


class Screen(io.StringIO):
    """A terminal of a given width: keeps the lines that a person would see, the cursor on the last one."""

    encoding = "utf-8"

    def __init__(self, width):
        super().__init__()
        self.width, self.lines, self.column, self.num_wraps = width, [""], 0, 0

    def isatty(self):
        return True

    def write(self, text):
        while text:
            if text.startswith("\x1b[K"):
                self.lines[-1], text = self.lines[-1][: self.column], text[3:]
                continue
            character, text = text[0], text[1:]
            assert character != "\x1b", "only erasing to the end of the line is understood"
            if character == "\r":
                self.column = 0
            elif character == "\n":
                self.lines.append("")
                self.column = 0
            else:
                self._put(character)
        return 0

    def _put(self, character):
        if self.column >= self.width:
            self.num_wraps += 1
            self.lines.append("")
            self.column = 0
        line = self.lines[-1].ljust(self.column)
        self.lines[-1] = line[: self.column] + character + line[self.column + 1 :]
        self.column += 1


def progress_event(step, num_steps=1000, **changed):
    event = {
        "kind": "progress",
        "step": step,
        "num_steps": num_steps,
        "epoch": step / 100,
        "loss": 6.1234,
        "images_per_s": 1234.5,
        "data_wait": 0.034,
        "lr": 0.03,
        "eta_s": 75.0,
    }
    return event | changed


KNN = {"kind": "knn", "keep": True, "step": 500, "epoch": 5.0, "knn_top1": 36.81, "knn_bank_top1": 33.4}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def screen(monkeypatch):
    def make(width):
        monkeypatch.setenv("COLUMNS", str(width))
        return Screen(width)

    return make


def test_a_terminal_shows_one_line_that_is_redrawn_in_place(screen, clock):
    terminal = screen(200)
    progress = Progress(terminal, is_terminal=True, clock=clock)
    for step in range(1, 51):
        clock.now_s += 1
        progress.update(progress_event(step))
    assert len(terminal.lines) == 1
    for part in ("step 50/1,000 (5%)", "1:15 left", "epoch 0.50", "loss 6.123", "1,234 images/s", "data 3%", "lr 0.03"):
        assert part in terminal.lines[0]


def test_a_shorter_line_leaves_nothing_of_a_longer_one(screen, clock):
    terminal = screen(200)
    progress = Progress(terminal, is_terminal=True, clock=clock)
    progress.update(progress_event(7))
    progress.update({"kind": "phase", "text": "embedding 3,000 of 10,000"})
    assert terminal.lines == ["embedding 3,000 of 10,000"]


@pytest.mark.parametrize("width", [1, 2, 10, 40, 80, 120, 121, 122, 123, 140])
def test_the_line_is_cut_to_the_width_and_never_wrapped(screen, clock, width):
    terminal = screen(width)
    progress = Progress(terminal, is_terminal=True, clock=clock)
    for step in (1, 10, 999, 1000):
        clock.now_s += 1
        progress.update(progress_event(step))
    assert terminal.num_wraps == 0
    assert len(terminal.lines) == 1


def test_wide_characters_count_twice_and_control_characters_do_not_move_the_cursor(screen, clock):
    terminal = screen(21)
    progress = Progress(terminal, is_terminal=True, clock=clock)
    progress.update({"kind": "phase", "text": "画像" * 20 + "\n\x1b[2J"})
    assert terminal.lines == ["画像" * 5]
    progress.update({"kind": "phase", "text": "a\nb\x1bc\td"})
    assert terminal.lines == ["a bc d"]


def test_results_and_messages_stand_above_the_live_line(screen, clock):
    terminal = screen(120)
    progress = Progress(terminal, is_terminal=True, clock=clock)
    progress.update(progress_event(499))
    progress.update(KNN)
    progress.update({"kind": "message", "text": "warning: one\nof two lines", "keep": True})
    assert terminal.lines[0] == ("kNN accuracy at step 500 (epoch 5.00): 36.8 % images re-encoded, 33.4 % memory bank")
    assert terminal.lines[1:3] == ["warning: one", "of two lines"]
    assert "step 499/1,000" in terminal.lines[3]
    assert len(terminal.lines) == 4


def test_a_terminal_is_redrawn_at_most_ten_times_a_second_and_ends_with_the_last_step(screen, clock):
    terminal = screen(120)
    progress = Progress(terminal, is_terminal=True, clock=clock)
    progress.update(progress_event(1))
    clock.now_s += 0.01
    progress.update(progress_event(2))
    assert "step 1/" in terminal.lines[-1]
    progress.close()
    progress.close()
    assert "step 2/" in terminal.lines[0]
    assert terminal.lines[1:] == [""]


def test_a_phase_is_gone_when_it_is_over(screen, clock):
    terminal = screen(120)
    progress = Progress(terminal, is_terminal=True, clock=clock)
    progress.update({"kind": "phase", "text": "embedding"})
    progress.close()
    assert terminal.lines == [""]


def test_a_log_gets_the_first_progress_at_once_and_then_one_line_in_ten_seconds(clock):
    log = io.StringIO()
    progress = Progress(log, clock=clock)
    shown = []
    for step in range(1, 36):
        progress.update(progress_event(step))
        shown.append(log.getvalue().count("\n"))
        clock.now_s += 1
    assert LOG_INTERVAL_S == 10
    assert shown == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 5
    assert "\x1b" not in log.getvalue()
    assert "\r" not in log.getvalue()


def test_a_log_gets_results_and_messages_at_once_and_the_last_progress_at_the_end(clock):
    log = io.StringIO()
    progress = Progress(log, clock=clock)
    progress.update(progress_event(1))
    progress.update({"kind": "message", "text": "saved", "keep": True})
    progress.update(KNN)
    progress.update(progress_event(1000, eta_s=0.0))
    assert len(log.getvalue().splitlines()) == 3
    progress.close()
    lines = log.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["step", "saved", "kNN", "step"]
    assert lines[-1].startswith("step 1,000/1,000 (100%), 0:00 left")


def test_a_log_is_not_flooded_by_a_phase_that_counts_but_gets_each_new_phase_at_once(clock):
    log = io.StringIO()
    progress = Progress(log, clock=clock)
    for text in ("embedding 1,000 of 3,000", "embedding 2,000 of 3,000", "indexing 1", "embedding 3,000 of 3,000"):
        progress.update({"kind": "phase", "text": text})
    assert log.getvalue().splitlines() == ["embedding 1,000 of 3,000", "indexing 1", "embedding 3,000 of 3,000"]


def test_unknown_times_losses_and_kinds_are_survived(clock):
    log = io.StringIO()
    progress = Progress(log, clock=clock)
    progress.update({"kind": "of a later version"})
    progress.update(progress_event(3, num_steps=0, eta_s=None, loss=None))
    assert "? left" in log.getvalue()
    assert "loss ?" in log.getvalue()
    assert len(log.getvalue().splitlines()) == 1


def test_kNN_without_a_bank_result_tells_the_one_that_there_is(clock):
    log = io.StringIO()
    Progress(log, clock=clock).update(KNN | {"knn_bank_top1": None})
    assert log.getvalue() == "kNN accuracy at step 500 (epoch 5.00): 36.8 % images re-encoded\n"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (100 * 3600 + 61, "100:01:01"),
        (-5, "0:00"),
        (None, "?"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_durations_read_as_a_clock(seconds, expected):
    assert duration(seconds) == expected


def test_a_real_terminal_is_recognised_and_its_width_is_asked(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
    with open(theirs, "w", encoding="ascii", closefd=True) as stream:
        progress = Progress(stream)
        progress.update(progress_event(12))
        shown = os.read(ours, 4096).decode()
        assert shown == "\r\x1b[Kstep 12/1,000 (1%), 1:15 left"[: 4 + 29]
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        progress.update(KNN)
        shown = os.read(ours, 4096).decode()
        assert "." * 20 in shown
        monkeypatch.setenv("TERM", "dumb")
        Progress(stream).update(progress_event(12))
        assert not os.read(ours, 4096).decode().startswith("\r")
    os.close(ours)


@pytest.mark.parametrize("kind", ["phase", "message"])
def test_no_line_shows_a_password(kind):
    stream = io.StringIO()
    progress = Progress(stream)
    progress.update({"kind": kind, "text": "starting 2 workers on the Ray cluster at http://me:geheim@host:1"})
    assert stream.getvalue() == "starting 2 workers on the Ray cluster at http://host:1\n"
