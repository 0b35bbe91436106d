"""The dataset format against the tools that others read it with, and every way in which a folder can be unusable."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from core.errors import UserError
from core.files import write_atomically, write_json
from core.paths import ROOT
from datagen.dataset import reader
from datagen.dataset.format import INDEX, PLAN, CorruptImage
from datagen.dataset.reader import Dataset, is_committed, read_plan
from datagen.dataset.writer import write_foreign_index, write_plan, write_shard, write_targets
from datagen.verify.verify import verify
from tests import listed_dataset
from tests.commands import BARE, contents, make
from tests.listed_dataset import Row

IDENTITY = {"name": "stand-in", "width": 8}


def encode(texts: list[str]) -> NDArray[np.float32]:
    """A stand-in for a target encoder: any text has its own unit vector."""
    seeds = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:4]) for t in texts]
    vectors = np.stack([np.random.default_rng(seed).standard_normal(8) for seed in seeds])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 scenes in two shards, with the stand-in's vectors."""
    root = tmp_path_factory.mktemp("whole") / "data"
    make(root, *BARE)
    assert write_targets(root, IDENTITY, encode, lambda _: None) == 60
    return root


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


# Reading


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its tars open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_our_tars(whole: Path) -> None:
    from webdataset.compat import WebDataset

    dataset = Dataset(whole)
    plan = read_plan(whole).to_pylist()
    samples: list[Any] = list(WebDataset(sorted(map(str, whole.glob("shards/*.tar"))), shardshuffle=False))
    assert [s["__key__"] for s in samples] == dataset.keys == [row["key"] for row in plan]
    for i, (sample, row) in enumerate(zip(samples, plan, strict=True)):
        assert sample["png"] == dataset.image_bytes(i)
        assert [sample["txt"].decode()] == dataset.prompts(i) == [row["prompt"]]
        meta = json.loads(sample["json"])
        assert meta == {k: row[k] for k in ("prompt_id", "source", "group", "split", "seed")}
        assert Image.open(io.BytesIO(sample["png"])).size == (32, 32)


def test_random_access_matches_sequential_read(whole: Path) -> None:
    wanted = []
    for path in sorted(whole.glob("shards/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".png"):
                    wanted.append((member.name.removesuffix(".png"), file.read()))
    dataset = Dataset(whole)
    assert len(dataset) == len(wanted) == 60
    for i in np.random.default_rng(0).permutation(60).tolist():
        assert (dataset.key(i), dataset.image_bytes(i)) == wanted[i]


def test_image_attributes(whole: Path) -> None:
    dataset = Dataset(whole, "stand-in")
    plan = read_plan(whole).to_pylist()
    assert dataset.width == 8
    for i, row in enumerate(plan):
        assert (dataset.source(i), dataset.group(i), dataset.prompt_ids(i).tolist()) == (
            row["source"],
            row["group"],
            [row["prompt_id"]],
        )
        np.testing.assert_array_equal(dataset.targets(i), encode([row["prompt"]]))
    for split in ("train", "val"):
        assert dataset.rows(split).tolist() == [i for i, row in enumerate(plan) if row["split"] == split]
    with pytest.raises(UserError, match=r"no image in the split 'test', only .*'train'"):
        dataset.rows("test")


def test_batched_read_matches_single_reads(tmp_path: Path) -> None:
    """Several shards, up to four captions an image: bit for bit."""
    rng = np.random.default_rng(0)
    rows = [
        Row(tuple(f"prompt {n}" for n in rng.choice(40, rng.integers(1, 5), replace=False)), source="abc"[i % 3])
        for i in range(50)
    ]
    root = listed_dataset.write(tmp_path / "data", rows, shard=17)
    dataset = Dataset(root, listed_dataset.ENCODER)
    order = rng.permutation(50)
    np.testing.assert_array_equal(dataset.mean_targets(order), [dataset.target(i) for i in order.tolist()])
    assert dataset.mean_targets(order[:0]).shape == (0, listed_dataset.WIDTH)
    captions = rng.permutation(int(dataset.caption_starts[-1]))
    each = np.concatenate([dataset.targets(i) for i in range(50)])
    np.testing.assert_array_equal(dataset.caption_targets(captions), each[captions])
    assert dataset.caption_starts.tolist() == [dataset.captions(i).start for i in range(50)] + [len(each)]
    names, codes = dataset.sources()
    assert [names[code] for code in codes] == [dataset.source(i) for i in range(50)]
    wanted = ["000031", "none", "000002"]
    assert dataset.find(pa.array(wanted)).tolist() == [31, -1, 2]
    assert dataset.encoder_identity == {"name": listed_dataset.ENCODER, "width": listed_dataset.WIDTH}


def test_images_of_the_same_prompts_share_a_hash(tmp_path: Path) -> None:
    single = [Row(text) for text in ("a", "b", "a", "c")]
    several = [Row(t) for t in (("a", "b"), "a", ("b", "a"), ("a", "c"), "a", ("a", "b", "c"))]
    for rows, same in ((single, {(0, 2)}), (several, {(0, 2), (1, 4)})):
        numbers = Dataset(listed_dataset.write(tmp_path / str(len(rows)), rows)).prompt_sets()
        assert len(numbers) == len(rows)
        assert {(i, j) for j in range(len(rows)) for i in range(j) if numbers[i] == numbers[j]} == same


def test_prompt_hash_is_the_same_in_every_dataset(tmp_path: Path) -> None:
    one = Dataset(listed_dataset.write(tmp_path / "1", [Row(("a", "b"), group="g"), Row("c"), Row("é", group="h")]))
    two = Dataset(listed_dataset.write(tmp_path / "2", [Row("c", group="h"), Row(("x", "a"))], shard=1))
    a, b, c, e = one.prompt_hashes().tolist()
    assert len({a, b, c, e}) == 4
    assert two.prompt_hashes().tolist()[::2] == [c, a]
    g, none, h = one.group_hashes().tolist()
    assert (none, two.group_hashes().tolist()) == (0, [h, 0])
    assert g != h
    assert a == int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "little", signed=True)


def _hashes(dataset: Dataset, rows: list[int]) -> list[tuple[str, float]]:
    return [(hashlib.sha256(dataset.image_bytes(i)).hexdigest(), float(dataset.target(i).sum())) for i in rows]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_reads_same_bytes_as_parent(whole: Path, method: str) -> None:
    dataset = Dataset(whole, "stand-in")
    rows = [59, 0, 31, 7]
    here = _hashes(dataset, rows)  # maps are open when it is pickled
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_hashes, (dataset, rows)) == here


def test_more_tars_than_file_descriptors(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MAX_MAPPED_TARS", 1)
    dataset, other = Dataset(whole), Dataset(whole)
    for i in (0, 40, 1, 41, 0):
        assert dataset.image_bytes(i) == other.image_bytes(i)
        assert len(dataset._maps) == 1


def test_more_target_files_than_file_descriptors(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MAX_MAPPED_TARGETS", 1)
    dataset = Dataset(whole, "stand-in")
    for i in (0, 40, 1, 41, 0):
        np.testing.assert_array_equal(dataset.targets(i), encode(dataset.prompts(i)))
        assert len(dataset._targets) == 1


def foreign(root: Path, captions: list[list[str]], paths: list[Path]) -> Dataset:
    """A dataset of images that lie elsewhere, in two index files."""
    ids = {text: n for n, text in enumerate(dict.fromkeys(t for texts in captions for t in texts))}
    rows = [
        {"key": f"k{i}", "prompt_id": ids[text], "prompt": text, "source": "s", "group": "", "split": "val", "seed": 0}
        | {"path": str(paths[i]), "offset": 0, "size": paths[i].stat().st_size, "crc32": 0}
        for i, texts in enumerate(captions)
        for text in texts
    ]
    for number, part in enumerate((rows[: len(captions[0])], rows[len(captions[0]) :])):
        write_foreign_index(root, number, {k: [row[k] for row in part] for k in INDEX.names})
    plan = pa.table({k: [row[k] for row in rows] for k in PLAN.names}, schema=PLAN)
    write_plan(root, plan, {"shards": 2, "settings": {}})
    write_targets(root, IDENTITY, encode, lambda _: None)
    return Dataset(root, "stand-in")


def test_several_captions(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * (i + 1))
    captions = [["a fox", "a red fox"], ["a cat"], ["a fox", "a boat", "boats"]]
    dataset = foreign(tmp_path / "data", captions, paths)
    assert len(dataset) == 3
    assert dataset.info["captions"] == 6
    assert dataset.info["splits"] == {"val": 3}
    for i, texts in enumerate(captions):
        assert dataset.prompts(i) == texts
        assert dataset.image_bytes(i) == bytes([i]) * (i + 1)
        np.testing.assert_array_equal(dataset.targets(i), encode(texts))
        np.testing.assert_allclose(dataset.target(i), encode(texts).mean(0), atol=1e-7)
    assert dataset.prompt_ids(0)[0] == dataset.prompt_ids(2)[0]
    # the dot product with the mean is the average cosine
    z = encode(["any"])[0]
    assert dataset.target(2) @ z == pytest.approx(np.mean([encode([t])[0] @ z for t in captions[2]]), abs=1e-6)


def test_missing_or_truncated_image(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        path.write_bytes(b"12345")
    dataset = foreign(tmp_path / "data", [["a"], ["b"]], paths)
    paths[0].unlink()
    paths[1].write_bytes(b"123")
    with pytest.raises(CorruptImage, match=r"k0: .*0\.png: No such file"):
        dataset.image_bytes(0)
    with pytest.raises(CorruptImage, match=r"k1: .*1\.png holds 3 bytes of 5"):
        dataset.image_bytes(1)
    assert len(verify(tmp_path / "data")) == 2


# Folders that cannot be used


def tar(root: Path) -> Path:
    return root / "shards" / "000001.tar"


def cut(root: Path) -> None:
    os.truncate(tar(root), 20_000)


def swap(root: Path) -> None:
    """Another tar, longer than the index needs."""
    with tarfile.open(tar(root), "w") as file:
        for n in range(9):
            member = tarfile.TarInfo(f"{n}.png")
            member.size = 20_000
            file.addfile(member, io.BytesIO(bytes(20_000)))


def vectors(shape: tuple[int, int]) -> Callable[[Path], None]:
    return lambda root: np.save(root / "targets" / "stand-in" / "000001.npy", np.zeros(shape, np.float32))


def schema(root: Path) -> None:
    info = json.loads((root / "dataset.json").read_text())
    write_json(root / "dataset.json", {**info, "schema": 99})


def another_index(root: Path) -> None:
    index = pq.read_table(root / "shards" / "000001.parquet")
    pq.write_table(index.slice(0, 20), root / "shards" / "000001.parquet")


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"no dataset at .*data: dataset.json is missing. Create one \(python -m datagen out="),
    "unknown schema": (schema, "schema 99, but this version reads 1; create the dataset again"),
    "broken json": (lambda r: (r / "dataset.json").write_text('{"schema": 1'), "dataset.json is damaged .*copy it"),
    "broken index": (lambda r: os.truncate(r / "shards/000001.parquet", 900), "000001.parquet is damaged .*copy it"),
    "missing shard": (
        lambda r: (r / "shards/000001.parquet").unlink(),
        r"1 of 2 shards are missing \(000001\): repeat the python -m datagen command",
    ),
    "another index": (another_index, "its index has 50 rows, but dataset.json says 60: .*copy it again"),
    "missing tar": (lambda r: tar(r).unlink(), "000001.tar is missing; copy it again, or remove .*000001.parquet and"),
    "cut tar": (cut, "000001.tar is truncated: 20000 bytes, the index needs .*; copy it again, or remove"),
    "empty tar": (lambda r: os.truncate(tar(r), 0), "000001.tar is truncated: 0 bytes"),
    "another tar": (swap, "000001.tar does not match its index: no 000000030 at 512; copy it again, or remove"),
    "no targets": (lambda r: shutil.rmtree(r / "targets"), "no vectors of stand-in; write them: python -m datagen.tar"),
    "missing targets": (
        lambda r: (r / "targets/stand-in/000001.npy").unlink(),
        r"000001.npy is missing; write it: python -m datagen.targets out=.*data encoder=stand-in",
    ),
    "short targets": (vectors((29, 8)), r"000001.npy is float32 \[29, 8\], expected float32 \[30, 8\]; remove it"),
    "narrow targets": (vectors((30, 7)), r"000001.npy is float32 \[30, 7\], expected float32 \[30, 8\]; remove it"),
    "broken targets": (
        lambda r: os.truncate(r / "targets/stand-in/000001.npy", 300),
        "000001.npy cannot be read .*; remove it and write it again",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_folder_is_refused(copy: Path, case: str) -> None:
    damage, said = UNUSABLE[case]
    damage(copy)
    with pytest.raises(UserError, match=said):
        Dataset(copy, "stand-in")


def test_all_problems_are_reported_at_once(copy: Path) -> None:
    for case in ("missing tar", "narrow targets"):
        UNUSABLE[case][0](copy)
    os.truncate(copy / "shards" / "000000.tar", 5000)
    with pytest.raises(UserError) as error:
        Dataset(copy, "stand-in")
    assert [line.strip().split()[0].rpartition("/")[2] for line in str(error.value).splitlines()[1:]] == [
        "000000.tar",
        "000001.tar",
        "000001.npy",
    ]


# Verifying


def test_verify_accepts_written_dataset(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert verify(copy) == []
    shutil.rmtree(copy / "targets")
    assert verify(copy) == []
    assert "no target vectors yet: python -m datagen.targets" in caplog.text


def test_verify_finds_a_flipped_byte(copy: Path) -> None:
    dataset = Dataset(copy)
    offset, size = int(dataset._offsets[41]), int(dataset._sizes[41])
    with tar(copy).open("r+b") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    (problem,) = verify(copy)
    assert problem.startswith(f"000000041: {tar(copy)} at {offset}: crc32 ")


# Writing


def noted(root: Path, notes: list[dict[str, Any]]) -> None:
    """A shard of as many images."""
    columns = {"key": str, "prompt_id": int, "prompt": str, "source": str, "group": str, "seed": int}
    rows = [{name: kind(n) for name, kind in columns.items()} | {"split": "train"} for n in range(len(notes))]
    plan = pa.Table.from_pylist(rows, schema=PLAN)
    write_plan(root, plan, {"shards": 1, "settings": {}})
    write_shard(root, 0, plan, [(b"picture", note) for note in notes], ".png")


def test_faulty_image_is_in_neither_train_nor_val(tmp_path: Path) -> None:
    noted(tmp_path, [{}, {"fault": "NaN", "batch_size": 2}, {"redrawn": "black"}])
    dataset = Dataset(tmp_path)
    assert dataset.rows("train").tolist() == [0, 2]
    assert dataset.splits == {"faulty": 1, "train": 2}
    assert dataset.info["splits"] == {"train": 3}  # as it was planned
    with pytest.raises(UserError, match=r"no image in the split 'val', only \{'faulty': 1, 'train': 2\}"):
        dataset.rows("val")
    with tarfile.open(tmp_path / "shards/000000.tar") as file:
        metas = [json.load(file.extractfile(f"{n}.json") or io.BytesIO()) for n in range(3)]
    plain = {"prompt_id": 0, "source": "0", "group": "0", "split": "train", "seed": 0}
    assert metas[0] == plain
    assert {metas[1][k] for k in ("split", "fault")} == {"faulty", "NaN"}
    assert (metas[1]["batch_size"], metas[2]["redrawn"], metas[2]["split"]) == (2, "black", "train")


def test_note_cannot_replace_plan_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0: the note .* would replace \['seed'\]"):
        noted(tmp_path, [{"seed": 3}])
    assert not is_committed(tmp_path, 0)


def test_writes_are_atomic(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail(file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_atomically(path, fail)
    assert contents(tmp_path) == {"file": b"before"}
    write_atomically(path, lambda file: file.write(b"after"))
    assert contents(tmp_path) == {"file": b"after"}


WRITERS = """
import resource, sys
from pathlib import Path
import numpy as np
import pyarrow as pa
from core.errors import UserError
from core.files import write_atomically
from datagen.dataset.format import PLAN
from core.files import write_table
from datagen.dataset.writer import write_plan, write_shard, write_targets

root, limit = Path(sys.argv[1]), int(sys.argv[2])
rows = 2000
text = [str(n) * 40 for n in range(rows)]
plan = pa.table({"key": [f"{n:09d}" for n in range(rows)], "prompt_id": list(range(rows)), "prompt": text,
    "source": text, "group": text, "split": ["train"] * rows, "seed": [0] * rows}, schema=PLAN)
write_plan(root, plan, {"shards": 1})
write_shard(root, 0, plan, [(b"x", {})] * rows, ".png")
before = sorted(p for p in root.rglob("*"))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
else:  # a disk that is full
    with (root / "filler").open("ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)): pass
        except OSError: pass
writers = {
    "bytes": lambda: write_atomically(root / "a", lambda file: file.write(bytes(100_000))),
    "table": lambda: write_table(root / "b.parquet", plan.append_column("x", [np.random.rand(rows)])),
    "shard": lambda: write_shard(root, 1, plan, [(b"x" * 99, {})] * rows, ".png"),
    "targets": lambda: write_targets(
        root, {"name": "e", "width": 64}, lambda t: np.ones((len(t), 64), np.float32), lambda _: None),
}
for name, write in writers.items():
    try:
        write()
        print(name, "was written")
    except UserError as error:
        print(name, "|", error)
for path in sorted(set(root.rglob("*")) - set(before)):
    if path.is_file() and path.name not in ("filler", "encoder.json"):
        print("left over:", path)
"""


def no_room(root: Path, limit: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITERS, str(root), str(limit)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["bytes", "table", "shard", "targets"], done.stdout
    for line in lines:
        assert f": {said}. Nothing half-written is left: make room or choose another out=, and run" in line


@pytest.mark.slow
def test_file_size_limit_leaves_no_partial_file(tmp_path: Path) -> None:
    no_room(tmp_path / "data", 8192, "File too large")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small disk: root only")
def test_full_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        no_room(disk / "data", 0, "No space left on device")
    finally:
        subprocess.run(["umount", disk], check=True)
