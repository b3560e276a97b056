import pytest
import timm
import torch
from torch import nn

from pml_ext.recipes import embed
from pml_ext.trunks import AttentionEnsemble, BackboneFeatures, GlobalLocalTrunk, PooledTrunk

IMAGES = torch.randn(3, 3, 64, 64)


@pytest.mark.parametrize("kind", ["pooled", "pooled, attention", "two levels", "learners"])
def test_features_are_those_of_the_backbone_whatever_the_head(kind):
    donor = timm.create_model("test_resnet").eval()
    state = donor.state_dict()
    if kind == "learners":
        trunk = AttentionEnsemble.from_backbone("test_resnet", None, 2, 8, input_size=(3, 64, 64), weights=state)
    elif kind == "two levels":
        trunk = GlobalLocalTrunk("test_resnet", 8, weights=state)
    else:
        attention = "normalized" if "attention" in kind else None
        trunk = PooledTrunk("test_resnet", 8, weights=state, attention=attention, pool_type="max")
    expected = donor.forward_features(IMAGES).mean((2, 3))
    torch.testing.assert_close(BackboneFeatures(trunk).eval()(IMAGES), expected)
    torch.testing.assert_close(BackboneFeatures(nn.DataParallel(trunk)).eval()(IMAGES), expected)
    rows, _ = embed(BackboneFeatures(trunk), torch.utils.data.TensorDataset(IMAGES, torch.arange(3)))
    torch.testing.assert_close(rows, nn.functional.normalize(expected))


def test_other_networks_are_refused():
    with pytest.raises(
        TypeError, match="trunk must be a trunk of this package, such as PooledTrunk\\(name\\), got a Linear"
    ):
        BackboneFeatures(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got 'resnet18'"):
        BackboneFeatures("resnet18")
