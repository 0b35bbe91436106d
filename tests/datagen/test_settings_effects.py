"""Every setting of the commands that make datasets has an effect, is refused with a reason, or is shown by a GPU alone.

python -m pytest tests/datagen/test_settings_effects.py
"""

import csv
import importlib.util
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from transformers import AutoTokenizer

from datagen import config
from datagen.dataset.reader import read_info, read_plan
from datagen.dataset.targets import minilm_wheel
from tests import small_dataset, tiny_published, tiny_sd2
from tests.effects import Command, Entries, Entry, Result, cases, complete, only_on_gpu, refused, shows, without_gpu

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.allow_hosts(["127.0.0.1"])]

UNUSED = "has no effect "


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory, weights: tiny_sd2.TinySD2) -> dict[str, Path]:
    """Files that the entries name: prompts, models, images and datasets, all tiny."""
    root = tmp_path_factory.mktemp("places")
    found = {"files": _prompts(root / "files"), "data": small_dataset.write(root / "data", train=16, val=6)}
    found["damaged"] = small_dataset.write(root / "damaged", train=4, val=2)
    small_dataset.corrupt(found["damaged"], 1)
    found["data2"] = small_dataset.write(root / "data2", train=12, val=6, seed=1)
    for seed, name in enumerate(("encoder", "encoder2")):
        found[name] = _encoder(root / name, seed)
    found |= {
        "sd2": weights.folder,
        "sd2_ckpt": weights.ckpt,
        "sd2_other": tiny_sd2.build(root / "other", seed=1).folder,
    }
    found["sd2_nan"], found["sd2_variant"] = _changed_weights(weights.folder, root / "nan", root / "variant")
    for name in ("diffusiondb", "sd2_4m"):
        getattr(tiny_published, name)(root / name)
        getattr(tiny_published, name)(root / f"{name}_more", archives=4)
        found |= {name: root / name, f"{name}_more": root / f"{name}_more"}
    _make_profane(root / "diffusiondb/metadata.parquet")
    found |= _images(root / "images")
    for command in (DATAGEN, INDEX, TARGETS, PUBLISHED, VERIFY, REPORT):
        command.places = found
    found["faulty"] = DATAGEN.run(root / "faulty", (*SD2, "renderer.model={sd2_nan}")).out
    return found


# ------------------------------------------------------------------------------------------------------------- datagen


def plan(result: Result) -> list[dict[str, Any]]:
    return read_plan(result.out).to_pylist()


def column(name: str) -> Any:
    def values(result: Result) -> list[Any]:
        return read_plan(result.out)[name].to_pylist()

    return values


def tars(result: Result) -> dict[str, str]:
    return result.digest("out/shards/*.tar")


def info(result: Result) -> dict[str, Any]:
    """`dataset.json` without the settings, which repeat what was asked."""
    return {key: value for key, value in read_info(result.out).items() if key != "settings"}


def vectors(result: Result) -> dict[str, str]:
    return result.digest("out/targets/*/*.npy")


def targets(result: Result) -> list[str]:
    return result.names("out/targets/*")


def failures(result: Result) -> int:
    return sum(line["event"] == "failed" for line in result.records("out.log.jsonl"))


def shard_is_blocked(folder: Path) -> None:
    """Leave a dataset in `folder` whose second shard cannot be written."""
    made = DATAGEN.run(folder / "made", ()).out
    (folder / "out/shards/000001.tar").mkdir(parents=True)
    for name in ("dataset.json", "prompts.parquet"):
        shutil.copy(made / name, folder / "out")


prompts, sides = column("prompt"), column("split")
CSV = ("prompts=file", "prompts.path={files}/p.csv", "split.kind=image")
PARQUET = (*CSV, "prompts.path={files}/p.parquet")
ODD = ("prompts=file", "prompts.path={files}/two.csv", "split.kind=image")
MIXED = (
    *("prompts=competition", "split.kind=image", "num=8"),
    *(f"~prompts.sources.{name}" for name in ("diffusiondb", "vizwiz", "flickr30k", "narratives")),
    *("prompts.sources.coco.weight=0.5", "prompts.sources.gustavosta.weight=0.5"),
    *("prompts.sources.coco.prompts.path={files}/p.csv", "prompts.sources.coco.prompts.column=prompt"),
    *("prompts.sources.gustavosta.prompts.path={files}/p.tsv", "prompts.sources.gustavosta.prompts.column=prompt"),
)
SD2 = (
    *("renderer=sd2_competition", "renderer.model={sd2}", "renderer.device=cpu", "renderer.render_size=64"),
    *("renderer.size=48", "renderer.steps=4", "force=true", "num=3", "shard_size=3"),
)
TWO_GPUS = ("devices=2", "renderer.device=auto")
CKPT = (*SD2, "renderer.model={sd2_ckpt}", "renderer.allow_unknown_weights=true")
UNGUIDED = (*SD2, "renderer.guidance=1")
ANY = (
    *("renderer=diffusers", "renderer.model={sd2}", "renderer.device=cpu", "renderer.size=48", "renderer.steps=2"),
    *("force=true", "num=3", "shard_size=3", "renderer.render_size=64"),
)
DAYS = (*SD2, "num=1000", "renderer.render_size=768", "renderer.steps=50", "renderer.model=owner/name")
ENCODED = ("encoder={encoder}",)
HUB = "renderer.model=owner/name"

DATAGEN = Command(
    "datagen",
    "datagen",
    (
        *("out={here}/out", "renderer=glyphs", "prompts=grammar", "renderer.size=32", "num=12", "shard_size=6"),
        *("encoder=null", "curate.dedup_threshold=null", "split.kind=holdout", "split.val_fraction=0.3", "workers=1"),
    ),
    spied=(
        "datagen.renderers.sd2.networks:Networks.decode",
        "datagen.renderers.diffusion_base:DiffusionRenderer._batch",
        "datagen.renderers.sd2.renderer:StableDiffusion2.draw",
        "datagen.renderers.diffusers.renderer:DiffusersModel.draw",
        "datagen.engine.local:_start",
    ),
)


def batches(result: Result) -> list[int]:
    return [len(args[1]) for args, _ in result.of("_batch")]


def diffusion(given: tuple[str, ...]) -> dict[str, Entry | list[Entry]]:
    """Entries of both diffusion renderers."""
    return {
        "model": shows(tars, "renderer.model={sd2_other}", given=given),
        "revision": [
            refused("tried the hub for revision v1", "renderer.revision=v1", given=(*given, HUB)),
            refused(
                rf"renderer\.revision: {UNUSED}with renderer.model=.*, a local path",
                "renderer.revision=v1",
                given=given,
            ),
        ],
        "steps": shows(tars, "renderer.steps=5", given=given),
        "guidance": shows(tars, "renderer.guidance=2", given=given),
        "render_size": shows(tars, "renderer.render_size=128", given=given),
        "size": shows(tars, "renderer.size=40", given=given),
        "filter": [
            shows(tars, "renderer.filter=box", given=given),
            refused(
                rf"filter: {UNUSED}with renderer\.size=64 equal", "renderer.filter=box", "renderer.size=64", given=given
            ),
        ],
        "precision": shows(tars, "renderer.precision=bf16", given=given),
        "device": refused("renderer.device=cuda:99", "renderer.device=cuda:99", given=given),
        "batch_size": shows(batches, "renderer.batch_size=2", given=given),
        "redraw": [
            shows(
                lambda r: len(r.of("draw")),
                "renderer.redraw=false",
                given=(*given, "renderer.model={sd2_nan}", "renderer.precision=bf16"),
            ),
            refused(
                rf"redraw: {UNUSED}with renderer\.precision=fp32",
                "renderer.redraw=true",
                "renderer.precision=fp32",
                given=given,
            ),
        ],
        "image_format": shows(lambda r: read_suffixes(r.out), "renderer.image_format=png", given=given),
    }


def weight_files(result: Result) -> dict[str, str]:
    return read_info(result.out)["settings"]["renderer"]["files"]


def read_suffixes(root: Path) -> set[str]:
    with tarfile.open(root / "shards/000000.tar") as tar:
        return {Path(name).suffix for name in tar.getnames()}


def of(renderer: str, entries: dict[str, Entry | list[Entry]]) -> dict[str, Entry | list[Entry]]:
    return {f"renderer[{renderer}].{name}": entry for name, entry in entries.items()}


CURATION: dict[str, Entry | list[Entry]] = {
    "curate.min_tokens": shows(prompts, "curate.min_tokens=14"),
    "curate.max_tokens": shows(prompts, "curate.max_tokens=10"),
    "curate.language": shows(info, "curate.language=en", given=ODD),
    "curate.profanity": shows(info, "curate.profanity=drop", given=ODD),
    "curate.dedup_threshold": shows(prompts, "curate.dedup_threshold=0.3", given=ENCODED),
    "curate.exclude_near": shows(
        info, "curate.exclude_near=[{files}/near.csv]", "curate.exclude_threshold=0.95", given=(*ENCODED, *CSV)
    ),
    "curate.exclude_threshold": [
        shows(info, "curate.exclude_threshold=0.999", given=(*ENCODED, *CSV, "curate.exclude_near=[{files}/near.csv]")),
        refused(f"curate.exclude_threshold: {UNUSED}with curate.exclude_near=", "curate.exclude_threshold=0.8"),
    ],
}
SPLIT: dict[str, Entry | list[Entry]] = {
    "split.kind": shows(sides, "split.kind=image"),
    "split.val_fraction": shows(sides, "split.val_fraction=0.6"),
    "split.threshold": [
        shows(info, "split.threshold=0.2", given=(*ENCODED, "split.kind=similarity")),
        shows(info, "split.threshold=0.999", given=(*ENCODED, *CSV, "curate.exclude_near=[{files}/near.csv]")),
        refused(f"split.threshold: {UNUSED}with split.kind=holdout", "split.threshold=0.5"),
    ],
}
DATAGEN_SETTINGS: Entries = {
    "out": shows(lambda r: r.names("*"), "out={here}/elsewhere"),
    "num": shows(tars, "num=11"),
    "seed": shows(prompts, "seed=1"),
    "seeds_per_prompt": shows(prompts, "seeds_per_prompt=2"),
    "shard_size": shows(lambda r: r.names("out/shards/*"), "shard_size=4"),
    "encoder": shows(targets, "encoder={encoder}"),
    "engine": refused("ray_address=127.0.0.1:1", "engine=ray", "ray_address=127.0.0.1:1"),
    "ray_address": [
        refused("ray_address=127.0.0.1:1", "ray_address=127.0.0.1:1", "engine=ray"),
        refused(f"ray_address: {UNUSED}with engine=local", "ray_address=auto"),
    ],
    "devices": [
        refused(f"devices: {UNUSED}with renderer=glyphs on the CPU", "devices=2"),
        without_gpu(refused("devices: 2 GPUs .* runs on the CPU of this machine", *TWO_GPUS, given=SD2)),
        refused(f"devices: {UNUSED}with renderer.device=cuda:1", "devices=2", "renderer.device=cuda:1", given=SD2),
        only_on_gpu("each device is a GPU"),
    ],
    "workers": [
        shows(lambda r: len(r.of("_start")), "workers=2"),
        refused(f"workers: {UNUSED}with renderer=sd2_competition", "workers=2", given=SD2),
    ],
    "part": shows(lambda r: r.names("out/shards/*"), "part=1/2"),
    "retries": shows(failures, "retries=0", prepare=shard_is_blocked),
    "dry_run": shows(lambda r: r.names(), "dry_run=true"),
    "force": refused("(?s)would take about .* or insist with force=true", "force=false", given=DAYS),
    "prompts": shows(prompts, *CSV, given=("split.kind=image",)),
    "prompts[grammar].flourish": shows(prompts, "prompts.flourish=1"),
    "prompts[grammar].objects": shows(prompts, "prompts.objects=[0,1]"),
    "prompts[grammar].detail": shows(prompts, "prompts.detail=0"),
    "prompts[grammar].names": shows(prompts, "prompts.names=5"),
    "prompts[file].path": shows(prompts, "prompts.path={files}/p.tsv", given=CSV),
    "prompts[file].revision": refused("is not on the hub", "prompts.revision=v1", given=CSV),
    "prompts[file].records": [
        shows(prompts, "prompts.records=more", given=(*CSV, "prompts.path={files}/p.json", "prompts.records=rows")),
        refused(f"prompts.records: {UNUSED}with path=.*p.csv", "prompts.records=rows", given=CSV),
    ],
    "prompts[file].column": [
        shows(prompts, "prompts.column=other", given=CSV),
        refused(
            f"prompts.column: {UNUSED}with path=.*p.txt", "prompts.column=x", given=(*CSV, "prompts.path={files}/p.txt")
        ),
    ],
    "prompts[file].text_encoding": [
        shows(prompts, "prompts.text_encoding=cp1252", given=(*CSV, "prompts.path={files}/accents.csv")),
        refused(f"text_encoding: {UNUSED}with path=", "prompts.text_encoding=cp1252", given=PARQUET),
    ],
    "prompts[file].json_lists": shows(prompts, "prompts.json_lists=true", given=(*CSV, "prompts.column=lists")),
    "prompts[file].group_column": shows(column("group"), "prompts.group_column=group", given=CSV),
    "prompts[file].max_values": shows(prompts, "+prompts.max_values={nsfw: 0}", given=CSV),
    "prompts[file].shuffle": shows(prompts, "prompts.shuffle=100", given=(*CSV, "num=20")),
    "prompts[file].source": shows(column("source"), "prompts.source=mine", given=CSV),
    "prompts[mixture].sources.*.weight": [
        shows(
            column("source"),
            *("prompts.sources.coco.weight=0.25", "prompts.sources.gustavosta.weight=0.75"),
            given=MIXED,
        ),
        refused(
            f"sources.coco.prompts.column: {UNUSED}with prompts.sources.coco.weight=0",
            *("prompts.sources.coco.weight=0", "prompts.sources.gustavosta.weight=1"),
            given=MIXED,
        ),
    ],
    "prompts[mixture].sources.*.prompts": [
        shows(prompts, "prompts.sources.coco.prompts.path={files}/two.csv", given=MIXED),
        refused(f"coco.prompts.source: {UNUSED}in a mixture", "prompts.sources.coco.prompts.source=x", given=MIXED),
    ],
    "prompts[mixture].sources.*.max_prompts": shows(
        column("source"), "prompts.sources.coco.max_prompts=1", given=MIXED
    ),
    **CURATION,
    **SPLIT,
    "renderer": shows(tars, *SD2, given=("num=3", "shard_size=3")),
    "renderer[glyphs].size": shows(tars, "renderer.size=48"),
    "renderer[glyphs].image_format": shows(lambda r: read_suffixes(r.out), "renderer.image_format=webp"),
    **of(
        "sd2_competition",
        {
            **diffusion(SD2),
            "allow_unknown_weights": [
                refused(
                    "its sha256 is",
                    "renderer.allow_unknown_weights=false",
                    given=(*SD2, "renderer.model={sd2_ckpt}", "renderer.allow_unknown_weights=true"),
                ),
                refused(
                    f"allow_unknown_weights: {UNUSED}with renderer.model=",
                    "renderer.allow_unknown_weights=true",
                    given=SD2,
                ),
            ],
            "scheduler": shows(tars, "renderer.scheduler=dpmsolver++", given=SD2),
            "guided_fraction": [
                shows(tars, "renderer.guided_fraction=0.5", given=SD2),
                refused(
                    f"guided_fraction: {UNUSED}with renderer.guidance=1",
                    "renderer.guided_fraction=0.5",
                    "renderer.guidance=1",
                    given=SD2,
                ),
            ],
            "cache_every": shows(tars, "renderer.cache_every=2", given=SD2),
            "compile": only_on_gpu(
                "compiling takes minutes on a CPU: test_stable_diffusion.py::test_compiled_networks_match, slow"
            ),
            "vae_batch": shows(lambda r: len(r.of("decode")), "renderer.vae_batch=1", given=SD2),
            "watermark": shows(tars, "renderer.watermark=true", given=SD2)
            if importlib.util.find_spec("imwatermark")
            else refused("invisible-watermark", "renderer.watermark=true", given=SD2),
        },
    ),
    **of(
        "diffusers",
        {
            **diffusion(ANY),
            "variant": shows(weight_files, "renderer.variant=fp16", given=(*ANY, "renderer.model={sd2_variant}")),
        },
    ),
}


@pytest.mark.parametrize("entry", cases(DATAGEN_SETTINGS))
def test_setting_of_datagen_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    DATAGEN.check(entry, tmp_path)


def test_each_setting_of_datagen_has_an_entry(tmp_path: Path) -> None:
    complete(config.DatagenSettings, DATAGEN_SETTINGS)
    DATAGEN.steady(DATAGEN_SETTINGS, tmp_path)


# --------------------------------------------------------------------------------------------------------------- index

INDEX = Command(
    "datagen.index",
    "index",
    ("out={here}/out", "images={images}", "csv={images}/a.csv", "encoder=null", "split.val_fraction=0.3"),
)
TARS = ("images=null", "csv=null", "tars={tars}/a.tar")
INDEX_SETTINGS: Entries = {
    "out": shows(lambda r: r.names("*"), "out={here}/elsewhere"),
    "images": shows(lambda r: read_plan(r.out)["key"].to_pylist(), "images={images2}"),
    "csv": [
        shows(prompts, "csv={images}/b.csv"),
        refused("csv: .* is for images=", "csv={images}/a.csv", given=TARS),
    ],
    "file_column": [
        shows(prompts, "file_column=other_file"),
        refused("file_column: is for csv=", "file_column=x", given=TARS),
    ],
    "prompt_column": shows(prompts, "prompt_column=other"),
    "text_encoding": [
        shows(prompts, "text_encoding=cp1252"),
        refused(
            f"text_encoding: {UNUSED}with prompt_column=text", "text_encoding=cp1252", "prompt_column=text", given=TARS
        ),
    ],
    "source_column": shows(column("source"), "source_column=other"),
    "group_column": shows(column("group"), "group_column=other"),
    "split_column": [
        shows(sides, "split_column=side"),
        refused(
            f"(?s)seed: {UNUSED}with.*split.val_fraction: {UNUSED}with",
            "split_column=side",
            "seed=1",
            "split.val_fraction=0.5",
        ),
    ],
    "tars": shows(prompts, "tars={tars}/b.tar", given=TARS),
    "source": shows(column("source"), "source=mine"),
    "seed": shows(sides, "seed=3"),
    "encoder": shows(targets, "encoder={encoder}"),
    "split.kind": shows(sides, "split.kind=holdout", given=("group_column=other",)),
    "split.val_fraction": shows(sides, "split.val_fraction=0.8"),
    "split.threshold": [
        refused(
            "cosine ≥ 0.1 to a validation",
            "split.threshold=0.1",
            given=(*ENCODED, "split.kind=similarity", "split.threshold=0.9999"),
        ),
        refused(f"split.threshold: {UNUSED}with split.kind=image", "split.threshold=0.5"),
    ],
}


@pytest.mark.parametrize("entry", cases(INDEX_SETTINGS))
def test_setting_of_index_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    INDEX.check(entry, tmp_path)


def test_each_setting_of_index_has_an_entry(tmp_path: Path) -> None:
    complete(config.IndexSettings, INDEX_SETTINGS)
    INDEX.steady(INDEX_SETTINGS, tmp_path)


# ------------------------------------------------------------------------------------------------- targets and verify


def dataset_is_here(folder: Path) -> None:
    small_dataset.write(folder / "out", train=4, val=2)


TARGETS = Command("datagen.targets", "targets", ("out={here}/out", "encoder={encoder}"))
TARGETS_SETTINGS: Entries = {
    "out": refused("holds no dataset|is no dataset|no dataset", "out={here}/nowhere"),
    "encoder": shows(targets, "encoder={encoder2}", prepare=dataset_is_here),
}
VERIFY = Command("datagen.verify", "verify", ("out={data}",))
VERIFY_SETTINGS: Entries = {"out": shows(lambda r: len(r.lines("ERROR")), "out={damaged}")}


@pytest.mark.parametrize("entry", cases(TARGETS_SETTINGS))
def test_setting_of_targets_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    TARGETS.check(entry, tmp_path)


@pytest.mark.parametrize("entry", cases(VERIFY_SETTINGS))
def test_setting_of_verify_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    VERIFY.check(entry, tmp_path)


def test_each_setting_of_targets_and_verify_has_an_entry(tmp_path: Path) -> None:
    complete(config.TargetsSettings, TARGETS_SETTINGS)
    complete(config.VerifySettings, VERIFY_SETTINGS)
    VERIFY.steady(VERIFY_SETTINGS, tmp_path)


# ----------------------------------------------------------------------------------------------------------- published

PUBLISHED = Command(
    "datagen.published",
    "published",
    (
        *("out={here}/out", "name=diffusiondb", "folder={diffusiondb}", "encoder=null", "curate.dedup_threshold=null"),
        *("split.kind=image", "split.val_fraction=0.3"),
    ),
)
FROM_TARS = ("name=sd2_4m", "folder={sd2_4m}")
FROM_HUB = ("folder=null",)

PUBLISHED_SETTINGS: Entries = {
    "name": shows(prompts, *FROM_TARS),
    "out": shows(lambda r: r.names("*"), "out={here}/elsewhere"),
    "num": shows(prompts, "num=5"),
    "folder": shows(prompts, "folder={diffusiondb_more}"),
    "revision": [
        refused("at v1 for", "revision=v1", given=FROM_HUB),
        refused("folder, revision: .* has no revision", "revision=v1"),
    ],
    "work": refused("dataset.json/out.published", "work={data}/dataset.json"),
    "hold_archives": [
        refused(f"hold_archives: {UNUSED}with name=diffusiondb", "hold_archives=true"),
        refused(f"hold_archives: {UNUSED}with folder=", "hold_archives=true", given=FROM_TARS),
    ],
    "max_nsfw": [
        shows(prompts, "max_nsfw=3"),
        refused(f"max_nsfw: {UNUSED}with name=sd2_4m", "max_nsfw=1", given=FROM_TARS),
    ],
    "seed": shows(prompts, "seed=1"),
    "encoder": shows(targets, "encoder={encoder}"),
    "curate.min_tokens": shows(prompts, "curate.min_tokens=12"),
    "curate.max_tokens": shows(prompts, "curate.max_tokens=11"),
    "curate.language": refused("no prompt remains .*not in the language de", "curate.language=de"),
    "curate.profanity": shows(prompts, "curate.profanity=drop"),
    "curate.dedup_threshold": shows(prompts, "curate.dedup_threshold=0.5", given=ENCODED),
    "curate.exclude_near": shows(
        prompts, "curate.exclude_near=[{files}/published.csv]", "curate.exclude_threshold=0.9999", given=ENCODED
    ),
    "curate.exclude_threshold": [
        shows(
            info,
            "curate.exclude_threshold=0.98",
            given=(*ENCODED, "curate.exclude_near=[{files}/published.csv]", "curate.exclude_threshold=0.9999"),
        ),
        refused(f"curate.exclude_threshold: {UNUSED}with curate.exclude_near=", "curate.exclude_threshold=0.8"),
    ],
    "split.kind": shows(sides, "split.kind=holdout", given=FROM_TARS),
    "split.val_fraction": shows(sides, "split.val_fraction=0.6"),
    "split.threshold": [
        shows(prompts, "split.threshold=0.2", given=(*ENCODED, "split.kind=similarity")),
        refused(f"split.threshold: {UNUSED}with split.kind=image", "split.threshold=0.5"),
    ],
}


@pytest.mark.parametrize("entry", cases(PUBLISHED_SETTINGS))
def test_setting_of_published_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    PUBLISHED.check(entry, tmp_path)


def test_each_setting_of_published_has_an_entry(tmp_path: Path) -> None:
    complete(config.PublishedSettings, PUBLISHED_SETTINGS)
    PUBLISHED.steady(PUBLISHED_SETTINGS, tmp_path)


# -------------------------------------------------------------------------------------------------------------- report


def page(result: Result) -> dict[str, str]:
    return result.digest("*.html")


REPORT = Command("datagen.report", "datagen_report", ("out={data}", "page={here}/page.html", "images=4", "faults=2"))
REPORT_SETTINGS: Entries = {
    "out": shows(page, "out={data2}"),
    "page": shows(lambda r: r.names(), "page={here}/other.html"),
    "images": shows(page, "images=2"),
    "faults": shows(page, "faults=1", given=("out={faulty}",)),
    "counted": shows(page, "counted=5"),
    "seed": shows(page, "seed=1"),
}


@pytest.mark.parametrize("entry", cases(REPORT_SETTINGS))
def test_setting_of_report_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    REPORT.check(entry, tmp_path)


def test_each_setting_of_report_has_an_entry(tmp_path: Path) -> None:
    complete(config.ReportSettings, REPORT_SETTINGS)
    REPORT.steady(REPORT_SETTINGS, tmp_path)


# ------------------------------------------------------------------------------------------------ what the entries name


def _prompts(folder: Path) -> Path:
    """Files of prompts: 24 with further columns, others in other formats, and a few odd ones."""
    folder.mkdir()
    things = ["fox", "boat", "castle", "robot", "lighthouse", "horse", "piano", "bridge"]
    rows = [
        {
            "prompt": f"a {colour} {thing} standing in {where}",
            "other": f"the image of a {thing} that is {colour} by {where}",
            "group": thing,
            "nsfw": n / 2 - 0.3,
            "lists": json.dumps([f"one {colour} {thing} seen from above", f"one {colour} {thing} at {where} again"]),
        }
        for n, (colour, where) in enumerate([("red", "the snow"), ("blue", "a harbour"), ("green", "a dark forest")])
        for thing in things
    ]
    _table(folder / "p.csv", rows)
    _table(folder / "p.tsv", [{"prompt": row["prompt"].replace("standing", "seen")} for row in rows], "\t")
    (folder / "p.txt").write_text("".join(f"{row['prompt']}\n" for row in rows))
    others = [{"prompt": row["other"]} for row in rows]
    (folder / "p.json").write_text(json.dumps({"rows": rows, "more": others}))
    odd = [
        "ein roter Fuchs steht im tiefen Schnee und schaut",
        "das ist wirklich ein sehr altes Haus am See",
        "a fucking ugly castle",
    ]
    _table(folder / "two.csv", [{"prompt": text} for text in [*odd, *(row["prompt"] for row in rows[:6])]])
    pq.write_table(pa.table({"prompt": [row["prompt"] for row in rows]}), folder / "p.parquet")
    _table(folder / "accents.csv", [{"prompt": f"{row['prompt']} by the café"} for row in rows])
    _table(folder / "near.csv", [{"prompt": f"a red {thing} standing in the deep snow"} for thing in things[:4]])
    _table(folder / "published.csv", [{"prompt": text} for text in tiny_published.PROMPTS[:6]])
    return folder


def _table(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def _make_profane(table: Path) -> None:
    """Give one prompt of the table a word of the list of `curate.profanity`."""
    rows = pq.read_table(table)
    texts = [*rows["prompt"].to_pylist()[:-1], "a photo of the fucking ugly castle by the sea"]
    pq.write_table(rows.set_column(rows.column_names.index("prompt"), "prompt", pa.array(texts)), table)


def _encoder(folder: Path, seed: int) -> Path:
    """A target encoder of 16 numbers a word."""
    torch.manual_seed(seed)
    words = StaticEmbedding(AutoTokenizer.from_pretrained(minilm_wheel()), embedding_dim=16)
    SentenceTransformer(modules=[words, Normalize()], device="cpu").save(str(folder))
    return folder


def _changed_weights(folder: Path, nan: Path, variant: Path) -> tuple[Path, Path]:
    """The model with a decoder that overflows; and with a second file of UNet weights, the variant fp16."""
    for copy in (nan, variant):
        shutil.copytree(folder, copy, copy_function=os.link)
    decoder = nan / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(decoder)
    decoder.unlink()
    save_file(
        {**tensors, "decoder.conv_in.bias": tensors["decoder.conv_in.bias"] * float("inf")},
        decoder,
        metadata={"format": "pt"},
    )
    unet = variant / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    return nan, variant


def _images(root: Path) -> dict[str, Path]:
    """Two folders of images with their prompts, and two tars of samples."""
    found = {"images": root / "a", "images2": root / "b", "tars": root / "tars"}
    for folder in found.values():
        folder.mkdir(parents=True)
    rows = []
    for n in range(10):
        for folder, name in ((found["images"], f"p{n}"), (found["images2"], f"p{n + 2}")):
            (folder / f"{name}.png").write_bytes(small_dataset.image(f"square {9 * n} 20 30 on 200 {n} 50", 8))
        rows.append(
            {
                "file": f"p{n}.png",
                "other_file": f"p{(n + 1) % 10}.png",
                "prompt": f"a red fox number {n} in a café",
                "other": f"a boat of kind {n}",
                "side": "val" if n < 7 else "train",
            }
        )
    _table(found["images"] / "a.csv", rows)
    _table(found["images"] / "b.csv", [{**row, "prompt": f"the {row['prompt']}"} for row in rows])
    for name in "ab":
        with tarfile.open(found["tars"] / f"{name}.tar", "w") as tar:
            for n in range(4):
                for suffix, data in (
                    ("png", small_dataset.image(f"square {9 * n} 20 30 on 200 {n} 50", 8)),
                    ("txt", f"a boat {name} of kind {n}".encode()),
                ):
                    (root / "member").write_bytes(data)
                    tar.add(root / "member", f"{n:04d}.{suffix}")
    return found
