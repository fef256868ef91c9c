"""Run a command beside an S3 server of its own, whose bucket is s3://images; the server and its objects go afterwards.

    uv run python tests/benchmarks/on_s3.py uv run instdisc bench checkpoint --store s3://images/bench

The server is on the same machine and takes its share of the processors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seaweed import Seaweed

MAX_VOLUMES = 160


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="seaweed-"))
    server = Seaweed(folder, max_volumes=MAX_VOLUMES)
    try:
        server.start()
        return subprocess.run(sys.argv[1:], env={**os.environ, **server.environment}, check=False).returncode
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
