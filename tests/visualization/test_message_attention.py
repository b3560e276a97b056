import numpy as np
import pytest
import torch

from pml_ext.visualization import batch_attention


def test_classes_are_sorted(tmp_path):
    labels = torch.tensor([2, 0, 2, 0])
    weights = torch.zeros(4, 4)
    weights[0, 2] = weights[2, 0] = 0.5  # inside class 2
    weights[1, 0] = 0.25  # from class 2 to class 0
    weights[3, 3] = 1.0
    figure = batch_attention(weights, labels, path=tmp_path / "attention.png")
    axis, _ = figure.axes  # and the color bar
    expected = np.array([[0, 0, 0.25, 0], [0, 1, 0, 0], [0, 0, 0, 0.5], [0, 0, 0.5, 0]])
    np.testing.assert_array_equal(axis.get_images()[0].get_array(), expected)
    assert axis.get_title() == "head 0\nitself 0.25, class 0.25, others 0.06"
    assert [line.get_ydata()[0] for line in axis.lines] == [1.5, 0]  # one line across, one down
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_heads_and_their_mean():
    weights = torch.rand(2, 6, 6).softmax(2)
    axes = batch_attention(weights, [0, 0, 1, 1, 2, 2]).axes
    assert [axis.get_title().split("\n")[0] for axis in axes[:3]] == ["mean", "head 0", "head 1"]
    np.testing.assert_allclose(axes[0].get_images()[0].get_array(), weights.mean(0).numpy())
    limits = {axis.get_images()[0].get_clim() for axis in axes[:3]}
    assert limits == {(0, weights.max().item())}


@pytest.mark.parametrize(
    "weights", [torch.rand(3, 3), torch.rand(2, 4, 3), torch.rand(1, 1, 4, 4), torch.rand(0, 4, 4)]
)
def test_bad_shapes(weights):
    with pytest.raises(ValueError, match=r"weights must have shape \(h, 4, 4\) for 4 labels, got"):
        batch_attention(weights, torch.arange(4))
