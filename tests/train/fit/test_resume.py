"""Resume checkpoints: checksums, verification after writing, damage, and an intact one after any kill or full disk.

The slow ones start commands: `pytest tests/train/fit/test_resume.py -m slow`.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.checksum import damage
from core.errors import UserError
from tests.commands import call
from tests.training import same_weights, train
from train.fit import resume
from train.fit.callbacks import ResumeCheckpoint

pytest_plugins = ["tests.tiny_run"]
pytestmark = pytest.mark.usefixtures("one_thread")

EACH_STEP = "save_every=1"


@pytest.fixture
def stopped_run(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run stopped after step 4 of 10, with resume checkpoints of steps 4 and 3."""
    run = tmp_path / "run"
    stop_at(4, small_data, run, monkeypatch)
    assert steps(run) == {"resume.ckpt": 4, "resume.previous.ckpt": 3}
    return run


def stop_at(step: int, data: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = ResumeCheckpoint._end_run

    def stop(self: ResumeCheckpoint, trainer: Any) -> None:
        self.stopped = self.stopped or trainer.global_step == step
        end(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(ResumeCheckpoint, "_end_run", stop)
        assert train(data, run, EACH_STEP) == 130


def steps(run: Path) -> dict[str, int]:
    return {p.name: torch.load(p, weights_only=True)["global_step"] for p in sorted(run.glob("resume*.ckpt"))}


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def twenty_places(path: Path) -> list[int]:
    """The first and last bytes, the zip's directory, the checksum, and tensors all over the file."""
    size = path.stat().st_size
    ends = [0, 1, 70, size - 1, size - 2, size - 40, size - 73, size - 74, size - 90, size - 300]
    return ends + np.linspace(100, size - 400, 10).astype(int).tolist()


# -------------------------------------------------------------------------------------------------------------- damage


def test_flipped_byte_in_resume_checkpoint_is_detected(stopped_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = stopped_run / "resume.ckpt"
    for place in twenty_places(newest):
        caplog.clear()
        flip(newest, place)
        assert resume.newest_whole(stopped_run) == (stopped_run / "resume.previous.ckpt", 3), place
        (said,) = caplog.messages
        assert said.startswith(f"{newest} is damaged: it"), place
        flip(newest, place)
    assert resume.newest_whole(stopped_run) == (newest, 4)


@pytest.mark.slow
def test_run_with_damaged_checkpoint_resumes_from_previous_one(
    stopped_run: Path, small_data: Path, tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each time the run ends with the very bits of a run that was never stopped."""
    places = twenty_places(stopped_run / "resume.ckpt")
    assert len(set(places)) == 20
    for place in places:
        copy = Path(shutil.copytree(stopped_run, tmp_path / f"flipped_{place}"))
        flip(copy / "resume.ckpt", place)
        caplog.clear()
        assert train(small_data, copy) == 0, place
        (said,) = [m for m in caplog.messages if "damaged" in m]
        assert said.startswith(f"{copy / 'resume.ckpt'} is damaged: ")
        assert said.endswith("The run continues from step 3 in resume.previous.ckpt")
        assert same_weights(copy / "last", tiny_run / "last"), place
        assert same_weights(copy / "best", tiny_run / "best"), place


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "cut off by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "without its checksum": lambda path: os.truncate(path, path.stat().st_size - 73),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "of torch alone": lambda path: torch.save({"global_step": 9}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGES)
def test_other_damage_of_resume_checkpoint_is_detected(
    case: str, stopped_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[case](stopped_run / "resume.ckpt")
    assert resume.newest_whole(stopped_run) == (stopped_run / "resume.previous.ckpt", 3)
    assert f"{stopped_run / 'resume.ckpt'} is damaged: it" in caplog.text


@pytest.mark.slow
def test_error_names_both_damaged_resume_checkpoints(stopped_run: Path, small_data: Path) -> None:
    for name, place in (("resume.ckpt", 500), ("resume.previous.ckpt", 7000)):
        flip(stopped_run / name, place)
    with pytest.raises(UserError) as error:
        train(small_data, stopped_run)
    for words in (
        f"{stopped_run / 'resume.ckpt'}: its bytes have changed since they were written: their sha256 is ",
        f"{stopped_run / 'resume.previous.ckpt'}: its bytes have changed",
        "remove resume.ckpt and resume.previous.ckpt to train from step 0",
    ):
        assert words in str(error.value)


@pytest.mark.slow
def test_damaged_first_resume_checkpoint_is_not_a_new_run(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    stop_at(1, small_data, run, monkeypatch)
    flip(run / "resume.ckpt", 3000)
    with pytest.raises(UserError, match=r"resume\.previous\.ckpt: missing\nRestore .* remove resume.ckpt to train"):
        train(small_data, run)


@pytest.mark.slow
def test_damaged_checkpoint_never_replaces_previous_one(
    stopped_run: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(stopped_run / "resume.ckpt", 3000)
    stop_at(4, small_data, stopped_run, monkeypatch)
    assert steps(stopped_run) == {"resume.ckpt": 4, "resume.previous.ckpt": 3}
    assert [damage(p) for p in stopped_run.glob("resume*.ckpt")] == [None, None]


def test_resume_checkpoint_has_keys_of_earlier_versions(stopped_run: Path) -> None:
    """Lightning finds a callback's state by this key; under another one the best score so far would be lost."""
    point = torch.load(stopped_run / "resume.ckpt", weights_only=True)
    assert set(point["callbacks"]) == {"KeepBest"}
    assert set(point["callbacks"]["KeepBest"]) == {"best", "scores"}
    assert set(point) == {
        *("callbacks", "epoch", "global_step", "loops", "lr_schedulers", "optimizer_states"),
        *("pytorch-lightning_version", "score", "skipped", "state_dict"),
    }


def test_finished_run_deletes_previous_resume_checkpoint(tiny_run: Path) -> None:
    assert steps(tiny_run) == {"resume.ckpt": 10}


# -------------------------------------------------------------------------------------------------- while it is written


@pytest.mark.slow
def test_failed_verification_keeps_both_resume_checkpoints(
    stopped_run: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that changes what it stores: here between the write and the read-back."""
    commit = resume.commit

    def on_a_bad_disk(part: Path, out: Path, *, rotate: bool) -> None:
        flip(part, 4000)
        commit(part, out, rotate=rotate)

    monkeypatch.setattr(resume, "commit", on_a_bad_disk)
    with pytest.raises(UserError, match=r"at step 5: read back from the disk, its bytes have changed .* is intact"):
        train(small_data, stopped_run, EACH_STEP)
    assert steps(stopped_run) == {"resume.ckpt": 4, "resume.previous.ckpt": 3}
    assert not list(stopped_run.glob(".resume*"))


def test_ranks_with_different_resume_checkpoints_are_refused() -> None:
    resume.require_agreement([3, 3])
    with pytest.raises(UserError, match=r"of different steps \(3, 0; 0 means none\): out= must be a folder"):
        resume.require_agreement([3, 0])


def train_until_killed(run: Path, number: int, data: Path) -> None:
    """Train with a resume checkpoint after each step; SIGKILL before the n-th open, rename or removal of one."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove") and "resume" in str(arguments[0]):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    train(data, run, EACH_STEP)


def killed_before_each_operation(data: Path, folder: Path) -> Iterator[Path]:
    """Runs killed before their n-th open, rename or removal of a resume file, up to the third resume checkpoint."""
    for number in range(1, 17):
        run = folder / f"killed_{number}"
        assert call(train_until_killed, run, number, data) == -signal.SIGKILL
        yield run


@pytest.mark.slow
def test_run_killed_between_file_operations_resumes_bitwise(small_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    resumed_at = []
    for run in killed_before_each_operation(small_data, tmp_path):
        resumed_at.append(resume.newest_whole(run)[1])
        assert train(small_data, run) == 0
        assert same_weights(run / "last", tiny_run / "last"), run.name
        assert same_weights(run / "best", tiny_run / "best"), run.name
    assert resumed_at == sorted(resumed_at)
    assert set(resumed_at) >= {0, 1, 2}
