"""Where tensors lie: fake tensors obey the rules of CUDA devices without one (but for their backward)."""

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.reducers import MeanReducer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from pml_ext.losses import MultiSimilarityLoss, ProxyAnchorLoss
from pml_ext.regularizers import DivergenceRegularizer
from pml_ext.trunks import GlobalPool2d
from tests.contract.cases import CASES, LABELS, NUM_CLASSES, SIZE, embeddings, grads_of, make

WITH_NETWORK = {name: case for name, case in CASES.items() if name.startswith("IntraBatchLoss")}
# shapes that fake tensors do not know
BY_VALUES = {"MultiSimilarityLoss in tiles", "SupConLoss", "NTXentLoss", "ContrastiveLoss", "ContrastiveLoss in tiles"}
MOVED = {name: case for name, case in CASES.items() if name not in WITH_NETWORK | dict.fromkeys(BY_VALUES)}
PAIRS = torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([0, 2]), torch.tensor([5, 5])


def unique_of_fake(x, return_counts=False):
    """Return as many values as there are classes: how many there are, fake tensors do not know."""
    x = x[:NUM_CLASSES]
    return (x, torch.ones_like(x)) if return_counts else x


@pytest.fixture
def cuda_rules(without_validation, monkeypatch):
    """Return the mode; validation is off, since fake tensors have no values."""
    monkeypatch.setattr(torch, "unique", unique_of_fake)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            LABELS.to("cuda")
    except (AssertionError, RuntimeError) as error:  # torch 2.5
        pytest.skip(f"the fake tensors of this torch need a CUDA driver: {error}")
    return mode


@pytest.mark.parametrize(
    ("name", "given", "rule"),
    [
        ("distance", CosineSimilarity, r"an object such as CosineSimilarity\(\), got the class CosineSimilarity"),
        ("distance", "cosine", r"an object such as CosineSimilarity\(\), got 'cosine'"),
        ("reducer", MeanReducer, r"an object such as MeanReducer\(\), got the class MeanReducer"),
        ("embedding_regularizer", 0.1, r"an object such as LpRegularizer\(\), got 0\.1"),
        ("weight_regularizer", 0.1, r"an object such as LpRegularizer\(\), got 0\.1"),
        ("weight_init_func", "normal", r"a function such as torch.nn.init.normal_, got 'normal'"),
    ],
)
def test_parts_of_the_wrong_kind(name, given, rule):
    with pytest.raises(TypeError, match=f"{name} must be {rule}"):
        ProxyAnchorLoss(3, 2, **{name: given})


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (
            lambda: ProxyAnchorLoss(3, 2, scale=3),
            "ProxyAnchorLoss has no argument scale: it has num_classes, .*alpha.*reducer",
        ),
        (
            lambda: MultiSimilarityLoss(miner=3),
            r"no argument miner: pass what the miner finds, loss_func\(embeddings, ",
        ),
        (lambda: MultiSimilarityLoss(weight_init_func=3), "no argument weight_init_func: losses with proxies have it"),
        (
            lambda: GlobalPool2d(pooling="avg"),
            "GlobalPool2d has no argument pooling: it has pool_type, p, collect_stats$",
        ),
        (lambda: DivergenceRegularizer(4, m=1), "DivergenceRegularizer has no argument m: it has num_learners, margin"),
    ],
)
def test_unknown_arguments(make_it, message):
    with pytest.raises(TypeError, match=message):
        make_it()


@pytest.mark.parametrize("labels_device", ["cpu", "cuda"])
@pytest.mark.parametrize("case", MOVED.values(), ids=MOVED)
def test_labels_indices_and_parameters_on_the_cpu(case, labels_device, cuda_rules):
    loss_func = make(case)
    with cuda_rules:
        embeddings = torch.randn(len(LABELS), SIZE, device="cuda", requires_grad=True)
        for indices_tuple in (None, PAIRS):
            loss = loss_func(embeddings, LABELS.to(labels_device), indices_tuple)
            assert loss.device.type == "cuda" and loss.requires_grad
        if case.refs:
            refs = embeddings.detach() + 1, LABELS.clone().to(labels_device)
            assert loss_func(embeddings, LABELS.to(labels_device), None, *refs).device.type == "cuda"
    assert {x.device.type for x in (*loss_func.parameters(), *loss_func.buffers())} <= {"cpu"}  # moved where used


@pytest.mark.parametrize("case", WITH_NETWORK.values(), ids=WITH_NETWORK)
def test_a_loss_with_a_network_must_be_moved(case, cuda_rules):
    loss_func = make(case)
    message = r"on the device of embeddings, cuda:0: call loss_func.to\(device\), got a refiner on cpu"
    with pytest.raises(ValueError, match=message), cuda_rules:
        loss_func(torch.randn(len(LABELS), SIZE, device="cuda"), LABELS)


@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "HybridLoss", "EnsembleLoss", "IntraBatchLoss"])
def test_checkpoints_hand_over_leaves_of_their_own(name):
    """A reentrant checkpoint computes a second time, with one leaf for each argument: one object becomes two."""
    emb = embeddings()
    (expected,) = grads_of(make(CASES[name])(emb, LABELS), emb)
    loss_func = make(CASES[name])
    checkpoint(loss_func, emb, LABELS, None, emb, LABELS, use_reentrant=True).backward()
    torch.testing.assert_close(emb.grad, expected)


def test_references_without_a_gradient_are_references():
    """``embeddings.detach()`` has the same memory, and is not the batch itself."""
    emb, loss_func = embeddings(), make(CASES["MultiSimilarityLoss"])
    loss = loss_func(emb, LABELS, None, emb.detach(), LABELS)
    torch.testing.assert_close(loss, loss_func(emb, LABELS, None, emb.detach().clone(), LABELS.clone()))
    assert loss != loss_func(emb, LABELS)
    with torch.no_grad():
        torch.testing.assert_close(loss_func(emb, LABELS, None, emb.detach(), LABELS), loss)
        torch.testing.assert_close(loss_func(emb, LABELS, None, emb, LABELS), loss_func(emb, LABELS))


def test_labels_that_are_missing_do_not_move_running_norms():
    """The refined embeddings are normalized before the loss on them asks for labels."""
    loss_func = make(CASES["IntraBatchLoss"])
    before = loss_func.norm.running_mean.clone(), loss_func.norm.num_batches_tracked.clone()
    with pytest.raises(ValueError, match="labels are required"):
        loss_func(embeddings())
    assert torch.equal(loss_func.norm.running_mean, before[0])
    assert torch.equal(loss_func.norm.num_batches_tracked, before[1])
    loss_func(embeddings(), LABELS)
    assert loss_func.norm.running_mean.any()
