"""Prompt sources: every kind of file gives the same stream, mixtures keep their shares, and what cannot be says why."""

import csv
import gzip
import hashlib
import json
import re
import zipfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.config import DatagenSettings, FilePrompts, GrammarPrompts, MixturePrompts, MixtureSource
from datagen.prompts import download
from datagen.prompts.sources import Prompt, provenance, shuffled, stream
from tests.commands import run

ROWS = [
    ("a red fox, in snow", "red fox"),
    ('say "cheese", 猫 and çà', "cat;cheese"),
    ("two lines\nof one prompt", ""),
]


def cfg(path: object, **values: Any) -> FilePrompts:
    prompts = settings(DatagenSettings, compose("datagen", ["prompts=file", "prompts.path=x.txt"])).prompts
    assert isinstance(prompts, FilePrompts)
    return replace(prompts, path=str(path), **values)


def read(path: object, seed: int = 0, **values: Any) -> list[Prompt]:
    download.files.cache_clear()
    return list(stream(cfg(path, **values), seed, None))


def texts(path: object, **values: Any) -> list[str]:
    """Texts of the prompts that are not skipped."""
    return [prompt.text for prompt in read(path, **values) if not prompt.out]


def write_table(path: Path) -> None:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"id": n, "prompt": p, "group": g}) for n, (p, g) in enumerate(ROWS)]
        path.write_text("\n\n".join(lines), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"id": n, "prompt": p, "group": g} for n, (p, g) in enumerate(ROWS)]))
    elif path.suffix == ".parquet":
        prompts, groups = zip(*ROWS, strict=True)
        pq.write_table(pa.table({"group": groups, "id": [0, 1, 2], "prompt": prompts}), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = [("id", "group", "prompt"), *((str(n), g, p) for n, (p, g) in enumerate(ROWS))]
            if path.suffix.lower() == ".tsv":  # has no quoting: no line breaks within a field
                file.write("".join("\t".join(row).replace("\n", " ") + "\n" for row in rows))
            else:
                csv.writer(file).writerows(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.jsonl", "p.json", "p.parquet", "P.TSV"])
def test_table_formats(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name)
    rows = [(p.replace("\n", " "), g) for p, g in ROWS] if name.lower() == "p.tsv" else ROWS
    assert read(tmp_path / name, group_column="group") == [Prompt(p, name[0], g) for p, g in rows]
    assert read(tmp_path / name, source="mine") == [Prompt(p, "mine", "") for p, _ in rows]
    for packed in (f"{tmp_path / name}.gz", f"zip://in/{name}::{tmp_path / 'p.zip'}"):
        if packed.endswith(".gz"):
            Path(packed).write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        else:
            with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(tmp_path / name, f"in/{name}")
        assert read(packed, group_column="group") == [Prompt(p, name[0], g) for p, g in rows]


@pytest.mark.slow
def test_glob_reads_files_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.csv"):
        (tmp_path / name).write_text(f"from {name}")
    assert texts(tmp_path / "*.txt") == ["from a.txt", "from b.txt"]
    assert texts(f"file://{tmp_path}/?.txt") == ["from a.txt", "from b.txt"]
    (tmp_path / "[a].txt").write_text("brackets")
    assert texts(tmp_path / "[a].txt") == ["brackets"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet", "p.json"])
def test_a_column_may_hold_several_captions(tmp_path: Path, name: str) -> None:
    rows = [{"captions": ["a fox", "one fox"]}, {"captions": []}, {"captions": ["a cat"]}]
    if name == "p.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif name == "p.jsonl":
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        (tmp_path / name).write_text(json.dumps({"info": {}, "annotations": rows}))
    found = texts(tmp_path / name, column="captions", records="annotations" if name == "p.json" else None)
    assert found == ["a fox", "one fox", "a cat"]


def test_a_csv_may_hold_json_lists(tmp_path: Path) -> None:
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["raw", "id"], [json.dumps(["a fox", 'a "cat", too']), 1], [json.dumps(["[x]"]), 2]]
        )
    assert texts(tmp_path / "p.csv", column="raw", json_lists=True) == ["a fox", 'a "cat", too', "[x]"]
    assert texts(tmp_path / "p.csv", column="raw")[1] == '["[x]"]'


def test_rows_above_a_bound_come_with_their_reason(tmp_path: Path) -> None:
    rows = [
        ("good", 0.1, False),
        ("bad", 0.9, False),
        ("spam", 0.1, True),
        ("unknown", None, None),
        ("edge", 0.5, False),
    ]
    columns = [list(column) for column in zip(*rows, strict=True)]
    pq.write_table(pa.table(dict(zip(("prompt", "nsfw", "spam"), columns, strict=True))), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text("prompt,nsfw,spam\ngood,0.1,0\nbad,.9,0\nspam,0.1,1\nunknown,,\nedge,0.5,0\n")
    for name in ("p.parquet", "p.csv"):
        found = read(tmp_path / name, max_values={"nsfw": 0.5, "spam": 0})
        assert [p.text for p in found] == ["good", "bad", "spam", "unknown", "edge"]
        assert [p.out for p in found] == ["", "nsfw above 0.5", "spam above 0", "", ""]


def test_skipped_rows_may_have_any_value(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,spam\n[],0\nno list,1\n")
    found = read(tmp_path / "p.csv", json_lists=True, max_values={"spam": 0})
    assert [p.out for p in found] == ["empty", "spam above 0"]


# The order


@pytest.mark.slow
def test_shuffle_is_a_seeded_permutation(tmp_path: Path) -> None:
    lines = [f"prompt {n}" for n in range(3000)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    pq.write_table(pa.table({"prompt": lines}), tmp_path / "p.parquet", row_group_size=100)
    for name in ("p.txt", "p.parquet"):
        found = [text.strip() for text in texts(tmp_path / name, shuffle=500)]
        assert found != lines
        assert sorted(found) == sorted(lines)
        assert found == [text.strip() for text in texts(tmp_path / name, shuffle=500)]
        assert found != [text.strip() for text in texts(tmp_path / name, shuffle=500, seed=1)]
    # a parquet's row groups are permuted: its first prompts come from all over the file; those of a .txt do not
    places = sorted(int(text.split()[1]) for text in texts(tmp_path / "p.parquet", shuffle=500)[:100])
    assert places[-1] - places[0] > 2000
    assert max(int(text.split()[1]) for text in texts(tmp_path / "p.txt", shuffle=500)[:100]) < 600


def test_shuffle_buffer_is_bounded() -> None:
    items = iter(range(10_000))
    source = shuffled(items, 1000, np.random.default_rng(0))
    next(source)
    assert next(items) == 1001
    rest = [*source, 1001]
    assert len(rest) == 9999
    waits = [place - item for place, item in enumerate(rest, 1)]
    assert min(waits) >= -1000
    assert 800 < float(np.std(waits)) < 1200


# Mixtures


def mixture(tmp_path: Path, **sources: tuple[float, int, int | None]) -> MixturePrompts:
    """Each source: weight, prompts in its file, most."""
    made = {}
    for name, (weight, count, most) in sources.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {n}\n" for n in range(count)))
        made[name] = MixtureSource(weight, cfg(tmp_path / f"{name}.txt"), most)
    return MixturePrompts("mixture", made)


def test_mixture_keeps_proportions_at_every_length(tmp_path: Path) -> None:
    cfg = mixture(tmp_path, a=(0.5, 900, None), b=(0.3, 900, None), c=(0.2, 900, None), off=(0, 0, None))
    found = [p.source for p in islice(stream(cfg, 0, None), 1000)]
    for length in (10, 100, 1000):
        assert Counter(found[:length]) == {"a": length // 2, "b": length * 3 // 10, "c": length // 5}
    for name in "abc":  # each source in its own order
        own = [p.text.strip() for p in islice(stream(cfg, 0, None), 100) if p.source == name]
        assert own == [f"{name} {n}" for n in range(len(own))]


def test_mixture_continues_when_a_source_ends_and_logs_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = mixture(tmp_path, a=(0.5, 30, None), b=(0.3, 300, 20), c=(0.2, 100, None))
    with caplog.at_level("INFO"):
        found = [p.source for p in stream(cfg, 0, None)]
    assert Counter(found) == {"a": 30, "b": 20, "c": 100}
    messages = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert messages == [
        ("WARNING", "prompts.sources.a ended after 30 prompts; the mixture continues with b, c in their proportion"),
        (
            "INFO",
            "prompts.sources.b.max_prompts: 20 prompts are drawn; the mixture continues with c in their proportion",
        ),
        ("WARNING", "prompts.sources.c ended after 100 prompts; the mixture ends"),
    ]


def test_skipped_prompts_do_not_count_in_proportions(tmp_path: Path) -> None:
    files = mixture(tmp_path, a=(0.5, 400, None)).sources
    (tmp_path / "b.csv").write_text("prompt,spam\n" + "".join(f"b {n},{int(n % 3 > 0)}\n" for n in range(300)))
    b = cfg(tmp_path / "b.csv", max_values={"spam": 0})
    found = list(stream(MixturePrompts("mixture", {**files, "b": MixtureSource(0.5, b, 50)}), 0, None))
    good = [p.source for p in found if not p.out]
    assert Counter(good[:100]) == {"a": 50, "b": 50}
    assert Counter(good) == {"a": 400, "b": 50}
    assert sum(bool(p.out) for p in found) in (98, 99, 100)  # the two behind the last may come, too


def test_the_grammar_may_be_part_of_a_mixture(tmp_path: Path) -> None:
    overrides = ["prompts=grammar", "prompts.detail=0"]
    grammar = settings(DatagenSettings, compose("datagen", overrides)).prompts
    assert isinstance(grammar, GrammarPrompts)
    files = mixture(tmp_path, a=(0.5, 5, None)).sources
    cfg = MixturePrompts("mixture", {**files, "scenes": MixtureSource(0.5, grammar)})
    found = list(islice(stream(cfg, 0, lambda _: False), 20))
    assert [p.source for p in found[:4]] in (["a", "scenes"] * 2, ["scenes", "a"] * 2)
    assert all(p.group for p in found if p.source == "scenes")
    assert sum(p.source == "scenes" for p in found) == 15


def test_provenance_of_prompts_is_recorded(tmp_path: Path) -> None:
    cfg = mixture(tmp_path, a=(1, 2, None))
    data = (tmp_path / "a.txt").read_bytes()
    facts = {"a.txt": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert provenance(cfg) == {"a": {"url": str(tmp_path / "a.txt"), "files": facts}}


def test_files_of_one_name_are_distinguished(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.txt").write_text(f"from {folder}")
        with zipfile.ZipFile(tmp_path / f"{folder}.zip", "w") as archive:
            archive.write(tmp_path / folder / "p.txt", "in/p.txt")
    for url, names in (
        (f"{tmp_path}/*/p.txt", ["a/p.txt", "b/p.txt"]),
        (f"zip://in/p.txt::{tmp_path}/?.zip", ["a.zip/in/p.txt", "b.zip/in/p.txt"]),
    ):
        assert texts(url) == ["from a", "from b"]
        assert list(provenance(cfg(url))["files"]) == names


def test_the_default_is_the_mixture_and_its_parts_can_be_overridden() -> None:
    default = settings(DatagenSettings, compose("datagen", [])).prompts
    assert isinstance(default, MixturePrompts)
    assert {"diffusiondb", "coco", "vizwiz"} <= set(default.sources)
    added = [
        "+prompts@prompts.sources.mine.prompts=file",
        "prompts.sources.mine.prompts.path='hf://datasets/o/n@v1/*.csv'",
    ]
    weights = [
        "+prompts.sources.mine.weight=0.1",
        "prompts.sources.coco.weight=0.05",
        "prompts.sources.coco.max_prompts=50000",
    ]
    mixed = settings(DatagenSettings, compose("datagen", [*added, *weights])).prompts
    assert isinstance(mixed, MixturePrompts)
    assert mixed.sources["coco"].max_prompts == 50000
    assert isinstance(mixed.sources["mine"].prompts, FilePrompts)
    assert mixed.sources["mine"].prompts.path == "hf://datasets/o/n@v1/*.csv"


def test_the_weights_in_the_message_can_be_pasted() -> None:
    without = ["~prompts.sources.vizwiz"]
    with pytest.raises(UserError, match=r"prompts\.sources: the weights sum to 0\.8, not 1; scaled: ") as error:
        settings(DatagenSettings, compose("datagen", without))
    pasted = str(error.value).partition("scaled: ")[2].split()
    prompts = settings(DatagenSettings, compose("datagen", [*without, *pasted])).prompts
    assert isinstance(prompts, MixturePrompts)
    assert sum(s.weight for s in prompts.sources.values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["prompts.sources.coco.weight=-0.1"], "prompts.sources.coco.weight: -0.1 is outside 0 to 1"),
        (["prompts.sources.coco.weight=0.9"], "prompts.sources: the weights sum to 1.75, not 1"),
        (["prompts.sources.coco.weight=many"], "prompts.sources.coco.weight: expected float, got 'many'"),
        (["prompts.sources.coco.max_prompts=0"], "prompts.sources.coco.max_prompts: 0 is below 1; null"),
        (["prompts.sources.coco.prompts.shuffle=-1"], "prompts.sources.coco.prompts.shuffle: -1 is below 0"),
        (["+prompts.sources.mine.weight=0.1"], "prompts.sources.mine.prompts: missing"),
        (["+prompts.sources.coco.prompts.max_values.x=y"], "prompts.sources.coco.prompts.max_values.x: expected float"),
    ],
)
def test_invalid_mixtures_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        settings(DatagenSettings, compose("datagen", overrides))


@pytest.mark.slow
def test_an_unknown_source_is_refused() -> None:
    done = run("datagen", "prompts.sources.cocoo.weight=0.1")
    assert done.returncode != 0
    assert "cocoo" in done.stderr


def test_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a red fox, in snow\n\n  \nçà\r\nlast", encoding="utf-8")
    assert [p.text.strip() for p in read(tmp_path / "mine.txt")] == ["a red fox, in snow", "çà", "last"]


def test_spreadsheets_mark_their_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbfprompt\na red fox\n")
    assert [p.text for p in read(tmp_path / "p.csv")] == ["a red fox"]


def test_null_is_not_the_prompt_null(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": null}\n{"prompt": "a fox"}\n')
    pq.write_table(pa.table({"prompt": [None, "a fox"]}), tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.parquet"):
        assert [p.text for p in read(tmp_path / name)] == ["", "a fox"]


def test_the_grammar_is_endless_and_names_its_groups() -> None:
    source = stream(settings(DatagenSettings, compose("datagen", ["prompts=grammar"])).prompts, 0, None)
    first = [next(source) for _ in range(50)]
    assert len({p.text for p in first}) == 50
    assert all(p.group and p.source == "grammar" for p in first)


ERRORS: dict[str, tuple[bytes | None, str]] = {
    "gone.txt": (None, "prompts.path: no file .*gone.txt"),
    "p.docx": (b"x", "is .docx; known: .txt, .csv"),
    "empty.txt": (b"", "empty.txt is empty"),
    "blank.txt": (b"\n  \n", "blank.txt holds no prompt"),
    "header.csv": (b"prompt\n", "header.csv holds no prompt"),
    "latin.txt": (
        "a fox\ncaf\xe9\n".encode("latin-1"),
        "not UTF-8: line 2 .* Likely cp1252 .*prompts.text_encoding=cp1252",
    ),
    "latin.csv": ("prompt\ncaf\xe9\n".encode("latin-1"), "latin.csv is not UTF-8: line 2 .* Likely cp1252"),
    "other.csv": (b"id,text\n1,a fox\n", "lacks the column prompt; it has id, text. .*prompts.column="),
    "comma.csv": (b"id,prompt\n1,a fox, in snow\n", "comma.csv:2: more fields than columns; quote"),
    "quote.csv": (b'prompt\n"a fox\n' + b"more\n" * 30_000, "quote.csv:2: .*a quotation mark may be open"),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', "broken.jsonl:2: not JSON"),
    "list.jsonl": (b'["a fox"]\n', "list.jsonl:1: expected an object .*, got list"),
    "key.jsonl": (b'{"prompt": "a"}\n{"text": "a"}\n', "key.jsonl:2 lacks the column prompt; it has text"),
    "p.parquet": (b"PAR1 is not all", "p.parquet is not a Parquet file"),
    "object.json": (
        b'{"rows": [], "info": 1}',
        "object.json: expected a list, got dict with the keys rows, info; .*records=",
    ),
    "broken.json": (b'[{"prompt": \n', "broken.json:2: not JSON"),
    "cut.txt.gz": (gzip.compress(b"a fox " * 999)[:30], "cut.txt.gz is damaged or truncated .*; copy it again"),
    "p.txt.gz": (b"a fox", "p.txt.gz is damaged or truncated .Not a gzipped file"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_unusable_files_are_refused(tmp_path: Path, name: str) -> None:
    data, said = ERRORS[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"(?s){said}"):
        read(tmp_path / name)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    lines = [f"prompt {n} {np.random.default_rng(n).bytes(9).hex()}" for n in range(3000)]
    pq.write_table(pa.table({"prompt": lines}), tmp_path / "p.parquet", compression="zstd", use_dictionary=False)
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name, kind in (("stored.zip", zipfile.ZIP_STORED), ("packed.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / name, "w", kind) as archive:
            archive.writestr("p.txt", "\n".join(lines))
    for name in ("p.parquet", "p.txt.gz", "stored.zip", "packed.zip"):
        data = bytearray((tmp_path / name).read_bytes())
        place = 4 if name == "p.parquet" else len(data) // 2  # its pages carry no checksum, so its first page's header
        data[place : place + 40] = bytes(reversed(range(40)))
        (tmp_path / name).write_bytes(data)
        url = f"zip://p.txt::{tmp_path / name}" if name.endswith(".zip") else tmp_path / name
        with pytest.raises(
            UserError, match=rf"prompts\.path: .*{name}.* is damaged or truncated \(.*\); copy it again"
        ):
            read(url)


def test_groups_need_columns(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox")
    with pytest.raises(UserError, match=r"the column 'group' is required, but a .txt"):
        read(tmp_path / "p.txt", group_column="group")


@pytest.mark.slow
def test_other_unusable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,nsfw\na fox,high\n")
    (tmp_path / "p.json").write_text('{"rows": []}')
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("there.txt", "a fox")
    (tmp_path / "no.zip").write_bytes(b"PK")
    cases: list[tuple[str, dict[str, Any], str]] = [
        (
            "p.csv",
            {"max_values": {"nsfw": 0.5}},
            r"p\.csv, row 1: nsfw is 'high', not a number, as max_values\.nsfw=0\.5 needs",
        ),
        ("p.csv", {"max_values": {"age": 0.5}}, r"p\.csv lacks the column age; it has prompt, nsfw"),
        ("p.csv", {"json_lists": True}, r"p\.csv, row 1: not a JSON list of texts; .*prompts\.json_lists=false"),
        ("p.csv", {"revision": "v1"}, r"is not on the hub .*, so it has no revision \(v1\)"),
        ("p.json", {"records": "items"}, r"prompts\.records=items: .*p\.json has no such key, but rows"),
        ("gone/*.csv", {}, r"prompts\.path: no file .*gone/\*\.csv"),
        ("gone.csv", {}, r"no file .*gone\.csv; .* holds no\.zip, p\.csv, p\.json, p\.zip"),
    ]
    for path, values, said in cases:
        with pytest.raises(UserError, match=said):
            read(tmp_path / path, **values)
    for url, said in (
        (f"zip://gone.txt::{tmp_path}/p.zip", r"p\.zip holds no gone\.txt, but there\.txt"),
        (f"zip://gone.txt::{tmp_path}/no.zip", r"no\.zip is not a zip, or truncated"),
        (f"zip://{tmp_path}/p.zip", r"is not zip://member::path"),
        ("hf://owner/name/p.csv", r"is not hf://datasets/owner/name/file"),
        ("hf://datasets/o/n@v1/p.csv", r"has the revision v1, but revision=v2"),
        ("nosuch://bucket/p.csv", r"prompts\.path=nosuch://bucket/p\.csv: .*nosuch"),
    ):
        with pytest.raises(UserError, match=said):
            read(url, revision="v2" if "@" in url else None)


def test_a_url_without_its_package_names_it() -> None:
    with pytest.raises(UserError, match=r"prompts\.path=gdrive://x/p\.csv: gdrive:// needs another package: .*gdrive"):
        read("gdrive://x/p.csv")


@pytest.mark.slow
def test_the_command_refuses_before_it_writes(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("text\na red fox in snow\n")
    bare = ("renderer=glyphs", "encoder=null", "curate.dedup_threshold=null", "split.kind=image")
    done = run("datagen", "prompts=file", f"prompts.path={tmp_path / 'p.csv'}", *bare, f"out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "lacks the column prompt" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
