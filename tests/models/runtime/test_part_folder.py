"""Part folder of predict.py: resuming after crashes, locking, preprocessed images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.runtime.model import BundleError
from models.runtime.part_folder import DONE, PREPROCESSED, READING, TODO, UNREADABLE, locked
from tests.predict_program import E, open_part, unit_vector


def test_resume_keeps_finished_rows_and_resets_torn_ones(tmp_path: Path) -> None:
    folder = tmp_path / "o.part"
    with locked(folder):
        part = open_part(folder)
        for row in (0, 1):
            part.put(row, unit_vector(row))
        part.mark(1, DONE)
        part.put(2, np.zeros(E, np.float32))  # the state has reached the disk, the vector has not
        part.mark_unreadable(3, 'says "no"')
        part.mark(4, READING)
        with (folder / "unreadable.jsonl").open("a") as file:
            file.write('\n[4, "cut o')
        part = open_part(folder)
        assert part.states().tolist() == [DONE, DONE, TODO, UNREADABLE, TODO]
        assert part.reasons() == {3: 'says "no"'}
        assert np.array_equal(part.vector(1), unit_vector(1))
        assert open_part(folder, fresh=True).states().tolist() == [TODO] * 5


def test_progress_of_another_task_is_discarded_and_logged(tmp_path: Path) -> None:
    folder, messages = tmp_path / "o.part", []
    with locked(folder):
        open_part(folder, images="1", bundle="a").put(0, unit_vector(0))
        part = open_part(folder, messages=messages, images="2", bundle="b")
        assert part.states().tolist() == [TODO] * 5
    assert "the interrupted run differs in images and bundle; its progress is discarded" in messages[0]


def test_folder_is_locked_and_unexpected_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "o.part"
    with (
        locked(folder),
        pytest.raises(BundleError, match=r"another process is using .*o\.part; wait for it"),
        locked(folder),
    ):
        pass
    with locked(folder):
        pass
    (folder / "thesis.tex").touch()
    with pytest.raises(BundleError, match=r"holds thesis\.tex, which predict.py did not write"), locked(folder):
        pass


def test_preprocessed_squares_round_trip(tmp_path: Path) -> None:
    squares = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for size in (8, 5)]
    with locked(tmp_path / "o.part"):
        part = open_part(tmp_path / "o.part")
        part.put_squares(2, squares)
        assert part.state(2) == PREPROCESSED
        for loaded, square in zip(part.read_squares(2, [8, 5]), squares, strict=True):
            assert torch.equal(loaded, square)
