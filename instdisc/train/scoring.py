"""From the features of one group of samples to the loss of each of them: which objective, with which negatives.

Shapes: b samples of this rank's group, G of all ranks in the step, K negatives, H hard negatives, D feature numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.collectives import all_gather_rows
from instdisc.config_method import ObjectiveConfig
from instdisc.hard_negatives import nearest_owned
from instdisc.memory_bank import ShardedMemoryBank
from instdisc.negatives import negative_indices_of_each
from instdisc.objectives.infonce import contrast, log_sum_exp
from instdisc.objectives.nce import data_terms, nce_offset, noise_terms
from instdisc.objectives.normalizer import Normalizer
from instdisc.objectives.own_rows import own_places
from instdisc.objectives.owners import OwnedPairs, log_sum_exp_of_owned, nce_noise_of_owned, owned_pairs
from instdisc.objectives.softmax import softmax_losses
from instdisc.rows_ahead import FetchedRows


@dataclass(frozen=True)
class Group:
    """The samples of a slot: those of this rank, and where the groups of all ranks lie in the G positions."""

    features_bD: Tensor
    own: slice
    offsets_W: Sequence[tuple[int, int]]

    @property
    def counts_W(self) -> list[int]:
        """Samples of each rank's group."""
        return [stop - start for start, stop in self.offsets_W]

    @property
    def places(self) -> np.ndarray:
        """The places in the G positions of the groups of all ranks, in rank order."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.offsets_W])


class Scorer:
    """Scores groups with one objective. seed: of the negatives of each sample."""

    def __init__(self, config: ObjectiveConfig, bank: ShardedMemoryBank, normalizer: Normalizer, seed: int) -> None:
        self._config, self._bank, self._normalizer, self._seed = config, bank, normalizer, seed
        self._drawn: tuple[int, np.ndarray] | None = None

    def losses(self, group: Group, rows: FetchedRows, step: int) -> tuple[Tensor, Tensor | None]:
        """Return the losses of a group and, for NCE, log sum_k exp(s_k) of its negatives; float32 (b,). Collective."""
        positives_bD = rows.positives_GD[group.own]
        if self._config.name == "softmax":
            return self._softmax(group, positives_bD, rows), None
        if self._config.name == "infonce":
            return self._infonce(group, positives_bD, rows, step), None
        return self._nce(group, positives_bD, rows, step)

    def log_sums(self, group: Group, rows: FetchedRows, step: int) -> Tensor:
        """Return log sum_k exp(s_k) of each sample's negatives, from which Z is estimated; float32 (b,). Collective."""
        temperature = self._config.temperature
        if not self._config.per_sample:
            return log_sum_exp(group.features_bD, rows.negatives_KD, temperature=temperature)
        return self._log_sums_of(group, self._own_negatives(group, rows, step, exclude_own_row=False))

    def _softmax(self, group: Group, positives_bD: Tensor, rows: FetchedRows) -> Tensor:
        return softmax_losses(
            group.features_bD,
            positives_bD,
            rows.indices_G[torch.from_numpy(group.places)],
            self._bank,
            temperature=self._config.temperature,
            counts_W=group.counts_W,
            score_bytes=self._config.score_mib * 2**20,
        )

    def _nce(self, group: Group, positives_bD: Tensor, rows: FetchedRows, step: int) -> tuple[Tensor, Tensor]:
        offset = nce_offset(self._normalizer.log_z, self._config.num_negatives, self._bank.num_rows)
        noise_b, log_sums_b = self._noise(group, rows, step, offset)
        data_b = data_terms(
            group.features_bD,
            positives_bD,
            temperature=self._config.temperature,
            offset=offset,
            proximal_weight=self._config.proximal_weight,
        )
        return data_b + noise_b, log_sums_b

    def _noise(self, group: Group, rows: FetchedRows, step: int, offset: Tensor | float) -> tuple[Tensor, Tensor]:
        temperature = self._config.temperature
        if not self._config.per_sample:
            return noise_terms(group.features_bD, rows.negatives_KD, temperature=temperature, offset=offset)
        return nce_noise_of_owned(
            group.features_bD,
            self._own_negatives(group, rows, step, exclude_own_row=False),
            self._bank,
            temperature=temperature,
            offset=offset,
            counts_W=group.counts_W,
        )

    def _infonce(self, group: Group, positives_bD: Tensor, rows: FetchedRows, step: int) -> Tensor:
        config, features_bD = self._config, group.features_bD
        if config.per_sample:
            pairs = self._own_negatives(group, rows, step, exclude_own_row=True)
            negative_b = self._log_sums_of(group, pairs)
        else:
            excluded = own_places(rows.indices_G[group.own], rows.indices_K)
            negative_b = log_sum_exp(features_bD, rows.negatives_KD, temperature=config.temperature, excluded=excluded)
        if config.hard_negatives:
            features_GD = all_gather_rows(features_bD.detach(), group.counts_W, self._bank.group)
            nearest = nearest_owned(
                features_GD, rows.indices_G[torch.from_numpy(group.places)], self._bank, config.hard_negatives
            )
            negative_b = torch.logaddexp(negative_b, self._log_sums_of(group, nearest))
        return contrast(
            (features_bD * positives_bD).sum(dim=1) / config.temperature,
            negative_b,
            denominator=config.denominator,
            num_negatives=config.num_negatives + config.hard_negatives,
            prior=config.debias_prior,
            temperature=config.temperature,
        )

    def _log_sums_of(self, group: Group, pairs: OwnedPairs) -> Tensor:
        return log_sum_exp_of_owned(
            group.features_bD, pairs, self._bank, temperature=self._config.temperature, counts_W=group.counts_W
        )

    def _own_negatives(self, group: Group, rows: FetchedRows, step: int, *, exclude_own_row: bool) -> OwnedPairs:
        if self._drawn is None or self._drawn[0] != step:
            drawn_GK = negative_indices_of_each(
                self._seed, step, len(rows.indices_G), self._config.num_negatives, self._bank.num_rows
            )
            self._drawn = step, drawn_GK.numpy()
        places = group.places
        excluded_G = rows.indices_G.numpy()[places] if exclude_own_row else None
        return owned_pairs(self._drawn[1][places], self._bank, excluded_G=excluded_G)
