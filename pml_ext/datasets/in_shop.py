"""In-Shop Clothes Retrieval of DeepFashion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pml_ext.datasets.image_files import ImageFiles
from pml_ext.datasets.image_reader import ImageReader

SPLITS = ("train", "query", "gallery")
HOW_TO_GET = (
    "the data cannot be downloaded here: ask for In-shop Clothes Retrieval on the DeepFashion project page of the "
    "Chinese University of Hong Kong (MMLAB), which grants a license by request"
)


class InShop(ImageFiles):
    r"""In-Shop Clothes Retrieval: photos of 7,982 items of clothing, 3,997 of them to train with.

    Queries and gallery show the other items: each query is to find the gallery's images of its item. The layout is the
    official one: ``list_eval_partition.txt`` in ``root`` or ``root/Eval`` and the images it lists (``img/WOMEN/...``)
    below ``root`` or ``root/Img``.

    Args:
        root: The folder of the data.
        split: "train", "query" or "gallery".
        transform: Applied to the PIL image (RGB).
        reader: How files are read. None: ``ImageReader()``.

    Attributes:
        paths: Paths of the images, in the order of the list.
        labels: ``(N,)``, int64 tensor. Training items have 0 to C - 1; query and gallery share the labels that follow,
            so that no label means two items. Both are in the sorted order of item ids.
        class_names: Item ids of all labels, those of the other splits too.
        transform: May be set at any time.

    Raises:
        FileNotFoundError: If the list or the images are not there; the message says where to ask for them.
        ValueError: If ``split`` is unknown or has no image, a line of the list is malformed (with its number), or an
            item is both in training and test; on access: if a file cannot be read.

    Source:
        Liu et al., "DeepFashion: Powering Robust Clothes Recognition and Retrieval with Rich Annotations", CVPR 2016.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transform: Callable[[Any], Any] | None = None,
        reader: ImageReader | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        root = Path(root)
        partition = _first_file([root / "list_eval_partition.txt", root / "Eval" / "list_eval_partition.txt"])
        rows = read_partition(partition)
        train = {item for _, item, status in rows if status == "train"}
        test = {item for _, item, status in rows if status != "train"}
        if train & test:
            raise ValueError(f"{partition}: item {min(train & test)} must not be both in train and in query or gallery")
        names = sorted(train) + sorted(test)
        label_of = {item: label for label, item in enumerate(names)}
        chosen = [(image, item) for image, item, status in rows if status == split]
        if not chosen:
            raise ValueError(f"{partition} must list images of split {split!r}, got 0")
        first = chosen[0][0]
        image_path = _first_file([root / first, root / "Img" / first])
        base = image_path.parents[len(Path(first).parts) - 1]
        super().__init__(
            [base / image for image, _ in chosen], [label_of[item] for _, item in chosen], transform, names, reader
        )
        self.root = root
        self.split = split


def read_partition(path: Path) -> list[tuple[str, str, str]]:
    """Return (image, item, status) of each row of ``list_eval_partition.txt``.

    Raises:
        ValueError: If a line is malformed; the message has the file and the line's number.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines[2:], 3):  # after the number of images and the header
        columns = line.split()
        if not columns:
            continue
        if len(columns) != 3 or columns[2] not in SPLITS:
            raise ValueError(f"{path}, line {number}: must be image, item and train, query or gallery, got {line!r}")
        rows.append((columns[0], columns[1], columns[2]))
    first = lines[0].strip() if lines else ""
    if not first.isdecimal() or int(first) != len(rows):
        raise ValueError(f"{path}, line 1: must be the number of images, {len(rows)} here, got {first!r}")
    header = lines[1].split() if len(lines) > 1 else []
    if header != ["image_name", "item_id", "evaluation_status"]:
        raise ValueError(f"{path}, line 2: must be image_name item_id evaluation_status, got {' '.join(header)!r}")
    return rows


def _first_file(candidates: list[Path]) -> Path:
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"root must contain the In-Shop data: no {' or '.join(map(str, candidates))}; {HOW_TO_GET}")
