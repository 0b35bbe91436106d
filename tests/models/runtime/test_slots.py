"""Cores, memory and GPUs that predict.py uses."""

from typing import Any

import pytest

from models.runtime import slots
from models.runtime.model import BundleError


def test_cores_respect_the_container_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for files, expected in (
        ({}, 8),
        ({"cpu.max": [-1, 100_000]}, 8),
        ({"cpu.max": [250_000, 100_000]}, 3),
        ({"cpu/cpu.cfs_quota_us": [100_000], "cpu/cpu.cfs_period_us": [100_000]}, 1),
        ({"cpu/cpu.cfs_quota_us": [-1], "cpu/cpu.cfs_period_us": [100_000]}, 8),
    ):
        monkeypatch.setattr(slots, "_cgroup", lambda name, files=files: files.get(name, []))
        assert slots.cores() == expected


def test_cpu_slots_follow_cores_memory_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "cores", lambda: 8)
    monkeypatch.setattr(slots, "memory", lambda: 64e9)

    def lanes_and_threads(
        count: int, weights: float, *options: Any, single_lane: bool = False
    ) -> list[tuple[int, int]]:
        workers, threads = options or (None, None)
        return [
            (slot.lanes, slot.threads)
            for slot in slots.cpu_slots(count, None, int(weights), workers, threads, single_lane)
        ]

    assert lanes_and_threads(10_000, 1e7) == [(4, 1)] * 2
    assert lanes_and_threads(20, 1e7) == [(3, 2)], "three batches"
    assert lanes_and_threads(1, 1e7) == [(1, 8)]
    assert lanes_and_threads(10_000, 30e9) == [(8, 1)], "no memory for a second model"
    assert lanes_and_threads(10_000, 1e12) == [(8, 1)]
    assert lanes_and_threads(10_000, 1e7, 2, None) == [(2, 4)]
    assert lanes_and_threads(10_000, 1e7, 5, None) == [(2, 1), (3, 1)]
    assert lanes_and_threads(10_000, 1e7, None, 4) == [(2, 4)], "as in the interrupted run"
    assert lanes_and_threads(10_000, 1e7, single_lane=True) == [(1, 1)] * 8


def test_one_slot_per_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "cores", lambda: 4)
    monkeypatch.setattr(slots.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    gpus = slots.gpu_slots(None, None)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in gpus] == ["5", "GPU-7"]
    assert [(slot.device, slot.threads, slot.workers, slot.optional) for slot in gpus] == [("cuda", 2, 2, True)] * 2
    (gpu,) = slots.gpu_slots("cuda:1", 3)
    assert (gpu.environment["CUDA_VISIBLE_DEVICES"], gpu.workers, gpu.optional) == ("GPU-7", 3, False)
    with pytest.raises(BundleError, match="no device cuda:2: there are 2 GPUs"):
        slots.gpu_slots("cuda:2", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(slots.torch.cuda, "device_count", lambda: 0)
    assert slots.gpu_slots(None, None) == []
    with pytest.raises(BundleError, match=r"no device cuda: torch .* finds no GPU"):
        slots.gpu_slots("cuda", None)
