import os
import platform
import subprocess
import sys

import pytest

from pml_ext.commands import main, train

SCRIPT = """
import resource, sys
from pml_ext.commands.freed_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def fill():
    block = bytearray(b"1") * 64_000_000
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    fill()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word, **variables):
    """Return what the function said, and the page faults of five blocks of 64 MB: 16 or more each, by the page size."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    command = [sys.executable, "-c", SCRIPT, word]
    kept, count = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of other systems is left alone")
def test_blocks_are_not_fetched_anew():
    kept, count = faults("keep")
    assert kept and 5 * count < faults("leave")[1]


def test_settings_of_the_user_stay():
    assert not faults("keep", MALLOC_ARENA_MAX="4")[0]


def test_training_keeps_it_in_a_process_of_its_own(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(main, "keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(train, "main", lambda **options: None)
    monkeypatch.chdir(tmp_path)
    main.main(["train", "glyphs"])
    assert not called
    monkeypatch.setattr(sys, "argv", ["pml-ext", "train", "glyphs"])
    main.main()
    assert called
