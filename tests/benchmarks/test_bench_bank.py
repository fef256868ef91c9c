"""`bench bank` on small banks: every comparison is there and of real work; refusals; bytes against the formula."""

from __future__ import annotations

import json

import pytest
import torch

from instdisc.bank_storage import start_rows
from instdisc.benchmark.bank_steps import Batches, OurBankSteps, PlainBankSteps, Trials
from instdisc.benchmark.plain_bank import PlainBank
from instdisc.cli.main import main
from instdisc.config_method import ObjectiveConfig
from instdisc.memory_bank import ShardedMemoryBank

SMALL = ["--rows", "3000", "--dim", "16", "--negatives", "64", "--batch", "8", "--trials", "2", "--steps", "2"]


def document_of(capsys, *options: str) -> dict:
    assert main(["bench", "bank", "--json", "--threads", "1", *SMALL, *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_sampled_negatives_are_measured_whole_and_by_phase_in_memory_and_over_n(capsys):
    document = document_of(capsys, "--table", "1000", "5000")
    names = [result["name"] for result in document["results"]]
    for name in (
        "step against per-sample gather, as released",
        "fetch against per-sample gather",
        "loss and gradient against per-sample gather",
        "update against per-sample gather",
        "peak memory beside the rows",
        "step without its fetch, N = 5,000",
        "fetch alone, N = 5,000",
    ):
        assert name in names
    for result in document["results"]:
        assert {"name", "value", "unit", "reference", "ratio", "trials"} <= set(result)
        assert min(result["trials"] + result["reference_trials"]) > 0
    assert document["config"]["num_negatives"] == 64


def test_the_softmax_is_measured_against_its_two_products_too(capsys):
    document = document_of(capsys, "--objective", "softmax")
    assert "exact softmax against its two products" in [result["name"] for result in document["results"]]


def test_workers_send_the_bytes_of_the_formula(capsys):
    """Other traffic on loopback counts as well, and headers and padding, which are large beside small messages."""
    document = document_of(capsys, "--workers", "3", "--negatives", "4096", "--batch", "128", "--steps", "8")
    *times, result = document["results"]
    assert [time["name"] for time in times] == [
        f"{name} of 3 workers" for name in ("step", "fetch", "loss and gradient", "update")
    ]
    assert all(min(time["trials"] + time["reference_trials"]) > 0 for time in times)
    assert result["reference"] == pytest.approx(2 / 3 * ((4096 + 128) * 16 * 4 + 128 * 16 * 4 + 128))
    assert 0.95 < result["value"] / result["reference"] < 1.5


@pytest.mark.parametrize("name", ["nce", "infonce", "softmax"])
def test_both_sides_compute_the_same_where_nothing_is_drawn(name):
    """One row per sample, the same in both banks: losses differ in their draws alone, updates not at all."""
    config = ObjectiveConfig(name=name, num_negatives=32, temperature=0.1)
    batches = Batches(500, 16, 8)
    bank = ShardedMemoryBank(500, 16)
    plain = PlainBank(start_rows(500, 16, 0, 0, 500), config, momentum=0.5, negatives="per-sample", kept_memory=True)
    for side in (Trials(OurBankSteps(bank, config, batches), 3), Trials(PlainBankSteps(plain, config, batches), 3)):
        side.prepare()
        side.run()
        assert all(seconds > 0 for seconds in side.phases.seconds.values())
    torch.testing.assert_close(bank.rows, plain.rows_ND, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "4"], "rows: found 4, expected at least 8"),
        (["--table", "1000", "100000000000"], "expected less than 90 %"),
        (["--workers", "0"], "workers: found 0"),
        (["--objective", "softmax", "--temperature", "0.01"], "at least 0.025"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, options, message):
    assert main(["bench", "bank", *SMALL, *options]) == 2
    assert message in capsys.readouterr().err
