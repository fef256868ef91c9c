"""The paired harness: its arithmetic, its order of trials, and the document of a tiny `bench step`."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys

import pytest
import torch

from dataloading.loader import Batch
from dataloading.stream import positions, rows
from instdisc.benchmark.document import as_text
from instdisc.benchmark.pairing import BenchmarkError, alternate, paired_result, spread, sweep
from instdisc.benchmark.plain_loop import PlainLoop, PlainSettings
from instdisc.cli.main import main
from instdisc.recipes import recipe

TINY = {
    "data.max_rows": "60",
    "model.width": "16",
    "model.feature_dim": "8",
    "optim.global_batch": "8",
    # The plain loop has no schedule.
    "optim.schedule": "constant",
    "optim.warmup_epochs": "0",
}
NEGATIVES = {
    "softmax": {},
    "infonce": {"objective.num_negatives": "16"},
    "nce": {"objective.num_negatives": "16", "objective.z": "ema"},
}


class FakeClock:
    """A clock that moves only when a side works, and remembers what happened."""

    def __init__(self):
        self.now_s = 0.0
        self.events = []

    def __call__(self):
        return self.now_s


class Side:
    """A contestant whose trials take the given seconds, and whose preparation and rest take an hour."""

    def __init__(self, name, clock, seconds):
        self.name, self.clock, self.seconds = name, clock, list(seconds)

    def prepare(self):
        self.clock.now_s += 3600
        self.clock.events.append(f"{self.name} prepares")

    def run(self):
        self.clock.now_s += self.seconds.pop(0)
        self.clock.events.append(f"{self.name} runs")

    def rest(self):
        self.clock.now_s += 3600
        self.clock.events.append(f"{self.name} rests")


def test_sides_take_turns_and_only_their_runs_after_the_warm_up_are_timed():
    clock = FakeClock()
    ours, theirs = Side("ours", clock, [100, 1, 2, 3]), Side("theirs", clock, [100, 4, 5, 6])

    seconds = alternate(ours, theirs, trials=3, warmup=1, clock=clock)

    assert seconds.ours == [1, 2, 3]
    assert seconds.reference == [4, 5, 6]
    turn = [f"{name} {does}" for name in ("ours", "theirs") for does in ("prepares", "runs", "rests")]
    assert clock.events == turn * 4


def test_a_side_that_fails_rests_all_the_same():
    clock = FakeClock()
    with pytest.raises(IndexError):
        alternate(Side("ours", clock, []), Side("theirs", clock, [1]), trials=1, clock=clock)
    assert clock.events == ["ours prepares", "ours rests"]


def test_the_sweep_ranks_settings_by_their_fastest_trial_and_keeps_those_that_fail():
    clock, said = FakeClock(), []

    def broken():
        raise OSError("no compiler here\nand much more")

    candidates = {
        "steady": lambda: Side("steady", clock, [0.5, 3, 3, 3]),
        "broken": broken,
        "noisy but fast": lambda: Side("noisy but fast", clock, [9, 8, 2, 8]),
    }
    swept = sweep(candidates, rounds=3, say=said.append, clock=clock)

    assert [(s.setting, s.seconds) for s in swept] == [
        ("noisy but fast", [8, 2, 8]),
        ("steady", [3, 3, 3]),
        ("broken", []),
    ]
    assert swept[2].error == "OSError: no compiler here"
    runs = [event for event in clock.events if event.endswith("runs")]
    assert runs[2:] == ["steady runs", "noisy but fast runs"] * 3
    assert any("broken: does not work here" in line for line in said)


def test_a_sweep_in_which_nothing_works_says_why():
    def broken():
        raise OSError("no compiler here")

    with pytest.raises(BenchmarkError, match="no compiler here"):
        sweep({"only": broken}, rounds=1, say=lambda _: None)


def test_spread_is_that_of_numbers_worked_out_by_hand():
    found = spread([7.0, 1.0, 3.0, 5.0, 100.0])  # in order 1 3 5 7 100: quartiles at places 1, 2 and 3
    assert (found.min, found.q1, found.median, found.q3, found.max) == (1, 3, 5, 7, 100)
    found = spread([1.0, 2.0, 3.0, 4.0])  # places 0.75, 1.5 and 2.25
    assert (found.min, found.q1, found.median, found.q3, found.max) == (1, 1.75, 2.5, 3.25, 4)
    found = spread([2.0])
    assert (found.min, found.q1, found.median, found.q3, found.max) == (2, 2, 2, 2, 2)


def test_the_ratio_is_the_median_over_pairs_and_above_one_where_ours_is_better():
    # The machine slows down tenfold for the second and third pair; ours is twice as fast in two pairs of three.
    faster = paired_result("speed", unit="images/s", ours=[10, 2, 3], reference=[5, 1, 6], higher_is_better=True)
    assert faster["ratio"] == 2
    assert faster["pair_ratios"] == [2, 2, 0.5]
    assert (faster["value"], faster["reference"], faster["ratio_of_medians"]) == (3, 5, 0.6)

    smaller = paired_result("memory", unit="MiB", ours=[100], reference=[150], higher_is_better=False)
    assert smaller["ratio"] == 1.5


@pytest.mark.parametrize("trials", [0, -1])
def test_fewer_than_one_trial_is_refused(trials):
    clock = FakeClock()
    with pytest.raises(BenchmarkError, match=f"trials: found {trials}, expected at least 1") as refused:
        alternate(Side("ours", clock, []), Side("theirs", clock, []), trials=trials, clock=clock)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--trials", "0"], "trials: found 0, expected at least 1"),
        (["step", "--steps", "0"], "steps: found 0, expected at least 1"),
        (["step", "--recipe", "cifar10-cpus"], "did you mean cifar10-cpu?"),
        (["step", "--model.widht", "8"], "did you mean model.width?"),
        (["step", "--recipe", "imagenet-npid-r18"], "give a smaller --data.max_rows"),
    ],
)
def test_a_mistake_in_the_command_is_told_with_exit_code_2(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_an_unknown_benchmark_is_told_with_those_that_exist(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "stairs"])
    assert stopped.value.code == 2
    assert "stairs" in (err := capsys.readouterr().err)
    assert "'step'" in err


@pytest.mark.parametrize("objective", ["softmax", "nce", "infonce"])
def test_the_plain_loop_trains_what_the_papers_formulas_say(objective):
    """One step's loss, judged by the formula over the bank's start in float64; and the row that it writes."""
    config = recipe("cifar10-cpu", **{**TINY, **NEGATIVES[objective], "objective.name": objective})
    for negatives in ("shared", "per-sample"):
        loop = PlainLoop(config, 60, PlainSettings(negatives=negatives), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        images_BCHW, indices_B = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) * 7
        bank_ND, tau, num_negatives = loop.bank.rows_ND.double(), config.objective.temperature, 16
        features_BD = loop.encoder(images_BCHW).detach().double()
        torch.manual_seed(5)
        loop.step(Batch(images_BCHW, indices_B, torch.ones(8, dtype=torch.bool)))

        torch.manual_seed(5)
        drawn_BK = (
            torch.randint(60, (num_negatives,)).expand(8, -1)
            if negatives == "shared"
            else torch.randint(60, (8, num_negatives + 1))[:, 1:]
        )
        scores_BN = (features_BD @ bank_ND.T / tau).exp()
        positive_B, negative_BK = scores_BN[torch.arange(8), indices_B], scores_BN.gather(1, drawn_BK)
        if objective == "softmax":
            loss = -(positive_B / scores_BN.sum(dim=1)).log().mean()
        elif objective == "infonce":
            kept_BK = negative_BK * (drawn_BK != indices_B[:, None])
            loss = -(positive_B / (positive_B + kept_BK.sum(dim=1))).log().mean()
        else:
            z, noise = negative_BK.mean() * 60, num_negatives / 60
            h_B, h_BK = (p / z / (p / z + noise) for p in (positive_B, negative_BK))
            loss = -(h_B.log() + (1 - h_BK).log().sum(dim=1)).mean()
        assert loop.mean_loss() == pytest.approx(loss.item(), rel=1e-4)
        mixed_BD = torch.nn.functional.normalize(0.5 * bank_ND[indices_B] + 0.5 * features_BD, dim=1)
        torch.testing.assert_close(loop.bank.rows_ND[indices_B].double(), mixed_BD, rtol=0, atol=1e-5)


def test_a_tiny_bench_step_prints_one_document_with_both_sides_measured():
    """In a process of its own, as the command sets the waiting policy of OpenMP, which torch reads when it loads."""
    overrides = [text for name, value in TINY.items() for text in (f"--{name}", value)]
    options = ["--trials", "2", "--steps", "2", "--threads", "1", "--sweep", "short", "--json"]
    command = [sys.executable, "-m", "instdisc.cli.main", "bench", "step", *options, *overrides]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr

    document = json.loads(ran.stdout)
    assert document["benchmark"] == "step"
    where = document["environment"]
    assert {"cpu", "cores_usable", "torch_threads", "memory_gib", "gpu", "versions", "commit", "date"} <= set(where)
    assert where["versions"]["torch"] == torch.__version__
    assert (where["torch_threads"], where["omp_wait_policy"]) == (1, "PASSIVE")
    assert len(where["load_average"]) == 3
    assert [result["name"] for result in document["results"]] == ["step", "peak memory", "step with data loading"]
    for result in document["results"]:
        assert {"name", "value", "unit", "reference", "ratio", "trials", "reference_trials", "spread"} <= set(result)
        num_trials = 1 if result["name"] == "peak memory" else 2
        assert len(result["trials"]) == len(result["reference_trials"]) == num_trials
        assert all(value > 0 and math.isfinite(value) for value in result["trials"] + result["reference_trials"])
    assert len(document["sweeps"]["plain loop, shared"]) == 6
    assert all(row["setting"] in ran.stderr for row in document["sweeps"]["plain loop, shared"])
    step = document["results"][0]
    # The exact softmax leaves nothing to chance: same images, weights and bank give the same losses.
    assert step["loss"] == pytest.approx(step["reference_loss"], rel=1e-3)
    assert "step with data loading" in as_text(document)


def test_the_two_sides_see_the_same_rows_of_the_sample_stream():
    from instdisc.benchmark.timed_steps import PreparedBatches

    images = [Batch(torch.full((8, 3, 4, 4), float(i)), torch.zeros(8), torch.ones(8)) for i in range(3)]
    source = PreparedBatches(images, num_rows=60, global_batch=8, seed=7, num_steps=4)
    batches = list(source.open(10))
    assert len(batches) == 5
    for step, batch in enumerate(batches, start=10):
        assert batch.indices_B.tolist() == rows(positions(step, 8), 60, 7).tolist()
        assert batch.images_BCHW.unique().item() == step % 3
