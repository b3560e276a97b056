"""``pml-ext doctor``."""

import json
import re
import sys

import torch

from pml_ext.commands import doctor
from pml_ext.commands.main import main
from tests.needs import declared_extras


def test_what_is_there(capsys):
    main(["doctor", "--json"])
    done = capsys.readouterr()
    found = json.loads(done.out)
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert found["devices"][0].startswith("cpu: ")
    assert re.search(r"^  yes  training, ", done.err, re.MULTILINE)


def test_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "faiss", None)
    works = doctor.main()["works"]
    printed = capsys.readouterr().out
    assert not any(works[purpose] for _, purpose in doctor.MODULES.values())
    for extra, (_, purpose) in doctor.MODULES.items():
        assert f"  no   {purpose}: pip install 'pml-ext[{extra}]'" in printed
    assert "  no   NMI, and pml-ext embed: faiss cannot be imported (" in printed
    assert "yes" not in printed


def test_extras_exist_and_bring_the_modules():
    extras = declared_extras()
    for extra, (module, _) in doctor.MODULES.items():
        assert module.replace("_", "-").removesuffix("-model") in extras[extra].replace("umap-learn", "umap")
