"""Before torch is imported anywhere: OpenMP threads that spin while they wait slow several processes on few cores."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
