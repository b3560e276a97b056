"""Names of splits: in folders and in lists."""

import os
import re
from pathlib import Path

from pml_ext.datasets.folder_walk import has_images

COMPLETE = (("train", "test"), ("train", "query", "gallery"))
RULE = "train and test, or train, query and gallery (validation classes are cut from the training classes)"
_WORDS = {
    "train": "train|training|trn",
    "test": "test|testing|tst|eval|evaluation",
    "validation": "validation|validate|valid|val|dev",
    "query": "query|queries|probe|probes",
    "gallery": "gallery|galleries|database|index|reference|references|distractors",
}


def meaning(name: str) -> str | None:
    """Return which split a name may stand for, "validation" included, in any of the common spellings, or None."""
    plain = re.sub(r"[\W_]", "", name.lower())
    for split, words in _WORDS.items():
        if re.fullmatch(rf"(boundingbox|images?)?({words})(set|split|data|images?|\d+)?", plain):
            return split
    return None


def check_splits(name: str, given: list[str]) -> tuple[str, ...]:
    """Return the splits to use, in the order of ``COMPLETE``.

    Args:
        name: Name of what has them, for the message.
        given: Names of splits.

    Raises:
        ValueError: If one is unknown, missing, or too many; the message has the rule.
    """
    for splits in COMPLETE:
        if set(splits) == set(given):
            return splits
    wrong = [split for split in given if split not in ("train", "test", "query", "gallery")]
    if wrong:
        wrong.sort(key=lambda split: meaning(split) == "validation")  # a misspelled one first
        likely = meaning(wrong[0])
        hint = f" ({likely}?)" if likely not in (None, "validation") else ""
        raise ValueError(f"{name} must be {RULE}, got {wrong[0]!r}{hint}")
    raise ValueError(f"{name} must be {RULE}, got {' and '.join(sorted(given))}")


def splits_of(folder: Path) -> tuple[str, ...]:
    """Return the folders of splits in a folder; none if its folders are classes.

    A folder with the name of a split may be a class ("train" beside "bus"): if it has images of its own, and no other
    folder has the name of a split.

    Raises:
        ValueError: If they are not those of ``COMPLETE``; validation folders beside these are not used.
    """
    given = sorted(e.name for e in os.scandir(folder) if meaning(e.name) and os.path.isdir(e.path))
    if not given or (len(given) == 1 and has_images(folder / given[0])):
        return ()
    used = [name for name in given if meaning(name) != "validation"]
    whole = any(set(used) == set(splits) for splits in COMPLETE)
    return check_splits(f"folders of splits in {folder}", used if whole else given)
