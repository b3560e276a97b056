import warnings

import pytest
import torch

from pml_ext.recipes import embed
from pml_ext.recipes.device import warn_of_slow_autocast


def warned(device="cpu", autocast=torch.bfloat16):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_slow_autocast(torch.device(device), autocast)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("capability", "machine", "slow"),
    [("AVX2", "x86_64", 1), ("DEFAULT", "AMD64", 1), ("AVX512", "x86_64", 0), ("DEFAULT", "arm64", 0)],
)
def test_warning_of_slow_autocast(monkeypatch, capability, machine, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert len(warned()) == slow
    assert warned(autocast=None) == warned("meta") == []
    expected = "autocast to float16 may be many times slower than float32 on this processor, which has no AVX-512"
    assert warned(autocast=torch.float16) == slow * [expected]


def test_embedding_warns_of_slow_autocast(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    images = torch.utils.data.TensorDataset(torch.randn(2, 4), torch.arange(2))
    with pytest.warns(UserWarning, match="autocast to bfloat16 may be many times slower"):
        embed(torch.nn.Linear(4, 3), images, autocast=torch.bfloat16)
