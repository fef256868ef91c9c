"""Environment variables for a while: what processes that are started meanwhile inherit."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def environment(variables: Mapping[str, str], *, overwrite: bool = True) -> Iterator[None]:
    """Set the variables, and put back afterwards what was there. overwrite: also those that the user has set."""
    chosen = {name: value for name, value in variables.items() if overwrite or name not in os.environ}
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def have_a_home() -> None:
    """Give a user without a home folder (a container that runs as any number) one below the folder for temporary files.

    Ray Train and others look for it when they are imported, and fail without.
    """
    if os.path.isabs(os.path.expanduser("~")):
        return
    folder = os.path.join(tempfile.gettempdir(), f"instdisc-home-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    # Not one that somebody else has made: what stands in it would be trusted.
    is_ours = os.stat(folder, follow_symlinks=False).st_uid == os.getuid()
    os.environ["HOME"] = folder if is_ours else tempfile.mkdtemp(prefix="instdisc-home-")
