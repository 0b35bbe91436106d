"""predict.py: right rows from any folder, and no progress lost when it is killed, hangs, or the disk is full."""

import argparse
import csv
import io
import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.regressor import Regressor
from models.runtime import predict
from models.runtime.coordinator import Progress
from models.runtime.decode import decode
from models.runtime.part_folder import DONE, READING, DiskError
from tests import predict_program
from tests.predict_program import (
    MEAN,
    E,
    hostile_image,
    make_image,
    make_png,
    raise_,
    read_submission,
    wait_until,
    write_sample,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("8h30m", 30600), ("90m", 5400), ("45s", 45), ("7", 7), ("1h2m3s", 3723), ("0.5", 0.5), ("1h5", 3605)],
)
def test_duration_parses_hours_minutes_and_seconds(text: str, seconds: float) -> None:
    assert predict.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "5d", "m", "soon", "1m2h"])
def test_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text or "^$"):
        predict.duration(text)


def test_time_limit_turns_errors_except_disk_errors_into_mean_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    def run(error: Exception, limit: float | None) -> bool:
        options = argparse.Namespace(time_limit=limit, format="npy")
        coordinator: Any = type("Coordinator", (), {"run": staticmethod(lambda *_: raise_(error))})
        return predict._run(coordinator, options, time.monotonic(), 1, E)

    assert not run(OSError(24, "Too many open files"), 60)
    assert (
        "ERROR: [Errno 24] Too many open files. Images that are not done get the mean vector" in capsys.readouterr().err
    )
    for error, limit in ((OSError(24, "Too many open files"), None), (DiskError("full"), 60)):
        with pytest.raises(type(error)):
            run(error, limit)


def test_progress_line_on_a_terminal_and_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100, 5)
    monkeypatch.setattr(predict.time, "monotonic", lambda: float(next(clock)))
    state = Progress(16_000, done=4_000, unreadable=3, resumed_at=2_000, facts={"device": "cpu"}, ready_at=90)
    for on_terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda on_terminal=on_terminal: on_terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        show = predict._ProgressLine()
        for _ in range(4):
            show(state)
        show.close()
        text = stream.getvalue()
        assert "4,000 of 16,000 images, 25 %, " in text
        assert "left, 3 unreadable" in text
        assert text.count("16,000 images") == (4 if on_terminal else 2)
        assert ("\r" in text) == on_terminal
        assert ("\n" in text) == (not on_terminal)
    assert predict._ProgressLine()._line(Progress(5), 0) == "loading the model"
    assert [predict._format_duration(seconds) for seconds in (7.4, 149, 11_130)] == ["7 s", "2 min 29 s", "3 h 05 min"]


def bad_inputs(images: Path) -> dict[str, bytes | None]:
    """Write difficult images below `images`; return name → bytes, None for unreadable images."""
    (images / "deeper").mkdir()
    plain = make_image(0)

    def save(name: str, image: Image.Image, **options: Any) -> None:
        image.save(images / name, **options)

    save("cmyk.jpg", plain.convert("CMYK"))
    save("sixteen.png", Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40))
    save("palette.png", plain.quantize(7))
    save("deeper/rgba.PNG", Image.merge("RGBA", (*plain.split(), make_image(1).getchannel(0))))
    save("animated.webp", plain, save_all=True, append_images=[make_image(1), make_image(2)], lossless=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    save("turned.jpg", plain, exif=turned)
    save("a b, 'c' \"d\" 50%.png", make_image(3))
    save("two\nlines.png", make_image(4))
    (images / "empty.png").touch()
    (images / "cut.png").write_bytes((images / "two\nlines.png").read_bytes()[:300])
    (images / "text.JPG").write_text("no image")
    Image.new("1", (30_000, 30_000)).save(images / "giant.png")
    unreadable = {"empty": None, "cut": None, "text": None, "giant": None}
    readable = [p for p in images.rglob("*") if p.is_file() and p.stem not in unreadable]
    return unreadable | {p.stem: p.read_bytes() for p in readable}


@pytest.mark.slow
def test_rows_are_right_for_a_folder_of_difficult_images(
    exported: tuple[Path, Regressor], images: Path, tmp_path: Path
) -> None:
    """Several batches, as CSV and as npy, equal the vectors of the checkpoint."""
    bundle, model = exported
    data = bad_inputs(images)
    make_image(9).save(images / "left out.png")
    ids = [*sorted(data, key=lambda name: name[::-1]), "no image"]
    arguments = [
        "--images",
        images,
        "--sample-submission",
        write_sample(tmp_path / "sample.csv", ids),
        "--batch-size",
        5,
    ]
    done = predict_program.run(bundle, *arguments, "--out", tmp_path / "s.csv", fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    vectors = read_submission(tmp_path / "s.csv")
    assert list(vectors) == ids
    expected = {n: model.embed([decode(d)])[0].numpy() if d is not None else MEAN for n, d in data.items()}
    for name, vector_E in (expected | {"no image": MEAN}).items():
        np.testing.assert_allclose(vectors[name], vector_E, atol=1e-5, err_msg=name)
    with (tmp_path / "s.unreadable.csv").open(newline="") as file:
        listed = {row["id"]: row for row in csv.DictReader(file)}
    assert {name: row["path"] for name, row in listed.items()} == {
        "empty": "empty.png",
        "cut": "cut.png",
        "text": "text.JPG",
        "giant": "giant.png",
        "no image": "",
    }
    assert "(900000000 pixels)" in listed["giant"]["reason"]
    assert listed["no image"]["reason"] == "no image has this id"
    assert f"s.csv: {len(data)} images, 4 of them unreadable; " in done.stderr
    assert "1 ids have no image and get the mean vector: no image" in done.stderr
    assert "1 images are skipped" in done.stderr
    assert "in fp32 on CPU" in done.stderr

    done = predict_program.run(bundle, *arguments, "--format", "npy", "--out", tmp_path / "v.npy")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "v.npy"), np.stack(list(vectors.values())).astype(np.float32))
    with (tmp_path / "v.ids.csv").open(newline="") as file:
        assert {row["id"]: row["state"] for row in csv.DictReader(file)} == {
            **{name: "unreadable" if d is None else "predicted" for name, d in data.items()},
            "no image": "missing",
        }
    names = {"images", "sample.csv", "s.csv", "s.unreadable.csv", "v.npy", "v.ids.csv", "v.unreadable.csv"}
    assert {p.name for p in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--images", "nowhere"], 1, "error: no folder nowhere"),
        (["--images", "empty"], 1, ".avif) in empty; it is empty"),
        (
            ["--images", "images", "--out", "no/s.csv"],
            1,
            "error: --out no/s.csv is a folder, or its folder does not",
        ),
        (["--images", "images", "--out", "empty"], 1, "error: --out empty is a folder"),
        (["--images", "images", "--sample-submission", "no.csv"], 1, "error: cannot read no.csv: No such file"),
        (["--images", "images", "--device", "cuda:7"], 1, "error: no device cuda:7"),
        (["--images", "images", "--time-limit", "soon"], 2, "--time-limit: invalid duration value: 'soon'"),
        (["--images", "images", "--batch-size", "0"], 2, "--batch-size: invalid number value: '0'"),
        ([], 2, "--images"),
    ],
)
def test_wrong_arguments_write_nothing(
    arguments: list[str],
    code: int,
    expected: str,
    bundle: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run in this process: every error comes before a child is started."""
    (tmp_path / "empty").mkdir()
    make_image(0).save(images / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handler of SIGTERM belongs to pytest
    monkeypatch.setattr(predict, "__file__", str(bundle / "predict.py"))
    with pytest.raises(SystemExit) as exit_:
        predict.main()
    message = exit_.value.code if isinstance(exit_.value.code, str) else capsys.readouterr().err
    assert expected in message
    assert exit_.value.code == code or code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "images"]


@pytest.fixture
def slow(images: Path) -> list[str]:
    """24 images that take 0.15 s each, and their ids."""
    for i in range(24):
        (images / f"{i:02d}.png").write_bytes(hostile_image("slow", i))
    return [f"{i:02d}" for i in range(24)]


def rows_in(state: int, part: Path) -> int:
    return (part / "states").read_bytes().count(bytes([state])) if (part / "states").exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGINT, signal.SIGKILL),
        (signal.SIGTERM, signal.SIGKILL, signal.SIGINT),
    ],
)
def test_interrupted_run_resumes_to_the_same_bytes(
    signals: tuple[signal.Signals, ...],
    bundle: Path,
    images: Path,
    slow: list[str],
    tmp_path: Path,
    hostility: dict[str, str],
) -> None:
    """Signals interrupt the coordinator several times; then a child is killed while it decodes."""
    part = tmp_path / "s.csv.part"

    def command(out: str) -> list[object]:
        return ["--images", images, "--out", tmp_path / out, "--batch-size", 4, "--workers", 1]

    whole = predict_program.run(bundle, *command("whole.csv"), env=hostility)
    assert whole.returncode == 0, whole.stderr
    assert list(read_submission(tmp_path / "whole.csv")) == slow
    (tmp_path / "s.csv").write_text("previous")
    for number in signals:
        before = rows_in(DONE, part)
        process = predict_program.start(bundle, *command("s.csv"), env=hostility)
        wait_until(lambda before=before: rows_in(DONE, part) > before)
        if number == signals[0]:
            process.send_signal(signal.SIGSTOP)
            second = predict_program.run(bundle, *command("s.csv"), env=hostility)
            assert second.returncode == 1
            assert "error: another process is using" in second.stderr
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        ended = predict_program.wait_for_exit(process)
        assert ended.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        assert ("run the same command to resume" in ended.stderr) == (number != signal.SIGKILL)
        assert "Traceback" not in ended.stderr
        wait_until(lambda: not predict_program.is_running(bundle), 5)
        assert (tmp_path / "s.csv").read_text() == "previous"
    before = rows_in(DONE, part)
    assert 0 < before < 24
    process = predict_program.start(bundle, *command("s.csv"), env=hostility)
    wait_until(lambda: rows_in(DONE, part) > before and rows_in(READING, part))
    (child,) = predict_program.child_pids(process.pid)
    os.kill(child, signal.SIGKILL)
    ended = predict_program.wait_for_exit(process)
    assert ended.returncode == 0, ended.stderr
    assert "from the interrupted run" in ended.stderr
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"hostility", "images", "s.csv", "whole.csv"}


@pytest.mark.slow
def test_image_that_crashes_the_decoder_is_unreadable(
    exported: tuple[Path, Regressor], images: Path, tmp_path: Path, hostility: dict[str, str]
) -> None:
    """Two of one batch, by segmentation faults in a decoder."""
    bundle, model = exported
    for i in range(6):
        (images / f"{i}.png").write_bytes(hostile_image("crash" if i in (1, 4) else "mild", i))
    done = predict_program.run(bundle, "--images", images, "--out", tmp_path / "s.csv", env=hostility)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "s.unreadable.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert [row["id"] for row in listed] == ["1", "4"]
    assert {row["reason"] for row in listed} == {"decoding it ends the process: Segmentation fault"}
    for i, vector_E in enumerate(read_submission(tmp_path / "s.csv").values()):
        expected = MEAN if i in (1, 4) else model.embed([predict_program.hostile_pixels(i)])[0].numpy()
        np.testing.assert_allclose(vector_E, expected, atol=1e-5)


@pytest.mark.slow
def test_time_limit_holds_when_a_decoder_hangs(
    bundle: Path, images: Path, tmp_path: Path, hostility: dict[str, str]
) -> None:
    for i in range(8):
        (images / f"{i}.png").write_bytes(hostile_image("hang" if i == 5 else "mild", i))
    command = ["--images", images, "--out", tmp_path / "s.csv", "--batch-size", 2, "--workers", 1]
    began = time.monotonic()
    done = predict_program.run(bundle, *command, "--time-limit", "15s", env=hostility)
    assert time.monotonic() - began < 15
    assert done.returncode == 0, done.stderr
    vectors = read_submission(tmp_path / "s.csv")
    assert list(vectors) == [f"{i}" for i in range(8)]
    reached = [name for name, vector_E in vectors.items() if np.abs(vector_E - MEAN).max() > 1e-3]
    assert reached in ([], ["0", "1"], ["0", "1", "2", "3"]), "complete batches of two"
    assert f"WARNING: {8 - len(reached)} of 8 images were not reached and have the mean vector." in done.stderr
    assert not predict_program.is_running(bundle)
    (tmp_path / "hostility/cease").touch()
    done = predict_program.run(bundle, *command, "--time-limit", "10m", env=hostility)
    assert done.returncode == 0, done.stderr
    assert not reached or f"; {len(reached)} from the interrupted run" in done.stderr
    again = read_submission(tmp_path / "s.csv")
    assert all(np.abs(vector_E - MEAN).max() > 1e-3 for vector_E in again.values())
    assert all(np.array_equal(again[name], vectors[name]) for name in reached)
    assert not (tmp_path / "s.csv.part").exists()


@pytest.mark.slow
def test_broken_model_is_an_error_or_mean_vectors_with_a_time_limit(bundle: Path, images: Path, tmp_path: Path) -> None:
    for i in range(3):
        make_image(i).save(images / f"{i}.png")
    shutil.copytree(bundle, tmp_path / "broken")
    config = json.loads((bundle / "config.json").read_text())
    config["members"][0]["backbone"] = "no_such_tower"
    (tmp_path / "broken/config.json").write_text(json.dumps(config))
    command = ["--images", images, "--out", tmp_path / "s.csv"]
    done = predict_program.run(tmp_path / "broken", *command)
    assert done.returncode == 1
    assert "no_such_tower" in done.stderr.splitlines()[-1]
    assert done.stderr.count("the model cannot be loaded") == 1, "reported once"
    assert "BundleError" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "images"]
    done = predict_program.run(tmp_path / "broken", *command, "--time-limit", "1h")
    assert done.returncode == 0, done.stderr
    assert "ERROR: " in done.stderr
    assert "WARNING: 3 of 3 images were not reached" in done.stderr
    done = predict_program.run(bundle, "--images", images, "--out", tmp_path / "t.csv", "--time-limit", "0.1")
    assert done.returncode == 0, done.stderr
    assert "--time-limit is too short to start" in done.stderr
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "s.csv").read_bytes()
    for vector_E in read_submission(tmp_path / "s.csv").values():
        np.testing.assert_allclose(vector_E, MEAN, atol=1e-7)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["broken", "images", *(f"{out}{kind}.csv" for out in "st" for kind in ("", ".unreadable"))]
    )


@pytest.mark.slow
def test_full_disk_loses_no_progress(bundle: Path, images: Path, tmp_path: Path) -> None:
    for i in range(200):
        (images / f"{i:03d} and a long name.png").write_bytes(make_png(i))
    (tmp_path / "s.csv").write_text("previous")
    command = ["--images", images, "--out", tmp_path / "s.csv"]
    none = predict_program.run(bundle, *command, file_bytes=1000)
    assert none.returncode == 1
    assert "File too large" in none.stderr
    assert "Traceback" not in none.stderr
    assert "Progress is saved" not in none.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "s.csv"]
    some = predict_program.run(bundle, *command, file_bytes=20_000)
    assert some.returncode == 1
    assert f"error: cannot write {tmp_path / 's.csv'}: File too large. Progress is saved" in some.stderr
    assert (tmp_path / "s.csv").read_text() == "previous"
    done = predict_program.run(bundle, *command)
    assert done.returncode == 0, done.stderr
    assert "; 200 from the interrupted run" in done.stderr
    assert len(read_submission(tmp_path / "s.csv")) == 200


@pytest.mark.slow
def test_images_not_reached_are_listed(tmp_path: Path) -> None:
    """Listed after a time limit too short to start, and no longer after resuming."""
    bundle, _ = predict_program.make_bundle(tmp_path / "exported")
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / f"images/{i}.ppm").write_bytes(b"P6 8 8 255\n" + os.urandom(192))
        (tmp_path / f"images/{i}.ppm").rename(tmp_path / f"images/{i}.png")
    command = ["--images", tmp_path / "images", "--out", tmp_path / "s.csv"]
    done = predict_program.run(bundle, *command, "--time-limit", "0.1")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "s.unreadable.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["id", "path", "reason"], ["0", "0.png", "not reached"], ["1", "1.png", "not reached"]]
    done = predict_program.run(bundle, *command)
    assert done.returncode == 0, done.stderr
    assert list(read_submission(tmp_path / "s.csv")) == ["0", "1"]
    assert not (tmp_path / "s.unreadable.csv").exists()
