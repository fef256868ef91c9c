"""One training step, which reads as the method does.

Wait for the bank's rows, embed, score, loss, backward, optimizer, bank update, start fetching the next rows. Nothing
in it waits for the device on the host; the metrics stay there until the loop reads them.

Shapes: B samples of this rank, G of all ranks, b of one group, K negatives, D feature numbers, W ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cluster.collectives import all_gather_rows
from cluster.worker import Worker
from dataloading.loader import Batch
from dataloading.order import Order, StepRows
from dataloading.philox import Purpose, words
from instdisc.memory_bank import GlobalBatch, PendingLookup, PendingUpdate
from instdisc.negatives import negative_indices
from instdisc.objectives import infonce_loss, softmax_loss
from instdisc.objectives.nce import nce_loss_and_scores
from instdisc.schedule import learning_rate
from instdisc.train.metrics import StepSums
from instdisc.train.plan import BatchPlan
from instdisc.train.state import TrainState, autocast_dtype, use_channels_last


@dataclass(frozen=True)
class _Fetching:
    """The bank's rows of a step on their way: those of its G samples and of its K negatives."""

    lookup: PendingLookup
    indices_K: Tensor | None


@dataclass(frozen=True)
class _Fetched:
    """The bank's rows that a step reads, float32, as the step before left them."""

    positives_GD: Tensor
    negatives_KD: Tensor
    indices_K: Tensor | None


class Stepper:
    """Runs the steps of one rank; between them it holds only the bank's rows that are on their way."""

    def __init__(self, state: TrainState, plan: BatchPlan, worker: Worker, order: Order) -> None:
        self.state, self.plan, self.worker = state, plan, worker
        self.sums = StepSums(worker.device)
        self._negatives = 0 if state.config.objective.name == "softmax" else state.config.objective.num_negatives
        self._autocast = autocast_dtype(state.config, worker.device)
        self._channels_last = use_channels_last(state.config, worker.device)
        self._has_dropout = any(isinstance(m, torch.nn.Dropout) for m in state.encoder.modules())
        self._step_rows = StepRows(order, plan.global_batch, (0, plan.global_batch))
        self._fetching: _Fetching | None = None

    def step(self, batch: Batch) -> None:
        """Run the state's next global step on this rank's part of it. Collective."""
        state, plan, step = self.state, self.plan, self.state.step
        valid_G = all_gather_rows(batch.valid_B, plan.counts_W, state.bank.group)
        whole = GlobalBatch(torch.from_numpy(self._step_rows.rows(step)), valid_G, plan.counts_W)
        fetched = self._fetched_rows(step)
        if state.config.objective.name == "nce" and not state.normalizer.started:
            self._start_normalizer(batch, whole, fetched.negatives_KD)

        features: list[Tensor] = []
        scores: list[Tensor] = []
        update: PendingUpdate | None = None
        for slot, offsets_W in enumerate(plan.slots):
            is_last = slot == len(plan.slots) - 1
            with self._gradient_exchange(is_last):
                features_bD = self._embed(batch, offsets_W, exchange=is_last)
                features.append(features_bD.detach())
                loss, scores_bK = self._loss(features_bD, batch, whole, offsets_W, fetched)
                scores.append(scores_bK)
                if is_last:
                    # Everything but the gradients is known by now: it travels while they are computed.
                    update = state.bank.start_update(whole, torch.cat(features), step)
                    state.batch_norm.start_exchange()
                if loss.requires_grad:
                    # DDP averages over the ranks; the loss is a mean over the valid samples of all of them.
                    (loss * self.worker.world_size).backward()
            mine = slice(*offsets_W[self.worker.rank])
            self.sums.add_group(loss, features_bD, fetched.positives_GD, mine, valid_G, whole.num_valid)

        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.config.optim, step, state.bank.num_rows)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.batch_norm.finish_step(plan.num_groups, step)
        if state.config.objective.name == "nce":
            state.normalizer.observe(scores, whole.num_valid * self._negatives)
        assert update is not None
        update.finish()
        self.sums.num_steps += 1
        state.step = step + 1
        self._start_fetching(state.step)

    def _start_fetching(self, step: int) -> None:
        """Start fetching the rows that `step` reads: those of its samples and its negatives, known from the stream."""
        state = self.state
        wanted, indices_K = [torch.from_numpy(self._step_rows.rows(step))], None
        if self._negatives:
            indices_K = negative_indices(state.config.seed, step, self._negatives, state.bank.num_rows)
            wanted.append(indices_K)
        self._fetching = _Fetching(state.bank.start_lookup(torch.cat(wanted)), indices_K)

    def _fetched_rows(self, step: int) -> _Fetched:
        """Wait for the rows that `step` reads."""
        if self._fetching is None:
            self._start_fetching(step)
        assert self._fetching is not None
        rows_MD, indices_K = self._fetching.lookup.wait(), self._fetching.indices_K
        self._fetching = None
        return _Fetched(rows_MD[: self.plan.global_batch], rows_MD[self.plan.global_batch :], indices_K)

    def _embed(self, batch: Batch, offsets_W: Sequence[tuple[int, int]], *, exchange: bool) -> Tensor:
        """Return the features of this rank's group, float32 (b, D), with b = 0 where its slot is empty."""
        start, stop = offsets_W[self.worker.rank]
        first = self.plan.offsets(self.worker.rank)[0]
        if start == stop and not (exchange and isinstance(self.state.parallel, DistributedDataParallel)):
            return torch.zeros((0, self.state.bank.dim), device=self.worker.device)
        if start == stop:
            # A rank without any group joins the gradient exchange with zeros: images that nothing is asked of.
            images_bCHW = torch.zeros((2, *batch.images_BCHW.shape[1:]), device=self.worker.device)
            return self._forward(images_bCHW)[:0]
        self._seed_dropout(start // self.plan.norm_group)
        features_bD = self._forward(batch.images_BCHW[start - first : stop - first])
        self.state.batch_norm.add_group()
        return features_bD

    def _forward(self, images_bCHW: Tensor) -> Tensor:
        if self._channels_last:
            images_bCHW = images_bCHW.contiguous(memory_format=torch.channels_last)
        device = self.worker.device.type
        with torch.autocast(device, dtype=self._autocast, enabled=self._autocast is not None):
            return self.state.parallel(images_bCHW)

    def _loss(
        self,
        features_bD: Tensor,
        batch: Batch,
        whole: GlobalBatch,
        offsets_W: Sequence[tuple[int, int]],
        fetched: _Fetched,
    ) -> tuple[Tensor, Tensor]:
        """Return this group's share of the mean loss over the valid samples of G, and its scores (b, K) for Z."""
        start, stop = offsets_W[self.worker.rank]
        first = self.plan.offsets(self.worker.rank)[0]
        indices_b, positives_bD = batch.indices_B[start - first : stop - first], fetched.positives_GD[start:stop]
        keep_b = whole.valid_G[start:stop]
        if not keep_b.all():
            kept = keep_b.to(features_bD.device, non_blocking=True)
            indices_b, features_bD, positives_bD = indices_b[keep_b], features_bD[kept], positives_bD[kept]
        config, bank = self.state.config.objective, self.state.bank
        scores_bK = features_bD.new_empty((0, 0))
        if config.name == "softmax":
            counts_W = [int(whole.valid_G[low:high].sum()) for low, high in offsets_W]
            loss = softmax_loss(
                features_bD,
                indices_b,
                bank,
                temperature=config.temperature,
                positives_BD=positives_bD,
                counts_W=counts_W,
            )
        elif config.name == "infonce":
            assert fetched.indices_K is not None
            excluded_bK = indices_b[:, None] == fetched.indices_K[None, :]
            loss = infonce_loss(
                features_bD, positives_bD, fetched.negatives_KD, temperature=config.temperature, excluded_BK=excluded_bK
            )
        else:
            loss, scores_bK = nce_loss_and_scores(
                features_bD,
                positives_bD,
                fetched.negatives_KD,
                temperature=config.temperature,
                log_z=self.state.normalizer.log_z,
                num_rows=bank.num_rows,
                proximal_weight=config.proximal_weight,
            )
        return loss * (len(indices_b) / max(1, whole.num_valid)), scores_bK

    @torch.no_grad()
    def _start_normalizer(self, batch: Batch, whole: GlobalBatch, negatives_KD: Tensor) -> None:
        """Estimate Z before the first loss, over the samples of all ranks and the step's negatives."""
        first = self.plan.offsets(self.worker.rank)[0]
        scores: list[Tensor] = []
        for start, stop in self.plan.groups(self.worker.rank):
            self._seed_dropout(start // self.plan.norm_group)
            features_bD = self._forward(batch.images_BCHW[start - first : stop - first])
            features_bD = features_bD[whole.valid_G[start:stop].to(features_bD.device)]
            scores.append(features_bD @ negatives_KD.T / self.state.config.objective.temperature)
        self.state.batch_norm.discard()
        self.state.normalizer.observe(scores, whole.num_valid * self._negatives)

    def _seed_dropout(self, group: int) -> None:
        """Let dropout depend on (seed, step, group) alone."""
        if self._has_dropout:
            stream = self.state.step << 24 | group
            torch.manual_seed(int(words(self.state.config.seed, stream, purpose=Purpose.DROPOUT, num=1)[0] >> 1))

    @contextlib.contextmanager
    def _gradient_exchange(self, now: bool) -> Iterator[None]:
        """Let DDP exchange gradients in the last slot only; before it they add up on each rank."""
        parallel = self.state.parallel
        if isinstance(parallel, DistributedDataParallel) and not now:
            with parallel.no_sync():
                yield
        else:
            yield
