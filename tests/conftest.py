"""Variables that must stand before torch or Ray is imported anywhere, and no time limits of single examples."""

import os

from hypothesis import settings

# OpenMP threads that spin while they wait slow several processes on few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Below `uv run` every process of a Ray that a test starts would send the whole folder, .venv included, to its head.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Machines are busy: how long one example took says nothing.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
