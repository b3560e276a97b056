import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pml_ext.recipes.run_lock import RunLock, _began


def lock_of(folder, **owner):
    known = {"process": os.getpid(), "host": socket.gethostname(), "since": "then", "began": _began(os.getpid())}
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
            ValueError, match=r"must be free, got .* \(process \d+ on \S+ since then\); if it does not, d"
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
