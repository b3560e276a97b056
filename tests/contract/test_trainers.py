"""Every loss in PML's trainer, tester, hooks and inference."""

import logging

import pytest
import torch
from pytorch_metric_learning import miners, samplers, testers, trainers
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import InferenceModel

from tests.contract.cases import CASES, SIZE, make, trained
from tests.contract.clusters import IN_FEATURES, clusters


def precision(model, dataset):
    data, labels = dataset.tensors
    with torch.no_grad():
        emb = model(data)
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1, device=torch.device("cpu"))
    return calculator.get_accuracy(emb, labels)["precision_at_1"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_miner", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_trains_in_metric_loss_only(case, with_miner, tmp_path):
    logging.getLogger("PML").setLevel(logging.ERROR)
    train_set, val_set = clusters(1), clusters(2)
    loss_func = make(case, collect_stats=True)
    before = {name: p.detach().clone() for name, p in trained(loss_func).items()}
    torch.manual_seed(0)
    trunk = torch.nn.Linear(IN_FEATURES, SIZE)
    start = precision(trunk, val_set)
    optimizers = {"trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=0.02)}
    if before:
        optimizers["metric_loss_optimizer"] = torch.optim.Adam(loss_func.parameters(), lr=0.02)
    record_keeper, _, _ = logging_presets.get_record_keeper(str(tmp_path / "csv"), str(tmp_path / "tensorboard"))
    hooks = logging_presets.get_hook_container(record_keeper, primary_metric="precision_at_1", log_freq=2)
    tester = testers.GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1, device=torch.device("cpu")),
    )
    trainer = trainers.MetricLossOnly(
        models={"trunk": trunk},
        optimizers=optimizers,
        batch_size=20,
        loss_funcs={"metric_loss": loss_func},
        dataset=train_set,
        mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()} if with_miner else None,
        sampler=samplers.MPerClassSampler(train_set.tensors[1], m=4, length_before_new_iter=100),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(tester, {"val": val_set}, str(tmp_path / "models")),
    )
    trainer.train(num_epochs=6)
    if case.uses_labels:
        assert precision(trunk, val_set) > start + 0.1
    for name, p in trained(loss_func).items():
        assert not torch.equal(p, before[name])
    saved = torch.load(tmp_path / "models" / "metric_loss_6.pth", weights_only=True)
    make(case).load_state_dict(saved)
    assert any(path.stat().st_size for path in (tmp_path / "csv").iterdir())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_inference_model(case):
    """What the loss trains is searched with PML's InferenceModel, which needs nothing of the loss."""
    train_set, test_set = clusters(1), clusters(2)
    loss_func, trunk = make(case), torch.nn.Linear(IN_FEATURES, SIZE)
    optimizer = torch.optim.Adam([*trunk.parameters(), *loss_func.parameters()], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss_func(trunk(train_set.tensors[0]), train_set.tensors[1]).backward()
        optimizer.step()
    inference = InferenceModel(trunk, data_device=torch.device("cpu"))
    inference.train_knn(train_set)
    _, indices = inference.get_nearest_neighbors(test_set.tensors[0], k=1)
    found = train_set.tensors[1][indices.squeeze(1)]
    if case.uses_labels:
        assert (found == test_set.tensors[1]).float().mean() > 0.5  # chance: 0.2
