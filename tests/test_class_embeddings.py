import importlib
import sys

import numpy as np
import pytest
import torch

from pml_ext import class_embeddings
from pml_ext.class_embeddings import from_samples, from_text
from pml_ext.losses import AdaptiveAdditiveMarginLoss
from tests.needs import needs

pytestmark = pytest.mark.xdist_group("text")  # one worker imports sentence-transformers

NAMES = ["small letter a", "small letter b", "digit one", "digit two"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model of sentence-transformers, made here: random vectors of words, averaged."""
    sentence_transformers = needs("sentence_transformers", "text")
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", *dict.fromkeys(" ".join(NAMES).split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("package") / "tiny_text_model" / "model"
    sentence_transformers.SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu").save(
        str(folder)
    )
    (folder.parent / "__init__.py").touch()
    return folder


def test_model_in_a_folder(model_folder):
    rows = from_text([*NAMES, None, " "], model=model_folder, device="cpu")
    assert rows.shape == (6, 8)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows[:4].norm(dim=1), torch.ones(4))
    assert rows[4:].isnan().all()
    assert rows[0] @ rows[1] > rows[0] @ rows[2]  # two words of three in common
    unknown = from_text(NAMES, model=str(model_folder), template="{} unseen", device="cpu")
    assert not torch.allclose(unknown, rows[:4])


def test_model_in_an_installed_package(model_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(model_folder.parent.parent))
    importlib.invalidate_caches()
    expected = from_text(NAMES, model=model_folder, device="cpu")
    for name in ("tiny_text_model", "tiny-text-model"):
        assert torch.equal(from_text(NAMES, model=name, device="cpu"), expected)


def test_module_without_a_folder_is_no_model(model_folder, monkeypatch):
    """Its parent folder is that of all packages: models of others must not be found there."""
    root = model_folder.parent.parent
    (root / "tiny_plain_module.py").touch()
    monkeypatch.syspath_prepend(str(root))
    importlib.invalidate_caches()
    assert class_embeddings._model_path("tiny_plain_module") == "tiny_plain_module"


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'pml-ext\[text\]', or use model=\"tfidf\""):
        from_text(NAMES)


def test_tfidf():
    rows = from_text([*NAMES, None], model="tfidf")
    torch.testing.assert_close(rows[:4].norm(dim=1), torch.ones(4))
    assert rows[4].isnan().all()
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2]
    assert rows[2] @ rows[3] > rows[2] @ rows[0]


@pytest.mark.parametrize("model", ["tfidf", None])
def test_feeds_the_loss(model, model_folder):
    rows = from_text([*NAMES, None], model=model or model_folder)
    loss_func = AdaptiveAdditiveMarginLoss(5, 3, class_embeddings=rows, base_margin=0.1)
    margins = loss_func.get_margins(torch.arange(5))
    assert 0.1 <= margins[0, 1] < margins[0, 2] <= 0.4001
    torch.testing.assert_close(margins[4], torch.tensor([0.1, 0.1, 0.1, 0.1, 0.0]))


def test_bad_names():
    with pytest.raises(
        TypeError, match="names must be a sequence of strings, one for each class, got the string 'abc'"
    ):
        from_text("abc", model="tfidf")
    with pytest.raises(TypeError, match=r"in the order of the labels, such as \[texts\[name\] for .*, got a dict$"):
        from_text({"cat": "small furry pet"}, model="tfidf")
    with pytest.raises(TypeError, match=r"in the order of the labels, got a set$"):
        from_text({"cat", "dog"}, model="tfidf")
    with pytest.raises(TypeError, match="names must be strings or None, got 3"):
        from_text(["a", 3], model="tfidf")
    with pytest.raises(ValueError, match="names must contain at least one text, got 2 without any"):
        from_text([None, ""], model="tfidf")
    with pytest.raises(ValueError, match=r"template must contain \{\}, got 'a photo'"):
        from_text(NAMES, model="tfidf", template="a photo")


def test_class_means():
    features = torch.arange(24.0).reshape(4, 2, 3)
    features[3, 0, 0] = torch.nan
    rows = from_samples(features, torch.tensor([2, 0, 2, 2], dtype=torch.int32), num_classes=4)
    assert rows.shape == (4, 6)
    torch.testing.assert_close(rows[2], (features[0] + features[2]).flatten() / 2)  # the sample with NaN is left out
    torch.testing.assert_close(rows[0], features[1].flatten())
    assert rows[[1, 3]].isnan().all()
    assert from_samples(features.double().numpy(), torch.tensor([2, 0, 2, 2])).dtype == torch.float64
    assert from_samples(torch.tensor([1, 2, 4]), torch.tensor([0, 1, 1])).tolist() == [[1.0], [3.0]]


@pytest.mark.parametrize(
    ("features", "labels", "num_classes", "error", "message"),
    [
        (torch.ones(3, 2), torch.ones(3), None, TypeError, "labels must have an integer dtype, got torch.float32"),
        (
            torch.ones(3, 2).bool(),
            torch.ones(3).long(),
            None,
            TypeError,
            "features must have a floating point or integer",
        ),
        (torch.ones(3, 2), torch.ones(2).long(), None, ValueError, r"for each sample, got shapes \(3, 2\), \(2,\)"),
        (torch.ones(0, 2), torch.ones(0).long(), None, ValueError, "one row for each sample"),
        (
            torch.ones(2, 2),
            torch.tensor([0, -1]),
            None,
            ValueError,
            "labels must be >= 0 and < num_classes = 1, got -1",
        ),
        (
            torch.ones(2, 2),
            torch.tensor([0, 1]),
            2.5,
            ValueError,
            r"num_classes must be None or an integer >= 1, got 2\.5",
        ),
        (torch.ones(2, 2), torch.tensor([0, 3]), 3, ValueError, "labels must be >= 0 and < num_classes = 3, got 3"),
    ],
)
def test_bad_samples(features, labels, num_classes, error, message):
    with pytest.raises(error, match=message):
        from_samples(features, labels, num_classes)


@pytest.mark.parametrize(
    "make", [lambda x: x[::-1], lambda x: x.astype(x.dtype.newbyteorder())], ids=["strides", "bytes"]
)
def test_arrays_of_any_layout(make):
    features, labels = np.arange(8.0).reshape(4, 2), np.array([2, 0, 2, 2])
    expected = from_samples(make(features).tolist(), make(labels).tolist())
    assert expected[0].any()
    torch.testing.assert_close(from_samples(make(features), make(labels)), expected.double(), equal_nan=True)
    assert torch.equal(from_samples(torch.eye(2), torch.tensor([1, 0], dtype=torch.uint64)), torch.eye(2).flip(0))


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (np.array([["a"], ["b"]]), TypeError, "features must be a tensor or an array of numbers, got an array of <U1"),
        (
            np.array([[None], [1]]),
            TypeError,
            "features must be a tensor or an array of numbers, got an array of object",
        ),
        ([[1], [2, 3]], TypeError, "features must be a tensor or an array of numbers, got list"),
        (torch.ones(2, 1, device="meta"), ValueError, "features must hold numbers, got a tensor on the meta device"),
        (np.ma.array([[1.0], [2.0]], mask=[[0], [1]]), TypeError, r"features must have no masked values, .*\.filled"),
        (torch.eye(2).to_sparse(), TypeError, r"features must be a dense tensor, got torch\.sparse_coo"),
    ],
)
def test_what_is_no_array_of_numbers(features, error, message):
    with pytest.raises(error, match=message):
        from_samples(features, torch.tensor([0, 1]))


def test_module_is_reachable():
    import pml_ext

    assert pml_ext.class_embeddings is class_embeddings
