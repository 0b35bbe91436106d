"""Child process of predict.py: memory errors of a GPU, non-finite vectors, transient read errors."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.runtime import worker
from models.runtime.decode import BadImage
from models.runtime.part_folder import DONE, PREPROCESSED, READ, READING, TODO, UNREADABLE, DiskError, locked
from models.runtime.preprocess import Preprocessing
from tests.predict_program import E, make_image, open_part, raise_


class _SmallPredictor:
    """Predictor with memory for three images, which records batch sizes."""

    def __init__(self) -> None:
        self.sizes, self.device, self.redone = (4,), torch.device("meta"), 0
        self.batch_sizes: list[int] = []

    def start(self, squares: list[torch.Tensor]) -> torch.Tensor:
        self.batch_sizes.append(len(squares[0]))
        if len(squares[0]) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.nn.functional.normalize(squares[0].float().mean((2, 3)).repeat(1, E // 3), dim=1)

    def finish(self, z_BE: torch.Tensor, _: list[torch.Tensor]) -> torch.Tensor:
        return z_BE


def test_out_of_memory_batch_is_split_in_halves(tmp_path: Path) -> None:
    messages: list[Any] = []
    connection, predictor = type("Connection", (), {"send": staticmethod(messages.append)})(), _SmallPredictor()
    squares = torch.randint(1, 256, (5, 3, 4, 4), dtype=torch.uint8)
    batches = [(0, [0, 1, 2, 3, 4], [squares]), (1, [], []), (2, [0, 1, 2, 3, 4], [squares])]
    with locked(tmp_path / "o.part"):
        part = open_part(tmp_path / "o.part")
        worker._Lane(connection, threading.Lock(), part, predictor).run(batches)  # type: ignore[arg-type]
        expected = predictor.start([squares[:3]]).numpy()
        assert part.states().tolist() == [DONE] * 5
        np.testing.assert_array_equal(np.stack([part.vector(row) for row in range(3)]), expected)
    assert messages == [("done", 0, 0), ("done", 1, 0), ("done", 2, 0)]
    assert predictor.batch_sizes == [5, 3, 2, 3, 2, 3], "a batch of five is not launched a second time"


def test_non_finite_vector_marks_its_image_unreadable(tmp_path: Path) -> None:
    predictor = _SmallPredictor()
    squares = torch.tensor([9, 0], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    with locked(tmp_path / "o.part"):
        part = open_part(tmp_path / "o.part")
        connection = type("Connection", (), {"send": staticmethod(lambda _: None)})()
        worker._Lane(connection, threading.Lock(), part, predictor).run([(0, [3, 4], [squares])])  # type: ignore[arg-type]
        assert part.states()[3:].tolist() == [DONE, UNREADABLE]
        assert part.reasons() == {4: "its vector is not finite"}


def test_transient_read_errors_do_not_mark_an_image_unreadable(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only errors of the image itself make it unreadable before it is decoded in isolation."""
    make_image(0).save(images / "a.png")
    no_memory = BadImage("MemoryError: ")
    no_memory.__cause__ = MemoryError()
    with locked(tmp_path / "o.part"):
        part = open_part(tmp_path / "o.part")
        reader = worker._Reader(
            {"part": str(part.folder), "width": E, "images": str(images), "squares": [Preprocessing(8).to_config()]}
        )
        for error, state in (
            (OSError(5, "Input/output error"), READING),
            (MemoryError(), READING),
            (no_memory, READING),
            (BadImage("truncated"), UNREADABLE),
            (None, READ),
        ):
            with monkeypatch.context() as patched:
                if error is not None:
                    patched.setattr(worker, "decode", lambda _, error=error: raise_(error))
                part.mark(0, TODO)
                number, rows, _ = reader[(7, 0, ["a.png"])]  # type: ignore[misc]
                assert (number, rows, part.state(0)) == (7, [0] if error is None else [], state)
                reader.decode_isolated(0, "a.png")
                assert part.state(0) == (PREPROCESSED if error is None else UNREADABLE)
        part.mark(0, TODO)
        assert reader[(7, 0, ["gone.png"])] == (7, [], [])
        assert part.reasons()[0] == "No such file or directory"


def test_worker_error_is_reported_without_traceback() -> None:
    text = "Caught DiskError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n"
    assert worker._error_text(DiskError(f"{text}__mp_main__.DiskError: o.part/states: No space")) == (
        "o.part/states: No space"
    )
    assert worker._error_text(DiskError("o.part/states: No space")) == "o.part/states: No space"
    assert worker._error_text(MemoryError()) == "MemoryError"
