"""Commands that a person is told to give next, ready to be pasted into a shell."""

from __future__ import annotations

import shlex


def command_line(*words: str, program: str = "instdisc") -> str:
    """Return a command as a shell reads it, each word quoted where it has to be: `command_line("show", uri)`."""
    return shlex.join([program, *words])


def tensorboard_command(uri: str) -> str:
    """Return the command that shows a run's events."""
    return command_line("--logdir", f"{uri.rstrip('/')}/tensorboard", program="tensorboard")
