import math

import numpy as np
import pytest
import torch

from pml_ext.evaluation.class_codes import IGNORED, class_codes
from tests.needs import needs

DTYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["array", "tensor", "list of scalars", "object", ">"])
def test_integers(dtype, kind):
    """The extremes of each type, and neighbors of them."""
    info = np.iinfo(dtype)
    values = [info.max, info.min, info.max - 1, info.max, info.min + 1, info.min]
    labels = np.array(values, dtype=dtype)
    if kind == "tensor":
        labels = torch.from_numpy(labels)
    elif kind == "list of scalars":
        labels = list(labels)
    elif kind == "object":
        labels = labels.astype(object)
    elif kind == ">":
        labels = labels.astype(labels.dtype.newbyteorder(">"))
    codes = class_codes(labels, 6)
    assert codes.classes == sorted(set(values)) and {type(label) for label in codes.classes} == {int}
    assert [codes.classes[code] for code in codes.queries] == values
    assert codes.gallery is codes.queries or torch.equal(codes.gallery, codes.queries)


def test_types_may_differ_between_queries_and_gallery():
    """A common type of int64 and uint64 would be float64, which merges them."""
    queries, gallery = np.array([-1, 2**62, 2**62 + 1]), np.array([2**62 + 1, 2**64 - 1, 2**62], dtype=np.uint64)
    codes = class_codes(queries, 3, gallery, 3)
    assert codes.classes == [-1, 2**62, 2**62 + 1, 2**64 - 1]
    assert codes.queries.tolist() == [0, 1, 2] and codes.gallery.tolist() == [2, 3, 1]
    assert class_codes([2**63, -1, 2**63 + 1], 3).queries.tolist() == [1, 0, 2]  # NumPy makes floats of this list


@pytest.mark.parametrize(
    "labels",
    [
        ["a", "b", "a", "ä"],
        np.array(["a", "b", "a", "ä"]),
        np.array(["a", "b", "a", "ä"], dtype=object),
        ("a", "b", "a", "ä"),
        [b"a", b"b", b"a", b"c"],
        [True, False, True, 7],
        ["1", 1, "1", 2],
        [torch.tensor(3), 4, np.int8(3), 5],
        [np.array(3), 4, np.array(3), 5],
        "pandas",
        "categories",
        "nullable",
    ],
    ids=str,
)
def test_kinds(labels):
    if isinstance(labels, str):
        pandas = needs("pandas")
        dtype = {"pandas": None, "categories": "category", "nullable": "Int64"}[labels]
        values = [5, 6, 5, 2**60] if labels == "nullable" else ["a", "b", "a", "c"]
        labels = pandas.Series(values, dtype=dtype, index=[9, 3, 3, 1])  # the index is no order
    first, second, third, fourth = class_codes(labels, 4).queries.tolist()
    assert first == third and len({first, second, fourth}) == 3


def test_ignored():
    codes = class_codes([3, -1, 3], 3, [-1, 3], 2, ignore_label=torch.tensor(-1))
    assert codes.classes == [3]
    assert codes.queries.tolist() == [0, IGNORED, 0] and codes.gallery.tolist() == [IGNORED, 0]
    assert class_codes(["junk", "x"], 2, ignore_label="junk").queries.tolist() == [IGNORED, 0]
    assert class_codes([3, -1], 2).classes == [-1, 3]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([1.0, 2.0]), TypeError, "labels must be integers, .*, got torch.float32: as floats"),
        (np.array([1.0, 2.0]), TypeError, "labels must be integers, strings or bools, got float64: as floats"),
        ([1, 2.5], TypeError, "labels must be integers, strings or bools, got 2.5 at position 1"),
        ([None, 1], TypeError, "got None at position 0"),
        ([[1], [2]], TypeError, r"got \[1\] at position 0"),
        ("ab", TypeError, "labels must be a tensor, an array or a sequence, one for each row, got 'ab'"),
        (5, TypeError, "labels must be a tensor, an array or a sequence, one for each row, got 5"),
        ({0: "a", 1: "a"}, TypeError, "labels must be a tensor, an array or a sequence, .*got {0: 'a', 1: 'a'}"),
        ({4, 7}, TypeError, "labels must be a tensor, an array or a sequence, .*got {4, 7}"),  # without an order
        (np.ma.masked_array([1, 2], mask=[False, True]), TypeError, "got None at position 1"),
        (np.array([[1], [2]]), ValueError, r"labels must have shape \(2,\), one for each row, got \(2, 1\)"),
        ([1], ValueError, "labels must have one entry for each of 2 rows, got 1"),
        (np.array(["2020-01-01"] * 2, dtype="datetime64[D]"), TypeError, "got datetime64"),
    ],
)  # fmt: skip
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        class_codes(labels, 2)


@pytest.mark.parametrize("ignore_label", [[-1, 3], (-1,), torch.tensor([-1, 3]), np.array([-1]), math.nan, -1.0, {-1}])
def test_one_label_is_ignored(ignore_label):
    """Several would be equal to no label: nothing would be ignored."""
    with pytest.raises(TypeError, match="ignore_label must be one integer, string or bool, got"):
        class_codes([3, -1], 2, ignore_label=ignore_label)
    assert class_codes([3, -1], 2, ignore_label=np.array(-1)).classes == [3]


def test_missing_values_of_pandas():
    pandas = needs("pandas")
    with pytest.raises(TypeError, match="labels must be integers, strings or bools, got"):
        class_codes(pandas.Series([1, None], dtype="Int64"), 2)
