"""Files of the hub and of other servers: fetched once, the commit recorded, and read without a network later.

The hub is `tests.tiny_hub`, on loopback, asked by processes of their own through huggingface_hub.
"""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from core.paths import ROOT
from datagen.prompts import download
from tests.tiny_hub import COMMIT, TinyHub

pytestmark = pytest.mark.enable_socket

READ = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.config import DatagenSettings
from datagen.prompts.sources import provenance, stream
prompts = settings(DatagenSettings, compose("datagen", ["prompts=file", *sys.argv[1:]])).prompts
try:
    print(json.dumps({"texts": [p.text for p in stream(prompts, 0, None)], "from": provenance(prompts)}))
except UserError as error:
    sys.exit(f"error: {error}")
"""


def read(*overrides: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", READ, *overrides],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def found(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-0.csv").write_text("Prompt\na fox\na cat\n")
    (folder / "data" / "train-1.csv").write_text("Prompt\na boat\n")
    (folder / "data" / "eval.csv").write_text("Prompt\nan eval\n")
    (folder / "all.txt").write_text("one\ntwo\n")
    return folder


def path(name: str, at: str = "") -> str:
    return f"prompts.path='hf://datasets/owner/name{at}/{name}'"


@pytest.mark.slow
def test_a_file_of_the_hub_is_fetched_once_and_its_commit_recorded(tmp_path: Path, repo: Path) -> None:
    with TinyHub({"owner/name": repo}) as hub:
        env = hub.environment(tmp_path)
        first = found(read(path("all.txt"), **env))
        assert [t.strip() for t in first["texts"]] == ["one", "two"]
        sha256 = hashlib.sha256(b"one\ntwo\n").hexdigest()
        assert first["from"] == {
            "repo": "owner/name",
            "commit": COMMIT,
            "files": {"all.txt": {"bytes": 8, "sha256": sha256}},
        }
        assert found(read(path("all.txt", "@v1"), **env)) == first
        assert sum(line.startswith("GET /datasets/") for line in hub.asked) == 1
    assert found(read(path("all.txt"), **{**env, "HF_HUB_OFFLINE": "1"})) == first


@pytest.mark.slow  # the hub's client tries five times
def test_hub_cache_is_used_offline(tmp_path: Path, repo: Path) -> None:
    with TinyHub({"owner/name": repo}) as hub:
        env = hub.environment(tmp_path)
        first = found(read(path("all.txt"), **env))
    assert found(read(path("all.txt"), **env)) == first
    lost = read(path("data/eval.csv"), **env)
    assert "Connection refused" in lost.stderr
    assert "again with HF_HUB_OFFLINE=1" in lost.stderr


@pytest.mark.slow
def test_a_glob_of_the_hub(tmp_path: Path, repo: Path) -> None:
    with TinyHub({"owner/name": repo}) as hub:
        env = hub.environment(tmp_path)
        first = found(read(path("data/train-*.csv"), "prompts.column=Prompt", **env))
        assert first["texts"] == ["a fox", "a cat", "a boat"]
        assert list(first["from"]["files"]) == ["data/train-0.csv", "data/train-1.csv"]
        assert not any("eval" in line for line in hub.asked)
    assert found(read(path("data/train-*.csv"), "prompts.column=Prompt", **{**env, "HF_HUB_OFFLINE": "1"})) == first


def test_a_member_of_a_zip_of_the_hub(tmp_path: Path, repo: Path) -> None:
    with zipfile.ZipFile(repo / "data" / "all.zip", "w") as archive:
        archive.writestr("in/p.csv", "prompt\na fox\n")
    with TinyHub({"owner/name": repo}) as hub:
        url = "prompts.path='zip://in/p.csv::hf://datasets/owner/name/data/all.zip'"
        first = found(read(url, **hub.environment(tmp_path)))
    assert first["texts"] == ["a fox"]
    assert (first["from"]["repo"], first["from"]["commit"]) == ("owner/name", COMMIT)
    assert list(first["from"]["files"]) == ["data/all.zip/in/p.csv"]


@pytest.mark.slow
def test_lost_connection_is_retried(tmp_path: Path, repo: Path) -> None:
    (repo / "all.txt").write_text("a prompt\n" * 100_000)
    with TinyHub({"owner/name": repo}) as hub:
        hub.drops.append("all.txt")
        assert len(found(read(path("all.txt"), **hub.environment(tmp_path)))["texts"]) == 100_000
        assert hub.drops == []


@pytest.mark.slow
def test_missing_hub_file_error_lists_files(tmp_path: Path, repo: Path) -> None:
    with TinyHub({"owner/name": repo}) as hub:
        env = hub.environment(tmp_path)
        for overrides, said in (
            ([path("gone.txt")], "The repository holds all.txt, data/eval.csv, data/train-0.csv, data/train-1.csv."),
            ([path("gone/*.txt")], "nothing matches gone/*.txt"),
            ([path("all.txt"), "prompts.revision=v9"], "at v9 for all.txt"),
            ([path("data/eval.csv")], "lacks the column prompt; near: Prompt; it has Prompt. Name the right one: "),
            (
                ["prompts.path=hf://datasets/owner/other/all.txt"],
                "tried the hub's dataset owner/other at its newest commit",
            ),
        ):
            done = read(*overrides, **env)
            assert done.returncode == 1
            assert "\nerror: " in f"\n{done.stderr}"
            assert said in done.stderr


@pytest.mark.slow
def test_offline_error_has_a_hint(tmp_path: Path) -> None:
    done = read(path("all.txt"), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    for part in ("tried the hub's dataset owner/name", "HF_HUB_OFFLINE=1", "copy the file", "prompts=grammar"):
        assert part in done.stderr


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "cut off": lambda path: os.truncate(path, 5),
    "altered": lambda path: path.write_bytes(b"ONE\ntwo\n"),  # as many bytes
}


def damage(path: Path, case: str) -> None:
    """Change a file, and restore its modification time."""
    stat = path.stat()
    DAMAGES[case](path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGES)
@pytest.mark.parametrize("pattern", ["all.txt", "al*.txt"])
def test_a_damaged_copy_of_a_hub_file_is_fetched_again_or_refused(
    case: str, pattern: str, tmp_path: Path, repo: Path
) -> None:
    with TinyHub({"owner/name": repo}) as hub:
        env = hub.environment(tmp_path)
        first = found(read(path(pattern), **env))
        (copy,) = (tmp_path / "hf").rglob("snapshots/*/all.txt")
        damage(copy.resolve(), case)
        offline = read(path(pattern), **{**env, "HF_HUB_OFFLINE": "1"})
        assert offline.returncode == 1
        assert f"error: {copy} is damaged (" in offline.stderr
        assert "it cannot be fetched again" in offline.stderr
        again = read(path(pattern), **env)
        assert found(again) == first
        assert f"{copy} is damaged: " in again.stderr
    assert found(read(path(pattern), **{**env, "HF_HUB_OFFLINE": "1"})) == first


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_copy_of_a_file_of_another_server_is_fetched_again_or_refused(
    case: str, tmp_path: Path, repo: Path
) -> None:
    with TinyHub({"owner/name": repo}) as hub:
        env = hub.environment(tmp_path)
        url = f"prompts.path={hub.url}/datasets/owner/name/resolve/main/all.txt"
        first = found(read(url, **env))
        (copy,) = (tmp_path / "im2emb").rglob("*-all.txt")
        damage(copy, case)
        again = read(url, **env)
        assert found(again) == first
        assert f"{copy}, the cached copy of " in again.stderr
        damage(copy, case)
    gone = read(url, **env)  # the server is
    assert gone.returncode == 1
    assert f"the copies on this machine cannot be used: {copy} is damaged: " in gone.stderr
    copy.unlink()
    assert f"cannot be used: {copy} is missing" in read(url, **env).stderr


@pytest.mark.slow
def test_a_copy_without_a_record_of_its_checksum_is_not_trusted(tmp_path: Path, repo: Path) -> None:
    """Earlier versions left copies without a checksum."""
    with TinyHub({"owner/name": repo}) as hub:
        env = hub.environment(tmp_path)
        url = f"prompts.path={hub.url}/datasets/owner/name/resolve/main/all.txt"
        first = found(read(url, **env))
        (record,) = (tmp_path / "im2emb").rglob(".*-all.txt.json")
        for content in (b"", b"{}", b'{"sha256": 1', None):
            record.unlink() if content is None else record.write_bytes(content)
            asked = len(hub.asked)
            assert found(read(url, **env)) == first
            assert any(line.startswith("GET /datasets/") for line in hub.asked[asked:])
        record.unlink()
    assert "has no record of its checksum" in read(url, **env).stderr


@pytest.mark.slow
def test_a_damaged_file_of_a_repository_is_fetched_again(tmp_path: Path, repo: Path) -> None:
    with TinyHub({"owner/name": repo}) as hub:
        script = (
            "import sys; from pathlib import Path; from datagen.prompts import download; work = Path(sys.argv[1])\n"
            "print(download.repository('owner/name', None, None).fetch('all.txt', work).read_text())"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "work")]
        for case in (None, *DAMAGES):
            if case is not None:
                damage(tmp_path / "work/all.txt", case)
            env = {**os.environ, **hub.environment(tmp_path)}
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
            assert done.stdout.split() == ["one", "two"]


def test_files_of_any_store_that_fsspec_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path))
    store = fsspec.filesystem("memory")
    store.pipe({"/prompts/b.txt": b"two\n", "/prompts/a.txt": b"one\n", "/prompts/c.csv": b"prompt\n"})
    try:
        found = download.files("memory://prompts/*.txt", None, "prompts.path")
        assert [(f.name, f.path.read_text()) for f in found.files] == [("a.txt", "one\n"), ("b.txt", "two\n")]
        store.pipe({"/prompts/x/p.txt": b"three\n", "/prompts/y/p.txt": b"four\n"})
        nested = download.files("memory://prompts/*/p.txt", None, "prompts.path")
        assert [(f.name, f.path.read_text()) for f in nested.files] == [("x/p.txt", "three\n"), ("y/p.txt", "four\n")]
        assert list(nested.facts()["files"]) == ["x/p.txt", "y/p.txt"]
        store.pipe("/prompts/a.txt", b"six\n")  # as many bytes
        download.files.cache_clear()
        assert download.files("memory://prompts/a.txt", None, "prompts.path").files[0].path.read_text() == "six\n"
        with pytest.raises(UserError, match=r"prompts\.path=memory://prompts/z\*: there is no such file"):
            download.files("memory://prompts/z*", None, "prompts.path")
    finally:
        store.rm("/prompts", recursive=True)
        download.files.cache_clear()


@pytest.mark.slow
def test_a_file_of_another_server_is_fetched_once(tmp_path: Path, repo: Path) -> None:
    with TinyHub({"owner/name": repo}) as hub:
        env = hub.environment(tmp_path)
        url = f"prompts.path={hub.url}/datasets/owner/name/resolve/main/all.txt"
        hub.drops.append("all.txt")
        first = found(read(url, **env))
        assert [t.strip() for t in first["texts"]] == ["one", "two"]
        assert list(first["from"]["files"]) == ["all.txt"]
        fetched = sum(line.startswith("GET /datasets/") for line in hub.asked)
        assert found(read(url, **env)) == first
        assert sum(line.startswith("GET /datasets/") for line in hub.asked) == fetched
        (repo / "all.txt").write_text("three, and more\n")  # it has changed there
        assert [t.strip() for t in found(read(url, **env))["texts"]] == ["three, and more"]
        missing = read(f"prompts.path={hub.url}/datasets/owner/name/resolve/main/gone.txt", **env)
        assert "there is no such file" in missing.stderr
    done = read(url, **env)  # the server is gone
    assert [t.strip() for t in found(done)["texts"]] == ["three, and more"]
    assert "using the copy in" in done.stderr
    lost = read(url, **{**env, "IM2EMB_CACHE": str(tmp_path / "empty")})
    assert "cannot be fetched" in lost.stderr
    assert "Copy the file to this machine and give prompts.path=FILE" in lost.stderr
