"""`datagen.verify`: each file of a dataset that no longer agrees with another is reported by name.

Real datasets are damaged, one file at a time, in every way in which two files can disagree.
"""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from core.cli import compose
from core.errors import UserError
from core.files import json_bytes
from core.settings import settings
from datagen.config import IndexSettings
from datagen.dataset.format import PLAN
from datagen.dataset.reader import read_plan
from datagen.dataset.writer import write_plan, write_shard, write_targets
from datagen.importers.foreign_dataset import index
from datagen.verify.__main__ import run
from datagen.verify.problems import Problems
from datagen.verify.verify import verify
from tests import small_dataset

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """52 images in shards of 20, and their vectors."""
    return small_dataset.write(tmp_path_factory.mktemp("whole") / "data")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


# ------------------------------------------------------------------------------------------------------ ways to damage


def plan(change: Callable[[list[dict[str, Any]]], object]) -> Damage:
    """Another plan, which dataset.json goes with: its hash and counts are right."""

    def damage(root: Path) -> None:
        rows = read_plan(root).to_pylist()
        change(rows)
        info = json.loads((root / "dataset.json").read_text())
        write_plan(root, pa.Table.from_pylist(rows, schema=PLAN), info)

    return damage


def table(name: str, change: Callable[[list[dict[str, Any]]], object]) -> Damage:
    def damage(root: Path) -> None:
        read = pq.read_table(root / name)
        rows = read.to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows, schema=read.schema), root / name)

    return damage


def index_rows(change: Callable[[list[dict[str, Any]]], object]) -> Damage:
    return table("shards/000001.parquet", change)


def info(**values: Any) -> Damage:
    def damage(root: Path) -> None:
        path = root / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def members(change: Callable[[list[tuple[str, bytes]]], object]) -> Damage:
    """Another tar of shard 1, whose images lie where the index has them unless `change` moves them."""

    def damage(root: Path) -> None:
        path = root / "shards/000001.tar"
        with tarfile.open(path) as tar:
            found = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
        change(found)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in found:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    return damage


def member_json(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Another .json of the sixth image of shard 1."""

    def changed(found: list[tuple[str, bytes]]) -> None:
        name, data = found[17]
        meta = json.loads(data)
        change(meta)
        found[17] = (name, json_bytes(meta))

    return members(changed)


def vectors(change: Callable[[NDArray[Any]], NDArray[Any] | None]) -> Damage:
    def damage(root: Path) -> None:
        path = root / f"targets/{small_dataset.ENCODER}/000001.npy"
        array = np.load(path)
        changed = change(array)
        np.save(path, array if changed is None else changed)

    return damage


def encoder_json(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(root: Path) -> None:
        path = root / f"targets/{small_dataset.ENCODER}/encoder.json"
        identity = json.loads(path.read_text())
        change(identity)
        path.write_text(json.dumps(identity))

    return damage


def flip(name: str, place: int) -> Damage:
    def damage(root: Path) -> None:
        data = bytearray((root / name).read_bytes())
        data[place] ^= 4
        (root / name).write_bytes(data)

    return damage


def set_to(row: int, **values: Any) -> Callable[[list[dict[str, Any]]], object]:
    return lambda rows: rows[row].update(values)


def swap(items: list[Any], a: int, b: int) -> None:
    items[a], items[b] = items[b], items[a]


def second_row(array: NDArray[Any], value: float) -> None:
    array[2] = value


TARGETS = f"targets/{small_dataset.ENCODER}"
K = "000025"  # row 5 of shard 1

DAMAGES: dict[str, tuple[Damage, str]] = {
    # dataset.json and the plan
    "no plan": (lambda r: (r / "prompts.parquet").unlink(), "prompts.parquet is missing"),
    "cut plan": (lambda r: os.truncate(r / "prompts.parquet", 800), "prompts.parquet is damaged"),
    "another plan": (
        table("prompts.parquet", set_to(3, seed=99)),
        "is not the plan that dataset.json was written with",
    ),
    "count of images": (info(pictures=51), "says pictures 51, but the plan has 52"),
    "count of captions": (info(captions=1), "says captions 1, but the plan has 52"),
    "count of splits": (info(splits={"train": 52}), "says splits {'train': 52}, but the plan has"),
    "no count": (info(shards="three"), "says shards 'three', not a number"),
    "plan lacks a column": (
        lambda r: pq.write_table(pq.read_table(r / "prompts.parquet").drop(["seed"]), r / "prompts.parquet"),
        "lacks the columns seed",
    ),
    "null in the plan": (table("prompts.parquet", set_to(3, prompt=None)), "has rows without prompt"),
    "key twice in the plan": (plan(set_to(40, key="000002")), "000002: stands at 2 places of"),
    "id of two prompts": (plan(set_to(40, prompt_id=2)), "prompt_id 2 is '.*' here and '.*' elsewhere"),
    "empty prompt": (plan(set_to(40, prompt="  ")), "000040: its prompt in .* is empty"),
    "caption twice": (plan(lambda rows: rows.insert(7, dict(rows[6]))), "000006: prompt_id 6 stands twice"),
    # the plan and the index
    "prompt_id unknown to the plan": (
        index_rows(set_to(5, prompt_id=999)),
        f"{K}: prompt_id 999 of the index is not in",
    ),
    "prompt_id of another image": (
        index_rows(set_to(5, prompt_id=3)),
        rf"{K}: prompt_id 3 in the index, \[25\] in the",
    ),
    "key unknown to the plan": (index_rows(set_to(5, key="nobody")), "nobody: is in the index and not in the plan"),
    "source": (index_rows(set_to(5, source="moon")), f"{K}: source 'moon' in the index, '.*' in the plan"),
    "group": (index_rows(set_to(5, group="moon")), f"{K}: group 'moon' in the index, '' in the plan"),
    "split": (index_rows(set_to(5, split="moon")), f"{K}: split 'moon' in the index, '(train|val)' in"),
    "split of the plan": (plan(set_to(25, split="moon")), f"{K}: split '(train|val)' in the index, 'moon' in"),
    "row missing": (
        index_rows(lambda rows: rows.pop(5)),
        rf"{K}: is in the plan with prompt_id \[25\], and in no index",
    ),
    "row twice": (
        index_rows(lambda rows: rows.insert(5, dict(rows[5]))),
        f"{K}: prompt_id 25 stands twice in the index",
    ),
    "order": (index_rows(lambda rows: swap(rows, 5, 6)), "not in the order of the plan"),
    "plan longer": (plan(lambda rows: rows.append({**rows[-1], "key": "000052"})), "000052: is in the plan with"),
    "cut index": (lambda r: os.truncate(r / "shards/000001.parquet", 900), "000001.parquet is damaged"),
    "index of other columns": (
        lambda r: shutil.copy(r / "prompts.parquet", r / "shards/000001.parquet"),
        "000001.parquet lacks the columns path, offset, size, crc32",
    ),
    # shards
    "missing index": (lambda r: (r / "shards/000001.parquet").unlink(), r"1 of 3 shards are missing \(000001"),
    "missing tar": (lambda r: (r / "shards/000001.tar").unlink(), "000001.tar is missing"),
    "shard beyond the plan": (
        lambda r: [shutil.copy(r / f"shards/000000.{s}", r / f"shards/000003.{s}") for s in ("tar", "parquet")],
        "000003.parquet is unexpected: dataset.json has 3 shards",
    ),
    "another file": (lambda r: (r / "shards/notes.txt").touch(), "notes.txt is unexpected"),
    "shard of another": (
        lambda r: [shutil.copy(r / f"shards/000000.{s}", r / f"shards/000001.{s}") for s in ("tar", "parquet")],
        "000000: prompt_id 0 stands twice in the index",
    ),
    # the index and the tars
    "path": (
        index_rows(set_to(5, path="shards/000000.tar")),
        f"{K}: its index .* names shards/000000.tar, not its own",
    ),
    "offset": (index_rows(set_to(5, offset=1024)), rf"{K}: .* bytes at \d+, its index says \d+ at 1024"),
    "size": (index_rows(set_to(5, size=7)), rf"{K}: .* holds \d+ bytes at \d+, its index says 7 at"),
    "crc32": (index_rows(set_to(5, crc32=7)), f"{K}: .* at .*: crc32 .*, index 00000007"),
    "two images at one place": (
        index_rows(lambda rows: rows[5].update(offset=rows[4]["offset"])),
        f"{K}: lies at the same place as 000024",
    ),
    "bytes of an image": (members(lambda m: m.__setitem__(15, (m[15][0], m[15][1][:-1] + b"?"))), f"{K}: .*: crc32"),
    "image missing": (members(lambda m: m.pop(15)), f"{K}: .* lacks its image"),
    "text missing": (members(lambda m: m.pop(16)), f"{K}: .* lacks its txt"),
    "json missing": (members(lambda m: m.pop(17)), f"{K}: .* lacks its json"),
    "member twice": (members(lambda m: m.append(m[16])), f"{K}: .* has a second txt"),
    "another member": (
        members(lambda m: m.append(("moon.png", b"?"))),
        "holds moon.png, which its index does not name",
    ),
    "another suffix of a member": (members(lambda m: m.append((f"{K}.jpg", b"?"))), f"{K}: .* has a second image"),
    "order of the tar": (
        members(lambda m: m.__setitem__(slice(15, 21), m[18:21] + m[15:18])),
        "000026: .* holds it where its index has 000025",
    ),
    "cut tar": (lambda r: os.truncate(r / "shards/000001.tar", 20_000), "000001.tar is truncated or damaged"),
    "tar without its end": (
        lambda r: os.truncate(
            r / "shards/000001.tar", (r / "shards/000001.tar").stat().st_size // 10240 * 10240 - 10240
        ),
        "000001.tar is truncated or damaged",
    ),
    "empty tar": (lambda r: os.truncate(r / "shards/000001.tar", 0), "000001.tar is truncated or damaged"),
    "header of a member": (flip("shards/000001.tar", 0), "000001.tar is truncated or damaged"),
    # the members and the plan
    "prompt": (members(lambda m: m.__setitem__(16, (m[16][0], b"the moon"))), f"{K}: .* says 'the moon', the plan"),
    "prompt of the plan": (plan(set_to(25, prompt="the moon")), f"{K}: .* says '.*', the plan 'the moon'"),
    "json: prompt_id": (
        member_json(lambda m: m.update(prompt_id=9)),
        f"{K}: its .json .* says prompt_id 9, the index 25",
    ),
    "json: number as text": (member_json(lambda m: m.update(prompt_id="25")), "says prompt_id '25', the index 25"),
    "json: source": (member_json(lambda m: m.update(source="moon")), "says source 'moon', the index"),
    "json: group": (member_json(lambda m: m.update(group="moon")), "says group 'moon', the index ''"),
    "json: split": (member_json(lambda m: m.update(split="moon")), "says split 'moon', the index '(train|val)'"),
    "json: seed": (member_json(lambda m: m.update(seed=-1)), "says seed -1, the plan"),
    "json: no seed": (member_json(lambda m: m.pop("seed")), "says seed None, the plan"),
    "json: a fault": (
        member_json(lambda m: m.update(fault="black")),
        "has a fault, but its split in the index is '(train|val)'",
    ),
    "index: faulty": (index_rows(set_to(5, split="faulty")), "has no fault, but its split in the index is 'faulty'"),
    "json: none": (members(lambda m: m.__setitem__(17, (m[17][0], b"{moon"))), f"{K}: its .json .* is not JSON"),
    "json: a list": (members(lambda m: m.__setitem__(17, (m[17][0], b"[]"))), f"{K}: its .json .* is not an object"),
    "json: spaces": (
        members(lambda m: m.__setitem__(17, (m[17][0], m[17][1].replace(b"\n", b"  ")))),
        f"{K}: its .json .* is not written as datagen writes it",
    ),
    # vectors
    "vectors missing": (lambda r: (r / TARGETS / "000001.npy").unlink(), "000001.npy is missing; write it: python -m"),
    "vectors cut": (lambda r: os.truncate(r / TARGETS / "000001.npy", 300), "000001.npy cannot be read"),
    "header of the vectors": (flip(f"{TARGETS}/000001.npy", 70), "000001.npy cannot be read"),
    "too few vectors": (vectors(lambda a: a[:-1]), r"000001.npy is float32 \[19, 384\], expected float32 \[20, 384\]"),
    "wide vectors": (
        vectors(lambda a: np.pad(a, ((0, 0), (0, 1)))),
        r"is float32 \[20, 385\], expected float32 \[20, 384\]",
    ),
    "vectors of doubles": (vectors(lambda a: a.astype(np.float64)), "is float64 .*, expected float32"),
    "vector too long": (vectors(lambda a: second_row(a, 2)), "000022: its vector of colours, row 2 of .* has length"),
    "vector of NaN": (vectors(lambda a: second_row(a, np.nan)), "000022: its vector .* has length nan, not 1"),
    "vector of zeros": (vectors(lambda a: second_row(a, 0)), "000022: its vector .* has length 0, not 1"),
    "vectors and more": (
        lambda r: (r / TARGETS / "000001.npy").write_bytes((r / TARGETS / "000001.npy").read_bytes() + b"x"),
        "000001.npy has bytes after its vectors",
    ),
    "one vector for all": (vectors(lambda a: np.repeat(a[:1], len(a), axis=0)), "000001.npy has one vector for all"),
    "vectors of another shard": (lambda r: (r / TARGETS / "000009.npy").touch(), "000009.npy is unexpected: no shard"),
    "no encoder.json": (
        lambda r: (r / TARGETS / "encoder.json").unlink(),
        "encoder.json is missing: the encoder of these vectors is unknown",
    ),
    "encoder.json cut": (lambda r: os.truncate(r / TARGETS / "encoder.json", 9), "encoder.json is damaged"),
    "encoder.json of another": (
        encoder_json(lambda e: e.update(name="moon")),
        "is of 'moon', but its folder is colours",
    ),
    "settings of encoder.json": (
        encoder_json(lambda e: e.update(settings={"truncate_dim": 5}, weights_sha256="5" * 64, sha256="5" * 64)),
        "encoder.json is damaged: its sha256 is not that of what it records",
    ),
    "no settings in encoder.json": (
        encoder_json(lambda e: e.update(sha256="5" * 64)),
        "its sha256 is not that of what it",
    ),
    "nested encoder.json": (
        lambda r: (r / TARGETS / "encoder.json").write_text("[" * 100_000),
        "encoder.json is damaged: .*nested too deeply",
    ),
    "width of encoder.json": (encoder_json(lambda e: e.update(width=11)), r"\[20, 384\], expected float32 \[20, 11\]"),
    "no width": (encoder_json(lambda e: e.update(width=None)), "says width None, not a positive number"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_reported_by_name(case: str, copy: Path) -> None:
    damage, said = DAMAGES[case]
    damage(copy)
    lines = verify(copy)
    assert any(re.search(said, line) for line in lines), lines


def test_a_damaged_header_in_the_middle_of_a_tar_is_reported(copy: Path) -> None:
    """tarfile itself stops at such a header without an error."""
    path = copy / "shards/000001.tar"
    with tarfile.open(path) as tar:
        header = tar.getmember(f"{K}.txt").offset
    flip("shards/000001.tar", header + 3)(copy)
    assert any(f"{path} is truncated or damaged: no end mark at {header}" in line for line in verify(copy))


def test_a_flipped_byte_anywhere_in_a_member_is_reported(copy: Path) -> None:
    path = copy / "shards/000001.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        image, text, meta = (tar.getmember(f"{K}.{suffix}") for suffix in ("png", "txt", "json"))
    for member in (image, text, meta):
        for place in (member.offset_data, member.offset_data + member.size - 1, member.offset + 130):
            flip("shards/000001.tar", place)(copy)
            assert verify(copy), (member.name, place)
            path.write_bytes(data)
    assert verify(copy) == []


@pytest.mark.parametrize("captions", [1, 3])
def test_written_dataset_has_no_problem(captions: int, tmp_path: Path) -> None:
    assert verify(small_dataset.write(tmp_path / "data", captions=captions)) == []


def test_faulty_image_is_not_a_problem(tmp_path: Path) -> None:
    root = tmp_path / "data"
    rows = [
        {"key": f"{n}", "prompt_id": n, "prompt": f"a {n}", "source": "s", "group": "", "split": "train", "seed": n}
        for n in range(3)
    ]
    table = pa.Table.from_pylist(rows, schema=PLAN)
    write_plan(root, table, {"shards": 1, "settings": {}})
    write_shard(root, 0, table, [(b"0", {}), (b"1", {"fault": "black"}), (b"2", {"redrawn": "fp32"})], ".png")
    assert verify(root) == []


def test_temporary_files_are_not_problems(copy: Path) -> None:
    (copy / "shards/.000003.tar.part-17-abcdef01").touch()
    (copy / TARGETS / ".000001.npy.part-17-abcdef01").touch()
    assert verify(copy) == []


# ------------------------------------------------------------------------------------------------------ foreign images


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Six images of a folder, two for each of three prompts, indexed where they lie, with vectors."""
    images = tmp_path / "images"
    images.mkdir()
    for n in range(6):
        (images / f"{n}.png").write_bytes(small_dataset.image(f"square {n} 0 0 on 9 9 9", 16))
    rows = [f"{n},square {90 * (n % 3)} 0 0 on 9 9 9" for n in range(6)]
    (images / "p.csv").write_text("\n".join(["file,prompt", *rows]))
    root = tmp_path / "data"
    index(settings(IndexSettings, compose("index", [f"out={root}", f"images={images}", f"csv={images / 'p.csv'}"])))
    identity = {"name": small_dataset.ENCODER, "width": small_dataset.WIDTH}
    write_targets(root, identity, small_dataset.encode, lambda _: None)
    assert verify(root) == []
    return root


def other_vector(root: Path) -> None:
    path = root / TARGETS / "000000.npy"
    array = np.load(path)
    array[4] = array[0]
    np.save(path, array)


FOREIGN: dict[str, tuple[Damage, str]] = {
    "gone": (lambda r: (r.parent / "images/3.png").unlink(), "3: .*3.png is missing"),
    "cut": (lambda r: os.truncate(r.parent / "images/3.png", 9), "3: .*3.png holds 9 bytes, but its index says"),
    "empty": (lambda r: os.truncate(r.parent / "images/3.png", 0), "3: .*3.png holds 0 bytes, but its index says"),
    "longer": (
        lambda r: (r.parent / "images/3.png").write_bytes((r.parent / "images/3.png").read_bytes() + b"?"),
        "3: .*3.png holds .* bytes, but its index",
    ),
    "altered": (lambda r: flip("../images/3.png", 20)(r), "3: .*3.png at 0: crc32"),
    "a folder": (lambda r: ((r.parent / "images/3.png").unlink(), (r.parent / "images/3.png").mkdir()), "3: .*3.png"),
    "vectors of one prompt": (other_vector, "4: its vector of colours is not that of 1, of the same prompt_id 1"),
    "a tar of ours": (lambda r: (r / "shards/000000.tar").touch(), "000000.tar is unexpected: its index names other"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_damage_of_foreign_images_is_reported_by_name(case: str, foreign: Path) -> None:
    damage, said = FOREIGN[case]
    damage(foreign)
    (line,) = verify(foreign)
    assert re.search(said, line), line


def test_foreign_tars(tmp_path: Path) -> None:
    path = tmp_path / "000.tar"
    with tarfile.open(path, "w") as tar:
        for n in range(3):
            for suffix, data in (("png", small_dataset.image(f"square {n} 0 0 on 9 9 9", 16)), ("txt", b"a fox")):
                member = tarfile.TarInfo(f"{n}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    root = tmp_path / "data"
    index(settings(IndexSettings, compose("index", [f"out={root}", f"tars={path}"])))
    assert verify(root) == []
    data = path.read_bytes()
    (root.parent / "000.tar").write_bytes(bytes(1024) + data)
    assert any("has no member of" in line for line in verify(root))
    path.write_bytes(data[:1200])
    assert any("but its index says" in line for line in verify(root))
    path.unlink()
    assert any(re.match("0: .* is missing", line) for line in verify(root))


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_counts_all_problems_and_exits_with_1(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    index_rows(lambda rows: [row.update(source="moon") for row in rows])(copy)
    with caplog.at_level("INFO"):
        assert run({"out": str(copy)}) == 1
    assert f"{copy}: 40 problems" in caplog.messages  # each row with the plan, and with its .json
    assert sum("source 'moon' in the index" in m for m in caplog.messages) == 20


def test_at_most_twenty_problems_of_a_kind_are_listed_and_all_counted() -> None:
    problems = Problems()
    for n in range(25):
        problems.add("an image is gone", f"{n}: gone")
    problems.add("a tar is gone", "0.tar: gone")
    assert problems.count == 26
    assert len(problems.lines()) == 22
    assert problems.lines()[20:] == ["… and 5 more: an image is gone", "0.tar: gone"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: (r / "dataset.json").unlink(), "dataset.json is missing"),
        (lambda r: os.truncate(r / "dataset.json", 9), "dataset.json is damaged"),
        (info(schema=99), "schema 99, but this version reads 1"),
        (lambda r: (r / "dataset.json").write_text("[]"), "dataset.json is damaged: it is not an object"),
    ],
)
def test_a_folder_that_is_not_a_dataset_is_refused(damage: Damage, said: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(UserError, match=said):
        verify(copy)
