"""Memory and file size of retrieval_report for 50,000 images.

Run: python benchmarks/report.py --out benchmarks/results/report-cpu.json
Clustered random embeddings of 128 dimensions; pictures of noise, 96 x 96, which no format compresses; names of files.
Each report is written in a process of its own. Memory is the peak above the embeddings and what was loaded before.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import harness
import numpy as np
import torch
from tqdm import tqdm

from pml_ext.visualization import retrieval_report

IMAGES, WIDTH = 50_000, 128


class Case(NamedTuple):
    """What a report is about: classes of about equal size beside the largest one."""

    title: str
    classes: int
    largest: int = 0  # share of the images that are of one class; 0: like the others
    runs: int = 1
    gallery: bool = False


CASES = [
    Case("1,000 classes, a gallery of 50,000", 1_000, gallery=True),
    Case("51 classes, one of 45,000", 51, largest=0.9),
    Case("10,000 classes, two runs", 10_000, runs=2),
    Case("25,000 classes, two runs", 25_000, runs=2),
]


class Noise:
    """Pictures that are drawn when they are asked for."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return np.random.default_rng(index).integers(0, 256, (96, 96, 3), dtype=np.uint8)


def measure(case, images):
    """Return the peak of memory and the size of the file, both in MB."""
    generator = torch.Generator().manual_seed(0)
    largest = int(case.largest * images)
    rest = torch.arange(images - largest) % (case.classes - (largest > 0)) + (largest > 0)
    labels = torch.cat([torch.zeros(largest, dtype=torch.long), rest])

    def embeddings(spread):
        centers = torch.randn(case.classes, WIDTH, generator=generator)
        return centers[labels] + spread * torch.randn(images, WIDTH, generator=generator)

    x, other = embeddings(2.0), embeddings(3.0)
    names = [f"photos/a_class_folder_{label}/IMG_2024_{i:06d}.jpg" for i, label in enumerate(labels.tolist())]
    more = {"other": other, "title": "new", "other_title": "old"} if case.runs == 2 else {}
    if case.gallery:
        more = {"gallery": other, "gallery_labels": labels, "gallery_images": Noise(images), "gallery_names": names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        retrieval_report(x[:100], labels[:100] % 2, path=path)  # what is loaded on first use
        start = harness.start_peak()
        retrieval_report(x, labels, Noise(images), path=path, names=names, **more)
        return round(harness.peak_since(start)), round(path.stat().st_size / 1e6, 1)


def table(rows):
    lines = [[row["title"], f"{row['peak_mb']:,} MB", f"{row['file_mb']:.1f} MB"] for row in rows]
    return harness.markdown_table(["50,000 images", "Memory", "File"], lines, numbers=2)


def main(images=IMAGES, out=None):
    rows = []
    for case in tqdm(CASES, desc="reports"):
        peak_mb, file_mb = harness.in_fresh_process(measure, case, images)
        rows.append({**case._asdict(), "peak_mb": peak_mb, "file_mb": file_mb})
    print(table(rows))
    return harness.save(out, {"metadata": harness.metadata(images=images, width=WIDTH), "rows": rows})


if __name__ == "__main__":
    main(**vars(harness.make_parser(__doc__, "--out").parse_args()))
