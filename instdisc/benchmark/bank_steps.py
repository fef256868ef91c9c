"""The two sides of `bench bank`: what a training step asks of a memory bank, without a network.

Features are given; a step fetches rows, scores, takes loss and gradient with respect to the features, and updates the
rows. The phases are timed one by one within the same steps.

Shapes: N rows, B samples, K negatives, D feature numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.collectives import all_gather_rows, rank, start_all_gather_rows, world_size
from instdisc.benchmark.plain_bank import PlainBank
from instdisc.config_method import ObjectiveConfig
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.objectives.normalizer import Normalizer
from instdisc.objectives.softmax import softmax_losses
from instdisc.rows_ahead import RowsAhead
from instdisc.train.plan import BatchPlan
from instdisc.train.scoring import Group, Scorer

PHASES = ("fetch", "loss and gradient", "update")
NUM_BATCHES = 64


@dataclass
class Phases:
    """Seconds of each phase, added up since the last `clear`."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the time inside to a phase."""
        started_s = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started_s


class Batches:
    """Rows and unit features of steps, made beforehand: the same for both sides."""

    def __init__(self, num_rows: int, dim: int, batch: int) -> None:
        generator = np.random.default_rng(0)
        self.rows_TB = [generator.choice(num_rows, batch, replace=False) for _ in range(NUM_BATCHES)]
        self.features_BD = F.normalize(
            torch.from_numpy(generator.standard_normal((batch, dim)).astype(np.float32)), dim=1
        )

    def rows(self, step: int) -> np.ndarray:
        """Return the rows of a step, int64 (B,)."""
        return self.rows_TB[step % NUM_BATCHES]


class BankSteps(Protocol):
    """One side: makes steps and takes down their phases."""

    phases: Phases

    def one_step(self) -> None:
        """Make a step."""
        ...


class Trials:
    """Contestant: trials of so many steps of a side."""

    def __init__(self, side: BankSteps, num_steps: int) -> None:
        self.phases, self._side, self._num_steps = side.phases, side, num_steps

    def prepare(self) -> None:
        """Make one step, which is not timed."""
        self._side.one_step()
        self.phases.seconds.clear()

    def run(self) -> None:
        """Make the steps."""
        for _ in range(self._num_steps):
            self._side.one_step()

    def rest(self) -> None:
        """Nothing that works runs on."""


class OurBankSteps:
    """Steps of our bank; on several ranks each brings its part of the batch."""

    def __init__(self, bank: ShardedMemoryBank, config: ObjectiveConfig, batches: Batches) -> None:
        self.phases = Phases()
        self._bank, self._config, self._batches = bank, config, batches
        batch = len(batches.features_BD)
        self._plan, self._rank = BatchPlan(batch, 1, bank.world_size), rank(bank.group)
        self._own = slice(*self._plan.offsets(self._rank))
        self._normalizer = Normalizer(
            kind="constant",
            decay=0.99,
            num_rows=bank.num_rows,
            temperature=config.temperature,
            device=bank.device,
            group=bank.group,
        )
        self._scorer = Scorer(config, bank, self._normalizer, seed=0)
        self._rows = RowsAhead(
            bank,
            batches.rows,
            global_batch=batch,
            num_negatives=config.num_shared_negatives,
            negatives_seed=0,
            ahead=0 if bank.world_size == 1 else 1,
        )
        self._valid_B = torch.ones(self._plan.counts_W[self._rank], dtype=torch.bool)
        self._step = 0

    def one_step(self) -> None:
        """Make a step. With several ranks, the rows of the next one are on their way afterwards. Collective."""
        batch, step, counts_W = len(self._batches.features_BD), self._step, self._plan.counts_W
        with self.phases.of("fetch"):
            validity = start_all_gather_rows(self._valid_B, counts_W, self._bank.group)
            self._rows.start(step)
            rows = self._rows.take(step)
        features_BD = self._batches.features_BD[self._own].clone().requires_grad_()
        offsets_W = [self._plan.offsets(number) for number in range(self._bank.world_size)]
        group = Group(features_BD, self._own, offsets_W)
        if self._config.name == "nce" and not self._normalizer.started:
            log_sums_B = self._scorer.log_sums(group, rows, step).detach()
            self._normalizer.observe([log_sums_B], batch * self._config.num_negatives)
        with self.phases.of("loss and gradient"):
            losses_B, log_sums_B = self._scorer.losses(group, rows, step)
            losses_B.mean().backward()
            if log_sums_B is not None:
                self._normalizer.observe([log_sums_B], batch * self._config.num_negatives)
        with self.phases.of("update"):
            update = self._bank.start_update(rows.indices_G, counts_W, validity, features_BD.detach(), step)
            self._rows.will_write(update)
            self._rows.settle()
        self._step += 1


class PlainBankSteps:
    """The same steps of the alternative; several ranks have it as a whole and gather what is written."""

    def __init__(self, bank: PlainBank, config: ObjectiveConfig, batches: Batches, group: Any = None) -> None:
        self.phases = Phases()
        self._bank, self._config, self._batches = bank, config, batches
        self._plan, self._group = BatchPlan(len(batches.features_BD), 1, world_size(group)), group
        self._own = slice(*self._plan.offsets(rank(group)))
        self._step = 0

    def one_step(self) -> None:
        """Make a step. Collective."""
        indices_B = torch.from_numpy(self._batches.rows(self._step))[self._own]
        features_BD = self._batches.features_BD[self._own].clone().requires_grad_()
        if self._config.name == "softmax":
            with self.phases.of("loss and gradient"):
                self._bank.loss(features_BD, indices_B).backward()
        else:
            with self.phases.of("fetch"):
                gathered = self._bank.gather(indices_B)
            with self.phases.of("loss and gradient"):
                scores = self._bank.scores(features_BD, indices_B, *gathered)
                self._bank.loss_of_scores(*scores).backward()
        with self.phases.of("update"):
            gathered = (all_gather_rows(t, self._plan.counts_W, self._group) for t in (indices_B, features_BD.detach()))
            self._bank.update(*gathered)
        self._step += 1


class SoftmaxAlone:
    """Contestant: loss and gradient of the exact softmax, the rows of its samples fetched before."""

    def __init__(self, bank: ShardedMemoryBank, config: ObjectiveConfig, batches: Batches) -> None:
        self._bank, self._config, self._batches = bank, config, batches
        self._positives_BD = torch.empty(0)

    def prepare(self) -> None:
        """Fetch the samples' own rows."""
        self._positives_BD = self._bank.lookup(torch.from_numpy(self._batches.rows(0)))

    def run(self) -> None:
        """Loss and gradient."""
        features_BD = self._batches.features_BD.clone().requires_grad_()
        softmax_losses(
            features_BD,
            self._positives_BD,
            torch.from_numpy(self._batches.rows(0)),
            self._bank,
            temperature=self._config.temperature,
            counts_W=[len(features_BD)],
            score_bytes=self._config.score_mib * 2**20,
        ).mean().backward()

    def rest(self) -> None:
        """Nothing runs in the background."""


class TwoProducts:
    """Contestant: the two matrix products that an exact softmax with its gradient cannot avoid, and nothing else."""

    def __init__(self, rows_ND: Tensor, features_BD: Tensor, block_rows: int) -> None:
        self._rows_ND, self._features_BD, self._block_rows = rows_ND, features_BD, block_rows
        self._scores_BC = torch.empty(0)
        self._sums_BD = torch.empty_like(features_BD)

    def prepare(self) -> None:
        """Take memory for one block of scores."""
        self._scores_BC = torch.empty(len(self._features_BD), self._block_rows)

    def run(self) -> None:
        """Scores of all rows, and their product with the rows, block by block."""
        for rows_CD in self._rows_ND.split(self._block_rows):
            scores_BC = self._scores_BC[:, : len(rows_CD)]
            if len(rows_CD) < self._block_rows:
                scores_BC = self._features_BD @ rows_CD.T
            else:
                torch.mm(self._features_BD, rows_CD.T, out=scores_BC)
            self._sums_BD.addmm_(scores_BC, rows_CD)

    def rest(self) -> None:
        """Give the memory back."""
        self._scores_BC = torch.empty(0)
