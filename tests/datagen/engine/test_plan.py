"""The plan's table: a row an image, seeds that count."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from core.cli import compose
from core.settings import settings
from datagen.config import DatagenSettings
from datagen.curation.curate import Curated
from datagen.curation.journal import KEPT
from datagen.dataset.format import PLAN
from datagen.engine.plan import count, image_seeds, log_plan, plan_table


def cfg(num: int, per_prompt: int, **more: Any) -> DatagenSettings:
    overrides = ["prompts=grammar", "renderer=glyphs", f"num={num}", f"seeds_per_prompt={per_prompt}"]
    return settings(DatagenSettings, compose("datagen", [*overrides, *(f"{k}={v}" for k, v in more.items())]))


def curated(train: int, val: int) -> Curated:
    def side(name: str, n: int) -> pa.Table:
        rows = [{"prompt": f"{name} {i}", "source": f"s{i % 3}", "group": f"g{i}"} for i in range(n)]
        return pa.Table.from_pylist(rows, schema=KEPT.remove(3))

    return Curated(side("train", train), side("val", val), drawn=train + val)


def test_plan_has_one_row_per_image() -> None:
    table = plan_table(cfg(100, 3), curated(30, 6))
    assert table.schema == PLAN
    rows = table.to_pylist()
    assert len(rows) == 100 == count(cfg(100, 3), curated(30, 6))  # of 108
    assert [row["key"] for row in rows] == [f"{n:09d}" for n in range(100)]
    assert [row["prompt_id"] for row in rows] == [n // 3 for n in range(100)]
    for n in range(0, 99, 3):
        one, two, three = rows[n : n + 3]
        assert len({row["seed"] for row in (one, two, three)}) == 3
        for row in (one, two, three):
            assert (row["prompt"], row["source"], row["group"]) == (one["prompt"], one["source"], one["group"])
            name, number = row["prompt"].split()
            assert (row["split"], row["source"], row["group"]) == (name, f"s{int(number) % 3}", f"g{number}")
    assert len({row["prompt"] for row in rows}) == 34
    where = [n for n, row in enumerate(rows) if row["split"] == "val"]
    assert where[0] < 50 < where[-1]
    assert plan_table(cfg(100, 3), curated(30, 6)) == table
    assert plan_table(cfg(100, 3, seed=1), curated(30, 6))["prompt"] != table["prompt"]


def test_resumed_plan_is_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan_table(cfg(50, 2), curated(30, 6))
    monkeypatch.setattr("datagen.engine.plan._ROWS", 7)
    assert plan_table(cfg(50, 2), curated(30, 6)).combine_chunks() == whole.combine_chunks()


def test_plan_with_several_seeds_per_prompt() -> None:
    seeds = image_seeds(5, 2000, 3)
    assert seeds.shape == (2000, 3)
    assert 0 <= seeds.min() < 2**31 * 0.01
    assert 2**31 * 0.99 < seeds.max() < 2**31
    assert len(np.unique(seeds)) > 5990
    np.testing.assert_array_equal(image_seeds(5, 700, 2), seeds[:700, :2])
    assert not (image_seeds(6, 2000, 3) == seeds).any()


def test_prompts_over_77_tokens_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    made = curated(3, 1)
    made.over_context = 1234
    made.dropped["empty"] = 1
    log_plan(cfg(10, 1), made)
    assert "1,234 prompts over 77 tokens: Stable Diffusion reads the first 77" in caplog.text
    assert "dropped 1 (25.0 %): empty" in caplog.text
    assert "only 4 of num=10 images" in caplog.text
