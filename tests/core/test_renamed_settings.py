"""Old names of settings: refused on the command line and in YAML files, understood in files of earlier versions."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from core.cli import compose
from core.errors import UserError
from core.paths import ROOT
from core.renamed_settings import (
    DATASET_FILES,
    RENAMED,
    RENAMED_VALUES,
    with_new_names,
    with_new_names_in_text,
    with_old_names,
)
from core.settings import settings
from datagen.config import PublishedSettings
from datagen.dataset.reader import Dataset, read_info
from datagen.engine import plan
from datagen.importers import published_sets
from models.export.model_card import CardDetails, render_card
from tests import commands, small_dataset, training
from tests.datagen.curation.test_curate import run as curated
from tests.models.export.test_model_card import ONE
from train import run_settings

COMPOSED = {
    "datagen": [(), ("prompts=file",)],
    "published": [("name=diffusiondb", "out=x")],
    "index": [("out=x",)],
    "report": [()],
}
"""Overrides whose compositions hold all keys of a command, where its defaults do not."""

# Records that earlier versions wrote.
RUN: dict[str, Any] = {
    "batch_size": 8,
    "data": {"crop": 1.0, "erase": 0.0, "flip": False, "jitter": 0.0, "one_seed": True, "sources": {}, "weights": None},
    "dry_run": False,
    "encoder": "colours",
    "encoder_sha256": [None],
    "epochs": 2.0,
    "fold": None,
    "fold_threshold": 0.7,
    "init_from": None,
    "keep_first": True,
    "log_every": 1,
    "loss": {"contrastive": 0.0, "hardest": 0.5, "mse": 0.0, "temperature": 0.07},
    "max_steps": 4,
    "model": {
        "backbone": "test_vit",
        "crop_pct": None,
        "fixed_stats": True,
        "freeze": 0,
        "head": "linear",
        "head_init": "ridge",
        "head_pictures": 100000,
        "head_width": 2048,
        "interpolation": None,
        "lora": {"alpha": 16.0, "blocks": 0, "dropout": 0.0, "rank": 16},
        "resize_mode": None,
        "size": 32,
        "text_tower": None,
        "weights": "random",
    },
    "name": "run",
    "optim": {
        "betas": [0.9, 0.98],
        "clip": 1.0,
        "ema": 0.0,
        "head_lr": 0.0003,
        "head_only": 0.4,
        "head_only_lr": 0.001,
        "layer_decay": 1.0,
        "lr": 0.0003,
        "name": "adamw",
        "schedule": "cosine",
        "warmup": 2,
        "weight_decay": 0.01,
    },
    "out": "checkpoints/run",
    "passes": [2.0],
    "precision": "fp32",
    "preprocess": 3,
    "save_every": 3,
    "scale": {
        "accelerator": "cpu",
        "compile": "auto",
        "devices": "auto",
        "micro_batch": "auto",
        "nodes": 1,
        "precision": "auto",
        "recompute": "auto",
        "strategy": "ddp",
        "workers": 0,
    },
    "seed": 0,
    "val": [],
    "validate_every": 1.0,
    "wandb": "off",
    "weights_sha256": None,
}
SAME_RUN = (
    *("save_initial=true", "loss.hard_fraction=0.5", "max_steps=4", "dataset_repeats=[2]"),
    *("optim.head_warmup_epochs=0.4", "optim.head_warmup_lr=0.001"),
)
CURATE = {
    "against": [],
    "against_at": 0.7,
    "duplicates_at": None,
    "language": None,
    "max_tokens": None,
    "min_tokens": 5,
    "profanity": "keep",
}
DATASET: dict[str, Any] = {
    "curate": CURATE,
    "encoder": None,
    "num": 12,
    "prompts": {"detail": 1.0, "flourish": 0.3, "name": "grammar", "names": None, "objects": [0.6, 0.3, 0.1]},
    "renderer": {"font": "7.2.96", "image_format": "png", "name": "glyphs", "size": 32, "version": 1},
    "seed": 0,
    "seeds_per_prompt": 1,
    "shard_size": 6,
    "split": {"kind": "picture", "share": 0.25, "threshold": 0.7},
}
PUBLISHED = {
    "curate": CURATE,
    "encoder": None,
    "nsfw_at_most": 0.5,
    "num": 9,
    "published": "diffusiondb",
    "seed": 0,
    "split": {"kind": "picture", "share": 0.25, "threshold": 0.7},
}
CURATION_FOLDER = """\
{
 "against": {},
 "chunks": 3,
 "curate": {
  "against": [],
  "against_at": 0.7,
  "duplicates_at": 0.9,
  "language": null,
  "max_tokens": null,
  "min_tokens": 5,
  "profanity": "keep"
 },
 "num": 20,
 "origin": {
  "prompts": {
   "name": "x"
  }
 },
 "seed": 0,
 "split": {
  "kind": "picture",
  "share": 0.25,
  "threshold": 0.7
 }
}
"""
SPLIT = ("split.kind=image", "split.val_fraction=0.25")


def keys_of(values: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Dotted keys of groups and of what is in them."""
    for key, value in values.items():
        yield f"{where}{key}"
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{where}{key}.")


def matching(pattern: str, keys: Iterable[str]) -> list[str]:
    names = pattern.split(".")
    split = [(key, key.split(".")) for key in keys]
    return [
        key
        for key, parts in split
        if len(parts) == len(names) and all(n in ("*", p) for n, p in zip(names, parts, strict=True))
    ]


@pytest.mark.parametrize("command", [name for name in RENAMED if name != DATASET_FILES])
def test_new_names_exist_and_old_ones_do_not(command: str) -> None:
    keys = {key for overrides in COMPOSED.get(command, [()]) for key in keys_of(compose(command, list(overrides)))}
    for old, new in RENAMED[command].items():
        assert matching(new, keys), new
        assert not matching(old, keys), old
        assert old.rpartition(".")[0] == new.rpartition(".")[0], "a key stays in its group"
    assert len(set(RENAMED[command].values())) == len(RENAMED[command]), "names can be translated back"


def test_the_changelog_lists_every_renamed_key() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    pairs = {pair for name in RENAMED if name != DATASET_FILES for pair in RENAMED[name].items()}
    pairs.discard(("prompts.sources.*.prompts.at_most", "prompts.sources.*.prompts.max_values"))  # of each source
    lacking = [pair for pair in pairs if "| `{}` | `{}` |".format(*pair).replace("*", "NAME") not in text]
    assert not lacking


def test_new_values_are_accepted_and_old_ones_are_not() -> None:
    values = compose("index", ["out=x", "images=x", "csv=x.csv", "encoder=null", "split.kind=image"])
    assert values["split"]["kind"] == "image"
    known = set(keys_of(compose("train", [])))
    assert set(RENAMED_VALUES["runs"]["sort"].values()) <= known
    assert not set(RENAMED_VALUES["runs"]["sort"]) & known


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("train", ["passes=3"], "error: passes is now dataset_repeats: write dataset_repeats=3\n"),
        (
            "train",
            ["+keep_first=true", "--help"],
            "error: keep_first is now save_initial: write +save_initial=true\n",
        ),
        (
            "train",
            [
                *(
                    "++optim.clip=0.5",
                    "~loss.hardest",
                    "data={weights: w.csv, one_seed: false}",
                    "scale.recompute=full",
                ),
                *("+experiment=vith14", "optim.lr=1e-4", "model.fixed_stats=true,false"),
            ],
            (
                "error: settings have new names:\n"
                "  optim.clip is now optim.grad_clip_norm: write ++optim.grad_clip_norm=0.5\n"
                "  loss.hardest is now loss.hard_fraction: write ~loss.hard_fraction\n"
                "  data.weights is now data.sample_weights: write data.sample_weights=w.csv\n"
                "  data.one_seed is now data.one_image_per_prompt: write data.one_image_per_prompt=false\n"
                "  scale.recompute is now scale.activation_checkpointing: write scale.activation_checkpointing=full\n"
                "  model.fixed_stats is now model.freeze_bn_stats: write model.freeze_bn_stats=true,false\n"
            ),
        ),
        ("datagen", ["split.kind=picture"], "error: split.kind=picture is now split.kind=image\n"),
        (
            "datagen",
            ["+prompts.at_most.nsfw=0.5", "prompts.sources.coco.most=5", "curate={against: [a, b], min_tokens: 4}"],
            (
                "error: settings have new names:\n"
                "  prompts.at_most.nsfw is now prompts.max_values.nsfw: write +prompts.max_values.nsfw=0.5\n"
                "  prompts.sources.coco.most is now prompts.sources.coco.max_prompts: write "
                "prompts.sources.coco.max_prompts=5\n"
                "  curate.against is now curate.exclude_near: write curate.exclude_near=[a,b]\n"
            ),
        ),
        (
            "train.evaluate",
            ["knn.bank=a.txt"],
            "error: knn.bank is now knn.prompt_index: write knn.prompt_index=a.txt\n",
        ),
        ("train.demo", ["most_mb=5"], "error: most_mb is now max_upload_mb: write max_upload_mb=5\n"),
        ("train.runs", ["sort=optim.clip"], "error: sort=optim.clip is now sort=optim.grad_clip_norm\n"),
        ("models.export", ["graphs=[onnx]"], "error: graphs is now runtimes: write runtimes=[onnx]\n"),
        ("models.export", ["pictures=x"], "error: pictures is now check_images: write check_images=x\n"),
    ],
)
def test_the_command_line_is_refused_with_the_new_names(module: str, arguments: list[str], message: str) -> None:
    done = commands.run(module, *arguments)
    assert (done.returncode, done.stderr, done.stdout) == (2, message, "")


def test_a_yaml_file_of_the_user_is_refused_with_the_new_names(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\npasses: [2]\noptim: {clip: 1, lr: 1e-4}\n"
    (tmp_path / "experiment/mine.yaml").write_text(text)
    done = commands.run("train", "--config-dir", tmp_path, "+experiment=mine")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: settings have new names:\n"
        "  optim.clip is now optim.grad_clip_norm; change the YAML file that sets it\n"
        "  passes is now dataset_repeats; change the YAML file that sets it\n"
    )


def test_composing_in_code_refuses_old_names() -> None:
    with pytest.raises(UserError, match=r"^optim\.clip is now optim\.grad_clip_norm: write optim\.grad_clip_norm=1$"):
        compose("train", ["optim.clip=1"])


# ------------------------------------------------------------------------------------------------------------- files


def test_names_are_translated_and_back() -> None:
    file = {"name": "file", "at_most": {"nsfw": 0.5}}
    old = {
        **DATASET,
        "prompts": {"sources": {"a": {"weight": 1, "most": 3, "prompts": file}}},
        "renderer": {"guided_share": 1.0, "files": {"unet/weights.fp16.safetensors": "ab", "vae/config.json": "cd"}},
    }
    new = with_new_names(DATASET_FILES, old)
    assert new["prompts"]["sources"]["a"] == {
        "weight": 1,
        "max_prompts": 3,
        "prompts": {"name": "file", "max_values": {"nsfw": 0.5}},
    }
    assert new["split"] == {"kind": "image", "val_fraction": 0.25, "threshold": 0.7}
    assert new["renderer"] == {"guided_fraction": 1.0, "files": old["renderer"]["files"]}
    assert with_new_names(DATASET_FILES, new) == new
    assert json.dumps(with_old_names(DATASET_FILES, new)) == json.dumps(old), "in the same order"
    assert with_new_names_in_text(DATASET_FILES, "near a prompt of curate.against, curate.against_at=1") == (
        "near a prompt of curate.exclude_near, curate.exclude_threshold=1"
    )


@pytest.fixture
def earlier_run(tmp_path: Path) -> Path:
    """A run folder with the settings.json of an earlier version, on a small dataset."""
    data = small_dataset.write(tmp_path / "data", train=8, val=4)
    values = {**RUN, "dataset": [str(data)], "dataset_sha256": [Dataset(data).fingerprint()]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/settings.json").write_text(json.dumps(values))
    return tmp_path / "run"


def test_a_run_of_an_earlier_version_resumes(earlier_run: Path) -> None:
    data = earlier_run.with_name("data")
    datasets = [Dataset(data, small_dataset.ENCODER)]
    cfg = training.cfg(data, earlier_run, *SAME_RUN)
    assert run_settings.check_run_folder(cfg, datasets, "fp32")["optim"]["grad_clip_norm"] == 1
    cfg = training.cfg(data, earlier_run, *SAME_RUN, "optim.grad_clip_norm=2")
    with pytest.raises(UserError) as refused:
        run_settings.check_run_folder(cfg, datasets, "fp32")
    assert [line for line in str(refused.value).splitlines() if line.startswith("  ")] == [
        "  optim.grad_clip_norm: 1.0 (recorded), 2.0 (requested)"
    ]


def test_settings_of_an_earlier_run_have_the_new_names(earlier_run: Path) -> None:
    from train.evaluate.trained_on import _recipe

    read = run_settings.read_settings(earlier_run)
    assert (read["dataset_repeats"], read["loss"]["hard_fraction"], read["data"]["sample_weights"]) == (
        [2.0],
        0.5,
        None,
    )
    known = set(keys_of(compose("train", [])))
    facts = ("dataset_sha256", "encoder_sha256", "weights_sha256", "precision", "preprocess")
    assert {key for key in keys_of(read) if key not in facts} == known
    recipe = earlier_run / "recipe.json"
    recipe.write_bytes((earlier_run / "settings.json").read_bytes())
    assert _recipe(recipe) == read


def test_the_model_card_of_an_earlier_run_says_how_it_was_trained() -> None:
    card = render_card(ONE, CardDetails(recipes={ONE["members"][0]["name"]: RUN}))
    assert "gradient norm clipped at 1, head only for the first 0.4 epochs" in card
    assert "on the 50% with the lowest cosine" in card


def test_a_dataset_has_the_same_record_as_before(tmp_path: Path) -> None:
    overrides = ("renderer=glyphs", "prompts=grammar", "renderer.size=32", "num=12", "shard_size=6", "workers=1")
    bare = (*overrides, *SPLIT, "curate.dedup_threshold=null", "encoder=null")
    commands.make(tmp_path / "data", *bare)
    recorded = read_info(tmp_path / "data")["settings"]
    versions = recorded.pop("versions")
    assert recorded == DATASET
    before = (tmp_path / "data/dataset.json").read_bytes()
    commands.make(tmp_path / "data", *bare)
    assert (tmp_path / "data/dataset.json").read_bytes() == before
    other = {**DATASET, "versions": versions, "curate": {**CURATE, "duplicates_at": 0.9}}
    with pytest.raises(UserError, match=r"\n  curate\.dedup_threshold: None \(recorded\), 0\.9 \(requested\)\n"):
        plan.refuse_another_dataset(tmp_path, {**DATASET, "versions": versions}, other)


def test_a_published_set_has_the_same_record_as_before() -> None:
    given = [
        "name=diffusiondb",
        "out=x",
        "num=9",
        "max_nsfw=0.5",
        "encoder=null",
        "curate.dedup_threshold=null",
        *SPLIT,
    ]
    assert published_sets._identity(settings(PublishedSettings, compose("published", given))) == PUBLISHED


def test_a_curation_has_the_same_record_as_before(tmp_path: Path) -> None:
    from tests.datagen.curation.test_curate import numbered

    curated(
        *(numbered(), 20, "image"),
        val_fraction=0.25,
        dedup_threshold=0.9,
        work=tmp_path,
        origin={"prompts": {"name": "x"}},
    )
    assert (tmp_path / "settings.json").read_text() == CURATION_FOLDER
