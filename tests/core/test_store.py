"""Datasets on an S3 server (moto on loopback), through broken connections, with every kind of refusal."""

import errno
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import boto3
import numpy as np
import pytest
from botocore.exceptions import EndpointConnectionError
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from core import retry, store
from core.cli import compose
from core.errors import UserError
from core.files import remove_parts, write_atomically, write_json
from core.paths import ROOT, Location
from core.settings import settings
from core.store import Files
from datagen.dataset import reader
from datagen.dataset.reader import (
    Dataset,
    is_committed,
    is_dataset,
    list_encoders,
    list_folder,
    missing_shards,
    read_encoder,
    read_info,
)
from datagen.verify.verify import verify
from tests import small_dataset, training
from tests.broken_line import Line
from tests.commands import BARE, contents, make, run

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

TAR = "GET /.*000001.tar"


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of an S3 server; credentials as a user's environment holds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own tries; s3fs has five, and then come ours
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        yield server.get_host_and_port()[1]
        server.stop()


class Client:
    """boto3's view of one bucket: what lies there, whatever we think."""

    def __init__(self, port: int, bucket: str) -> None:
        self._s3: Any = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        self.bucket = bucket
        self._s3.create_bucket(Bucket=bucket)

    def contents(self, prefix: str = "data") -> dict[str, bytes]:
        """Every object below the prefix."""
        actual = self._s3.list_objects_v2(Bucket=self.bucket, Prefix=f"{prefix}/").get("Contents", [])
        names = [o["Key"] for o in actual]
        return {name.removeprefix(f"{prefix}/"): self.get(name) for name in names}

    def get(self, key: str) -> bytes:
        return self._s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def put(self, key: str, data: bytes) -> None:
        self._s3.put_object(Bucket=self.bucket, Key=key, Body=data)

    def upload(self, folder: Path) -> None:
        for name, data in contents(folder).items():
            self.put(f"data/{name}", data)

    def remove(self, key: str) -> None:
        self._s3.delete_object(Bucket=self.bucket, Key=key)

    def deny(self, *actions: str, what: str = "*") -> None:
        objects = f"arn:aws:s3:::{self.bucket}/{what}"
        rule = {"Effect": "Deny", "Principal": "*", "Action": list(actions), "Resource": objects}
        policy = {"Version": "2012-10-17", "Statement": [rule]}
        self._s3.put_bucket_policy(Bucket=self.bucket, Policy=json.dumps(policy))


@pytest.fixture
def line(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """The way to the server of this process and those it starts; an empty cache; no long waits."""
    server_line = Line(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server_line.port}")
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retry, "_STORE_WAITS_S", (0.01, 0.01, 0.01, 0.01))
    S3FileSystem.clear_instance_cache()
    yield server_line
    server_line.close()
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def client(server: int) -> Client:
    return Client(server, f"b{uuid4().hex}")


@pytest.fixture
def root(line: Line, client: Client) -> Location:
    """Folder or URL for a dataset."""
    assert line.port
    return Location(f"s3://{client.bucket}/data")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 12 validation images in three shards, on this machine; some 30 kB a tar."""
    return small_dataset.write(tmp_path_factory.mktemp("here") / "data")


@pytest.fixture
def uploaded(here: Path, root: Location, client: Client) -> Location:
    client.upload(here)
    return root


def read_all(dataset: Dataset) -> list[tuple[bytes, float]]:
    return [(dataset.image_bytes(i), float(dataset.target(i).sum())) for i in range(len(dataset))]


def cached(tmp_path: Path, suffix: str = "tar") -> list[Path]:
    return sorted((tmp_path / "cache").rglob(f"*.{suffix}"))


# Writing and reading


@pytest.mark.slow
def test_datagen_writes_same_bytes_to_url_and_folder(
    root: Location, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a URL's log goes
    make(tmp_path / "local/data", *BARE)
    make(root, *BARE)
    written = client.contents()
    assert written == contents(tmp_path / "local/data")
    make(root, *BARE)
    assert client.contents() == written
    done = run("datagen.verify", f"out={root}")
    assert done.returncode == 0, done.stderr
    assert f"{root}: 0 problems" in done.stderr
    assert f"no target vectors yet: python -m datagen.targets out={root}" in done.stderr


@pytest.mark.slow
def test_writers_write_same_bytes_to_url_and_folder(here: Path, root: Location, client: Client) -> None:
    small_dataset.write(root)
    assert client.contents() == contents(here)
    assert missing_shards(root, read_info(root)) == []
    assert list_encoders(root) == [small_dataset.ENCODER]
    assert read_encoder(root, small_dataset.ENCODER)["width"] == small_dataset.WIDTH
    with pytest.raises(UserError, match=r"no vectors of other; write them: python -m datagen\.targets out=s3://"):
        read_encoder(root, "other")
    assert verify(root) == []


def test_remote_dataset_reads_like_local_one(here: Path, uploaded: Location) -> None:
    ours, theirs = Dataset(here, small_dataset.ENCODER), Dataset(str(uploaded), small_dataset.ENCODER)
    assert read_all(theirs) == read_all(ours)
    assert [theirs.prompts(i) for i in range(len(theirs))] == [ours.prompts(i) for i in range(len(ours))]
    assert theirs.fingerprint() == ours.fingerprint()
    assert theirs.splits == {"train": 40, "val": 12}


def test_a_second_reader_fetches_nothing(uploaded: Location, line: Line) -> None:
    first = read_all(Dataset(uploaded, small_dataset.ENCODER))
    line.requests.clear()
    assert read_all(Dataset(uploaded, small_dataset.ENCODER)) == first
    assert [r for r in line.requests if "list-type" not in r] == []


@pytest.mark.slow
def test_workers_read_what_their_parent_reads(here: Path, uploaded: Location, line: Line) -> None:
    dataset, ours = Dataset(uploaded, small_dataset.ENCODER), Dataset(here, small_dataset.ENCODER)
    line.requests.clear()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        actual = pool.map(dataset.image_bytes, range(52), chunksize=13)
    assert actual == [ours.image_bytes(i) for i in range(52)]
    assert not [r for r in line.requests if "list-type" in r]  # they have their parent's listing


@pytest.mark.slow
def test_few_images_are_read_by_ranges(here: Path, uploaded: Location, tmp_path: Path) -> None:
    assert read_all(Dataset(uploaded, small_dataset.ENCODER, whole=False)) == read_all(
        Dataset(here, small_dataset.ENCODER)
    )
    assert cached(tmp_path) == []


@pytest.mark.slow
def test_full_cache_falls_back_to_ranges_and_logs(
    here: Path, uploaded: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    need = sum((here / f"shards/{n:06d}.tar").stat().st_size for n in range(3))
    monkeypatch.setattr(reader, "free_bytes", lambda _: need - 1)
    dataset = Dataset(uploaded, small_dataset.ENCODER)
    assert read_all(dataset) == read_all(Dataset(here, small_dataset.ENCODER))
    assert cached(tmp_path) == []
    (said,) = [m for m in caplog.messages if "do not fit into the cache" in m]
    assert said.startswith(f"{uploaded}: 0.00 GB in 3 tars do not fit into the cache {tmp_path / 'cache'}, which has ")
    assert said.endswith("read from the store one by one, which is slower. Set IM2EMB_CACHE to a larger folder")
    monkeypatch.setattr(reader, "free_bytes", lambda _: need)
    Dataset(uploaded).image_bytes(0)
    assert len(cached(tmp_path)) == 1


@pytest.mark.slow
def test_a_listing_shows_what_another_process_wrote(uploaded: Location, client: Client, line: Line) -> None:
    info = read_info(uploaded)
    index = client.get("data/shards/000001.parquet")
    client.remove("data/shards/000001.parquet")
    line.requests.clear()
    assert missing_shards(uploaded, info) == [1]
    assert len(line.requests) == 1
    assert not is_committed(uploaded, 1)
    client.put("data/shards/000001.parquet", index)
    assert is_committed(uploaded, 1)
    assert missing_shards(uploaded, info) == []
    assert "targets" in list_folder(uploaded)
    assert list_folder(uploaded / "nowhere") == []


@pytest.mark.slow
def test_rewritten_file_is_not_read_from_stale_copy(uploaded: Location, client: Client, tmp_path: Path) -> None:
    old = read_all(Dataset(uploaded, small_dataset.ENCODER))
    other = small_dataset.write(tmp_path / "other", seed=1)
    client.upload(other)
    new = read_all(Dataset(uploaded, small_dataset.ENCODER))
    assert new == read_all(Dataset(other, small_dataset.ENCODER)) != old
    assert len(cached(tmp_path)) == 3  # the old copies are gone


def test_file_url_is_a_local_folder(here: Path) -> None:
    dataset = Dataset(f"file://{here}", small_dataset.ENCODER)
    assert dataset.root == here
    assert read_all(dataset) == read_all(Dataset(here, small_dataset.ENCODER))


def test_all_fsspec_file_systems(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IM2EMB_CACHE", str(tmp_path / "cache"))
    root = small_dataset.write(Location(f"memory://{uuid4().hex}/data"))
    assert {name: root.joinpath(name).read_bytes() for name in contents(here)} == contents(here)
    assert read_all(Dataset(root, small_dataset.ENCODER)) == read_all(Dataset(here, small_dataset.ENCODER))


# Connections that break


@pytest.mark.slow
def test_training_reads_through_broken_connections(
    here: Path, root: Location, client: Client, line: Line, tmp_path: Path
) -> None:
    """Written through connections that break, read back by `python -m train` through others, and judged."""
    from train.config import EvaluateSettings
    from train.evaluate.evaluate import evaluate

    line.cut(r"PUT /.*000000.tar", after=9_000, times=7)  # more often than s3fs tries
    line.cut(r"PUT /.*000001.parquet", after=0, times=2)
    small_dataset.write(root)
    assert line.broken == 9
    assert client.contents() == contents(here)
    line.cut(TAR, after=9_000, times=7)
    line.cut(r"GET /.*dataset.json", after=0, times=2)
    assert training.train(here, tmp_path / "local") == 0
    done = run("train", f"dataset={root}", f"out={tmp_path / 'remote'}", *training.OVERRIDES)
    assert done.returncode == 0, done.stderr
    assert line.broken == 18
    assert training.same_weights(tmp_path / "remote/last", tmp_path / "local/last")
    assert not (tmp_path / "remote/skipped.jsonl").exists()
    told, ours = (json.loads((tmp_path / run / "settings.json").read_text()) for run in ("remote", "local"))
    assert told["dataset"] == [str(root)]
    assert told["dataset_sha256"] == ours["dataset_sha256"]
    judge = [f"run={tmp_path / 'remote'}", "embedders=[regressor]", "accelerator=cpu", "workers=0"]
    info = evaluate(settings(EvaluateSettings, compose("evaluate", judge)))
    assert (info["datasets"][0]["path"], info["images"], info["skipped"]) == (str(root), 12, [])


@pytest.mark.slow
def test_large_download_retries_only_broken_blocks(
    root: Location, client: Client, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_BLOCK", 10_000)
    data = np.random.default_rng(0).bytes(205_000)
    client.put("data/large.tar", data)
    line.cut("GET /.*large.tar", after=4_000, times=9)
    assert Files(root).path("large.tar").read_bytes() == data
    assert line.broken == 9
    asked = [r for r in line.requests if "large.tar" in r and r.startswith("GET")]
    assert 21 + 9 <= len(asked) < 21 + 9 + 8 * 3


@pytest.mark.slow
def test_unreachable_store_is_reported(uploaded: Location, line: Line, caplog: pytest.LogCaptureFixture) -> None:
    """An outage is not treated as a corrupt image, which would be skipped silently."""
    dataset = Dataset(uploaded)
    one_by_one = Dataset(uploaded, whole=False)
    line.close()
    for opened in (dataset, one_by_one):
        with pytest.raises(UserError, match=r"(?s)cannot read s3://.*000001.tar, tried 5 times: .*Check the network"):
            opened.image_bytes(20)
    assert sum("trying again in 0.01 s" in message for message in caplog.messages) == 8
    for work in (
        lambda: is_committed(uploaded, 0),
        lambda: missing_shards(uploaded, {"shards": 3}),
        lambda: write_json(uploaded / "a.json", {}),
        lambda: Dataset(uploaded),
    ):
        with pytest.raises(UserError, match=r"cannot (look for|list|write) s3://.*, tried 5 times: "):
            work()


@pytest.mark.slow
def test_a_worker_that_cannot_read_ends_the_run_with_the_reason(
    uploaded: Location, client: Client, tmp_path: Path
) -> None:
    client.deny("s3:GetObject", what="data/shards/*.tar")
    done = run("train", f"dataset={uploaded}", f"out={tmp_path / 'run'}", *training.OVERRIDES, "scale.workers=1")
    assert done.returncode == 2
    assert re.search(rf"\nerror: cannot read {uploaded}/shards/00000\d.tar: Forbidden\nCheck the URL", done.stderr)
    assert "Traceback" not in done.stderr


def test_file_changed_while_in_use(uploaded: Location, client: Client) -> None:
    dataset = Dataset(uploaded)
    tar = client.get("data/shards/000001.tar")
    client.put("data/shards/000001.tar", tar[:-1] + b"x")
    with pytest.raises(UserError, match=r"000001\.tar was changed or removed while it was in use; run the same"):
        dataset.image_bytes(20)
    client.remove("data/shards/000002.tar")
    with pytest.raises(UserError, match=r"000002\.tar was changed or removed"):
        dataset.image_bytes(50)


def fault(error: Exception) -> list[float]:
    """Raise the error twice, then work."""
    calls: list[float] = []

    def work() -> list[float]:
        calls.append(1)
        if len(calls) < 3:
            raise error
        return calls

    return retry.retry_store("cannot read s3://b/x", work)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError("slow"),
        OSError(errno.EBUSY, "Slow Down"),
        EndpointConnectionError(endpoint_url="http://x"),
        aiohttp.ClientPayloadError("not enough data"),
    ],
)
def test_transient_error_is_retried(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retry, "_STORE_WAITS_S", (0.0, 0.0, 0.0))
    assert len(fault(error)) == 3
    assert len([m for m in caplog.messages if m.startswith("cannot read s3://b/x: ")]) == 2


def test_programming_error_is_not_retried() -> None:
    with pytest.raises(TypeError, match="ours"):
        fault(TypeError("ours"))


# Refusals


@pytest.mark.slow
def test_permission_error_is_reported(uploaded: Location, client: Client, line: Line) -> None:
    dataset = Dataset(uploaded)
    client.deny("s3:PutObject", "s3:GetObject")
    line.requests.clear()
    with pytest.raises(UserError, match=r"(?s)cannot write s3://.*/a\.json: Forbidden\n.*credentials and rights"):
        write_json(uploaded / "a.json", {})
    assert len(line.requests) == 1  # no second try
    with pytest.raises(UserError, match=r"(?s)cannot read s3://.*000000\.tar: Forbidden\n.*credentials"):
        dataset.image_bytes(0)


@pytest.mark.usefixtures("line")
def test_missing_bucket_is_reported() -> None:
    root = Location("s3://nobody-made-this/data")
    with pytest.raises(UserError, match=r"s3://nobody-made-this.*: The specified bucket does not exist; check the URL"):
        Dataset(root)
    with pytest.raises(UserError, match=r"cannot write s3://nobody.*The specified bucket does not exist; make the bu"):
        write_json(root / "a.json", {})
    with pytest.raises(UserError, match="bucket does not exist"):
        is_dataset(root)


def test_missing_remote_dataset_is_reported(root: Location) -> None:
    assert not is_dataset(root)
    with pytest.raises(UserError, match=r"no dataset at s3://.*/data: dataset\.json is missing\. Create one"):
        Dataset(root)


def test_missing_credentials_are_reported(uploaded: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"(?s)cannot list s3://.*Unable to locate credentials\nCheck the URL, and"):
        Dataset(Location(str(uploaded)))


def test_unknown_protocol_is_refused() -> None:
    with pytest.raises(UserError, match=r"nope://x/y: .*nope.*; give a local path, or s3://, gs:// or hf://"):
        Dataset("nope://x/y")


def test_protocol_with_missing_package() -> None:
    packages = {"gs": "gcsfs", "abfs": "adlfs", "oci": "ocifs", "oss": "ossfs"}
    protocol, package = next((p, m) for p, m in packages.items() if find_spec(m) is None)
    with pytest.raises(UserError, match=rf"{protocol}://bucket/data: .*: pip install {package}"):
        Dataset(f"{protocol}://bucket/data")


@pytest.mark.slow
def test_truncated_missing_or_foreign_tar(uploaded: Location, client: Client) -> None:
    tars = {name: data for name, data in client.contents().items() if name.endswith(".tar")}
    client.put("data/shards/000000.tar", tars["shards/000000.tar"][:5000])
    client.remove("data/shards/000001.tar")
    with pytest.raises(UserError) as error:
        Dataset(uploaded)
    assert "000000.tar is truncated: 5000 bytes, the index needs" in str(error.value)
    assert "000001.tar is missing; copy it again, or remove s3://" in str(error.value)
    client.put("data/shards/000001.tar", tars["shards/000000.tar"])
    longer = bytes(1024) + tars["shards/000000.tar"]
    client.put("data/shards/000000.tar", longer)
    for whole in (True, False):
        with pytest.raises(UserError, match=r"000000\.tar does not match its index: no 000000 at 512; copy it again"):
            Dataset(uploaded, whole=whole).image_bytes(0)


def test_flipped_byte_is_detected(uploaded: Location, client: Client) -> None:
    dataset = Dataset(uploaded)
    place = int(dataset._offsets[25]) + int(dataset._sizes[25]) // 2
    tar = bytearray(client.get("data/shards/000001.tar"))
    tar[place] ^= 1
    client.put("data/shards/000001.tar", bytes(tar))
    (problem,) = verify(uploaded)
    assert problem.startswith(f"000025: {uploaded}/shards/000001.tar at {dataset._offsets[25]}: crc32 ")


COPY_DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["tar", "parquet", "npy"])
@pytest.mark.parametrize("case", COPY_DAMAGES)
def test_a_damaged_copy_in_the_cache_is_fetched_again(
    case: str, suffix: str, uploaded: Location, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = read_all(Dataset(uploaded, small_dataset.ENCODER))
    copy = cached(tmp_path, suffix)[-1]
    whole = copy.read_bytes()
    COPY_DAMAGES[case](copy)
    assert read_all(Dataset(uploaded, small_dataset.ENCODER)) == first
    (said,) = [m for m in caplog.messages if "is damaged" in m]
    assert said.startswith(f"{copy}, the cached copy of {uploaded}/")
    assert copy.read_bytes() == whole


@pytest.mark.slow
def test_a_copy_without_its_record_is_fetched_again(uploaded: Location, tmp_path: Path) -> None:
    first = read_all(Dataset(uploaded, small_dataset.ENCODER))
    for copy in cached(tmp_path):
        copy.with_name(f".{copy.name}.json").unlink()
        copy.write_bytes(bytes(copy.stat().st_size))
    store._whole_copies.clear()  # as another process has it
    assert read_all(Dataset(uploaded, small_dataset.ENCODER)) == first


@pytest.mark.slow
def test_large_copy_is_hashed_if_changed_or_requested(uploaded: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_HASHED_ALWAYS", 0)
    files = store.Files(uploaded)
    copy = files.path("shards/000000.tar")
    whole, stat = copy.read_bytes(), copy.stat()
    copy.write_bytes(bytes(len(whole)))
    store._whole_copies.clear()
    assert files.path("shards/000000.tar").read_bytes() == whole
    stat = copy.stat()
    copy.write_bytes(bytes(len(whole)))
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    store._whole_copies.clear()
    assert files.path("shards/000000.tar").read_bytes() == bytes(len(whole))
    store._whole_copies.clear()
    assert store.Files(uploaded, hash_all=True).path("shards/000000.tar").read_bytes() == whole


# Killed, or without room


WRITER = """
import sys, time
from core.paths import Location
from tests import small_dataset

real = small_dataset.image
def slow(text, size):
    time.sleep(0.01)
    return real(text, size)
small_dataset.image = slow
small_dataset.write(Location(sys.argv[1]))
"""


def test_killed_writer_commits_no_partial_shard(
    here: Path, root: Location, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(root)], cwd=ROOT)
    while "shards/000000.parquet" not in client.contents():
        assert process.poll() is None
        time.sleep(0.02)
    while not (parts := list((tmp_path / "tmp").iterdir())):
        assert process.poll() is None
    process.kill()
    process.wait()
    ours, theirs = contents(here), client.contents()
    assert {"dataset.json", "shards/000000.parquet"} <= theirs.keys() < ours.keys()
    assert all(ours[name] == data for name, data in theirs.items())
    remove_parts(root)
    assert not any(part.exists() for part in parts)
    small_dataset.write(root)
    assert client.contents() == ours


def test_temporary_files_being_written_remain(tmp_path: Path) -> None:
    (tmp_path / ".other.part-1").write_bytes(b"left by a kill")

    def write(file: Any) -> None:
        file.write(b"whole")
        remove_parts(tmp_path)

    write_atomically(tmp_path / "a", write)
    assert contents(tmp_path) == {"a": b"whole"}


FULL = """
import resource, sys
from core import store
from core.errors import UserError
from core.files import write_atomically
from core.paths import Location

resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
root = Location("memory://data")
try:
    write_atomically(root / "a", lambda file: file.write(bytes(100_000)))
except UserError as error:
    print(error)
root.joinpath("b").write_bytes(bytes(100_000))
try:
    store.Files(root).path("b")
except UserError as error:
    print(error)
print(store.Files(root).names())
"""


def test_full_disk_for_upload_or_download(tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path), "IM2EMB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", FULL], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    write, read, names = done.stdout.splitlines()
    told = f"cannot write memory://data/a: it is built in {tmp_path}, and there: File too large. Nothing half-written "
    assert write.startswith(told)
    assert "File too large. Nothing half-written is left: make room, or name another folder by IM2EMB_CACHE" in read
    assert names == "['b']"
    assert contents(tmp_path) == {}
