"""Instance discrimination (Wu et al. 2018, arXiv 1805.01978) on many machines: every image its own class.

>>> import instdisc
>>> result = instdisc.fit(instdisc.recipe("quickstart"), run="runs/first")
>>> encoder = instdisc.load_encoder(result.uri)
>>> scores_BK, indices_BK = instdisc.load_bank(result.uri).nearest(features_BD, k=5)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instdisc.config import TrainConfig
    from instdisc.launch import fit
    from instdisc.loading import Bank, load_bank, load_encoder
    from instdisc.recipes import recipe
    from instdisc.runs import RunResult

__all__ = ["Bank", "RunResult", "TrainConfig", "fit", "load_bank", "load_encoder", "recipe"]
__version__ = "0.1.0"

_HOMES = {
    "TrainConfig": "instdisc.config",
    "fit": "instdisc.launch",
    "Bank": "instdisc.loading",
    "load_bank": "instdisc.loading",
    "load_encoder": "instdisc.loading",
    "recipe": "instdisc.recipes",
    "RunResult": "instdisc.runs",
}


def __getattr__(name: str) -> Any:
    """Import on first use: looking at a run must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'instdisc' has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found
