import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pml_ext.recipes import run_lock
from pml_ext.recipes.run_lock import RunLock, _began, _system
from tests.processes import START_METHOD, start


def lock_of(folder, **owner):
    known = {"process": os.getpid(), "host": socket.gethostname(), "since": "then", "began": _began(os.getpid())}
    known["system"] = _system()
    (folder / "lock.json").write_text(json.dumps(known | owner))


def test_one_thread_may_hold_it_twice(tmp_path):
    folder = tmp_path / "new" / "run"
    with RunLock(folder):
        owner = json.loads((folder / "lock.json").read_text())
        assert (owner["process"], owner["host"]) == (os.getpid(), socket.gethostname())
        with RunLock(folder):
            pass
        with (
            ThreadPoolExecutor(1) as pool,
            pytest.raises(ValueError, match=f"must be free, got .*process {os.getpid()}"),
        ):
            pool.submit(RunLock(folder).__enter__).result()
        assert [path.name for path in folder.iterdir()] == ["lock.json"]
    assert not list(folder.iterdir())


def test_living_owners_and_those_of_other_hosts_are_respected(tmp_path):
    for owner in (
        {"process": os.getppid(), "began": _began(os.getppid())},
        {"host": "elsewhere", "process": 2**22 + 1},
    ):
        lock_of(tmp_path, **owner)
        with pytest.raises(
            ValueError,
            match=r"must be free, got .* \(process \d+ on \S+ since then, last active 0 s ago\); if .* delete ",
        ):
            RunLock(tmp_path).__enter__()
    (tmp_path / "lock.json").write_text("")  # whoever it is
    with pytest.raises(ValueError, match=r"process None on None since None"):
        RunLock(tmp_path).__enter__()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_locks_of_dead_owners_are_taken_over(tmp_path):
    ended = subprocess.Popen(["true"])
    zombie = subprocess.Popen(["true"])
    ended.wait()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    for owner in ({"process": ended.pid}, {"process": zombie.pid, "began": "5"}, {"began": "5"}):  # or its number anew
        lock_of(tmp_path, **owner)
        names = ["last.pt.0a1b.new", "last.pt.new", "config.json.new", "notes.new", "trial.pt.new.0a1b.new"]
        for name in names:
            (tmp_path / name).touch()
        with RunLock(tmp_path):
            assert {path.name for path in tmp_path.iterdir()} == {"lock.json", "notes.new"}
            assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()
    zombie.wait()


def test_only_one_of_many_gets_it(tmp_path):
    lock_of(tmp_path, began="5")  # a stale one, which all want to take over
    begin, holders, refused = threading.Barrier(8, timeout=60), [], []

    def take():
        begin.wait()
        try:
            with RunLock(tmp_path):
                holders.append(1)
                begin.wait()
                assert len(holders) == 1
        except ValueError:
            refused.append(1)
            begin.wait()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(take) for _ in range(8)]:
            done.result()
    assert (len(holders), len(refused)) == (1, 7)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("owner", [{"host": "elsewhere"}, {"system": "another container"}, {"process": "?"}])
def test_owners_elsewhere_count_as_dead_when_they_are_silent(owner, tmp_path):
    lock_of(tmp_path, **owner)
    lock = tmp_path / "lock.json"
    os.utime(lock, (time.time() - 200,) * 2)
    with pytest.raises(ValueError, match=r"last active 20\d s ago.*of another host expires after 300 s"):
        RunLock(tmp_path).__enter__()
    os.utime(lock, (time.time() - 400,) * 2)
    with RunLock(tmp_path):
        assert json.loads(lock.read_text())["process"] == os.getpid()


def test_a_living_owner_here_may_be_silent(tmp_path):
    """Since it may sleep: its number tells that it lives."""
    lock_of(tmp_path, process=os.getppid(), began=_began(os.getppid()))
    os.utime(tmp_path / "lock.json", (0, 0))
    with pytest.raises(ValueError, match="must be free"):
        RunLock(tmp_path).__enter__()


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_SIGN_OF_LIFE", 0.01)
    with RunLock(tmp_path):
        lock = tmp_path / "lock.json"
        os.utime(lock, (0, 0))
        until = time.monotonic() + 30
        while not lock.stat().st_mtime and time.monotonic() < until:
            time.sleep(0.01)
        assert lock.stat().st_mtime > time.time() - 60
        RunLock(tmp_path).confirm()
        lock_of(tmp_path, token="of another")  # who took it for dead
        os.utime(lock, (0, 0))
        time.sleep(0.1)
        assert lock.stat().st_mtime == 0
        with pytest.raises(ValueError, match=r"a run's folder must stay this process's, got .*, which another"):
            RunLock(tmp_path).confirm()
    assert json.loads(lock.read_text())["token"] == "of another"


ROUNDS = 300


def take_in_turns(rank, folder, barrier, winners):
    """Take a folder with a stale lock together with the other process, many times; count how often this one gets it."""
    for number in range(ROUNDS):
        if not rank:
            lock_of(Path(folder), began="5")
        barrier.wait(60)
        try:
            with RunLock(folder):
                winners[number] += 1
                barrier.wait(60)  # the other has tried
        except ValueError:
            barrier.wait(60)
        barrier.wait(60)  # and this one has given it back


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_of_two_processes_gets_it(tmp_path):
    context = multiprocessing.get_context(START_METHOD)
    winners = context.Array("i", ROUNDS)
    start(take_in_turns, (str(tmp_path), context.Barrier(2), winners), world=2)
    assert list(winners) == [1] * ROUNDS
    assert not list(tmp_path.iterdir())
