"""Retries: number of attempts, waits, and errors that are not retried. Those of stores are in test_store.py."""

import time
from collections.abc import Callable

import pytest

from core.retry import retry


def failing(times: int, error: BaseException) -> tuple[list[int], Callable[[], str]]:
    calls: list[int] = []

    def work() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return calls, work


@pytest.mark.parametrize("times", [0, 1, 2])
def test_retry_waits_as_given_and_reports_each_wait(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    reported: list[tuple[str, float]] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    calls, work = failing(times, OSError("slow"))
    actual = retry(
        work, waits_s=(0.5, 2), is_transient=lambda _: True, report=lambda e, s: reported.append((str(e), s))
    )
    assert actual == "done"
    assert len(calls) == times + 1
    assert slept == [0.5, 2][:times]
    assert reported == [("slow", wait_s) for wait_s in slept]


def test_last_error_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    error = OSError("slow")
    calls, work = failing(9, error)
    with pytest.raises(OSError, match="slow") as raised:
        retry(work, waits_s=(1, 2), is_transient=lambda _: True, report=lambda *_: None)
    assert raised.value is error
    assert len(calls) == 3


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt()])
def test_other_errors_are_not_retried(error: BaseException) -> None:
    calls, work = failing(9, error)
    with pytest.raises(type(error)):
        retry(work, waits_s=(1, 2), is_transient=lambda e: isinstance(e, OSError), report=lambda *_: None)
    assert len(calls) == 1
