import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pml_ext.datasets.image_files import ImageFiles
from pml_ext.recipes import embed, retrieval_metrics
from pml_ext.recipes.evaluation import embed_readable


def test_embed():
    x, labels = torch.randn(10, 4), torch.arange(10)
    trunk = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).train()
    embeddings, embedded_labels = embed(trunk, torch.utils.data.TensorDataset(x, labels), batch_size=4)
    assert torch.equal(embedded_labels, labels)
    torch.testing.assert_close(embeddings, nn.functional.normalize(trunk[1](x)).detach())  # no dropout
    assert trunk.training
    assert not embeddings.is_inference()  # may be the input of a linear probe
    half, _ = embed(trunk, torch.utils.data.TensorDataset(x, labels), autocast=torch.bfloat16)
    assert half.dtype == torch.float32 and not torch.equal(half, embeddings)
    torch.testing.assert_close(half, embeddings, atol=2e-2, rtol=0)


def test_metrics_by_hand():
    """Four points on a line of classes 0, 0, 1, 1: one query of class 1 has a neighbor of class 0 before its own."""
    angles = torch.tensor([0.0, 0.1, 0.25, 0.9])
    embeddings, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 1])
    metrics = retrieval_metrics(embeddings, labels)
    # 0: 1 right; 1: 0 right; 2: 1 wrong; 3: 2 right. One match each, so that all metrics agree.
    assert set(metrics.values()) == {0.75}
    assert {type(value) for value in metrics.values()} == {float}


def test_metrics_of_a_slice():
    embeddings, labels = torch.randn(12, 8), torch.arange(12) // 3
    part = embeddings[:, 2:5]
    assert not part.is_contiguous()
    expected = retrieval_metrics(part.clone(), labels)
    assert retrieval_metrics(part, labels) == expected
    everyone = retrieval_metrics(part, labels, (part, labels), ("precision_at_1",))
    assert everyone == retrieval_metrics(part.clone(), labels, (part.clone(), labels), ("precision_at_1",))


def test_metrics_in_a_gallery():
    gallery = torch.eye(3), torch.tensor([7, 8, 9])
    metrics = retrieval_metrics(torch.eye(3)[[1, 2]], torch.tensor([8, 7]), gallery, ("precision_at_1",))
    assert metrics == {"precision_at_1": pytest.approx(0.5)}


class Returns(nn.Module):
    """A network without parameters that returns what a function makes of its images."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def with_rows(value, *rows):
    """Images 0, 1, 2, ... of one number; the network gives ``value`` for some of them."""

    def forward(x):
        wrong = torch.isin(x[:, :1], torch.tensor(rows, dtype=x.dtype))
        return torch.where(wrong, torch.tensor([1.0, value]), torch.tensor([1.0, 2.0]))

    return forward


@pytest.mark.parametrize(
    ("forward", "kind", "message"),
    [
        (
            with_rows(float("nan"), 6, 9, 10),
            ValueError,
            r"trunk must return finite embeddings, got nan in row 6; 1 of the first 8 rows: 6$",
        ),
        (
            with_rows(float("inf"), 0, 1, 2, 3),
            ValueError,
            r"finite embeddings, got inf in row 0; 4 of the first 4 rows: 0, 1, 2, 3$",
        ),
        (with_rows(-float("inf"), 11), ValueError, "got -inf in row 11; 1 of the first 12 rows: 11$"),
        (
            with_rows(1e30, 5),
            ValueError,
            r"got 1e\+30, which makes a row too long for float32, in row 5; 1 of the first 8 rows: 5$",
        ),
        (
            lambda x: x.double() + 1e200,
            ValueError,
            r"got 1e\+200, which makes a row too long for float32, in row 0; 4 of ",
        ),
        (lambda x: (x, x), TypeError, "trunk must return one tensor, got tuple$"),
        (lambda x: {"x": x}, TypeError, "trunk must return one tensor, got dict$"),
        (lambda x: x[1:], ValueError, r"a row for each image, shape \(4, D\), got \(3, 2\)$"),
        (lambda x: x[0], ValueError, r"a row for each image, shape \(4, D\), got \(2,\)$"),
        (lambda x: x[:, :0], ValueError, r"shape \(4, D\), got \(4, 0\)$"),
        (lambda x: x[:, :, None, None], ValueError, r"got \(4, 2, 1, 1\): pool or flatten feature maps$"),
        (lambda x: x.long(), TypeError, r"trunk must return floating point, got torch\.int64$"),
        (lambda x: x[:, : 1 + int(x[0, 0] < 8)], ValueError, "rows of one width, got 2 and, from row 8 on, 1$"),
    ],
)
def test_networks_that_cannot_be_used(forward, kind, message):
    images = torch.arange(13.0)[:, None].expand(13, 2)
    dataset = torch.utils.data.TensorDataset(images, torch.arange(13))
    trunk = Returns(forward).train()
    with pytest.raises(kind, match=message):
        embed(trunk, dataset, batch_size=4)
    assert trunk.training


def test_no_more_than_five_rows_are_named():
    dataset = torch.utils.data.TensorDataset(torch.arange(8.0)[:, None], torch.arange(8))
    with pytest.raises(ValueError, match=r"got nan in row 1; 6 of the first 8 rows: 1, 2, 3, 4, 5, \.\.\.$"):
        embed(Returns(with_rows(float("nan"), *range(1, 7))), dataset)


def test_rows_of_zeros_and_large_numbers_stay_usable():
    x = torch.tensor([[0.0, 0.0], [3e18, 4e18], [3e-10, 4e-10]])
    embeddings, _ = embed(nn.Identity(), torch.utils.data.TensorDataset(x, torch.arange(3)))
    torch.testing.assert_close(embeddings, torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.6, 0.8]]))


@pytest.mark.parametrize(
    ("dataset", "kind", "message"),
    [
        ([], ValueError, "dataset must have at least one image, got none"),
        ([torch.ones(2), torch.ones(2)], ValueError, "an image and a label for each index, got one thing"),
        ([(torch.ones(2), 0, "a.png")], ValueError, "an image and a label for each index, got 3 things"),
        ([{"image": torch.ones(2), "label": 0}], ValueError, "for each index, got a dictionary of image, label"),
        ([(torch.ones(2), "cat")], TypeError, "dataset must give integers as labels, got 'cat'"),
        ([(torch.ones(2), 2.5)], TypeError, "dataset must give integers as labels, got 2.5"),
        (
            torch.utils.data.TensorDataset(torch.ones(3, 2), torch.ones(3, 1).long()),
            ValueError,
            r"dataset must give one label for each image, got labels of shape \(3, 1\)",
        ),
        ([{0: torch.ones(2), 1: 0}], ValueError, "for each index, got a dictionary of 0, 1"),
        ([(torch.ones(2), None)], TypeError, "as images and integers as labels, got <class 'NoneType'>$"),
        ([(Image.new("L", (2, 2)), 0)], TypeError, "makes tensors of images, got <class 'PIL.Image.Image'>$"),
        (torch.utils.data.DataLoader([(torch.ones(2), 0)]), TypeError, r"such as loader\.dataset, got a DataLoader"),
    ],
)
def test_data_that_cannot_be_embedded(dataset, kind, message):
    with pytest.raises(kind, match=message):
        embed(nn.Identity(), dataset)


def test_a_gallery_is_a_pair():
    with pytest.raises(TypeError, match="gallery must be a pair of embeddings and labels, or None, got a Tensor"):
        retrieval_metrics(torch.eye(2), torch.arange(2), torch.eye(2))


def test_placeholders_are_not_embedded(tmp_path):
    """Nor counted: the network would refuse them, as it refuses black."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i in (0, 3, 4):
        Image.new("RGB", (4, 4), (40 * i + 1, 9, 9)).save(paths[i])
    files = ImageFiles(paths, [5, 1, 2, 3, 4, 0], lambda image: torch.from_numpy(np.array(image)).float().flatten())
    trunk = NanForZeros()
    embeddings, labels, readable = embed_readable(trunk, files, batch_size=2)  # the last batch is lost as a whole
    assert readable.tolist() == [True, False, False, True, True, False]
    assert labels.tolist() == [5, 3, 4] and embeddings.isfinite().all()
    np.testing.assert_allclose(embeddings, embed(trunk, torch.utils.data.Subset(files, [0, 3, 4]))[0])
    with pytest.raises(ValueError, match="dataset must have at least one image that can be read, got 3 that cannot"):
        embed_readable(trunk, torch.utils.data.Subset(files, [1, 2, 5]))
    files.transform = lambda image: int("a fault of the transform")
    with pytest.raises(ValueError, match="invalid literal"):
        embed_readable(trunk, files)


class NanForZeros(nn.Module):
    def forward(self, x):
        return x / x.abs().amax(1, keepdim=True)
