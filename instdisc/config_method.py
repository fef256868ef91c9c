"""The sections of a run's configuration that say what is learnt: the memory bank and the loss."""

from __future__ import annotations

from dataclasses import dataclass

from instdisc.config_sections import check

OBJECTIVES = ("softmax", "nce", "infonce")
BANK_DTYPES = ("float32", "float16", "bfloat16")
BANK_DEVICES = ("auto", "cpu", "mapped")
DENOMINATORS = ("standard", "decoupled", "debiased")
MIN_SUM_TEMPERATURE = 0.025


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """The memory bank."""

    momentum: float = 0.5
    """Weight of the OLD row in an update (released code of the paper: 0.5)."""
    final_momentum: float | None = None
    """Weight at the end of training, reached along half a cosine (arXiv 2006.07733 moves its target's that way); None:
    always `momentum`."""
    dtype: str = "float32"
    """Storage: one of `BANK_DTYPES`; arithmetic is float32."""
    device: str = "auto"
    """Where a worker keeps its rows: "auto" (the memory of its GPU, or of the machine without one), "cpu" (host
    memory, page-locked for a GPU) or "mapped" (a nameless file in `mapped_dir`, mapped into host memory)."""
    mapped_dir: str | None = None
    """Folder on a local disk for mapped rows, with room for all workers of the machine; None: the folder for temporary
    files."""
    fetch_ahead: int = 1
    """Steps between the start of a fetch of rows and the step that reads them. Changes no result; more hide a slower
    link. With 0, or one worker whose rows are at hand, rows are fetched when they are read."""

    def __post_init__(self) -> None:
        check(
            "bank",
            ("momentum", self.momentum, 0 <= self.momentum < 1, "0 <= momentum < 1"),
            (
                "final_momentum",
                self.final_momentum,
                self.final_momentum is None or 0 <= self.final_momentum < 1,
                "0 <= momentum < 1, or none",
            ),
            ("dtype", self.dtype, self.dtype in BANK_DTYPES, f"one of {', '.join(BANK_DTYPES)}"),
            ("device", self.device, self.device in BANK_DEVICES, f"one of {', '.join(BANK_DEVICES)}"),
            (
                "mapped_dir",
                self.mapped_dir,
                self.mapped_dir is None or self.device == "mapped",
                "none unless bank.device is mapped",
            ),
            ("fetch_ahead", self.fetch_ahead, 0 <= self.fetch_ahead <= 64, "0 to 64 steps"),
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss."""

    name: str = "nce"
    """"softmax" (exact over all N), "nce" or "infonce"."""
    temperature: float = 0.07
    """τ (arXiv 1805.01978: 0.07 for ImageNet; its repository: 0.1 for CIFAR)."""
    num_negatives: int = 4096
    """K = m, negatives per step (arXiv 1805.01978: 4096); not used by softmax."""
    per_sample: bool = False
    """Draw K negatives for each sample, as the paper's released code does, instead of K that the batch shares: the
    owners of the rows add up what each sample needs of them. Slower, and no better on average."""
    hard_negatives: int = 0
    """InfoNCE: add so many rows of the whole bank that are nearest to each sample's feature (arXiv 2010.01028 mixes
    such from a queue). Each step then passes over the whole bank."""
    denominator: str = "standard"
    """InfoNCE: "standard", "decoupled" (without the positive, arXiv 2110.06848) or "debiased" (arXiv 2007.00224)."""
    debias_prior: float = 0.1
    """Share of images of a sample's own class, which "debiased" takes out of the negatives (arXiv 2007.00224, τ+)."""
    score_mib: int = 256
    """Most MiB of scores that the exact softmax holds at a time on each worker."""
    z: str = "constant"
    """Normaliser of NCE: "constant" (first batch, as in the paper) or "ema", a running mean of the batches' estimates,
    which data sets of fewer than about a million images need (with the constant the loss grows without end)."""
    z_decay: float = 0.99
    """Decay of the running estimate of Z (github.com/HobbitLong/CMC/issues/23)."""
    proximal_weight: float = 0.0
    """λ of the proximal term |v - v_old|^2 (arXiv 1805.01978, equation 9); the released code leaves it out."""

    def __post_init__(self) -> None:
        check(
            "objective",
            ("name", self.name, self.name in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}"),
            ("temperature", self.temperature, 0.01 <= self.temperature <= 10, "0.01 to 10"),
            (
                "temperature",
                self.temperature,
                not self.sums_at_owners or self.temperature >= MIN_SUM_TEMPERATURE,
                f"at least {MIN_SUM_TEMPERATURE} where ranks add up exponentials: softmax, per_sample, hard_negatives",
            ),
            ("num_negatives", self.num_negatives, self.num_negatives >= 1, "at least 1"),
            ("z", self.z, self.z in ("constant", "ema"), "constant or ema"),
            ("z_decay", self.z_decay, 0 <= self.z_decay < 1, "0 <= z_decay < 1"),
            ("proximal_weight", self.proximal_weight, self.proximal_weight >= 0, "at least 0"),
            ("per_sample", self.per_sample, not self.per_sample or self.name != "softmax", "no: softmax draws none"),
            ("hard_negatives", self.hard_negatives, 0 <= self.hard_negatives <= 4096, "0 to 4096"),
            (
                "hard_negatives",
                self.hard_negatives,
                self.hard_negatives == 0 or self.name == "infonce",
                "0: only infonce takes them (the noise of NCE is uniform, and softmax has all rows)",
            ),
            ("denominator", self.denominator, self.denominator in DENOMINATORS, f"one of {', '.join(DENOMINATORS)}"),
            (
                "denominator",
                self.denominator,
                self.denominator == "standard" or self.name == "infonce",
                "standard: only infonce has others",
            ),
            ("debias_prior", self.debias_prior, 0 <= self.debias_prior < 1, "0 <= share < 1"),
            ("score_mib", self.score_mib, self.score_mib >= 1, "at least 1"),
        )

    @property
    def sums_at_owners(self) -> bool:
        """Whether the owners of rows add up exponentials of scores for all ranks."""
        return self.name == "softmax" or self.per_sample or self.hard_negatives > 0

    @property
    def num_shared_negatives(self) -> int:
        """Negatives of a step that all samples share."""
        return 0 if self.name == "softmax" or self.per_sample else self.num_negatives
