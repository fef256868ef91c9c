"""Which pixel rules a run follows: the present ones, those that its images were packed by, those that it began with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cluster.store import Store
from dataloading.index import DatasetError
from dataloading.loader import eval_batches
from dataloading.pack import pack
from dataloading.pixel_rules import BEFORE_RULES, PixelRules
from dataloading.sources import list_images, open_dataset
from instdisc import recipes
from instdisc.config import TrainConfig
from instdisc.launch import fit
from instdisc.loading import RunEncoder
from instdisc.models import build_encoder
from instdisc.runs import Run


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Return a folder of JPEG files, some of which EXIF turns."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(6):
        coarse = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x112] = (1, 6, 3)[number % 3]
        Image.fromarray(coarse).resize((160, 120)).save(root / f"{number}.jpg", exif=exif.tobytes())
    return root


def config_of(root: Path) -> TrainConfig:
    return recipes.recipe("cifar10-cpu").with_overrides(
        {
            "data.kind": "auto",
            "data.root": str(root),
            "data.max_rows": None,
            "model.architecture": "convnet-small",
            "model.width": 4,
            "augment.size": 16,
            "eval.resize": 16,
            "eval.crop": 16,
            "optim.global_batch": 4,
            "optim.norm_group": 4,
            "optim.epochs": 1,
            "optim.warmup_epochs": 0,
            "system.bank_checks": "warn",
            "system.tensorboard": False,
        }
    )


def packed(photos: Path, target: Path, rules: PixelRules) -> Path:
    images = list_images("folder", str(photos), "train")
    pack(images, Store(str(target)), "train", parallel=map, rules=rules)
    return target


def stored_rules(uri: Path) -> PixelRules:
    """Return the rules that the run's configuration states by value, once its index states the same."""
    data = json.loads((uri / "config.json").read_text())["data"]
    rules = PixelRules(data["orientation"], data["deep_samples"])
    assert Run(str(uri)).index().rules == rules
    return rules


def test_a_new_run_states_the_present_rules_by_value(photos, tmp_path):
    fit(config_of(photos), run=str(tmp_path / "run"))
    assert stored_rules(tmp_path / "run") == PixelRules("exif", "scaled")


def test_a_run_of_an_older_version_goes_on_with_the_pixels_it_had(photos, tmp_path):
    """The run is one of an older version: what it stored states no rules."""
    older, uri = config_of(photos).with_overrides({"data.orientation": "tiff", "data.deep_samples": "clipped"}), "run"
    fit(older, run=str(tmp_path / uri))
    run = Run(str(tmp_path / uri))
    config = json.loads((tmp_path / uri / "config.json").read_text())
    for name in ("orientation", "deep_samples"):
        del config["data"][name]
    (tmp_path / uri / "config.json").write_text(json.dumps(config))
    (tmp_path / uri / "results.json").unlink()
    assert run.require_same_config(config_of(photos)).data.pixel_rules == BEFORE_RULES
    assert fit(config_of(photos), run=str(tmp_path / uri)).step == 2
    assert stored_rules(tmp_path / uri) == BEFORE_RULES
    assert not (tmp_path / uri / "bad_images.jsonl").exists()


def test_a_new_run_takes_the_rules_that_its_images_were_packed_by_and_says_so(photos, tmp_path):
    root, said = packed(photos, tmp_path / "packed", BEFORE_RULES), []
    fit(config_of(root), run=str(tmp_path / "run"), on_event=said.append)
    assert stored_rules(tmp_path / "run") == BEFORE_RULES
    assert any("pixel rules are those that it was packed by (orientation tiff" in e.get("text", "") for e in said)
    assert not (tmp_path / "run/bad_images.jsonl").exists()


def test_a_run_does_not_go_on_with_images_packed_by_other_rules(photos, tmp_path):
    uri = str(tmp_path / "run")
    fit(config_of(photos), run=uri)
    (tmp_path / "run/results.json").unlink()
    other = packed(photos, tmp_path / "older", BEFORE_RULES)
    with pytest.raises(DatasetError, match="orientation 'tiff', asked for 'exif'"):
        fit(config_of(other), run=uri)
    fit(config_of(packed(photos, tmp_path / "packed", PixelRules())), run=uri)


@pytest.mark.parametrize("rules", [PixelRules(), BEFORE_RULES])
def test_preprocess_turns_a_picture_as_evaluations_do(rules, photos, tmp_path):
    config = config_of(photos).with_overrides(
        {"data.orientation": rules.orientation, "data.deep_samples": rules.deep_samples}
    )
    encoder = RunEncoder(build_encoder(config.model), config)
    dataset = open_dataset("folder", str(photos), "train", rules=rules)
    (batch,) = eval_batches(
        dataset,
        range(6),
        resize=16,
        crop=16,
        mean=config.augment.mean,
        std=config.augment.std,
        batch_size=6,
        device="cpu",
        num_threads=1,
    )
    for row, name in enumerate(dataset.index.names):
        with Image.open(photos / name) as image:
            assert torch.equal(encoder.preprocess(image), batch.images_BCHW[row])
            if rules == PixelRules():  # a picture that its user turned is not turned again
                assert torch.equal(encoder.preprocess(ImageOps.exif_transpose(image)), batch.images_BCHW[row])
