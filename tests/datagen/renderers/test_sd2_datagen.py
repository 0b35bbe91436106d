"""`python -m datagen` with a tiny Stable Diffusion 2 of the real classes: plan, batches, kills, Ray, faults."""

import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from core.cli import compose
from core.errors import UserError
from core.settings import settings
from datagen.config import DatagenSettings
from datagen.dataset.reader import Dataset
from datagen.engine import runner
from datagen.engine.runner import generate
from datagen.verify.verify import verify
from tests import tiny_sd2
from tests.commands import contents, run, start
from tests.datagen.test_main import kill, wait_for

PLAIN = (
    "prompts=grammar",
    "encoder=null",
    "curate.dedup_threshold=null",
    "split.kind=image",
    "split.val_fraction=0.25",
)
TINY = (*PLAIN, "renderer.device=cpu", "renderer.render_size=64", "renderer.size=48", "renderer.steps=2", "force=true")
EIGHT = (*TINY, "renderer.batch_size=2", "num=8", "shard_size=2")


def cfg(folder: Path, out: Path, *overrides: str) -> DatagenSettings:
    return settings(DatagenSettings, compose("datagen", [*overrides, f"renderer.model={folder}", f"out={out}"]))


@pytest.fixture(scope="module")
def eight(weights: tiny_sd2.TinySD2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EIGHT in one process, never killed."""
    out = tmp_path_factory.mktemp("eight") / "data"
    assert generate(cfg(weights.folder, out, *EIGHT)) == 0
    return out


@pytest.mark.slow
def test_long_runs_are_refused_unless_forced(
    weights: tiny_sd2.TinySD2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = cfg(weights.folder, tmp_path / "data", *TINY, "num=5", "force=false")
    monkeypatch.setattr(runner, "_LONGEST_UNASKED_S", 0)
    with pytest.raises(UserError, match=r"(?s)5 images by sd2_competition would take about .*force=true"):
        generate(asked)
    assert not (tmp_path / "data").exists()
    assert generate(replace(asked, force=True)) == 0
    assert verify(tmp_path / "data") == []
    dataset = Dataset(tmp_path / "data")
    assert dataset.info["splits"] == {"train": 4, "val": 1}
    assert dataset.image_bytes(3)[8:12] == b"WEBP"
    recorded = dataset.info["settings"]["renderer"]
    assert (recorded["model"], recorded["device"], recorded["precision"], recorded["scheduler"]) == (
        "tiny-sd2",
        "cpu",
        "fp32",
        "ddim",
    )
    assert len(recorded["files"]) >= 3
    assert dataset.info["batch_size"] == 4, "found, since the settings left it open"
    asked = replace(asked, force=True)
    assert generate(asked) == 0, "the batch size found is that of the resumed run"
    other = replace(asked, renderer=replace(asked.renderer, batch_size=3))
    with pytest.raises(UserError, match=r"(?s)holds another dataset:.*batch_size: 4 \(recorded\), 3 \(requested\)"):
        generate(other)


def test_sd2_fast_makes_a_dataset(weights: tiny_sd2.TinySD2, tmp_path: Path) -> None:
    asked = cfg(weights.folder, tmp_path / "data", "renderer=sd2_fast", *TINY, "num=2", "renderer.guided_fraction=0.5")
    assert generate(asked) == 0
    recorded = Dataset(tmp_path / "data").info["settings"]["renderer"]
    assert (recorded["name"], recorded["scheduler"], recorded["guided_share"]) == ("sd2_fast", "dpmsolver++", 0.5)


def test_diffusers_model_makes_a_dataset(weights: tiny_sd2.TinySD2, tmp_path: Path) -> None:
    few = (*PLAIN, "renderer.device=cpu", "renderer.size=48", "renderer.steps=2", "num=2", "force=true")
    asked = cfg(weights.folder, tmp_path / "data", "renderer=diffusers", *few)
    assert generate(asked) == 0
    assert verify(tmp_path / "data") == []


@pytest.mark.slow
def test_killed_run_resumes_bitwise(weights: tiny_sd2.TinySD2, eight: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    command = (*EIGHT, f"renderer.model={weights.folder}", f"out={out}")
    for shards in (1, 2):
        process = start("datagen", *command)
        wait_for(lambda want=shards: len(list(out.glob("shards/*.parquet"))) >= want, process)
        assert process.poll() is None
        kill(process)
        assert len(list(out.glob("shards/*.parquet"))) < 4
    assert run("datagen", *command).returncode == 0
    assert contents(out) == contents(eight)


@pytest.mark.slow
def test_ray_engine_gives_same_bytes(weights: tiny_sd2.TinySD2, eight: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    done = run("datagen", *EIGHT, "engine=ray", "workers=2", f"renderer.model={weights.folder}", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(eight)


def test_a_nan_image_is_counted_and_in_no_split(
    weights: tiny_sd2.TinySD2, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that overflow whatever the precision: not redrawn, since fp32 is the highest."""
    folder = tmp_path / "weights"
    for path in weights.folder.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(weights.folder)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, folder / path.relative_to(weights.folder))
    decoder = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(decoder)
    decoder.unlink()
    tensors["decoder.conv_in.bias"] = tensors["decoder.conv_in.bias"] * float("inf")
    save_file(tensors, decoder, metadata={"format": "pt"})
    caplog.set_level("INFO")
    out = tmp_path / "data"
    assert generate(cfg(folder, out, *TINY, "num=3", "shard_size=3")) == 0
    assert "3 images: NaN at the highest precision too: in no split" in caplog.text
    dataset = Dataset(out)
    with pytest.raises(UserError, match="has no image in the split 'train'"):
        dataset.rows("train")
    with tarfile.open(out / "shards" / "000000.tar") as tar:
        member = tar.extractfile("000000000.json")
        assert member is not None
        assert json.load(member)["fault"] == "nan"
    events = [json.loads(line) for line in (tmp_path / "data.log.jsonl").read_text().splitlines()]
    assert [e["notes"] for e in events if e["event"] == "shard"] == [{"fault": 3}]
