import pytest
import torch

from pml_ext.visualization import mask_grid


def test_rows_and_columns(tmp_path):
    images, masks = torch.rand(2, 3, 8, 8), torch.rand(2, 4, 5, 3, 3)
    figure = mask_grid(images, masks, path=tmp_path / "masks.png")
    axes = figure.axes
    assert len(axes) == 2 * 5
    assert [axis.get_title() for axis in axes[:5]] == ["image", "learner 0", "learner 1", "learner 2", "learner 3"]
    means = masks.mean(2)
    assert axes[0].get_ylabel() == f"{means[0].min():.2f} to {means[0].max():.2f}"
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")


def test_learners_of_an_image_share_one_scale():
    """Flat masks of 0.4 and 0.6: the darkest and the brightest color, in each row for itself."""
    masks = torch.tensor([[0.4, 0.6], [0.1, 0.2]])[:, :, None, None].expand(2, 2, 4, 4)
    axes = mask_grid(torch.zeros(2, 4, 4), masks, alpha=1.0).axes
    pictures = [axis.get_images()[0].get_array() for axis in axes]
    assert (pictures[1] == pictures[4]).all()  # both dark
    assert (pictures[2] == pictures[5]).all()  # both bright
    assert pictures[1].mean() < 20
    assert pictures[2].mean() > 150
    mask_grid(torch.zeros(1, 4, 4), torch.ones(1, 2, 4, 4))  # no range


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (torch.rand(2, 8, 8), torch.rand(2, 4, 4), r"masks must have shape .* got \(2, 4, 4\)"),
        (torch.rand(2, 8, 8), torch.rand(3, 2, 4, 4), "images and masks must have one length, got 2 and 3"),
        (torch.rand(0, 8, 8), torch.rand(0, 2, 4, 4), "masks must have shape"),
    ],
)
def test_bad_arguments(images, masks, message):
    with pytest.raises(ValueError, match=message):
        mask_grid(images, masks)
