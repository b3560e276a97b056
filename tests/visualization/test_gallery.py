import matplotlib.colors
import numpy as np
import pytest
import torch
from PIL import Image

from pml_ext.visualization import retrieval_gallery

ANGLES = torch.tensor([0.0, 0.1, 0.3, 0.6, 3.0])
EMB = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
LABELS = torch.tensor([0, 1, 0, 1, 0])
IMAGES = (torch.arange(5)[:, None, None] * 50).expand(5, 4, 4).to(torch.uint8)


def test_neighbors_and_frames(tmp_path):
    figure = retrieval_gallery(EMB, LABELS, IMAGES, queries=[0, 3], num_neighbors=4, path=tmp_path / "gallery.png")
    axes = np.array(figure.axes).reshape(2, 5)
    shown = [[int(ax.images[0].get_array().flat[0]) // 50 for ax in row] for row in axes]
    assert shown == [[0, 1, 2, 3, 4], [3, 2, 1, 0, 4]]  # by angle, without the query itself
    frames = [[matplotlib.colors.to_hex(ax.spines["top"].get_edgecolor()) for ax in row[1:]] for row in axes]
    green, red = "#1a9641", "#d7191c"
    assert frames == [[red, green, red, green], [red, green, red, red]]
    assert [ax.get_title() for ax in axes[0]] == ["query", "1.00 ✗", "0.96", "0.83 ✗", "-0.99"]
    assert (tmp_path / "gallery.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(5, 1, 4, 4),
        torch.rand(5, 3, 4, 4),
        [Image.new("RGB", (6, 4))] * 5,
        [np.zeros((4, 4, 3), dtype=np.uint8)] * 5,
        np.zeros((5, 4, 4)),
    ],
)
def test_kinds_of_images(images):
    figure = retrieval_gallery(EMB, LABELS, images, num_queries=2, num_neighbors=9)
    assert len(figure.axes) == 2 * 5  # fewer neighbors than asked for


def drawn(axis):
    """The colors of a picture's pixels, as matplotlib maps them."""
    (picture,) = axis.images
    return picture.to_rgba(picture.get_array(), bytes=True)[..., :3]


@pytest.mark.parametrize("half", [0.5, 128], ids=["float", "uint8"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_gray_is_drawn_as_it_is(kind, half):
    """One range for all images: not black, and not stretched to that of the picture."""
    one = np.full((4, 4), half, dtype=np.uint8 if half == 128 else np.float32)
    images = [one] * 5 if kind is list else kind(np.stack([one] * 5))
    figure = retrieval_gallery(EMB, LABELS, images, num_queries=1)
    assert {value for axis in figure.axes for value in drawn(axis).flat} == {128}


def test_kinds_of_embeddings():
    expected = [axis.get_title() for axis in retrieval_gallery(EMB, LABELS, IMAGES, queries=[0, 3]).axes]
    for embeddings in (EMB.numpy(), EMB.double().numpy(), EMB.clone().requires_grad_()):
        figure = retrieval_gallery(embeddings, LABELS.numpy(), IMAGES, queries=[0, 3])
        assert [axis.get_title() for axis in figure.axes] == expected


def test_names_under_the_pictures(tmp_path):
    names = [f"photos/${i}$/a_long_name_of_an_image_{i}.jpg" for i in range(4)] + ["photos/b.jpg"]
    figure = retrieval_gallery(EMB, LABELS, IMAGES, queries=[0], names=names, path=tmp_path / "gallery.png")
    texts = [axis.get_xlabel() for axis in figure.axes]
    assert texts[1] == "photos/$1$\na_long_name\u2026image_1.jpg" and texts[4] == "photos\nb.jpg"
    assert max(len(line) for text in texts for line in text.split("\n")) == 23
    assert not any(axis.xaxis.label.get_parse_math() for axis in figure.axes)
    for i in range(5):
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
    figure = retrieval_gallery(EMB, LABELS, [tmp_path / f"{i}.png" for i in range(5)], queries=[0])
    assert [axis.get_xlabel() for axis in figure.axes] == [f"{i}.png" for i in range(5)]
    assert {axis.get_xlabel() for axis in retrieval_gallery(EMB, LABELS, IMAGES, queries=[0]).axes} == {""}


def test_random_queries_are_of_different_classes():
    labels = torch.arange(40) // 4
    figure = retrieval_gallery(
        torch.randn(40, 3), labels, torch.arange(40, dtype=torch.uint8)[:, None, None].expand(40, 2, 2), num_neighbors=1
    )
    queries = [int(ax.images[0].get_array().flat[0]) for ax in figure.axes if ax.get_title() == "query"]
    assert len({q // 4 for q in queries}) == len(queries) == 8


def test_random_queries_have_something_to_find():
    """A class with one image has no right neighbor, nor has one that is not searched."""
    labels = torch.tensor([0, 1, 1, 2, 3, 3, 2])
    images = torch.arange(7, dtype=torch.uint8)[:, None, None].expand(7, 2, 2)
    for seed in range(5):
        common = {"num_queries": 5, "num_neighbors": 1, "seed": seed, "searched": [0, 1, 2, 3]}
        figure = retrieval_gallery(torch.randn(7, 3), labels, images, **common)
        queries = [int(ax.images[0].get_array().flat[0]) for ax in figure.axes if ax.get_title() == "query"]
        assert set(queries[:3]) == {1, 2, 6} and labels[queries[:2]].tolist() in ([1, 2], [2, 1])
        assert labels[queries[3:]].sort().values.tolist() == [0, 3]


def test_bad_arguments():
    with pytest.raises(ValueError, match="one length of at least 2, got 5, 4, 5"):
        retrieval_gallery(EMB, LABELS[:4], IMAGES)
    assert len(retrieval_gallery(EMB, LABELS, IMAGES, queries=torch.tensor([0, 1]), num_neighbors=2).axes) == 6
    for bad, message in ((EMB / 0, "embeddings must be finite"), (EMB[:, 0], "embeddings must have shape")):
        with pytest.raises(ValueError, match=message):
            retrieval_gallery(bad, LABELS, IMAGES)
    with pytest.raises(ValueError, match=r"images\[\d\] must have floats in 0 to 1, got -2 to -2; normalized"):
        retrieval_gallery(EMB, LABELS, torch.rand(5, 3, 4, 4) * 0 - 2)
    with pytest.raises(ValueError, match=r"queries must be indices in 0 to 4, at least one, got \[5\]"):
        retrieval_gallery(EMB, LABELS, IMAGES, queries=[5])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"images": None}, TypeError, "images must have a length, with an entry for each image, got NoneType"),
        ({"images": iter(IMAGES)}, TypeError, "images must have a length, with an entry for each image, got "),
        ({"images": dict(enumerate(IMAGES))}, TypeError, "images must be a tensor, a sequence of .*, got dict"),
        ({"images": {1, 2, 3, 4, 5}}, TypeError, "images must be a tensor, a sequence of .*, got set"),
        ({"images": "abcde"}, TypeError, "images must be a tensor, a sequence of .*, got str"),
        ({"images": IMAGES.expand(2, 5, 4, 4).transpose(0, 1)}, ValueError, r"images must have shape \(N, H, W\), .*"),
        ({"images": ["gone.png"] * 5}, ValueError, r"images\[\d\]: cannot read image gone\.png: "),
        ({"labels": None}, TypeError, "labels must have a length, with an entry for each image, got NoneType"),
        ({"labels": [*LABELS.tolist(), 0]}, ValueError, "one length of at least 2, got 5, 6, 5"),
        ({"names": ["a"] * 4}, ValueError, "names must have one entry for each of 5 embeddings, got 4"),
        ({"queries": [0.5]}, TypeError, r"queries must be indices in 0 to 4, at least one, got \[0\.5\]"),
        ({"queries": torch.tensor([0.0])}, TypeError, "queries must be indices in 0 to 4, at least one, got tensor"),
        ({"queries": 1}, TypeError, "queries must be indices in 0 to 4, at least one, got 1"),
        ({"queries": []}, ValueError, r"queries must be indices in 0 to 4, at least one, got \[\]"),
        ({"searched": []}, ValueError, r"searched must be indices in 0 to 4, at least one, got \[\]"),
        ({"searched": [1, -1, 9]}, ValueError, r"searched must be indices in 0 to 4, at least one, got \[-1, 9\]"),
        ({"num_queries": 0}, ValueError, "num_queries must be an integer >= 1, got 0"),
        ({"num_neighbors": -1}, ValueError, "num_neighbors must be an integer >= 1, got -1"),
        ({"num_neighbors": 2.5}, ValueError, r"num_neighbors must be an integer >= 1, got 2\.5"),
    ],
)
def test_what_cannot_be_drawn(changes, kind, message):
    with pytest.raises(kind, match=message):
        retrieval_gallery(**({"embeddings": EMB, "labels": LABELS, "images": IMAGES} | changes))


def test_an_image_that_is_searched_twice_is_shown_once():
    """The query, too, was its own neighbor where it was named twice."""
    figure = retrieval_gallery(EMB, LABELS, IMAGES, queries=[0], searched=[3, 0, 1, 0, 3])
    assert [int(axis.images[0].get_array().flat[0]) // 50 for axis in figure.axes] == [0, 1, 3]
