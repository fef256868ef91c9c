"""Whether the memory bank is alive: what every rank measures of its shard, and when training is pointless.

Banks have been dead for whole trainings without anybody noticing: rows of a wrong length, rows that were never written,
features that had collapsed, a normaliser that no longer fits.

Shapes: R rows of this rank, S rows of a sample of them, D feature numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instdisc.memory_bank import NEVER, ShardedMemoryBank

SAMPLE_ROWS = 4096
MIN_SAMPLE, MIN_DIM = 64, 8
"""Fewer written rows, or numbers of a feature, say nothing of a collapse."""
MAX_NORM_ERROR = 0.02
"""bfloat16 rounds each number by up to 2^-9 of it: lengths stay within 0.004 of 1."""
MAX_GRAM = 512
"""With longer features so many rows are taken, which bound what an eigenvalue decomposition costs."""
MIN_EFFECTIVE_RANK = 1.1
WARN_EFFECTIVE_RANK = 2.0
MAX_LOG_Z_DRIFT = 6.0
"""The gradient of NCE's negatives is then 400 times too large or too small."""
MAX_UNWRITTEN = 0.5


class DeadBankError(RuntimeError):
    """The memory bank shows that training is pointless."""


@dataclass(frozen=True)
class BankHealth:
    """What a rank measured; None where it has no rows, or too few that were ever written."""

    norm_min: float | None
    norm_mean: float | None
    norm_max: float | None
    num_written: int
    """Owned rows that were written at least once."""
    num_rows: int
    staleness_mean: float | None
    """Steps since the last write, the mean over written rows of the sample."""
    effective_rank: float | None
    """Of written rows: 1 where all point one way, D where they fill all directions."""


@torch.no_grad()
def measure(bank: ShardedMemoryBank, step: int) -> BankHealth:
    """Measure this rank's shard after `step` steps, on evenly spaced rows. Waits for the device."""
    num_rows = len(bank.rows)
    if num_rows == 0:
        return BankHealth(None, None, None, 0, 0, None, None)
    places_S = sample_places(num_rows, bank.device)
    rows_SD = bank.rows.index_select(0, places_S).float()
    last_S = bank.last_step.index_select(0, places_S)
    norms_S = rows_SD.norm(dim=1)
    written_S = last_S != NEVER
    stale_S = step - 1 - last_S[written_S]
    return BankHealth(
        norm_min=float(norms_S.min()),
        norm_mean=float(norms_S.mean()),
        norm_max=float(norms_S.max()),
        num_written=int(bank.num_written),
        num_rows=num_rows,
        staleness_mean=float(stale_S.double().mean()) if len(stale_S) else None,
        effective_rank=effective_rank(rows_SD[written_S][:: 1 if bank.dim <= MAX_GRAM else SAMPLE_ROWS // MAX_GRAM])
        if len(stale_S) >= MIN_SAMPLE and bank.dim >= MIN_DIM
        else None,
    )


def sample_places(num_rows: int, device: torch.device) -> Tensor:
    """Return at most `SAMPLE_ROWS` evenly spaced places of a shard, int64 (S,)."""
    count = min(num_rows, SAMPLE_ROWS)
    return torch.arange(count, device=device) * num_rows // max(1, count)


def effective_rank(rows_SD: Tensor) -> float:
    """Return exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007; arXiv
    2210.02885).

    float32 (S, D). Rows that are not finite give nan.
    """
    rows_SD = rows_SD.double()
    gram = rows_SD.T @ rows_SD if len(rows_SD) > rows_SD.shape[1] else rows_SD @ rows_SD.T
    if not bool(gram.isfinite().all()):
        return math.nan
    singular_D = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    # Rounding of the Gram matrix leaves singular values of this size where there are none.
    singular_D = singular_D[singular_D > 1e-7 * singular_D[-1]]
    shares_D = singular_D / singular_D.sum()
    return float(torch.exp(-(shares_D * shares_D.log()).sum()))


def problems(
    by_rank: Sequence[BankHealth], *, step: int, epoch: float, num_bad: int, log_z_drift: float | None
) -> tuple[list[str], list[str]]:
    """Return what makes training pointless, and what is worth a warning, in words that name rank and step.

    epoch: visits of every row so far. num_bad: images known to be damaged, whose rows are not written. log_z_drift: log
    Z of its running estimate less that in use, None without one.
    """
    pointless: list[str] = []
    doubtful: list[str] = []
    for rank, health in enumerate(by_rank):
        where = f"rank {rank}, step {step}"
        _judge_lengths(health, where, pointless)
        _judge_rank(health, where, pointless, doubtful)
        if epoch >= 1:  # every row has come once
            _judge_writes(health, where, epoch, num_bad, pointless, doubtful)
    if log_z_drift is not None and epoch >= 1 and not abs(log_z_drift) <= MAX_LOG_Z_DRIFT:
        pointless.append(
            f"step {step}: found a running estimate of log Z {log_z_drift:+.1f} away from the log Z in use, expected "
            f"at most {MAX_LOG_Z_DRIFT:g}; NCE weighs its negatives wrongly. Use objective.z=ema (with a new run)"
        )
    return pointless, doubtful


def _judge_lengths(health: BankHealth, where: str, pointless: list[str]) -> None:
    if health.norm_min is None or health.norm_max is None:
        return
    if not max(1 - health.norm_min, health.norm_max - 1) <= MAX_NORM_ERROR:
        pointless.append(
            f"{where}: found bank rows of length {health.norm_min:.4g} to {health.norm_max:.4g}, expected 1; the "
            "bank's memory or its checkpoint is damaged"
        )


def _judge_rank(health: BankHealth, where: str, pointless: list[str], doubtful: list[str]) -> None:
    found = health.effective_rank
    if found is None:
        return
    if not found >= MIN_EFFECTIVE_RANK:
        pointless.append(
            f"{where}: found an effective rank of {found:.3g} of the bank's rows, expected at least "
            f"{MIN_EFFECTIVE_RANK}; all features have become alike. A lower optim.lr, a longer warm-up or a higher "
            "objective.temperature usually helps"
        )
    elif found < WARN_EFFECTIVE_RANK:
        doubtful.append(f"{where}: the bank's rows have an effective rank of {found:.3g}: features may collapse")


def _judge_writes(
    health: BankHealth, where: str, epoch: float, num_bad: int, pointless: list[str], doubtful: list[str]
) -> None:
    unwritten = health.num_rows - health.num_written - num_bad
    if unwritten > MAX_UNWRITTEN * health.num_rows:
        pointless.append(
            f"{where}: found {unwritten:,} of {health.num_rows:,} bank rows that were never written after "
            f"{epoch:.1f} epochs, expected none; most of the bank is noise"
        )
    elif unwritten > 0:
        doubtful.append(f"{where}: {unwritten:,} bank rows were never written after {epoch:.1f} epochs")
