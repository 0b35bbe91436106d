"""Odd values × readers: the right captions or a refusal, and what is left out is counted by reason.

Every case writes a real file and reads it by the functions that the commands use. No prompt is ever the Python
representation of a value.
"""

import csv
import datetime
import io
import json
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.config import DatagenSettings, FilePrompts, IndexSettings
from datagen.dataset.archive_readers import opened
from datagen.dataset.reader import Dataset
from datagen.importers.foreign_dataset import index
from datagen.importers.foreign_images import read_folder, read_tars
from datagen.prompts import download
from datagen.prompts.sources import stream
from tests.commands import run

Read = tuple[list[str], Counter[str]]
"""Captions, and the values left out by reason."""


def read_prompts(path: Path, **values: Any) -> Read:
    """Read prompts as `python -m datagen prompts=file prompts.path=…`."""
    download.files.cache_clear()
    cfg = settings(DatagenSettings, compose("datagen", ["prompts=file", "prompts.path=x.txt"])).prompts
    assert isinstance(cfg, FilePrompts)
    prompts = list(stream(replace(cfg, path=str(path), **values), 0, None))
    assert all(p.where for p in prompts if p.out)
    return [p.text for p in prompts if not p.out], Counter(p.out for p in prompts if p.out)


def read_bank(path: Path) -> Read:
    """Read prompts as `prompt_index=…` of `train.evaluate`."""
    from train.evaluate.prompt_index import from_places

    bank = from_places([path], "all-MiniLM-L6-v2")
    return bank.texts(range(len(bank))), Counter()


def index_settings(**values: Any) -> IndexSettings:
    overrides = [f"{k}={str(v)!r}" for k, v in values.items()]
    return settings(IndexSettings, compose("index", ["out=unused", "encoder=null", *overrides]))


def read_index(cfg: IndexSettings) -> tuple[dict[str, list[str]], Counter[str]]:
    """Key → captions, as `python -m datagen.index` reads them, and what it lists in its log by reason."""
    skipped: list[dict[str, str]] = []
    batches = list(read_tars(cfg, skipped) if cfg.tars else read_folder(cfg, skipped))
    return {i.key: list(i.captions) for batch in batches for i in batch}, Counter(s["reason"] for s in skipped)


def image(n: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (n, 0, 0)).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def no_representations(texts: Sequence[str]) -> None:
    wrong = [t for t in texts if re.match(r"b['\"]|[{\[]['\"{\[]", t) or t in ("nan", "None", "null", "[]", "{}")]
    assert not wrong


# ------------------------------------------------------------------------------------------------------- typed values

FOX, CAT = "a fox", "çà et là"
VIEWS = pa.array([FOX, CAT])
GOOD: dict[str, tuple[Callable[[], pa.Array], list[str], dict[str, int]]] = {
    "string": (lambda: VIEWS, [FOX, CAT], {}),
    "large string": (lambda: VIEWS.cast(pa.large_string()), [FOX, CAT], {}),
    "string view": (lambda: VIEWS.cast(pa.string_view()), [FOX, CAT], {}),
    "dictionary": (lambda: VIEWS.dictionary_encode(), [FOX, CAT], {}),
    "dictionary of large strings": (lambda: VIEWS.cast(pa.large_string()).dictionary_encode(), [FOX, CAT], {}),
    "binary": (lambda: VIEWS.cast(pa.binary()), [FOX, CAT], {}),
    "large binary": (lambda: VIEWS.cast(pa.large_binary()), [FOX, CAT], {}),
    "binary view": (lambda: pa.array([FOX.encode(), CAT.encode()], pa.binary_view()), [FOX, CAT], {}),
    "fixed binary": (lambda: pa.array([b"a fox", b"a cat"], pa.binary(5)), [FOX, "a cat"], {}),
    "lists": (lambda: pa.array([[FOX, CAT], []]), [FOX, CAT], {"empty": 1}),
    "list with nulls": (lambda: pa.array([[FOX, None, " "], None]), [FOX], {"null": 2, "empty": 1}),
    "large list": (lambda: pa.array([[FOX], [CAT]], pa.large_list(pa.string())), [FOX, CAT], {}),
    "fixed list": (lambda: pa.array([[FOX, CAT]], pa.list_(pa.string(), 2)), [FOX, CAT], {}),
    "list of bytes": (lambda: pa.array([[FOX.encode()], [CAT.encode()]]), [FOX, CAT], {}),
    "nulls": (lambda: pa.array([None, FOX]), [FOX], {"null": 1}),
    "empty": (lambda: pa.array(["", " \t", "\u200b", FOX]), [FOX], {"empty": 3}),
    "null type": (lambda: pa.nulls(2), [], {"null": 2}),
}
BAD: dict[str, tuple[Callable[[], pa.Array], str]] = {
    "bytes that are no text": (
        lambda: pa.array([FOX.encode(), b"caf\xe9"]),
        r"row 2: 'prompt' holds bytes that are not UTF",
    ),
    "struct": (lambda: pa.array([{"from": "x"}]), r"column 'prompt' is struct<from: string>, not text"),
    "list of structs": (lambda: pa.array([[{"from": "x"}]]), r"column 'prompt' is list<.*struct<from: string>>, not"),
    "nested lists": (lambda: pa.array([[[FOX]]]), r"column 'prompt' is list<.*list<.*string>>, not text"),
    "map": (lambda: pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), r"'prompt' is map<"),
    "whole numbers": (lambda: pa.array([1, 2]), r"the column 'prompt' is int64, not text or lists of texts"),
    "numbers, NaN": (lambda: pa.array([float("nan"), 1.5]), r"the column 'prompt' is double, not text"),
    "truth values": (lambda: pa.array([True]), r"the column 'prompt' is bool, not text"),
    "times": (lambda: pa.array([datetime.datetime(2026, 1, 1)]), r"the column 'prompt' is timestamp"),
    "dictionary of numbers": (lambda: pa.array([1, 2]).dictionary_encode(), r"the column 'prompt' is int64"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("reader", ["prompts", "bank"])
def test_parquet_columns_with_text(tmp_path: Path, case: str, reader: str) -> None:
    array, texts, left_out = GOOD[case]
    pq.write_table(pa.table({"prompt": array()}), tmp_path / "p.parquet")
    if reader == "prompts":
        assert read_prompts(tmp_path / "p.parquet") == (texts, left_out)
    elif texts:
        assert read_bank(tmp_path / "p.parquet")[0] == texts
    else:
        with pytest.raises(UserError, match="holds no prompt"):
            read_bank(tmp_path / "p.parquet")


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("reader", [read_prompts, read_bank])
def test_parquet_columns_without_text_are_refused(tmp_path: Path, case: str, reader: Callable[[Path], Read]) -> None:
    array, message = BAD[case]
    pq.write_table(pa.table({"prompt": array()}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=rf"p\.parquet.*{message}.*column=…"):
        reader(tmp_path / "p.parquet")


@pytest.mark.parametrize("reader", [read_prompts, read_bank])
def test_invalid_utf8_in_parquet(tmp_path: Path, reader: Callable[[Path], Read]) -> None:
    starts = pa.array([0, 5, 9], pa.int32()).buffers()[1]
    strings = pa.Array.from_buffers(pa.string(), 2, [None, starts, pa.py_buffer(b"a foxcaf\xe9")])
    pq.write_table(pa.table({"prompt": strings}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet: the column 'prompt' holds a string that is not UTF-8 \(b'caf"):
        reader(tmp_path / "p.parquet")


def test_duplicate_parquet_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([VIEWS, VIEWS], names=["prompt", "prompt"]), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="several columns prompt; rename"):
        read_prompts(tmp_path / "p.parquet")


def test_column_types_are_checked_before_reading(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [FOX]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"prompt": [1]}), tmp_path / "1.parquet")
    download.files.cache_clear()
    cfg = settings(DatagenSettings, compose("datagen", ["prompts=file", f"prompts.path='{tmp_path}/*.parquet'"]))
    with pytest.raises(UserError, match=r"1\.parquet: the column 'prompt' is int64"):
        next(stream(cfg.prompts, 0, None))


JSON_GOOD: dict[str, tuple[str, list[str], dict[str, int]]] = {
    "text": ('"a fox"', [FOX], {}),
    "escapes": (r'"\u00e7\u00e0 et l\u00e0"', [CAT], {}),
    "half a pair": (r'"a fox\ud83d"', [FOX], {}),
    "list": ('["a fox", "a cat"]', [FOX, "a cat"], {}),
    "list with nulls": ('["a fox", null, NaN, ""]', [FOX], {"null": 1, "NaN": 1, "empty": 1}),
    "null": ("null", [], {"null": 1}),
    "NaN": ("NaN", [], {"NaN": 1}),
    "empty": ('" "', [], {"empty": 1}),
    "empty list": ("[]", [], {"empty": 1}),
    "text that looks like a value": ('"None of them"', ["None of them"], {}),
}
JSON_BAD = {
    "number": ("3.5", r"a number \(3.5\)"),
    "infinity": ("Infinity", r"a number \(inf\)"),
    "whole number": ("7", r"a number \(7\)"),
    "truth value": ("true", r"a truth value \(true\)"),
    "long whole number": ("7" * 4000, r"a number \(7{60}…\)"),
    "object": ('{"from": "x"}', "an object with the keys from"),
    "list of objects": ('[{"from": "x"}]', "an object with the keys from"),
    "list of numbers": ('["a fox", 3]', r"a number \(3\)"),
    "nested list": ('[["a fox"]]', "a list within a list"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*JSON_GOOD, *JSON_BAD])
@pytest.mark.parametrize("reader", [".jsonl", ".json", ".tar", "bank"])
def test_json_values(tmp_path: Path, case: str, reader: str) -> None:
    value = (JSON_GOOD.get(case) or JSON_BAD[case])[0]
    rows = ['{"prompt": "first"}', f'{{"prompt": {value}}}']
    if reader == ".tar":
        members = [(f"{n}.png", image(n)) for n in range(2)] + [
            (f"{n}.json", row.encode()) for n, row in enumerate(rows)
        ]
        cfg = index_settings(tars=write_tar(tmp_path / "p.tar", members))
        where = r"p\.tar, sample 1"

        def read() -> Read:
            captions, reasons = read_index(cfg)
            values = Counter({r.removeprefix("prompt that is "): n for r, n in reasons.items()})
            return [text for texts in captions.values() for text in texts], values
    else:
        path = tmp_path / f"p{'.jsonl' if reader == 'bank' else reader}"
        path.write_text(f"[{','.join(rows)}]" if reader == ".json" else "\n".join(rows))
        where = rf"p\.{path.suffix[1:]}, row 2"

        def read() -> Read:
            return read_bank(path) if reader == "bank" else read_prompts(path)

    if case in JSON_BAD:
        with pytest.raises(UserError, match=rf"{where}: 'prompt' holds {JSON_BAD[case][1]}, not text"):
            read()
        return
    texts, left_out = read()
    assert texts == ["first", *JSON_GOOD[case][1]]
    assert left_out == (Counter() if reader == "bank" else JSON_GOOD[case][2])
    no_representations(texts)


@pytest.mark.parametrize(
    ("value", "message"), [("[" * 100_000, "nested too deep"), ("9" * 5000, "thousands of digits")]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".tar", ".csv"])
def test_json_beyond_python_limits_is_refused(tmp_path: Path, value: str, message: str, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    row = f'{{"prompt": {value}}}'
    if suffix == ".tar":
        write_tar(path, [("a.png", image()), ("a.json", row.encode()), ("b.png", image(1)), ("b.txt", FOX.encode())])
        assert read_index(index_settings(tars=path)) == ({"b": [FOX]}, {".json that is not JSON": 1})
        return
    path.write_text({".json": f"[{row}]", ".csv": f"prompt\n{value}\n"}.get(suffix, row))
    with pytest.raises(UserError, match="row 1: not a JSON list" if suffix == ".csv" else f"not JSON: .*{message}"):
        read_prompts(path, json_lists=suffix == ".csv")


def test_json_lists_in_a_csv(tmp_path: Path) -> None:
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], ['["a fox", null, "a cat"]'], [" "], ['["a boat", ""]']])
    assert read_prompts(tmp_path / "p.csv", json_lists=True) == (
        [FOX, "a cat", "a boat"],
        {"null": 1, "empty": 2},
    )
    (tmp_path / "q.csv").write_text('prompt\n"[""a fox"", 3]"\n')
    with pytest.raises(UserError, match=r"q\.csv, row 1: 'prompt' holds a number \(3\)"):
        read_prompts(tmp_path / "q.csv", json_lists=True)


# ------------------------------------------------------------------------------------------------- tables of text alone

TABLES: dict[str, tuple[str, str, list[str] | str]] = {
    "quotes in the middle": (".csv", 'id,prompt\na,a 5" nail and a "red" hen\n', ['a 5" nail and a "red" hen']),
    "quoted": (".csv", 'id,prompt\na,"a ""red"" fox, in snow"\n', ['a "red" fox, in snow']),
    "two lines": (".csv", 'id,prompt\na,"a fox\nin snow"\nb,a cat\n', ["a fox\nin snow", "a cat"]),
    "words of missing values": (".csv", "id,prompt\na,nan\nb,NULL\nc,3.5\n", ["nan", "NULL", "3.5"]),
    "never closed": (".csv", 'id,prompt\na,a cat\nb,"a fox\nc,a hen\nd,a dog\n', r"p\.csv:3: unexpected end"),
    "closed by another": (".csv", 'id,prompt\na,"a fox\nb,a cat\nc,"a hen"\n', r"p\.csv:2: ',' expected after '\"'"),
    "not doubled": (".csv", 'id,prompt\na,a cat\nb,"a "red" fox"\n', r"p\.csv:3: ',' expected after '\"'"),
    "two columns of one name": (".csv", "id,prompt,prompt\na,b,c\n", r"several columns prompt"),
    "opening quote": (
        ".tsv",
        'id\tprompt\na\t"a fox\nb\ta cat\nc\t"hen" of\nd\ta dog\n',
        ['"a fox', "a cat", '"hen" of', "a dog"],
    ),
    "escapes stay": (".tsv", "id\tprompt\na\ta\\tfox\\n, 'red'\n", ["a\\tfox\\n, 'red'"]),
    "carriage return": (".tsv", "id\tprompt\na\ta\rfox\n", r"p\.tsv:2: a carriage return within a field"),
    "carriage return in a csv": (".csv", "id,prompt\na,a\rfox\n", r"p\.csv:2: a carriage return within a field"),
    "quoted carriage return": (".csv", 'id,prompt\na,"a\rfox"\n', ["a\rfox"]),
    "lines that end by it": (".csv", "id,prompt\ra,a fox\rb,a cat\r", ["a fox", "a cat"]),
    "a tab too many": (".tsv", "id\tprompt\na\ta fox\nb\ta\tcat\n", r"p\.tsv:3: more fields than columns"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("reader", ["prompts", "bank", "index"])
def test_csv_quotes(tmp_path: Path, case: str, reader: str, caplog: pytest.LogCaptureFixture) -> None:
    suffix, text, expected = TABLES[case]
    path = tmp_path / f"p{suffix}"
    path.write_text(text, newline="")

    def read() -> list[str]:
        if reader == "prompts":
            return read_prompts(path)[0]
        if reader == "bank":
            return read_bank(path)[0]
        (tmp_path / "images").mkdir()
        for n, name in enumerate("abcd"):
            (tmp_path / "images" / f"{name}.png").write_bytes(image(n))
        captions, reasons = read_index(index_settings(images=tmp_path / "images", csv=path))
        assert reasons.total() == 4 - len(captions)
        return [" ".join(text.split()) for texts in captions.values() for text in texts]

    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            read()
        return
    with caplog.at_level("INFO"):
        assert read() == ([" ".join(t.split()) for t in expected] if reader == "index" else expected)
    assert ("1 rows hold line breaks within quotes, the first from line 2" in caplog.text) == (case == "two lines")


def test_skipped_table_rows_are_listed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for n, name in enumerate("abcd"):
        (tmp_path / "images" / f"{name}.png").write_bytes(image(n))
    (tmp_path / "p.csv").write_text("id,prompt\na,a fox\nb,\nc, \nd\n")
    captions, reasons = read_index(index_settings(images=tmp_path / "images", csv=tmp_path / "p.csv"))
    assert captions == {"a": [FOX]}
    assert reasons == {"prompt that is empty": 3, "image without a prompt": 3}
    assert read_prompts(tmp_path / "p.csv") == ([FOX], {"empty": 3})


# ------------------------------------------------------------------------------------------------------- text encodings

MARKS = {"utf-8-sig": b"", "utf-16": b"", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff", "utf-32": b""}
ENCODINGS = {
    "cp1252": "the artist’s “blue” château",
    "iso8859-1": "un café au château",
    "cp1251": "рыжая лиса в снегу",
    "cp932": "雪の中の赤い狐",
    "gb18030": "雪地里的红狐狸，夜空",
    "big5": "雪地裡的紅狐狸，一座城堡",
    "cp1250": "zażółć gęślą jaźń",
    "utf-16-le": "a café",
    "utf-16-be": "a café",
    "utf-32-le": "a café",
    "utf-32-be": "a café",
    "iso2022_jp": "雪の中の赤い狐",
}


@pytest.mark.slow
@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.txt", "p.jsonl", "p.json"])
def test_byte_order_mark_decides_encoding(tmp_path: Path, encoding: str, name: str) -> None:
    text = {"p.txt": f"{CAT}\n", "p.jsonl": f'{{"prompt": "{CAT}"}}\n', "p.json": f'[{{"prompt": "{CAT}"}}]'}
    data = MARKS[encoding] + text.get(name, f"prompt\n{CAT}\n").encode(encoding)
    (tmp_path / name).write_bytes(data)
    assert [t.strip() for t in read_prompts(tmp_path / name)[0]] == [CAT]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.txt", "p.jsonl"])
def test_wrong_encoding_error_names_likely_encoding(tmp_path: Path, encoding: str, name: str) -> None:
    text = ENCODINGS[encoding]
    lines = {"p.txt": f"{text}\n", "p.jsonl": f'{{"prompt": "{text}"}}\n'}.get(name, f"prompt\n{text}\n")
    (tmp_path / name).write_bytes((lines if name != "p.txt" else lines * 2).encode(encoding))
    likely = "cp1252" if encoding == "iso8859-1" else encoding
    with pytest.raises(UserError, match=rf"is not UTF-8: line \d .*Likely {likely}.*prompts\.text_encoding={likely}"):
        read_prompts(tmp_path / name)
    assert [t.strip() for t in read_prompts(tmp_path / name, text_encoding=likely)[0]] in ([text], [text] * 2)


def test_wrong_encoding_error_suggests_iconv_without_setting(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes("prompt\nun château\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"reads 'un château'.*iconv -f CP1252 -t UTF-8 .*p\.csv > utf8-p\.csv"):
        read_bank(tmp_path / "p.csv")


def test_damaged_utf8_line_is_not_another_encoding(tmp_path: Path) -> None:
    data = "".join(f"{CAT} {n}\n" for n in range(9)).encode()
    (tmp_path / "p.txt").write_bytes(data + b"a fo\xff\n" + data)
    with pytest.raises(UserError, match=r"line 10 cannot be decoded, while 18 lines .*damaged there"):
        read_prompts(tmp_path / "p.txt")


def test_unknown_encoding_is_refused() -> None:
    for encoding in ("cp12520", "base64"):
        with pytest.raises(UserError, match=rf"text_encoding: {encoding} is not a text encoding"):
            index_settings(tars="x.tar", text_encoding=encoding)


def test_text_encoding_of_an_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "un château à côté"
    members = [("a.png", image(0)), ("a.txt", text.encode("cp1252")), ("b.png", image(1)), ("b.txt", b"a fox")]
    members += [("c.png", image(2)), ("c.txt", text.encode("utf-16"))]
    tars = write_tar(tmp_path / "0.tar", members)
    captions, reasons = read_index(index_settings(tars=tars))
    assert (captions, reasons) == ({"b": [FOX], "c": [text]}, {".txt in another text encoding": 1})
    assert f"the first of {tars}, sample a; likely cp1252, which reads {text!r}" in caplog.text
    captions, reasons = read_index(index_settings(tars=tars, text_encoding="cp1252"))
    assert (captions, reasons) == ({"a": [text], "b": [FOX], "c": [text]}, {})


# ------------------------------------------------------------------------------------------------------------ samples

TARS: dict[str, tuple[list[str], list[str], dict[str, int]]] = {
    "dots": (["22.05.png", "22.05.txt", "22.06.png", "22.06.txt"], ["22.05", "22.06"], {}),
    "dots, images first": (["22.05.png", "22.06.png", "22.05.txt", "22.06.txt"], ["22.05", "22.06"], {}),
    "dots beside none": (["v.png", "v.txt", "v.1.png", "v.1.txt"], ["v", "v.1"], {}),
    "dots and letters": (["A.b.PNG", "A.b.txt", "A.B.PNG", "A.B.txt"], ["A.b", "A.B"], {}),
    "versions in folders": (
        ["x/v1.0.2.webp", "x/v1.0.2.json", "x/v1.0.3.webp", "x/v1.0.3.json"],
        ["x/v1.0.2", "x/v1.0.3"],
        {},
    ),
    "several parts": (["1.png", "1.seg.png", "1.cls.txt", "1.txt"], ["1"], {"further image of a sample": 1}),
    "one named part": (["1.rgb.png", "1.txt", "2.rgb.png", "2.txt"], ["1", "2"], {}),
    "two kinds": (["1.png", "1.jpg", "1.txt"], ["1"], {"further image of a sample": 1}),
    "dots without text": (["22.05.png", "22.06.png"], [], {"image without a text of its name": 2}),
    "one text of two": (["22.05.png", "22.06.png", "22.06.txt"], ["22.06"], {"image without a text of its name": 1}),
    "a key twice": (["k.png", "k.txt", "k.png", "k.txt"], ["k", "k~2"], {}),
    "a key twice, apart": (["k.png", "k.txt", "j.png", "j.txt", "k.txt", "k.png"], ["k", "k~2", "j"], {}),
    "a key twice, images first": (["k.png", "k.png", "k.txt", "k.txt"], ["k", "k~2"], {}),
    "a key twice, one without text": (["k.png", "k.png", "k.txt"], ["k~2"], {"sample without a prompt": 1}),
    "a dotted key twice": (["k.1.png", "k.1.txt", "k.1.png", "k.1.txt"], ["k.1", "k.1~2"], {}),
    "system files": (["a.png", "a.txt", "._a.png", "__MACOSX/a.png"], ["a"], {"system file": 2}),
    "other suffixes": (
        ["a.jfif", "a.txt", "b.avif", "b.txt", "c.heic", "c.txt", "README"],
        ["a", "b"],
        {"sample without an image": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TARS)
def test_no_sample_of_a_tar_is_lost(tmp_path: Path, case: str) -> None:
    names, keys, reasons = TARS[case]
    members, text_of = [], {}
    for n, name in enumerate(names):
        text = f"text {n}"
        data = {"txt": text.encode(), "json": json.dumps({"prompt": text}).encode()}.get(name.rpartition(".")[2])
        members.append((name, data or image(n)))
        if data:
            text_of[n] = text
    tars = write_tar(tmp_path / "0.tar", members)
    captions, skipped = read_index(index_settings(tars=tars))
    assert sorted(captions) == sorted(keys)
    assert skipped == reasons
    texts = [t for texts in captions.values() for t in texts]
    assert len(set(texts)) == len(texts) == len(keys), "each sample has a text of its own"
    out = tmp_path / "data"
    if keys:
        overrides = [f"out={out}", f"tars={tars}", "encoder=null"]
        index(settings(IndexSettings, compose("index", overrides)))
        dataset = Dataset(out)
        stored = {dataset.key(i): dataset.image_bytes(i) for i in range(len(dataset))}
        by_text = {text: n for n, text in text_of.items()}
        for key, data in stored.items():  # the image beside the text in the tar, of the same name up to its suffix
            number = by_text[captions[key][0]]
            same = [m for m, (name, _) in enumerate(members) if members[m][1] == data]
            assert len(same) == 1
            assert names[same[0]].partition(".")[0] == names[number].partition(".")[0]


def test_members_without_bytes_are_listed(tmp_path: Path) -> None:
    tars = write_tar(tmp_path / "0.tar", [("a.png", b""), ("a.txt", b"a hen"), ("b.png", image()), ("b.txt", b"a fox")])
    with tarfile.open(tars, "a") as tar:
        for name, kind in (("c.png", tarfile.SYMTYPE), ("d.png", tarfile.LNKTYPE), ("e.png", tarfile.FIFOTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "b.png"
            tar.addfile(header)
    reasons = {"empty file": 1, "link": 2, "not a file": 1}
    assert read_index(index_settings(tars=tars)) == ({"b": [FOX]}, reasons)


def test_names_that_are_not_utf_8_are_listed(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    members = [
        (f"{stem}{suffix}", data) for stem in (name, "b") for suffix, data in ((".png", image()), (".txt", b"a fox"))
    ]
    captions, reasons = read_index(index_settings(tars=write_tar(tmp_path / "0.tar", members)))
    assert (captions, reasons) == ({"b": [FOX]}, {"a name that is not UTF-8": 1})
    (tmp_path / "images").mkdir()
    for stem in (name, "b"):
        (tmp_path / "images" / f"{stem}.png").write_bytes(image())
    (tmp_path / "p.csv").write_text("id,prompt\nb,a fox\n")
    captions, reasons = read_index(index_settings(images=tmp_path / "images", csv=tmp_path / "p.csv"))
    assert (captions, reasons) == ({"b": [FOX]}, {"a name that is not UTF-8": 1})


@pytest.mark.parametrize("kind", ["folder", "link to nowhere"])
def test_unreadable_tar_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "0.tar").mkdir()
    else:
        (tmp_path / "0.tar").symlink_to(tmp_path / "1.tar")
    with pytest.raises(UserError, match=r"0\.tar cannot be read: (Is a directory|No such file)"):
        read_index(index_settings(tars=tmp_path / "0.tar"))


def test_ignored_files_of_a_folder_are_listed(tmp_path: Path) -> None:
    for n, name in enumerate(["a.bmp", "b.gif", "c.tif", "d.jfif", "e.AVIF", "f.v1.png", "f.v2.png"]):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(image(n))
    for name in ("x.heic", "y.heic", "z", "._a.bmp", "Thumbs.db"):
        (tmp_path / "images" / name).write_bytes(b"x")
    names = ["a", "b", "c", "d", "e", "f.v1", "f.v2"]
    table = tmp_path / "images" / "p.csv"
    table.write_text("id,prompt\n" + "".join(f"{name},prompt {name}\n" for name in names))
    captions, reasons = read_index(index_settings(images=tmp_path / "images", csv=table))
    assert captions == {name: [f"prompt {name}"] for name in names}
    assert reasons == {"suffix .heic": 2, "no suffix": 1, "system file": 2}


# ----------------------------------------------------------------------------------------------------------- commands


@pytest.mark.slow
@pytest.mark.parametrize("case", ["parquet", "tar", "csv"])
def test_commands_exit_with_2_and_write_nothing(tmp_path: Path, case: str) -> None:
    if case == "parquet":
        pq.write_table(pa.table({"prompt": [1.5]}), tmp_path / "p.parquet")
        bare = ("renderer=glyphs", "encoder=null", "curate.dedup_threshold=null", "split.kind=image")
        ended = run("datagen", "prompts=file", f"prompts.path={tmp_path / 'p.parquet'}", *bare, f"out={tmp_path / 'o'}")
        message = "the column 'prompt' is double, not text or lists of texts; name another: prompts.column=…"
    elif case == "tar":
        write_tar(tmp_path / "0.tar", [("a.png", image()), ("a.json", b'{"prompt": {"from": "x"}}')])
        ended = run("datagen.index", f"tars={tmp_path / '0.tar'}", f"out={tmp_path / 'o'}", "encoder=null")
        message = "0.tar, sample a: 'prompt' holds an object with the keys from, not text"
    else:
        (tmp_path / "images").mkdir()
        (tmp_path / "p.csv").write_bytes("id,prompt\na,un château\n".encode("cp1252"))
        places = (f"images={tmp_path / 'images'}", f"csv={tmp_path / 'p.csv'}", f"out={tmp_path / 'o'}")
        ended = run("datagen.index", *places, "encoder=null")
        message = "p.csv is not UTF-8: line 2 cannot be decoded. Likely cp1252 (Western Europe), which reads"
    assert ended.returncode == 2
    assert any(line.startswith("error: ") and message in line for line in ended.stderr.splitlines())
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "o").exists()


def test_duplicate_names_in_folders_of_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for name, data in (("x/a.png", b"1"), ("y/a.png", b"2"), ("x/b.png", b"3"), ("y/b.png", b"3"), ("c.png", b"4")):
            archive.writestr(name, data)
    with opened(tmp_path / "p.zip") as archive:
        assert [archive.image(name) for name in ("a.png", "b.png", "c.png", "d.png")] == [None, b"3", b"4", None]
