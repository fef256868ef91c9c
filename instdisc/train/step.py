"""One training step, which reads as the method does.

Embed, wait for the bank's rows, score, loss, backward, optimizer, bank update. The rows were fetched, and features are
gathered, behind other work (`instdisc.rows_ahead`). Nothing in a step waits for the device on the host, but for hard
negatives and a bank in another memory than the device's; the metrics stay there until the loop reads them.

Shapes: B samples of this rank, G of all ranks, b of one group, K negatives, D feature numbers, W ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cluster.collectives import PendingSum, all_reduce_sum, start_all_gather_rows
from cluster.worker import Worker
from dataloading.device_copies import to_device
from dataloading.loader import Batch
from dataloading.order import Order, StepRows
from dataloading.philox import Purpose, words
from instdisc.bank_update import PendingUpdate
from instdisc.rows_ahead import FetchedRows, RowsAhead
from instdisc.schedule import bank_momentum, learning_rate, num_steps
from instdisc.timeline import Timeline
from instdisc.train.metrics import StepSums
from instdisc.train.plan import BatchPlan
from instdisc.train.scoring import Group, Scorer
from instdisc.train.state import TrainState, autocast_dtype, use_channels_last


class Stepper:
    """Runs the steps of one rank.

    Between steps rows of the bank, the last features and the last observation of Z may be on their way; `settle` waits
    for them, and must be called before the state is evaluated or saved. timeline: takes down when the parts of a step
    ran.
    """

    def __init__(
        self, state: TrainState, plan: BatchPlan, worker: Worker, order: Order, timeline: Timeline | None = None
    ) -> None:
        self.state, self.plan, self.worker = state, plan, worker
        self.sums = StepSums(worker.device)
        self.timeline = timeline or Timeline(None)
        config, bank = state.config, state.bank
        self._scorer = Scorer(config.objective, bank, state.normalizer, config.seed)
        self._num_steps = num_steps(config.optim, bank.num_rows)
        self._autocast = autocast_dtype(config, worker.device)
        self._channels_last = use_channels_last(config, worker.device)
        self._has_dropout = any(isinstance(m, torch.nn.Dropout) for m in state.encoder.modules())
        self._own = slice(*plan.offsets(worker.rank))
        at_hand = bank.world_size == 1 and bank.device == worker.device and not bank.is_mapped
        self._rows = RowsAhead(
            bank,
            StepRows(order, plan.global_batch, (0, plan.global_batch)).rows,
            global_batch=plan.global_batch,
            num_negatives=config.objective.num_shared_negatives,
            negatives_seed=config.seed,
            ahead=0 if at_hand else config.bank.fetch_ahead,
        )
        self._observation: tuple[PendingSum, PendingUpdate] | None = None

    def step(self, batch: Batch) -> None:
        """Run the state's next global step on this rank's part of it. Collective."""
        state, plan, step = self.state, self.plan, self.state.step
        validity = start_all_gather_rows(batch.valid_B, plan.counts_W, state.bank.group)
        with self.timeline.span("start fetch"):
            self._rows.start(step)
        rows = None if self._is_ready_to_score() else self._start_normalizer(batch, step)

        features: list[Tensor] = []
        losses: list[Tensor] = []
        log_sums: list[Tensor] = []
        update: PendingUpdate | None = None
        for slot, offsets_W in enumerate(plan.slots):
            is_last = slot == len(plan.slots) - 1
            with self._gradient_exchange(is_last):
                with self.timeline.span("embed"):
                    features_bD = self._embed(batch, offsets_W, exchange=is_last)
                # The rows had until now to arrive.
                rows = rows or self._take_rows(step)
                with self.timeline.span("score"):
                    group = Group(features_bD, slice(*offsets_W[self.worker.rank]), offsets_W)
                    losses_b, log_sums_b = self._scorer.losses(group, rows, step)
                features.append(features_bD.detach())
                losses.append(losses_b.detach())
                log_sums.append(self._of_valid(log_sums_b, batch, group.own))
                if is_last:
                    # Everything but the gradients is known by now: it travels while they are computed.
                    update = state.bank.start_update(
                        rows.indices_G,
                        plan.counts_W,
                        validity,
                        torch.cat(features),
                        step,
                        bank_momentum(state.config.bank, step, self._num_steps),
                    )
                    self._observe(log_sums, update)
                    state.batch_norm.start_exchange()
                with self.timeline.span("backward"):
                    self._backward(losses_b, batch, group.own)
        assert update is not None
        assert rows is not None
        self._scale_gradients(update)
        with self.timeline.span("optimizer"):
            for param_group in state.optimizer.param_groups:
                param_group["lr"] = learning_rate(state.config.optim, step, state.bank.num_rows)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
        self._rows.will_write(update)
        self.sums.add_step(torch.cat(losses), torch.cat(features), rows.positives_GD, self._own, update.batch)
        state.step = step + 1

    def settle(self) -> None:
        """Bring the whole state to where the last step left it. Waits for what is on its way. Collective."""
        self._settle_exchanges()
        self.state.batch_norm.put_back(self.state.step)

    def _settle_exchanges(self) -> None:
        self._rows.settle()
        self.state.batch_norm.finish_step(self.plan.num_groups)
        if self._observation is not None:
            total, update = self._observation
            self._observation = None
            self.state.normalizer.finish(total, update.batch.num_valid * self.state.config.objective.num_negatives)

    def _take_rows(self, step: int) -> FetchedRows:
        with self.timeline.span("wait for rows"):
            self._settle_exchanges()
            return self._rows.take(step)

    def _backward(self, losses_b: Tensor, batch: Batch, own: slice) -> None:
        """Add this group's share to the gradient of the mean loss over the G samples."""
        valid_b = self._valid(batch, own)
        if not valid_b.all():
            losses_b = torch.where(to_device(valid_b, losses_b.device), losses_b, 0)
        # DDP averages over the ranks; the loss is a mean over the samples of all of them.
        loss = losses_b.sum() * (self.worker.world_size / self.plan.global_batch)
        if loss.requires_grad:
            loss.backward()

    def _scale_gradients(self, update: PendingUpdate) -> None:
        """Turn the mean over G into the mean over the valid samples of G: how many those are is known by now."""
        num_valid = update.batch.num_valid
        if num_valid not in (0, self.plan.global_batch):
            gradients = [p.grad for p in self.state.encoder.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, self.plan.global_batch / num_valid)  # pyright: ignore[reportPrivateImportUsage]

    def _valid(self, batch: Batch, own: slice) -> Tensor:
        return (
            batch.valid_B[own.start - self._own.start : own.stop - self._own.start] if own.stop else batch.valid_B[:0]
        )

    def _of_valid(self, log_sums_b: Tensor | None, batch: Batch, own: slice) -> Tensor:
        if log_sums_b is None:
            return torch.empty(0, device=self.worker.device)
        valid_b = to_device(self._valid(batch, own), log_sums_b.device)
        return log_sums_b.detach().masked_fill(~valid_b, -torch.inf)

    def _observe(self, log_sums: Sequence[Tensor], update: PendingUpdate) -> None:
        if self.state.config.objective.name == "nce":
            self._observation = self.state.normalizer.start_observation(log_sums), update

    def _is_ready_to_score(self) -> bool:
        return self.state.config.objective.name != "nce" or self.state.normalizer.started

    @torch.no_grad()
    def _start_normalizer(self, batch: Batch, step: int) -> FetchedRows:
        """Estimate Z before the first loss, over the samples of all ranks and the step's negatives; return the rows."""
        rows = self._take_rows(step)
        log_sums: list[Tensor] = []
        for offsets_W in self.plan.slots:
            features_bD = self._embed(batch, offsets_W, exchange=False)
            group = Group(features_bD, slice(*offsets_W[self.worker.rank]), offsets_W)
            log_sums.append(self._of_valid(self._scorer.log_sums(group, rows, step), batch, group.own))
        self.state.batch_norm.discard()
        num_valid = all_reduce_sum(batch.valid_B.sum()[None], self.state.bank.group)
        self.state.normalizer.observe(log_sums, int(num_valid) * self.state.config.objective.num_negatives)
        return rows

    def _embed(self, batch: Batch, offsets_W: Sequence[tuple[int, int]], *, exchange: bool) -> Tensor:
        """Return the features of this rank's group, float32 (b, D), with b = 0 where its slot is empty."""
        start, stop = offsets_W[self.worker.rank]
        first = self._own.start
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
