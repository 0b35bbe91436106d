"""Published sets become datasets: byte for byte, curated, resumed after a kill, from a folder and from the hub."""

import importlib
import itertools
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.config import PublishedSettings
from datagen.curation import curate
from datagen.dataset.prompt_normal_form import normal_form
from datagen.dataset.reader import Dataset, read_info
from datagen.importers import published_sets
from datagen.importers.published_sets import publish
from datagen.verify.verify import verify
from tests import tiny_published
from tests.commands import call, contents, run, start
from tests.tiny_hub import COMMIT, TinyHub

BARE = ("encoder=null", "curate.dedup_threshold=null", "split.kind=image", "split.val_fraction=0.25")


def make(name: str, out: Path, folder: Path, *overrides: str) -> Dataset:
    values = compose("published", [f"name={name}", f"out={out}", f"folder={folder}", *BARE, *overrides])
    publish(settings(PublishedSettings, values))
    return Dataset(out)


def images(dataset: Dataset) -> dict[str, tuple[bytes, str]]:
    """Name in the archive → bytes and prompt, of all that can be used."""
    splits = [i for split in dataset.splits if split != "faulty" for i in dataset.rows(split).tolist()]
    return {dataset.key(i).partition("/")[2]: (dataset.image_bytes(i), dataset.prompts(i)[0]) for i in splits}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.with_name(f"{out.name}.log.jsonl").read_text().splitlines()]


def test_diffusiondb_from_a_folder(tmp_path: Path) -> None:
    expected = tiny_published.diffusiondb(tmp_path / "copy", archives=4, images=12)
    before = contents(tmp_path / "copy")
    dataset = make("diffusiondb", tmp_path / "out", tmp_path / "copy")
    names = list(expected)
    good = {name.removesuffix(".png"): expected[name] for i, name in enumerate(names) if i not in (1, 2, 3)}
    assert images(dataset) == good
    assert verify(tmp_path / "out") == []
    assert contents(tmp_path / "copy") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "out", "out.log.jsonl"]

    faults = {line["file"]: line["fault"] for line in lines(tmp_path / "out")}
    assert faults[names[1]].startswith("cannot be decoded: ")
    assert faults[names[2]] == "not in its archive, or damaged there"
    assert dataset.splits["faulty"] == len(faults) == 2
    info = read_info(tmp_path / "out")
    assert info["curation"]["pictures_left_out"] == {"image_nsfw above 1": 1}  # the blurred one
    assert [a["pictures"] for a in info["provenance"]["archives"]] in (
        [11, 12, 12, 12],
        [12, 11, 12, 12],
        [12, 12, 11, 12],
        [12, 12, 12, 11],
    )

    sides: dict[str, set[str]] = {}
    for split in ("train", "val"):
        for i in dataset.rows(split).tolist():
            sides.setdefault(dataset.prompts(i)[0], set()).add(split)
            assert dataset.source(i) == "diffusiondb"
    assert {len(found) for found in sides.values()} == {1}  # all images of a prompt on one side
    assert len(sides) == 36
    seeds = dict(zip(*(shards_plan(tmp_path / "out")[c].to_pylist() for c in ("key", "seed")), strict=True))
    assert {key.partition("/")[2]: seed for key, seed in seeds.items()}[names[5].removesuffix(".png")] == 2**32 - 6


def shards_plan(root: Path) -> Any:
    from datagen.dataset.reader import read_plan

    return read_plan(root)


@pytest.mark.slow
def test_num_takes_archives_in_seeded_order(tmp_path: Path) -> None:
    tiny_published.diffusiondb(tmp_path / "copy", archives=5, images=4)
    archives = {}
    for seed in range(4):
        make("diffusiondb", tmp_path / f"{seed}", tmp_path / "copy", "num=7", f"seed={seed}", "max_nsfw=2")
        archives[seed] = [tuple(a.values()) for a in read_info(tmp_path / f"{seed}")["provenance"]["archives"]]
        assert [count for _, count in archives[seed]] == [4, 3]
    assert len({tuple(names) for names in archives.values()}) > 1
    make("diffusiondb", tmp_path / "again", tmp_path / "copy", "num=7", "seed=3", "max_nsfw=2")
    assert contents(tmp_path / "again") == contents(tmp_path / "3")


def test_sd2_4m_from_a_folder_by_its_clusters(tmp_path: Path) -> None:
    expected = tiny_published.sd2_4m(tmp_path / "copy", archives=4, images=9)
    dataset = make("sd2_4m", tmp_path / "out", tmp_path / "copy", "split.kind=holdout", "split.val_fraction=0.5")
    assert images(dataset) == {name.removesuffix(".webp"): value for name, value in expected.items()}
    assert verify(tmp_path / "out") == []
    clusters = {split: {dataset.group(i) for i in dataset.rows(split).tolist()} for split in ("train", "val")}
    assert not clusters["train"] & clusters["val"]
    assert clusters["train"] | clusters["val"] == {f"cluster {n}" for n in range(6)}
    assert read_info(tmp_path / "out")["curation"]["pictures_left_out"] == {"sample without an image": 1}
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["copy", "out"]


@pytest.mark.slow
def test_published_prompts_are_curated_like_datagen(tmp_path: Path) -> None:
    """By similarity, with the real encoder: no training prompt is near a validation prompt, and targets are written."""
    tiny_published.sd2_4m(tmp_path / "copy", archives=4, images=9)
    overrides = (
        "encoder=all-MiniLM-L6-v2",
        "curate.dedup_threshold=0.98",
        "split.kind=similarity",
        "split.threshold=0.85",
    )
    make("sd2_4m", tmp_path / "out", tmp_path / "copy", *overrides)
    dataset = Dataset(tmp_path / "out", "all-MiniLM-L6-v2")
    train, val = (dataset.rows(split).tolist() for split in ("train", "val"))
    cosines = [float(dataset.target(t) @ dataset.target(v)) for t in train for v in val]
    assert max(cosines) < 0.85
    assert sum(read_info(tmp_path / "out")["curation"]["dropped"].values()) > 0


def rewritten(path: Path, change: Callable[[int, str], str | None]) -> None:
    """Diffusiondb's table with other prompts."""
    table = pq.read_table(path)
    prompts = pa.array([change(n, p) for n, p in enumerate(table["prompt"].to_pylist())], pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("prompt"), "prompt", prompts), path)


def test_image_keeps_spelling_of_its_prompt(tmp_path: Path) -> None:
    expected = tiny_published.diffusiondb(tmp_path / "copy", archives=4, images=12)
    rewritten(tmp_path / "copy" / "metadata.parquet", lambda n, p: p.title() if n >= 36 else p)
    dataset = make("diffusiondb", tmp_path / "out", tmp_path / "copy")
    found = {name: prompt for name, (_, prompt) in images(dataset).items()}
    wanted = {n.removesuffix(".png"): p.title() if i >= 36 else p for i, (n, (_, p)) in enumerate(expected.items())}
    assert found.items() <= wanted.items()
    assert len(found) == 45
    sides: dict[str, set[str]] = {}
    for split in ("train", "val"):
        for i in dataset.rows(split).tolist():
            sides.setdefault(dataset.prompts(i)[0].casefold(), set()).add(split)
    assert {len(s) for s in sides.values()} == {1}
    plan = shards_plan(tmp_path / "out")
    pairs = set(zip(plan["prompt_id"].to_pylist(), plan["prompt"].to_pylist(), strict=True))
    assert len(pairs) == len({n for n, _ in pairs}) == len({p for _, p in pairs}) == 47  # one was blurred
    assert read_info(tmp_path / "out")["curation"]["dropped"] == {"equal text": 11}


def test_images_of_near_identical_prompts_are_on_one_side(tmp_path: Path) -> None:
    """The repetitions of a prompt have other case, punctuation and spaces."""
    tiny_published.diffusiondb(tmp_path / "copy", archives=6, images=12)
    rewritten(
        tmp_path / "copy" / "metadata.parquet", lambda n, p: p if n < 36 else f" {p.title()}, ".replace(" ", "  ")
    )
    dataset = make("diffusiondb", tmp_path / "out", tmp_path / "copy")
    prompts = {split: [dataset.prompts(i)[0] for i in dataset.rows(split).tolist()] for split in ("train", "val")}
    assert len(prompts["train"]) + len(prompts["val"]) == 69
    assert {text.istitle() for text in prompts["val"]} == {True, False}
    forms = {split: set(map(normal_form, texts)) for split, texts in prompts.items()}
    assert not forms["train"] & forms["val"]
    assert len(forms["train"] | forms["val"]) == 36
    assert read_info(tmp_path / "out")["leakage"] == {"train/val": {"prompts": 0, "affected": 0}}


def test_holdout_leaves_out_images_whose_prompt_is_on_the_other_side(tmp_path: Path) -> None:
    """The fifth archive repeats nine prompts of the first, each in the next cluster."""
    tiny_published.sd2_4m(tmp_path / "copy", archives=5, images=9)
    tar = tmp_path / "copy" / "co" / "sd-4.4M-co-001.tar"
    tar.write_bytes(re.sub(rb'"cluster": (\d)', lambda m: b'"cluster": %d' % ((int(m[1]) + 1) % 6), tar.read_bytes()))
    dataset = make("sd2_4m", tmp_path / "out", tmp_path / "copy", "split.kind=holdout", "split.val_fraction=0.5")
    clusters = {split: {dataset.group(i) for i in dataset.rows(split).tolist()} for split in ("train", "val")}
    assert not clusters["train"] & clusters["val"]
    side = [n for n in range(6) if f"cluster {n}" in clusters["val"]]
    moved = sum((n % 6 in side) != ((n + 1) % 6 in side) for n in range(36, 44))  # the ninth's first image is missing
    assert moved > 0
    assert read_info(tmp_path / "out")["curation"]["pictures_left_out"] == {
        "sample without an image": 1,
        "group on another side than its prompt": moved,
    }


def test_an_image_without_a_prompt_is_left_out_and_counted(tmp_path: Path) -> None:
    expected = tiny_published.diffusiondb(tmp_path / "copy", archives=1, images=12)
    rewritten(tmp_path / "copy" / "metadata.parquet", lambda n, p: None if n == 5 else p)
    dataset = make("diffusiondb", tmp_path / "out", tmp_path / "copy")
    assert list(expected)[5].removesuffix(".png") not in images(dataset)
    assert len(images(dataset)) == 8
    assert read_info(tmp_path / "out")["curation"]["dropped"] == {"empty": 1}


def test_holdout_leaves_out_images_without_cluster(tmp_path: Path) -> None:
    tiny_published.sd2_4m(tmp_path / "copy", archives=1, images=9)
    tar = next((tmp_path / "copy").rglob("*.tar"))
    tar.write_bytes(tar.read_bytes().replace(b'"cluster": 0', b'"another": 0'))
    dataset = make("sd2_4m", tmp_path / "out", tmp_path / "copy", "split.kind=holdout", "split.val_fraction=0.5")
    groups = [dataset.group(i) for split in ("train", "val") for i in dataset.rows(split).tolist()]
    assert set(groups) == {f"cluster {n}" for n in range(1, 6)}
    assert read_info(tmp_path / "out")["curation"]["dropped"] == {"no group": 2}


# Interrupted


def end_at(values: dict[str, Any], module: str, function: str, call: int) -> None:
    """Import in a separate process that is killed at the n-th call of a function."""
    curate._CHUNK = 15
    place, calls = importlib.import_module(module), itertools.count(1)
    whole = getattr(place, function)

    def call_or_end(*args: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)

    setattr(place, function, call_or_end)
    publish(settings(PublishedSettings, values))


@pytest.mark.parametrize("name", ["diffusiondb", "sd2_4m"])
def test_import_killed_anywhere_resumes_bitwise(tmp_path: Path, name: str) -> None:
    getattr(tiny_published, name)(tmp_path / "copy", archives=12, images=10)
    make(name, tmp_path / "whole", tmp_path / "copy")
    out = tmp_path / "out"
    values = compose("published", [f"name={name}", f"out={out}", f"folder={tmp_path / 'copy'}", *BARE])
    for module, function, number, shards in (
        ("datagen.prompts.clip_tokenizer", "token_counts", 3, 0),  # in the third chunk of its curation
        ("datagen.importers.published_sets", "write_plan", 1, 0),
        ("datagen.importers.published_sets", "_fault", 5, 0),  # in the first shard
        ("datagen.importers.published_sets", "_fault", 65, 6),
    ):
        assert call(end_at, values, module, function, number) == -signal.SIGKILL
        assert len(list(out.glob("shards/*.parquet"))) == shards
        if function == "token_counts":
            assert len(list((tmp_path / "out.published" / "curation").glob("[0-9]*.json"))) == 2
    make(name, out, tmp_path / "copy")
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "out.published").exists()


def killed(overrides: list[str], env: dict[str, str], when: Callable[[], bool]) -> bool:
    """Start the command and kill it as soon as `when`; whether it was still running."""
    process = start("datagen.published", *overrides, fresh=True, **env)
    deadline = time.monotonic() + 120
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running


@pytest.mark.slow
@pytest.mark.enable_socket
def test_sd2_4m_from_the_hub_holding_archives_or_not(tmp_path: Path) -> None:
    expected = tiny_published.sd2_4m(tmp_path / "copy", archives=6, images=6)
    with TinyHub({"jamarju/sd-4.4M": tmp_path / "copy"}) as hub:
        env = hub.environment(tmp_path)
        for hold, downloads in (("true", 4), ("false", 8)):
            out = tmp_path / f"hold-{hold}"
            hub.asked.clear()
            overrides = ["name=sd2_4m", f"out={out}", "num=20", f"hold_archives={hold}", *BARE]
            done = run("datagen.published", *overrides, fresh=True, **env)
            assert done.returncode == 0, done.stderr
            assert sum(line.startswith("GET /datasets/") for line in hub.asked) == downloads
            assert not out.with_name(f"{out.name}.published").exists()
        assert not any("metadata.parquet" in line for line in hub.asked)
    assert contents(tmp_path / "hold-true") == contents(tmp_path / "hold-false")
    dataset = Dataset(tmp_path / "hold-true")
    assert len(dataset) == 20
    assert images(dataset).items() <= {name.removesuffix(".webp"): value for name, value in expected.items()}.items()
    assert read_info(tmp_path / "hold-true")["provenance"]["commit"] == COMMIT


@pytest.mark.slow
@pytest.mark.enable_socket
def test_diffusiondb_from_the_hub_killed_and_offline(tmp_path: Path) -> None:
    tiny_published.diffusiondb(tmp_path / "copy", archives=6, images=6, size=128)
    out = tmp_path / "out"
    with TinyHub({"poloclub/diffusiondb": tmp_path / "copy"}) as hub:
        env = hub.environment(tmp_path)
        whole = ["name=diffusiondb", f"out={tmp_path / 'whole'}", *BARE]
        assert run("datagen.published", *whole, fresh=True, **env).returncode == 0
        hub.drops += ["images/part-000002.zip", "metadata.parquet"]
        overrides = ["name=diffusiondb", f"out={out}", *BARE]
        assert killed(overrides, env, lambda: len(list(out.glob("shards/*.parquet"))) >= 2)
        done = run("datagen.published", *overrides, fresh=True, **env)
        assert done.returncode == 0, done.stderr
        assert hub.drops == []
    assert contents(out) == contents(tmp_path / "whole")
    # without a hub, a finished dataset asks for nothing, and a new one says what to do
    env["HF_HUB_OFFLINE"] = "1"
    assert run("datagen.published", *overrides, fresh=True, **env).returncode == 0
    done = run("datagen.published", "name=diffusiondb", f"out={tmp_path / 'new'}", *BARE, fresh=True, **env)
    assert done.returncode == 2
    assert "tried the hub's dataset poloclub/diffusiondb at its newest commit" in done.stderr
    assert "folder=FOLDER" in done.stderr


# What cannot be used


def test_folder_with_unexpected_files_is_refused(tmp_path: Path) -> None:
    tiny_published.sd2_4m(tmp_path / "copy", archives=2, images=3)
    make("sd2_4m", tmp_path / "out", tmp_path / "copy")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for out, folder, overrides, said in (
        (
            "out",
            "copy",
            ["seed=1"],
            r"(?s)out holds another dataset:\n  seed: 0 \(recorded\), 1 \(requested\)\nChoose another out=",
        ),
        ("full", "copy", [], r"full is not empty and holds no dataset \(mine\.txt"),
        ("new", "gone", [], r"folder: no folder .*gone; give a copy of the hub's dataset jamarju/sd-4\.4M"),
        ("new", "full", [], r"full holds no \*/sd-4\.4M-\*\.tar, but mine\.txt"),
    ):
        with pytest.raises(UserError, match=said):
            make("sd2_4m", tmp_path / out, tmp_path / folder, *overrides)


@pytest.mark.slow
def test_unusable_archives_and_tables_are_refused(tmp_path: Path) -> None:
    tiny_published.sd2_4m(tmp_path / "sd", archives=1, images=3)
    tar = tmp_path / "sd" / "cc" / "sd-4.4M-cc-000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"sd-4\.4M-cc-000\.tar is truncated or not a tar"):
        make("sd2_4m", tmp_path / "out", tmp_path / "sd")
    tiny_published.diffusiondb(tmp_path / "db", archives=1, images=5)
    zipped = tmp_path / "db" / "images" / "part-000001.zip"
    data = zipped.read_bytes()
    zipped.write_bytes(data[:-30])
    with pytest.raises(UserError, match=r"part-000001\.zip is truncated or not a zip"):
        make("diffusiondb", tmp_path / "out", tmp_path / "db")
    zipped.write_bytes(data)  # repaired: the same command resumes
    assert make("diffusiondb", tmp_path / "out", tmp_path / "db").splits["faulty"] == 2
    (tmp_path / "db" / "metadata.parquet").unlink()
    with pytest.raises(UserError, match=r"db lacks metadata\.parquet; copy it"):
        make("diffusiondb", tmp_path / "new", tmp_path / "db")
    shutil.copy(tmp_path / "out" / "prompts.parquet", tmp_path / "db" / "metadata.parquet")
    with pytest.raises(UserError, match=r"lacks the column image_name, part_id, image_nsfw; it has key, prompt_id"):
        make("diffusiondb", tmp_path / "new", tmp_path / "db")


def test_full_disk_is_reported_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datagen.prompts import download

    tiny_published.sd2_4m(tmp_path / "copy", archives=1, images=3)
    name = "cc/sd-4.4M-cc-000.tar"

    class FromAfar(download.Repository):
        def sizes(self, names: list[str]) -> dict[str, int]:
            return {name: (tmp_path / "copy" / name).stat().st_size for name in names}

    monkeypatch.setattr(published_sets, "free_bytes", lambda _: 1 << 30)
    with pytest.raises(
        UserError, match=r"archives: cc/sd-4\.4M-cc-000\.tar needs 0\.00 GB and 1\.1 GB of reserve, but only"
    ):
        published_sets._fetched(FromAfar("jamarju/sd-4.4M", COMMIT, None, (name,)), name, tmp_path / "work")
