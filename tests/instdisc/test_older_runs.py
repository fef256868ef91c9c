"""Runs of older versions: their configurations are read, their checkpoints are theirs, and they keep their rules.

`older_runs.json` holds, of the last version before fields began to be added (0.1.0, commit 0045750), each recipe's
config.json as its documented command wrote it, and the digest that its checkpoints have.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from cluster.checkpoint import Checkpointer, CheckpointError
from cluster.store import Store
from cluster.worker import Worker, run_local
from instdisc import recipes
from instdisc.cli.main import main
from instdisc.config import (
    MAY_CHANGE_ON_RESUME,
    TrainConfig,
    as_begun,
    lasting_digest,
    resume_differences,
    rules_kept,
    undecided_digest,
)
from instdisc.overrides import BEFORE, field_names, from_plain, values_before
from instdisc.recipes import left_open
from instdisc.runs import DIGEST, Run
from instdisc.start_advice import keeps

OLDER = json.loads((Path(__file__).parent / "older_runs.json").read_text())


def older(name: str) -> TrainConfig:
    return TrainConfig.from_json(json.dumps(OLDER[name]["config"]))


@pytest.mark.parametrize("name", OLDER)
def test_a_run_of_the_older_version_is_read_and_its_checkpoints_have_the_digest_of_then(name):
    assert lasting_digest(older(name)) == OLDER[name]["digest"]


@pytest.mark.parametrize("name", OLDER)
def test_the_command_that_began_a_run_of_the_older_version_goes_on_with_it(name):
    asked = recipes.recipe(name)
    assert resume_differences(older(name), asked, left_open(asked)) == []
    assert lasting_digest(as_begun(older(name), asked, left_open(asked))) == OLDER[name]["digest"]


def test_every_field_added_since_says_what_its_absence_means_or_changes_nothing_computed():
    stored = OLDER["quickstart"]["config"]
    known = {f"{section}.{name}" for section in stored if isinstance(stored[section], dict) for name in stored[section]}
    added = set(field_names(TrainConfig)) - known - {"recipe", "seed"}
    silent = added - set(values_before(TrainConfig)) - MAY_CHANGE_ON_RESUME
    assert not silent, f"{sorted(silent)}: give metadata={{BEFORE: what older runs did}}, or say that they may change"


def test_a_run_keeps_a_normalisation_group_that_its_recipe_states_otherwise_today():
    begun_alone = older("quickstart").with_overrides({"optim.norm_group": 128})
    asked = recipes.recipe("quickstart")
    assert asked.optim.norm_group == 64
    assert resume_differences(begun_alone, asked, left_open(asked)) == []
    assert as_begun(begun_alone, asked, left_open(asked)).optim.norm_group == 128
    other = asked.with_overrides({"optim.norm_group": 32})
    assert resume_differences(begun_alone, other, left_open(other)) == [
        "optim.norm_group: the run has 128, asked for 32"
    ]


def test_a_precision_that_was_decided_stays_whatever_auto_would_come_to_now():
    begun = older("quickstart").with_overrides({"system.precision": "float32"})
    asked = recipes.recipe("quickstart")
    assert as_begun(begun, asked, left_open(asked)).system.precision == "float32"
    other = asked.with_overrides({"system.precision": "bfloat16"})
    assert resume_differences(begun, other) == ["system.precision: the run has 'float32', asked for 'bfloat16'"]
    assert undecided_digest(begun) == OLDER["quickstart"]["digest"]


def test_the_same_value_written_in_another_way_is_no_difference():
    config = TrainConfig()
    same = replace(
        config,
        optim=replace(config.optim, epochs=200, milestones=[120, 160], final_lr=-0.0, nesterov=0),
        augment=replace(config.augment, scale=[0.2, 1], order=["grayscale", "jitter"]),
    )
    assert resume_differences(config, same) == []
    assert lasting_digest(same) == lasting_digest(config)
    assert resume_differences(config, replace(config, optim=replace(config.optim, epochs=201))) != []


def test_a_field_that_nothing_reads_is_no_difference_and_keeps_the_digest():
    begun = older("cifar10-npid").with_overrides({"objective.proximal_weight": 5.0, "data.lanes": 3})
    asked = recipes.recipe("cifar10-npid")
    assert resume_differences(begun, asked, left_open(asked)) == []
    assert lasting_digest(as_begun(begun, asked, left_open(asked))) == lasting_digest(begun)


def test_a_run_names_the_rules_of_its_time_that_it_keeps():
    @dataclass(frozen=True, kw_only=True)
    class Newer(TrainConfig):
        rule: str = field(default="new", metadata={BEFORE: "old"})
        same: str = field(default="as ever", metadata={BEFORE: "as ever"})

    kept = rules_kept(from_plain(Newer, OLDER["quickstart"]["config"]))
    assert kept["rule"] == "old"
    assert "same" not in kept
    assert "data.orientation" not in kept, "code makes the images of quickstart"
    assert rules_kept(older("imagenet-npid-r18"))["data.orientation"] == "tiff"
    assert kept["optim.step_count"] == "rounded"
    assert rules_kept(Newer()) == {}


def test_the_rules_that_an_older_run_keeps_are_shown_in_one_line(tmp_path, capsys):
    run = Run(str(tmp_path))
    run.keep_config(older("quickstart"))
    run.store.put(DIGEST, b"{}")
    asked = recipes.recipe("quickstart")
    told = keeps(run.agreed_config(asked), asked)
    assert told is not None
    assert told.startswith("this run keeps the rules of the version that it began with: ")
    assert "optim.step_count=rounded" in told
    assert main(["show", run.uri]) == 0
    assert f"  {told}" in capsys.readouterr().out.splitlines()
    assert main(["show", run.uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rules_kept"] == rules_kept(older("quickstart"))


def save_then_restore(worker: Worker, uri: str, saved: str, now: str, also: str | None) -> int:
    for digest, older_digests in ((saved, None), (now, None if also is None else {"configuration": also})):
        checkpointer = Checkpointer(
            Store(uri), worker=worker, digests={"configuration": digest}, older_digests=older_digests
        )
        found = checkpointer.restore()
        if found is None:
            checkpointer.begin_attempt()
            checkpointer.start_save(1, {}, {}, {"step": 1}, {})
            checkpointer.wait()
        checkpointer.close()
    assert found is not None
    return found.step


def test_a_checkpoint_with_the_digest_of_an_older_version_is_taken_over_and_another_is_not(tmp_path):
    assert run_local(save_then_restore, 0, str(tmp_path / "a"), "auto", "float32", "auto")[0] == 1
    with pytest.raises(CheckpointError, match="another configuration"):
        run_local(save_then_restore, 0, str(tmp_path / "b"), "auto", "float32", None)
