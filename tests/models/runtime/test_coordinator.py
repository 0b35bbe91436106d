"""Coordinator of predict.py: crashing and stalled children, GPUs that do not coordinator, little shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.regressor import Regressor
from models.runtime import coordinator
from models.runtime.coordinator import Coordinator, WorkError
from models.runtime.decode import decode
from models.runtime.model import read_config, squares_of
from models.runtime.part_folder import DONE, UNREADABLE, PartFolder, locked, open_part_folder, write_settings
from models.runtime.slots import Slot
from tests.predict_program import E, hostile_image, make_png, raise_, unit_vector

pytestmark = pytest.mark.usefixtures("forked_children")


def make_coordinator(bundle: Path, images: Path, folder: Path, slots: list[Slot], messages: list[str]) -> Coordinator:
    paths = sorted(p.name for p in images.iterdir())
    identity = {"pictures": "1"}
    part, settings = open_part_folder(folder, identity, len(paths), E, False, messages.append)
    job = {"bundle": str(bundle), "images": str(images), "part": str(folder), "width": E}
    job["squares"] = [square.to_config() for square in squares_of(read_config(bundle))]
    job |= {"precision": "auto", "backend": "torch", "batch": 4}
    cpu = [Slot("cpu", 1, 1, 0, {"OMP_NUM_THREADS": "1"})]
    return Coordinator(bundle / "predict.py", part, paths, job, slots, lambda: cpu, identity, settings, messages.append)


@pytest.mark.slow
def test_decoding_workers_give_the_same_vectors(
    exported: tuple[Path, Regressor],
    images: Path,
    tmp_path: Path,
    hostility: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A child with two decoding workers, one of which crashes with a segmentation fault."""
    bundle, model = exported
    for i in range(14):
        (images / f"{i:02d}.png").write_bytes(hostile_image("crash", i) if i == 6 else make_png(i))
    messages: list[str] = []
    with locked(tmp_path / "o.part"):
        slot = Slot("cpu", 1, 1, 2, {"OMP_NUM_THREADS": "1"})
        runner = make_coordinator(bundle, images, tmp_path / "o.part", [slot], messages)
        for name, value in hostility.items():
            monkeypatch.setenv(name, value)  # read by the process that decodes the isolated image
        assert runner.run(None, lambda _: None)
        part = PartFolder(tmp_path / "o.part", E)
        assert part.states().tolist() == [UNREADABLE if i == 6 else DONE for i in range(14)]
        assert part.reasons() == {6: "decoding it ends the process: Segmentation fault"}
        for row in (0, 5, 7, 13):
            expected = model.embed([decode(make_png(row))])[0]
            np.testing.assert_allclose(part.vector(row), expected, atol=1e-5)
    assert (runner.progress.done, runner.progress.unreadable) == (14, 1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU of this machine works")
def test_cpu_replaces_a_gpu_that_does_not_work(bundle: Path, images: Path, tmp_path: Path) -> None:
    for i in range(3):
        (images / f"{i}.png").write_bytes(make_png(i))
    messages: list[str] = []
    with locked(tmp_path / "o.part"):
        runner = make_coordinator(
            bundle, images, tmp_path / "o.part", [Slot("cuda", 1, 1, 0, {}, optional=True)], messages
        )
        assert runner.run(None, lambda _: None)
        assert PartFolder(tmp_path / "o.part", E).states().tolist() == [DONE] * 3
    assert "device 'cuda' does not work here" in messages[0]
    assert messages[1] == "no GPU works; computing on the CPU"
    assert runner.progress.facts["device"] == "cpu"


def test_stalled_child_is_replaced(
    exported: tuple[Path, Regressor],
    images: Path,
    tmp_path: Path,
    hostility: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A decoder hangs in a child with decoding workers, whose number /dev/shm limits to one."""
    bundle, model = exported
    for i in range(8):
        (images / f"{i}.png").write_bytes(hostile_image("hang", i) if i == 5 else make_png(i))
    monkeypatch.setattr(coordinator, "_STALLED_SECONDS", 2)
    monkeypatch.setattr(coordinator, "_ISOLATED_SECONDS", 6)
    monkeypatch.setattr(coordinator, "shared_memory", lambda: 5 * 4 * 3 * 32 * 32)  # room for five batches
    for name, value in hostility.items():
        monkeypatch.setenv(name, value)
    messages: list[str] = []
    slot = Slot("cpu", 1, 1, 3, {"OMP_NUM_THREADS": "1"})
    with locked(tmp_path / "o.part"):
        assert make_coordinator(bundle, images, tmp_path / "o.part", [slot], messages).run(None, lambda _: None)
        part = PartFolder(tmp_path / "o.part", E)
        assert part.reasons() == {5: "decoding it takes more than 6 s"}
        for row in (0, 7):
            np.testing.assert_allclose(part.vector(row), model.embed([decode(make_png(row))])[0], atol=1e-5)
    assert messages == ["/dev/shm has 0 MB free: 1 processes decode instead of 3; a container gets more by --shm-size"]
    assert slot.workers == 0, "the number is halved after a crash"


@pytest.mark.slow
def test_rows_of_another_device_are_kept_and_a_finished_run_starts_no_process(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        (images / f"{i}.png").write_bytes(make_png(i))
    messages: list[str] = []
    folder, slot = tmp_path / "o.part", Slot("cpu", 1, 1, 0, {"OMP_NUM_THREADS": "1"})
    with locked(folder):
        part = make_coordinator(bundle, images, folder, [slot], messages)._part
        for row in range(4):
            part.put(row, unit_vector(row))
        gpu = {"device": "cuda", "precision": "fp16", "batch": 2, "threads": 1}
        write_settings(part, {"pictures": "1"}, gpu)
        runner = make_coordinator(bundle, images, folder, [slot], messages)
        assert runner.run(None, lambda _: None)
        assert (runner.progress.resumed_at, runner.progress.done) == (4, 5)
        for row in range(4):
            np.testing.assert_array_equal(part.vector(row), unit_vector(row))
        assert messages[0].startswith(
            "the interrupted run computed on cuda in fp16, this one computes on cpu in fp32: "
        )
        assert len(messages) == 1
        monkeypatch.setattr(coordinator, "_Child", None)
        runner = make_coordinator(bundle, images, folder, [slot], messages)
        assert runner.run(None, lambda _: None)
        assert (runner.progress.resumed_at, runner.progress.done) == (5, 5)


def test_failing_process_starts_end_the_run(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "a.png").write_bytes(make_png(0))
    monkeypatch.setattr(coordinator, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(coordinator, "_Child", lambda *_: raise_(OSError(12, "Cannot allocate memory")))
    with locked(tmp_path / "o.part"):
        runner = make_coordinator(bundle, images, tmp_path / "o.part", [Slot("cpu", 1, 1, 0, {})], [])
        with pytest.raises(WorkError, match="no process can be started: Cannot allocate memory"):
            runner.run(None, lambda _: None)


def test_cpu_replaces_a_gpu_that_fails_repeatedly(bundle: Path, images: Path, tmp_path: Path) -> None:
    """Every process exits immediately, as when the model does not fit the memory."""
    messages: list[str] = []
    slot = Slot("cpu", 1, 1, 0, {}, optional=True)
    with locked(tmp_path / "o.part"):
        (images / "a.png").write_bytes(make_png(0))
        runner = make_coordinator(bundle, images, tmp_path / "o.part", [slot], messages)
        for _ in range(coordinator._ATTEMPTS):
            runner._start_children()
            (child,) = runner._children
            runner._handle_exit(child, "CUDA out of memory")
        assert runner._slots != [slot]
        assert runner._slots[0].device == "cpu"
    assert messages == ["CUDA out of memory", "CUDA out of memory", "no GPU works; computing on the CPU"]


_IN_A_SMALL_CONTAINER = """
import sys
from pathlib import Path
import timm
from models.runtime import coordinator
from models.runtime.part_folder import locked
from models.runtime.slots import Slot
from tests import forked_predict
from tests.models.runtime import test_coordinator

assert coordinator.shared_memory() < 70_000
coordinator._STALLED_SECONDS = 2
coordinator.subprocess.Popen = forked_predict.popen
folder = Path(sys.argv[1])
for how in ("seen", "not seen"):
    if how == "not seen":
        coordinator.shared_memory = lambda: 1e9
    messages, part = [], folder / f"{how}.part"
    slot = Slot("cpu", 1, 1, 2, {"OMP_NUM_THREADS": "1"})
    with locked(part):
        runner = test_coordinator.make_coordinator(folder / "bundle", folder / "images", part, [slot], messages)
        runner._job["batch"] = 32
        assert runner.run(None, lambda _: None)
    print(slot.workers, messages)
"""


@pytest.mark.slow
def test_small_shared_memory_does_not_hang(bundle: Path, images: Path, tmp_path: Path) -> None:
    """In a namespace whose /dev/shm is smaller than a batch: "not seen", a batch is lost, and no process ends."""
    for i in range(64):
        (images / f"{i:02d}.png").write_bytes(make_png(i))
    shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "small.sh").write_text('mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77\nexec "$@"\n')
    inside = ["unshare", "-rm", "sh", tmp_path / "small.sh"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow a namespace with its own /dev/shm")
    done = subprocess.run(
        [*inside, sys.executable, "-c", _IN_A_SMALL_CONTAINER, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert done.returncode == 0, done.stderr
    seen, not_seen = done.stdout.splitlines()
    for line, message in ((seen, "0 processes decode instead of 2"), (not_seen, "made no progress for 2 s")):
        assert line.startswith("0 [")
        assert message in line
