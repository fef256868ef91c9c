"""`instdisc`: picks the command, and turns a user's mistakes into messages."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from cluster.credentials import without_credentials
from cluster.environment import have_a_home
from cluster.interrupts import INTERRUPTED, said_at_once
from instdisc import __version__
from instdisc.cli.output import printable
from instdisc.cli.overrides import split_overrides

# In the order of `--help`. Modules load when their command is parsed; none of them imports torch before it runs.
COMMANDS = (
    *("train", "submit", "status", "show", "checkpoints", "index", "pack", "verify", "embed", "knn", "bench"),
    "doctor",
)
USER_ERROR, FAILED = 2, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (it failed), 2 (a mistake in what was asked), 130 (Ctrl-C)."""
    _print_in_any_encoding()
    is_debugged = False
    try:
        with said_at_once():  # from the first import on, which may take seconds
            options = _parse(arguments)
            is_debugged = options.debug
            have_a_home()
            # Before torch is imported: OpenMP's threads that spin while they wait take the cores from everything else.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        if arguments is None:  # a thread may wait for a storage for minutes
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) went away: not an error, and nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        # A storage that was there and is away now is nobody's mistake: the same command may succeed later.
        code = USER_ERROR if getattr(error, "is_permanent", True) else FAILED
        return _tell(error, code, is_debugged)
    except Exception as error:
        return _tell(error, FAILED, is_debugged or not _is_ours(error))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(rest)
    if overrides and not options.takes_overrides:
        parser.error(f"unknown arguments: {' '.join(overrides)}")
    options.overrides = overrides
    return options


def _print_in_any_encoding() -> None:
    """Let no answer be lost where the terminal's encoding lacks one of its characters: that one is shown as '?'."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="instdisc",
        description="Distributed instance discrimination: learn features from unlabelled images, and search them.",
    )
    parser.add_argument("--version", action="version", version=f"instdisc {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = import_module(f"instdisc.cli.{name}").add_parser(commands)
        if command.get_default("takes_overrides") is None:
            command.set_defaults(takes_overrides=False)
    return parser


def _tell(error: BaseException, code: int, with_traceback: bool) -> int:
    if with_traceback:
        print(without_credentials("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    name = "error" if code == USER_ERROR else f"failed ({type(error).__name__})"
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []) if "Traceback" not in note)
    lines = f"instdisc: {name}: {_message(error)}{notes}".split("\n")
    print(without_credentials("\n".join(map(printable, lines))), file=sys.stderr)
    return code


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        advice = "; check its owner and rights" if isinstance(error, PermissionError) else ""
        return f"{error.filename}: {error.strerror}{advice}"
    return str(error) or type(error).__name__


def _is_ours(error: Exception) -> bool:
    """Whether an error was written for people: then it needs no traceback."""
    return type(error).__module__.partition(".")[0] in ("instdisc", "cluster", "dataloading")


if __name__ == "__main__":
    sys.exit(main())
