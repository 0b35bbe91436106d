"""Bundles to the hub and to Kaggle: by their real clients, in processes of their own, to servers on loopback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from core.errors import UserError
from core.paths import ROOT
from models.export import upload
from models.export.kaggle_metadata import dataset_metadata
from models.export.model_card import CardDetails, render_card
from tests import hub_server, kaggle_server
from tests.commands import contents
from tests.hub_server import HubServer, Repo
from tests.kaggle_server import Dataset, KaggleServer

pytestmark = pytest.mark.enable_socket
pytest_plugins = ["tests.tiny_run"]

PUSH = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from pathlib import Path
from core.errors import UserError
from models.export.upload import push
folder, address, *words = sys.argv[1:]
try:
    print(push(Path(folder), address, dry_run="earnest" not in words, public="public" in words, command="AGAIN"))
except UserError as error:
    sys.exit(f"error: {error}")
"""
SECRETS = (hub_server.TOKEN, kaggle_server.TOKEN, "LeGaCyKeY0123456789", "dXNlcjpMZUdhQ3lLZVkwMTIzNDU2Nzg5")
LEGACY = {"KAGGLE_USERNAME": "user", "KAGGLE_KEY": SECRETS[2]}
MODERN = {"KAGGLE_API_TOKEN": kaggle_server.TOKEN}
NOT_SENT = {"__pycache__/predict.cpython-311.pyc", ".env"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder with the files of a bundle, as far as publishing looks at them."""
    folder = tmp_path / "bundle"
    about = {"backbone": "test_vit", "head": "linear", "size": 160, "facts": {}}
    member = {"name": "model", "file": "model.safetensors", "weight": 1.0, "flip": False, "sizes": [160], **about}
    config = {
        "format": 2,
        "kind": "bundle",
        "encoder": "all-MiniLM-L6-v2",
        "target_width": 384,
        "precision": "fp32",
        "members": [member],
        "facts": {},
        "graphs": {"onnx": {"file": "graphs/model.onnx", "pictures": 8, "mean_distance": 0.0, "max_distance": 0.0}},
        "versions": {"torch": "2.15.0"},
    }
    files = {
        "config.json": json.dumps(config),
        "predict.py": "pass\n",
        "README.md": render_card(config, CardDetails()),
        "dataset-metadata.json": json.dumps(dataset_metadata(config, CardDetails())),
        "model.safetensors": "weights" * 1000,
        "graphs/model.onnx": "graph" * 100,
        "wheels/a-1-py3-none-any.whl": "wheel",
        "__pycache__/predict.cpython-311.pyc": "bytes",
        ".env": "A=1",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def kaggle() -> Iterator[KaggleServer]:
    pytest.importorskip("kagglesdk", reason="Kaggle's client is not installed: pip install -e '.[kaggle]'")
    with KaggleServer() as server:
        yield server


def push(tmp_path: Path, bundle: Path, address: str, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Of a user without any other token; nothing told or left anywhere holds one, and the bundle is as it was."""
    before = contents(bundle)
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir(exist_ok=True)
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(bundle), address, *words],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **places, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr]
    left = {name: data for place in ("home", "tmp") for name, data in contents(tmp_path / place).items()}
    assert not [name for name, data in left.items() for secret in SECRETS if secret.encode() in data]
    assert not list((tmp_path / "tmp").iterdir())
    assert contents(bundle) == before
    return done


def sent(bundle: Path, *besides: str) -> dict[str, bytes]:
    return {name: data for name, data in contents(bundle).items() if name not in {*NOT_SENT, *besides}}


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "address",
    [
        "bundle", "hub:x", "hub:a/b/c", "hub:/b", "hub:a/", "hub:a b/c", "hub:a/b--c", "hub:a/c.git", "gs:a/bundle",
        "kaggle:User Name/bundle", "kaggle:User/bundle", "kaggle:user/Bundle", "kaggle:user/short",
        "kaggle:user/a--bundle", f"kaggle:user/{'x' * 51}", "kaggle:bundle", "hub:https://host/a",
    ],
)  # fmt: skip
def test_invalid_address_is_refused_first(address: str, tmp_path: Path) -> None:
    assert len(upload.address_problems(address)) == 1
    with pytest.raises(UserError, match="push: "):
        upload.push(tmp_path / "nowhere", address, command="")


def test_valid_addresses() -> None:
    for address in (
        "hub:user/name",
        "hub:Some-Org/im2emb_v1.2",
        "kaggle:user/im2emb-vith14",
        "kaggle:some_user/123456",
    ):
        assert upload.address_problems(address) == []


@pytest.mark.parametrize(
    "lacking", ["config.json", "model.safetensors", "graphs/model.onnx", "README.md", "predict.py"]
)
def test_incomplete_bundle_is_refused(lacking: str, bundle: Path) -> None:
    (bundle / lacking).unlink()
    with pytest.raises(UserError, match="is not a bundle" if lacking == "config.json" else f"lacks {lacking}"):
        upload.push(bundle, "hub:user/name", command="")


def test_checkpoint_is_refused(bundle: Path) -> None:
    (bundle / "config.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="is not a bundle; only bundles are uploaded"):
        upload.push(bundle, "kaggle:user/some-bundle", command="")


def test_dry_run_logs_and_sends_nothing(tmp_path: Path, bundle: Path, hub: HubServer) -> None:
    done = push(tmp_path, bundle, "hub:user/name", **hub.environment(tmp_path))
    assert done.stdout.strip() == f"{hub.url}/user/name"
    for words in (
        "nothing is sent",
        "does not exist; it would be created, private",
        "7,000 B  model.safetensors",
        "7 files",
        "AGAIN",
    ):
        assert words in done.stderr
    assert not [name for name in NOT_SENT if name in done.stderr]
    assert [line for line in hub.asked if not line.startswith("GET ")] == ["POST /api/validate-yaml"]
    assert hub.repos == {}


@pytest.mark.slow
def test_dry_run_without_token_stays_offline(tmp_path: Path, bundle: Path, hub: HubServer) -> None:
    env = hub.environment(tmp_path) | {"HF_TOKEN": ""}
    done = push(tmp_path, bundle, "hub:user/name", "public", **env)
    assert done.returncode == 0
    assert "unknown whether it exists: no token of the hub: run hf auth login" in done.stderr
    assert "public; unknown whether" in done.stderr
    assert "error: no token of the hub: run hf auth login" in refused(
        push(tmp_path, bundle, "hub:user/name", "earnest", **env)
    )
    assert hub.asked == []


@pytest.mark.parametrize("visibility", ["private", "public"])
def test_hub_upload_is_one_commit(visibility: str, tmp_path: Path, bundle: Path, hub: HubServer) -> None:
    done = push(tmp_path, bundle, "hub:team/name", "earnest", visibility, **hub.environment(tmp_path))
    assert done.returncode == 0, done.stderr
    repo = hub.repos["team/name"]
    assert repo.private == (visibility == "private")
    assert repo.commits == ["im2emb bundle"]
    assert {name: data for name, data in repo.files.items() if name != ".gitattributes"} == sent(bundle)
    assert f"{hub.url}/team/name, commit {repo.sha}, {visibility}" in done.stderr


@pytest.mark.slow
def test_new_bundle_replaces_the_old_one(tmp_path: Path, bundle: Path, hub: HubServer) -> None:
    env = hub.environment(tmp_path)
    push(tmp_path, bundle, "hub:user/name", "earnest", **env)
    repo = hub.repos["user/name"]
    repo.files |= {"picture.jpg": b"the user's", "model-old.safetensors": b"stale", "wheels/old.whl": b"stale"}
    shutil.rmtree(bundle / "graphs")
    config = json.loads((bundle / "config.json").read_text()) | {"graphs": {}}
    (bundle / "config.json").write_text(json.dumps(config))
    dry = push(tmp_path, bundle, "hub:user/name", **env)
    for name in ("model-old.safetensors", "wheels/old.whl", "graphs/model.onnx"):
        assert f"removed  {name}\n" in dry.stderr
    assert "exists, private" in dry.stderr
    assert len(repo.commits) == 1
    assert push(tmp_path, bundle, "hub:user/name", "earnest", **env).returncode == 0
    assert len(repo.commits) == 2
    assert repo.files == {**sent(bundle), "picture.jpg": b"the user's", ".gitattributes": repo.files[".gitattributes"]}


@pytest.mark.slow
def test_other_repositories_are_not_overwritten(tmp_path: Path, bundle: Path, hub: HubServer) -> None:
    env = hub.environment(tmp_path)
    hub.repos["user/bert"] = Repo(private=True, files={"config.json": b"{}", "model.safetensors": b"months of work"})
    hub.repos["user/shown"] = Repo(private=False)
    hub.repos["user/hidden"] = Repo(private=True)
    told = refused(push(tmp_path, bundle, "hub:user/bert", "earnest", **env))
    assert "hub:user/bert holds something that is not a bundle (config.json, model.safetensors)" in told
    assert "is public, so the upload would be public; set public=true" in refused(
        push(tmp_path, bundle, "hub:user/shown", "earnest", **env)
    )
    assert "is private; make it public in the settings of its page" in refused(
        push(tmp_path, bundle, "hub:user/hidden", "earnest", "public", **env)
    )
    assert not [line for line in hub.asked if line.startswith(("POST", "PUT"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("GET /api/whoami-v2", 401, "the hub does not accept the token (401); no token of the hub: run hf auth login"),
        ("POST /api/repos/create", 403, "the token has no permission (403): 403 Forbidden"),
        ("POST /api/repos/create", 409, "was changed by another upload (409)"),
        ("POST /api/models/user/name/commit", 404, "not found (404); does the user or organisation user exist?"),
        ("POST /api/models/user/name/commit", 412, "was changed by another upload (412); run it again"),
        ("POST /api/models/user/name/commit", 500, "the hub cannot be reached, or fails: HfHubHTTPError"),
        ("POST /api/validate-yaml", 400, "the hub refuses the card: no: … (the licence is set by licence=…)"),
        ("POST /api/validate-yaml", 500, "the hub cannot be reached, or fails: HfHubHTTPError"),
    ],
)
def test_hub_errors_are_explained(
    fault: str, status: int, words: str, tmp_path: Path, bundle: Path, hub: HubServer
) -> None:
    said = f"no: {hub_server.TOKEN}"  # a server that repeats what it should not
    hub.faults[fault] = (status, {"error": said, "errors": [{"message": said}]}, {"X-Error-Message": said})
    assert words in refused(push(tmp_path, bundle, "hub:user/name", "earnest", **hub.environment(tmp_path)))
    assert not [repo for repo in hub.repos.values() if repo.commits]
    assert not hub.repos or "commit" in fault, "an empty repository is left"


@pytest.mark.slow
def test_refused_card_creates_no_repository(tmp_path: Path, bundle: Path, hub: HubServer) -> None:
    card_text = (bundle / "README.md").read_text()
    for text, words in (
        (card_text.replace('license: "other"', 'license: "apache-2"'), 'the hub refuses the card: "license" must be'),
        (card_text.replace('license: "other"', 'license: ["other"'), "the hub refuses the card: while parsing"),
    ):
        (bundle / "README.md").write_text(text)
        for word in ("dry", "earnest"):
            assert words in refused(push(tmp_path, bundle, "hub:user/name", word, **hub.environment(tmp_path)))
    assert hub.repos == {}


@pytest.mark.slow
def test_export_command_uploads(tiny_run: Path, tmp_path: Path, hub: HubServer) -> None:
    """The dry run's own line, as a shell takes it."""
    env = {**os.environ, **hub.environment(tmp_path), "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    words = [f"checkpoint={tiny_run / 'best'}", f"out={tmp_path / 'a bundle'}", "push=hub:user/name"]
    words += ["licence=apache-2.0", "title='Images, to sentences (tiny)'", "author=Somebody Else"]
    command = ["python", "-m", "models.export", *words]
    dry = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert dry.returncode == 0, dry.stderr
    assert hub.repos == {}
    (line,) = [line for line in (dry.stdout + dry.stderr).splitlines() if "to upload: " in line]
    done = subprocess.run(
        line.partition("to upload: ")[2], shell=True, cwd=ROOT, env=env, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    repo = hub.repos["user/name"]
    assert repo.private
    assert {name: data for name, data in repo.files.items() if name != ".gitattributes"} == contents(
        tmp_path / "a bundle"
    )
    readme = repo.files["README.md"].decode()
    assert ModelCard(readme).data.to_dict()["license"] == "apache-2.0"
    for words_there in ("# Images, to sentences (tiny)\n", "By Somebody Else.", "Weights: apache-2.0."):
        assert words_there in readme
    assert hub_server.TOKEN not in dry.stdout + dry.stderr + done.stdout + done.stderr


@pytest.mark.slow
def test_write_access_is_checked(tmp_path: Path, bundle: Path, hub: HubServer) -> None:
    env = hub.environment(tmp_path)
    assert "the token of user can write only for user, team" in refused(push(tmp_path, bundle, "hub:other/name", **env))
    hub.role = "read"
    assert "the token of user is read-only" in refused(push(tmp_path, bundle, "hub:user/name", "earnest", **env))


@pytest.mark.slow
def test_unreachable_hub(tmp_path: Path, bundle: Path) -> None:
    with HubServer() as gone:
        env = gone.environment(tmp_path)
    dry = push(tmp_path, bundle, "hub:user/name", **env)
    assert "unknown whether it exists: the hub cannot be reached, or fails: ConnectError" in dry.stderr
    assert "error: the hub cannot be reached" in refused(push(tmp_path, bundle, "hub:user/name", "earnest", **env))
    offline = push(tmp_path, bundle, "hub:user/name", "earnest", **env | {"HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE is set; unset it" in refused(offline)


@pytest.mark.slow
@pytest.mark.parametrize("token", [LEGACY, MODERN], ids=["key", "token"])
def test_kaggle_upload_creates_a_dataset_and_then_a_version(
    token: dict[str, str], tmp_path: Path, bundle: Path, kaggle: KaggleServer
) -> None:
    env = {**kaggle.environment(), **token, "VERBOSE": "1"}  # which prints each request with its headers
    dry = push(tmp_path, bundle, "kaggle:user/some-bundle", **env)
    assert "does not exist" in dry.stderr
    assert kaggle.datasets == {}
    assert not [line for line in kaggle.asked if "Blob" in line]
    done = push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "https://www.kaggle.com/datasets/user/some-bundle"
    assert "keywords unknown to Kaggle are ignored: deep learning" in done.stderr
    made = kaggle.datasets["user/some-bundle"]
    assert made.private
    assert made.versions == [sent(bundle, "dataset-metadata.json")]
    assert made.about["title"] == "Image to all-MiniLM-L6-v2, test_vit"
    assert made.about["licenseName"] == "other"
    made.page |= {"collaborators": [{"username": "other", "role": "WRITER"}], "userSpecifiedSources": "a book"}
    (bundle / "model.safetensors").write_text("better")
    metadata = json.loads((bundle / "dataset-metadata.json").read_text())
    metadata |= {"title": "A better title", "licenses": [{"name": "apache-2.0"}]}
    (bundle / "dataset-metadata.json").write_text(json.dumps(metadata))
    assert "exists, private" in push(tmp_path, bundle, "kaggle:user/some-bundle", **env).stderr
    done = push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **env)
    assert done.returncode == 0, done.stderr
    assert "title and licence of the page are unchanged" not in done.stderr
    assert made.versions[1:] == [sent(bundle, "dataset-metadata.json")]
    assert made.private, "the client's own default is public"
    assert (made.page["title"], made.page["licenses"]) == ("A better title", [{"name": "apache-2.0"}])
    assert made.page["collaborators"] == [{"username": "other", "role": "WRITER"}]
    assert made.page["userSpecifiedSources"] == "a book"
    updates = [line for line in kaggle.asked if "UpdateDatasetMetadata" in line]
    assert push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **env).returncode == 0
    assert [line for line in kaggle.asked if "UpdateDatasetMetadata" in line] == updates, "nothing differs"
    bearer = {f"Bearer {kaggle_server.TOKEN}"}
    assert kaggle.authorizations == (bearer if token is MODERN else {f"Basic {SECRETS[3]}"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", [(200, {"errors": [f"not {SECRETS[2]}"]}), (403, {"code": 403, "message": f"no {SECRETS[2]}"})]
)
def test_title_that_kaggle_keeps_is_logged(
    answer: tuple[int, Any], tmp_path: Path, bundle: Path, kaggle: KaggleServer
) -> None:
    env = {**kaggle.environment(), **LEGACY}
    push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **env)
    kaggle.datasets["user/some-bundle"].page["title"] = "Renamed by hand"
    kaggle.faults["POST /api/v1/datasets.DatasetApiService/UpdateDatasetMetadata"] = (*answer, {})
    done = push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **env)
    assert done.returncode == 0
    assert "title and licence of the page are unchanged; set them to 'Image to all-MiniLM-L6-v2, test_vit' and oth" in (
        done.stderr
    )
    assert "at https://www.kaggle.com/datasets/user/some-bundle/settings: " in done.stderr
    assert len(kaggle.datasets["user/some-bundle"].versions) == 2


@pytest.mark.slow
def test_dataset_that_became_public_stops_the_upload(tmp_path: Path, bundle: Path, kaggle: KaggleServer) -> None:
    env = {**kaggle.environment(), **LEGACY}
    push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **env)
    made = kaggle.datasets["user/some-bundle"]
    made.page["title"] = "Renamed by hand"
    kaggle.opens = True
    told = refused(push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **env))
    assert "kaggle:user/some-bundle has become public; make it private at https://www.kaggle.com/" in told
    assert len(made.versions) == 1


def test_public_kaggle_dataset(tmp_path: Path, bundle: Path, kaggle: KaggleServer) -> None:
    env = {**kaggle.environment(), **LEGACY}
    assert push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", "public", **env).returncode == 0
    assert not kaggle.datasets["user/some-bundle"].private
    assert "is public, so the upload would be public" in refused(
        push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **env)
    )


@pytest.mark.slow
def test_invalid_kaggle_token(tmp_path: Path, bundle: Path, kaggle: KaggleServer) -> None:
    env = kaggle.environment()
    dry = push(tmp_path, bundle, "kaggle:user/some-bundle", **env)
    assert "exists: no valid token of Kaggle: run kaggle auth login" in dry.stderr
    assert kaggle.asked == []
    kaggle.accepts = "another"
    told = refused(push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **env, **MODERN))
    assert "error: no valid token of Kaggle" in told


def test_other_kaggle_datasets_are_not_overwritten(tmp_path: Path, bundle: Path, kaggle: KaggleServer) -> None:
    kaggle.datasets["user/some-bundle"] = Dataset(True, {}, {}, [{"train.csv": b"", "test.csv": b""}])
    told = refused(push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **kaggle.environment(), **LEGACY))
    assert "holds something that is not a bundle (test.csv, train.csv)" in told


@pytest.mark.slow
def test_failed_file_creates_no_kaggle_version(tmp_path: Path, bundle: Path, kaggle: KaggleServer) -> None:
    kaggle.faults["PUT /upload/2"] = (400, {}, {})
    told = refused(push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **kaggle.environment(), **LEGACY))
    assert "1 of its uploads failed" in told
    assert kaggle.datasets == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "answer", "words"),
    [
        ("GetDataset", (401, {"code": 401, "message": "no"}), "Kaggle does not accept the token (401)"),
        (
            "CreateDataset",
            (403, {"code": 403, "message": f"no {SECRETS[2]}"}),
            "the token has no permission (403): no …",
        ),
        (
            "CreateDataset",
            (200, {"status": "error", "error": "The title is in use"}),
            "refuses the upload: The title is in use",
        ),
    ],
)
def test_kaggle_errors_are_explained(
    fault: str, answer: tuple[int, Any], words: str, tmp_path: Path, bundle: Path, kaggle: KaggleServer
) -> None:
    kaggle.faults[f"POST /api/v1/datasets.DatasetApiService/{fault}"] = (*answer, {})
    env = {**kaggle.environment(), **LEGACY}
    assert words in refused(push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **env))
    assert kaggle.datasets == {}


def test_invalid_metadata_is_refused(bundle: Path) -> None:
    path = bundle / "dataset-metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"title": "Short", "subtitle": "Too short"}))
    with pytest.raises(UserError, match=r"title: 'Short' has 5 .*\n.*subtitle: 'Too short' has 9"):
        upload.push(bundle, "kaggle:user/some-bundle", command="")


@pytest.mark.slow
@pytest.mark.parametrize("token", [LEGACY, MODERN], ids=["key", "token"])
def test_unreachable_kaggle(token: dict[str, str], tmp_path: Path, bundle: Path) -> None:
    pytest.importorskip("kagglesdk", reason="Kaggle's client is not installed: pip install -e '.[kaggle]'")
    with KaggleServer() as gone:
        env = {**gone.environment(), **token}
    dry = push(tmp_path, bundle, "kaggle:user/some-bundle", **env)
    assert "unknown whether it exists: Kaggle cannot be reached, or fails: ProxyError" in dry.stderr
    told = refused(push(tmp_path, bundle, "kaggle:user/some-bundle", "earnest", **env))
    assert "error: Kaggle cannot be reached, or fails" in told
