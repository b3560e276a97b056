"""Lists of images in CSV files."""

import csv
import os
from functools import cache
from pathlib import Path

from pml_ext.datasets.splits import check_splits


def read_csv(file: Path) -> dict[str | None, dict[str, list[str]]]:
    """Return the paths of each class, in the order of the file, for each split; the only split is None without one.

    Classes are sorted: as numbers if all labels are integers, else as text. Labels that are written in two ways ("7",
    "07") are two classes.

    Args:
        file: With the columns ``path``, absolute or relative to the file's folder, ``label`` and perhaps ``split``.

    Raises:
        FileNotFoundError: If none of the images is there.
        ValueError: If the file is not a text in UTF-8, a column or a value is missing, an image is listed twice, by
            another path or a symbolic link too, or splits are not those that ``open_data`` takes; the message has file
            and line.
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
    rows, lines, real_folder = [], dict[str, int](), cache(os.path.realpath)
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for name in ("path", "label"):
                if header.count(name) != 1:
                    columns = "the columns path, label and perhaps split, with commas between them"
                    raise ValueError(f"line 1: must name {columns}, got {header}")
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
                real = os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path))
                real = os.path.realpath(real) if os.path.islink(real) else real
                if real in lines:
                    raise ValueError(
                        f"line {reader.line_num}: an image must be listed once, got {values['path']}, that of line "
                        f"{lines[real]}"
                    )
                lines[real] = reader.line_num
                rows.append((path, values["label"], values.get("split")))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: must be saved as UTF-8, got {error}") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file}: {error}") from error
    if not rows:
        raise ValueError(f"{file}: must list images, got none")
    return rows
