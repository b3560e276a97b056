"""Lists of images in CSV files."""

import csv
import os
from pathlib import Path

from pml_ext.datasets.splits import check_splits


def read_csv(file: Path) -> dict[str | None, dict[str, list[str]]]:
    """Return the paths of each class, in the order of the file, for each split; the only split is None without one.

    Classes are sorted: as numbers if all labels are integers, else as text. Labels that are written in two ways ("7",
    "07") are two classes.

    Args:
        file: With the columns ``path``, relative to the file's folder, ``label`` and perhaps ``split``.

    Raises:
        FileNotFoundError: If none of the images is there.
        ValueError: If the file is not a text in UTF-8, a column or a value is missing, a path is listed twice, or
            splits are not those that ``open_data`` takes; the message has file and line.
    """
    rows = _rows(file)
    if not any(os.path.exists(path) for path, _, _ in rows):
        raise FileNotFoundError(f"{file}: paths must be relative to its folder, got {rows[0][0]}, which does not exist")
    names = {label for _, label, _ in rows}
    try:
        classes = sorted(names, key=lambda label: (int(label), label))
    except ValueError:
        classes = sorted(names)
    given = list(dict.fromkeys(split for _, _, split in rows))
    splits = given if given == [None] else check_splits(f"{file}: split", [str(split) for split in given])
    lists: dict[str | None, dict[str, list[str]]] = {split: {c: [] for c in classes} for split in splits}
    for path, label, split in rows:
        lists[split][label].append(path)
    return {split: {c: paths for c, paths in images.items() if paths} for split, images in lists.items()}


def _rows(file: Path) -> list[tuple[str, str, str | None]]:
    rows, lines = [], dict[str, int]()
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for name in ("path", "label"):
                if header.count(name) != 1:
                    raise ValueError(f"line 1: must name the columns path, label and perhaps split, got {header}")
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(f"line {reader.line_num}: must have {len(header)} values, got {len(row)}")
                values = dict(zip(header, (value.strip() for value in row), strict=True))
                for name in ("path", "label", "split"):
                    if not values.get(name, "absent"):
                        raise ValueError(f"line {reader.line_num}: {name} must not be empty")
                path = os.path.normpath(file.parent / values["path"])
                if path in lines:
                    raise ValueError(
                        f"line {reader.line_num}: path must be listed once, got {values['path']} of line {lines[path]}"
                    )
                lines[path] = reader.line_num
                rows.append((path, values["label"], values.get("split")))
    except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{file}: {error}") from error
    if not rows:
        raise ValueError(f"{file}: must list images, got none")
    return rows
