"""Forked commands behave like new interpreters, and a hanging command dumps its stacks.

pytest tests/test_commands.py
"""

import json
import signal
import subprocess
import sys

import pytest

from tests import commands

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands are forked on Linux alone")
MODULE = "tests.reporting_command"


def sleeping() -> "subprocess.Popen[str]":
    process = commands.start(MODULE, "sleep")
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.slow
def test_forked_command_matches_new_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IM2EMB_SEEN", "yes")
    forked, fresh = (commands.run(MODULE, "a=1", "b c", fresh=fresh) for fresh in (False, True))
    assert (forked.returncode, forked.stderr) == (fresh.returncode, fresh.stderr) == (3, "to stderr\n")
    assert json.loads(forked.stdout) == json.loads(fresh.stdout)


def test_signals_reach_a_forked_command() -> None:
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, -15)):
        process = sleeping()
        assert isinstance(process, commands._Forked)
        assert process.poll() is None
        process.send_signal(number)
        assert commands.ended(process, 60).returncode == code
        assert process.poll() == code


def test_forked_commands_run_concurrently() -> None:
    first, second = sleeping(), sleeping()
    first.kill()
    assert commands.ended(first).returncode == -signal.SIGKILL
    assert second.poll() is None
    second.kill()
    assert commands.ended(second).returncode == -signal.SIGKILL


@pytest.mark.parametrize("fresh", [False, True])
def test_hanging_command_dumps_stacks_and_is_killed(fresh: bool) -> None:
    process = commands.start(MODULE, "sleep", fresh=fresh)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(
        AssertionError, match=r"did not end in 0\.2 s(?s:.*)reporting_command\.py\", line \d+ in <module>"
    ):
        commands.ended(process, 0.2)
    assert process.returncode == -signal.SIGABRT
