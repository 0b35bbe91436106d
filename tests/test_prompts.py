"""Prompt sources: every kind of file gives the same stream, and a file that cannot be used says why."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf import UserError, compose, settings
from datagen.config import DatagenSettings, FilePrompts
from datagen.prompts import Prompt, stream
from tests.commands import run

ROWS = [
    ("a red fox, in snow", "red fox"),
    ('say "cheese", 猫 and çà', "cat;cheese"),
    ("two lines\nof one prompt", ""),
]


def chosen(path: Path, **values: str | None) -> FilePrompts:
    return replace(FilePrompts("file", path, "prompt", None, None), **values)


def read(path: Path, **values: str | None) -> list[Prompt]:
    return list(stream(chosen(path, **values), 0, None))


def write_table(path: Path) -> None:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"id": n, "prompt": p, "group": g}) for n, (p, g) in enumerate(ROWS)]
        path.write_text("\n\n".join(lines), encoding="utf-8")
    elif path.suffix == ".parquet":
        prompts, groups = zip(*ROWS, strict=True)
        pq.write_table(pa.table({"group": groups, "id": [0, 1, 2], "prompt": prompts}), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            writer.writerows([("id", "group", "prompt"), *((n, g, p) for n, (p, g) in enumerate(ROWS))])


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.jsonl", "p.parquet", "P.TSV"])
def test_tables(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name)
    assert read(tmp_path / name, group_column="group") == [Prompt(p, name[0], g) for p, g in ROWS]
    assert read(tmp_path / name, source="mine") == [Prompt(p, "mine", "") for p, _ in ROWS]


def test_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a red fox, in snow\n\n  \nçà\r\nlast", encoding="utf-8")
    assert [p.text.strip() for p in read(tmp_path / "mine.txt")] == ["a red fox, in snow", "çà", "last"]


def test_spreadsheets_mark_their_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbfprompt\na red fox\n")
    assert [p.text for p in read(tmp_path / "p.csv")] == ["a red fox"]


def test_null_is_no_prompt_of_that_name(tmp_path: Path) -> None:
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
    "latin.txt": ("a fox\ncaf\xe9\n".encode("latin-1"), "not UTF-8: byte 0xe9 .*iconv -f latin1 -t utf-8"),
    "latin.csv": ("prompt\ncaf\xe9\n".encode("latin-1"), "not UTF-8: byte 0xe9"),
    "other.csv": (b"id,text\n1,a fox\n", "lacks the column prompt; it has id, text. .*prompts.column="),
    "comma.csv": (b"id,prompt\n1,a fox, in snow\n", "comma.csv:2: more fields than columns; quote"),
    "quote.csv": (b'prompt\n"a fox\n' + b"more\n" * 30_000, "quote.csv:.*a quotation mark may be open"),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', "broken.jsonl:2: not JSON"),
    "list.jsonl": (b'["a fox"]\n', "list.jsonl:1: expected an object .*, got list"),
    "key.jsonl": (b'{"prompt": "a"}\n{"text": "a"}\n', "key.jsonl:2 lacks the column prompt; it has text"),
    "p.parquet": (b"PAR1 is not all", "p.parquet is no parquet file"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_files_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    data, said = ERRORS[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"(?s){said}"):
        read(tmp_path / name)


def test_groups_need_columns(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox")
    with pytest.raises(UserError, match=r"prompts.group_column: 'group', but a .txt"):
        read(tmp_path / "p.txt", group_column="group")


def test_the_command_refuses_before_it_writes(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("text\na red fox in snow\n")
    bare = ("renderer=glyphs", "encoder=null", "curate.duplicates_at=null", "split.kind=picture")
    done = run("datagen", "prompts=file", f"prompts.path={tmp_path / 'p.csv'}", *bare, f"out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "lacks the column prompt" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["p.csv"]
