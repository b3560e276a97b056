"""What pytorch-metric-learning demands of a loss, checked for every loss that the package exports."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from pytorch_metric_learning import losses, miners, reducers, regularizers
from pytorch_metric_learning.losses.mixins import WeightRegularizerMixin
from pytorch_metric_learning.utils import common_functions as c_f

import pml_ext.losses
from pml_ext.losses import CrossBatchMemory, HybridLoss, SelfSupervisedLoss
from tests.contract.cases import CASES, LABELS, NUM_CLASSES, SIZE, Case, embeddings, grads_of, make, mean_of, trained

NONE = torch.empty(0, dtype=torch.long)
MINERS = {
    name: cls
    for name, cls in inspect.getmembers(miners, inspect.isclass)
    if issubclass(cls, miners.BaseMiner)
    and name not in ("BaseMiner", "EmbeddingsAlreadyPackagedAsTriplets")  # the latter needs one triplet after another
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_metric_learning")


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def test_every_exported_loss_has_a_case():
    exported = [getattr(pml_ext.losses, name) for name in pml_ext.losses.__all__]
    ours = {cls.__name__ for cls in exported if issubclass(cls, losses.BaseMetricLossFunction)}
    assert ours == {name.split()[0] for name in CASES}
    assert {cls.__name__ for cls in exported} - ours == {"CrossBatchMemory", "SelfSupervisedLoss"}


def test_forward_has_pml_arguments_in_order(case):
    names = list(inspect.signature(make(case).forward).parameters)
    assert names == ["embeddings", "labels", "indices_tuple", "ref_emb", "ref_labels"]


def test_scalar_with_gradient(case, device):
    emb = embeddings()
    loss = make(case).to(device)(emb.to(device), LABELS)
    assert loss.shape == ()
    assert loss > 0
    (grad,) = grads_of(loss, emb)
    assert grad.isfinite().all()
    assert grad.abs().sum(1).gt(0).all()


@pytest.mark.parametrize("name", MINERS)
def test_miners(case, name, device):
    emb = embeddings()
    indices_tuple = MINERS[name]()(emb.to(device), LABELS.to(device))
    assert any(len(x) for x in indices_tuple)
    loss_func = make(case).to(device)
    loss = loss_func(emb.to(device), LABELS, indices_tuple)
    (grad,) = grads_of(loss, emb)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert grad.any()


def test_what_is_mined_counts(case):
    emb = embeddings(torch.float64)
    loss_func = make(case).double()
    for miner in (miners.BatchHardMiner(), miners.MultiSimilarityMiner(epsilon=0.01)):  # a 3-tuple, a 4-tuple
        mined = loss_func(emb, LABELS, miner(emb, LABELS))
        assert (mined != loss_func(emb, LABELS)) == case.uses_labels


def test_packaged_triplets(case):
    labels = torch.tensor([0, 0, 1] * 4)
    indices_tuple = miners.EmbeddingsAlreadyPackagedAsTriplets()(embeddings(), labels)
    assert make(case)(embeddings(), labels, indices_tuple) > 0


def test_repeated_pairs_and_identical_rows(case):
    emb = embeddings()
    indices_tuple = tuple(x.repeat(3) for x in miners.MultiSimilarityMiner()(emb, LABELS))
    torch.testing.assert_close(
        make(case)(emb, LABELS, indices_tuple),
        make(case)(emb, LABELS, miners.MultiSimilarityMiner()(emb, LABELS)),
    )
    same = emb.detach()[:1].repeat(4, 1).requires_grad_()
    (grad,) = grads_of(make(case)(same, LABELS[:4]), same)
    assert grad.isfinite().all()


@pytest.mark.parametrize("empty", [NONE, torch.tensor([])], ids=["int64", "float32"])
def test_empty_tuples(case, empty):
    """A pair loss of no pairs is 0, with a graph; a proxy loss counts every sample."""
    emb = embeddings()
    for length in (3, 4):
        loss = make(case)(emb, LABELS, (empty,) * length)
        (grad,) = grads_of(loss, emb)
        loss_func = make(case)
        if case.without_pairs is not None:
            torch.testing.assert_close(loss, case.without_pairs(loss_func, emb))
            assert grad.any()
        elif list(loss_func.parameters()) or not case.uses_labels:
            torch.testing.assert_close(loss, loss_func(emb, LABELS))
            assert grad.any()
        else:
            assert loss == 0
            assert not grad.any()


@pytest.mark.parametrize(
    ("emb_rows", "labels"),
    [
        (slice(None), torch.zeros(12, dtype=torch.long)),
        (slice(0, 1), torch.tensor([2])),
        (slice(0, 5), torch.arange(5)),
        (slice(0, 0), torch.empty(0, dtype=torch.long)),
    ],
    ids=["one class", "one sample", "all different", "no sample"],
)
def test_degenerate_batches(case, emb_rows, labels):
    emb = embeddings()
    loss_func = make(case)
    loss = loss_func(emb[emb_rows], labels)
    loss.backward()
    assert loss.isfinite()
    assert emb.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(loss_func).values())


def test_zero_embeddings(case):
    emb = torch.zeros(12, SIZE, requires_grad=True)
    (grad,) = grads_of(make(case)(emb, LABELS), emb)
    assert grad.isfinite().all()


class TestReducers:
    def each(self, case, emb):
        """Return the unreduced sub-losses."""
        return make(case, reducer=reducers.DoNothingReducer())(emb, LABELS)

    def test_do_nothing_gives_every_sub_loss(self, case):
        emb = embeddings()
        loss_func = make(case, embedding_regularizer=regularizers.LpRegularizer())
        loss_func.set_reducer(reducers.DoNothingReducer())
        found = loss_func(emb, LABELS)
        assert set(found) == set(loss_func.sub_loss_names())
        for name in loss_func._sub_loss_names():
            entry = found[name]
            if entry["reduction_type"] == "element":
                length = NUM_CLASSES if case.per_class else len(LABELS)
                assert entry["losses"].shape == entry["indices"].shape == (length,)
                assert "divisor" in entry
            else:
                assert entry["reduction_type"] == "already_reduced"
                assert entry["losses"].ndim == 0

    @pytest.mark.parametrize(
        ("reducer", "by_hand"),
        [
            (reducers.MeanReducer(), lambda x: x.mean()),
            (reducers.SumReducer(), lambda x: x.sum()),
            (reducers.AvgNonZeroReducer(), lambda x: mean_of(x[x > 0])),
            (reducers.ThresholdReducer(low=0.1, high=20), lambda x: mean_of(x[(x > 0.1) & (x < 20)])),
        ],
        ids=["Mean", "Sum", "AvgNonZero", "Threshold"],
    )
    def test_values(self, case, reducer, by_hand):
        emb = embeddings()
        each = self.each(case, emb).values()
        expected = sum(entry["losses"] if case.reduced else by_hand(entry["losses"]) for entry in each)
        torch.testing.assert_close(make(case, reducer=reducer)(emb, LABELS), expected)

    def test_divisor(self, case):
        emb = embeddings()
        each = self.each(case, emb).values()
        expected = sum(e["losses"] if case.reduced else e["losses"].sum() / e["divisor"] for e in each)
        torch.testing.assert_close(make(case, reducer=reducers.DivisorReducer())(emb, LABELS), expected)

    def test_class_weighted(self, case):
        """Weights follow the class, in whatever order the samples come."""
        emb, weights = embeddings(), torch.arange(1.0, NUM_CLASSES + 1)
        classes = torch.arange(NUM_CLASSES) if case.per_class else LABELS
        each = self.each(case, emb).values()
        expected = sum(e["losses"] if case.reduced else (e["losses"] * weights[classes]).mean() for e in each)
        loss_func = make(case, reducer=reducers.ClassWeightedReducer(weights))
        torch.testing.assert_close(loss_func(emb, LABELS), expected)
        order = torch.randperm(len(LABELS))
        torch.testing.assert_close(loss_func(emb[order], LABELS[order]), expected)

    def test_per_anchor(self, case):
        loss = make(case, reducer=reducers.PerAnchorReducer())(embeddings(), LABELS)
        torch.testing.assert_close(loss, make(case, reducer=reducers.MeanReducer())(embeddings(), LABELS))

    def test_multiple(self, case):
        emb = embeddings()
        first = make(case).sub_loss_names()[0]
        by_name = reducers.MultipleReducers({first: reducers.SumReducer()}, default_reducer=reducers.MeanReducer())
        each = self.each(case, emb)
        expected = sum(e["losses"].sum() if name == first else e["losses"].mean() for name, e in each.items())
        torch.testing.assert_close(make(case, reducer=by_name)(emb, LABELS), expected)
        with pytest.raises(ValueError, match=r"reducer must have keys among the sub-losses .*, got typo"):
            make(case, reducer=reducers.MultipleReducers({"typo": reducers.SumReducer()}))


@pytest.mark.parametrize(
    "regularizer",
    [
        regularizers.LpRegularizer(),
        regularizers.ZeroMeanRegularizer(),
        regularizers.CenterInvariantRegularizer(),
        regularizers.RegularFaceRegularizer(),
    ],
    ids=lambda r: type(r).__name__,
)
def test_embedding_regularizers(case, regularizer):
    emb = embeddings()
    loss = make(case, embedding_regularizer=regularizer, embedding_reg_weight=0.5)(emb, LABELS)
    torch.testing.assert_close(loss, make(case)(emb, LABELS) + 0.5 * regularizer(emb))
    assert regularizer(emb) != 0


@pytest.mark.parametrize(
    "regularizer",
    [
        regularizers.LpRegularizer(),
        regularizers.RegularFaceRegularizer(),
        regularizers.SparseCentersRegularizer(num_classes=1, centers_per_class=NUM_CLASSES),
    ],
    ids=lambda r: type(r).__name__,
)
def test_weight_regularizers(case, regularizer):
    """Losses with proxies take them, the others refuse."""
    if not isinstance(make(case), WeightRegularizerMixin | HybridLoss):
        with pytest.raises(TypeError, match="weight_regularizer"):
            make(case, weight_regularizer=regularizer)
        return
    loss_func = make(case, weight_regularizer=regularizer, weight_reg_weight=2.0)
    regularized, plain = loss_func(embeddings(), LABELS), make(case)(embeddings(), LABELS)
    (proxies,) = (p for p in loss_func.parameters() if p.ndim == 2)
    scale = getattr(loss_func, "proxy_weight", 1.0)
    torch.testing.assert_close(regularized, plain + scale * 2 * regularizer(proxies))


def test_ref_emb(case):
    emb, ref, ref_labels = embeddings(), embeddings(seed=1)[:7], LABELS[:7].flip(0)
    if not case.refs:
        with pytest.raises(ValueError, match="ref_emb is not supported"):
            make(case)(emb, LABELS, ref_emb=ref, ref_labels=ref_labels)
        return
    loss = make(case)(emb, LABELS, ref_emb=ref, ref_labels=ref_labels)
    assert loss != make(case)(emb, LABELS)
    assert all(g.any() for g in grads_of(loss, emb, ref))
    other_labels = LABELS.flip(0)  # the same embeddings with other labels are not the batch itself
    relabelled = make(case)(emb, LABELS, ref_emb=emb, ref_labels=other_labels)
    torch.testing.assert_close(relabelled, make(case)(emb, LABELS, ref_emb=emb + 0, ref_labels=other_labels))
    wider = make(case)(emb, LABELS, ref_emb=ref.double(), ref_labels=ref_labels)
    torch.testing.assert_close(wider.float(), loss)
    itself = make(case)(emb, LABELS, ref_emb=emb, ref_labels=LABELS)
    torch.testing.assert_close(itself, make(case)(emb, LABELS))


def test_collect_stats(case, monkeypatch):
    monkeypatch.setattr(c_f, "COLLECT_STATS", True)
    recording = make(case)
    recording.add_to_recordable_attributes(name="left_over", is_stat=True)
    recording.left_over = 5
    loss = recording(embeddings(), LABELS)
    monkeypatch.setattr(c_f, "COLLECT_STATS", False)
    torch.testing.assert_close(loss, make(case)(embeddings(), LABELS))
    assert recording.distance.collect_stats
    assert recording.left_over == 0  # statistics are reset at each forward
    for module in recording.modules():
        for kind in c_f.list_of_recordable_attributes_list_names():
            for name in getattr(module, kind, []):
                assert isinstance(getattr(module, name), int | float), f"{type(module).__name__}.{name} is no scalar"


def test_cross_batch_memory(case):
    if not case.wrapper_refs:
        for wrapper in (CrossBatchMemory, losses.CrossBatchMemory):
            with pytest.raises(Exception, match=rf"{type(make(case)).__name__}|loss\.losses\["):
                wrapper(make(case), SIZE)
        return
    memory = CrossBatchMemory(make(case), SIZE, memory_size=30)
    for seed in range(4):
        emb = embeddings(seed=seed)
        (grad,) = grads_of(memory(emb, LABELS), emb)
        assert grad.any()
    assert memory.queue_idx == 4 * 12 % 30


def test_self_supervised_loss(case):
    emb, view = embeddings(), embeddings(seed=1)
    if list(make(case).parameters()) or not case.uses_labels:
        with pytest.raises(TypeError, match=rf"{type(make(case)).__name__}|loss\.losses\["):
            SelfSupervisedLoss(make(case))
        return
    for symmetric in (True, False):
        assert SelfSupervisedLoss(make(case), symmetric=symmetric)(emb, view) > 0


def test_multiple_losses(case):
    both = losses.MultipleLosses([make(case), make(case)], weights=[1, 0.5])
    torch.testing.assert_close(both(embeddings(), LABELS), 1.5 * make(case)(embeddings(), LABELS))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_embeddings(case, half, device):
    """Float32 loss, half gradient, no parameter cast, and the value of the same numbers in float32."""
    emb = embeddings(half).detach().to(device).requires_grad_()
    loss_func = make(case).to(device)
    dtypes = [p.dtype for p in loss_func.parameters()]
    loss = loss_func(emb, LABELS)
    loss.backward()
    assert loss.dtype == torch.float32
    assert emb.grad.dtype == half
    assert emb.grad.any()
    assert [p.dtype for p in loss_func.parameters()] == dtypes
    torch.testing.assert_close(loss, loss_func(emb.float(), LABELS))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(loss_func(emb, LABELS), loss)  # nothing inside is computed in half precision
    if case.refs:
        ref = embeddings(half, seed=1).to(device)
        torch.testing.assert_close(
            loss_func(emb, LABELS, ref_emb=ref, ref_labels=LABELS),
            loss_func(emb.float(), LABELS, ref_emb=ref.float(), ref_labels=LABELS),
        )


def test_large_half_values_do_not_overflow(case):
    emb = (1000 * embeddings()).half().detach().requires_grad_()
    (grad,) = grads_of(make(case)(emb, LABELS), emb)
    assert grad.isfinite().all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_autocast_and_optimizer(case, half, device):
    """Training under autocast: parameters stay float32 and keep changing."""
    model = torch.nn.Linear(SIZE, SIZE).to(device)
    loss_func = make(case).to(device)
    parameters = [*model.parameters(), *trained(loss_func).values()]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    values = []
    for step in range(4):
        before = [p.detach().clone() for p in parameters]
        with torch.autocast(device.type, dtype=half, enabled=step != 2):
            loss = loss_func(model(embeddings().detach().to(device)), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
        assert all(p.dtype == torch.float32 and not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert values[-1] < values[0]


def test_value_can_be_scaled_in_place(case):
    """Trainers do ``losses[name] *= weight`` on the returned tensor."""
    for kwargs in ({}, {"reducer": reducers.SumReducer()}):
        emb = embeddings()
        (once,) = grads_of(make(case, **kwargs)(emb, LABELS), emb)
        loss = make(case, **kwargs)(emb, LABELS)
        loss *= 2
        torch.testing.assert_close(grads_of(loss, emb)[0], 2 * once)


def test_torch_func(case):
    """Gradients by function transforms, one output at a time and all at once."""
    loss_func, emb = make(case).train(not case.batch_norm), embeddings()  # transforms refuse running statistics
    (expected,) = grads_of(loss_func(emb, LABELS), emb)
    for transform in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(transform(lambda x: loss_func(x, LABELS))(emb.detach()), expected)


def test_inputs_are_not_changed(case):
    emb, labels = embeddings(), LABELS.clone()
    indices_tuple = miners.MultiSimilarityMiner()(emb, labels)
    copies = emb.detach().clone(), tuple(x.clone() for x in indices_tuple)
    make(case)(emb, labels, indices_tuple).backward()
    assert torch.equal(emb, copies[0])
    assert torch.equal(labels, LABELS)
    assert all(torch.equal(a, b) for a, b in zip(indices_tuple, copies[1], strict=True))


def test_order_of_the_batch_does_not_matter(case):
    order = torch.randperm(len(LABELS))
    emb = embeddings(torch.float64)
    torch.testing.assert_close(make(case).double()(emb[order], LABELS[order]), make(case).double()(emb, LABELS))


def test_eval_computes_a_loss(case):
    loss_func = make(case).eval()
    loss = loss_func(embeddings(), LABELS)
    assert loss > 0
    assert torch.equal(loss_func(embeddings(), LABELS), loss)
    if not case.batch_norm:
        torch.testing.assert_close(make(case)(embeddings(), LABELS), loss)


def test_state_dict_copy_and_pickle(case):
    loss_func = make(case)
    with torch.no_grad():
        for p in loss_func.parameters():
            p.mul_(1.5)
    expected = loss_func(embeddings(), LABELS)
    file = io.BytesIO()
    torch.save(loss_func.state_dict(), file)
    file.seek(0)
    loaded = case.make()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(loss_func), pickle.loads(pickle.dumps(loss_func))):
        torch.testing.assert_close(other(embeddings(), LABELS), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in loss_func.parameters()}


def test_moves_with_to(case):
    loss_func = make(case).double()
    emb = embeddings(torch.float64)
    loss = loss_func(emb, LABELS)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), make(case)(emb.float(), LABELS), rtol=1e-4, atol=0)


def test_unknown_argument(case):
    with pytest.raises(TypeError):
        make(case, no_such_argument=1)


def test_labels_are_required(case):
    if not case.uses_labels:
        torch.testing.assert_close(make(case)(embeddings()), make(case)(embeddings(), LABELS))
        return
    with pytest.raises(ValueError, match="labels"):
        make(case)(embeddings())


def test_case_is_documented(case: Case):
    doc = inspect.getdoc(type(make(case)))
    for section in ("Args:", "Shape:", "Raises:", "Examples:", "Source:"):
        assert section in doc
