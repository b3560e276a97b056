import unittest

import torch

from pytorch_metric_learning.losses import DivergenceLoss
from pytorch_metric_learning.reducers import DoNothingReducer

from .. import TEST_DEVICE, TEST_DTYPES

NUM_LEARNERS, SIZE = 4, 3


def make_embeddings(dtype):
    torch.manual_seed(0)
    embeddings = torch.randn(9, NUM_LEARNERS * SIZE)
    embeddings[1, SIZE : 2 * SIZE] = embeddings[1, :SIZE]  # identical learners
    embeddings[2, SIZE : 2 * SIZE] = -2 * embeddings[2, :SIZE]  # opposite learners
    return embeddings.to(TEST_DEVICE).type(dtype)


def loss_of_one_sample(embedding, margin):
    learners = [x / torch.norm(x) for x in embedding.double().split(SIZE)]
    total = 0
    for i in range(NUM_LEARNERS):
        for j in range(i):
            total += max(0, margin - torch.sum((learners[i] - learners[j]) ** 2))
    return total


class TestDivergenceLoss(unittest.TestCase):
    def test_divergence_loss(self):
        for dtype in TEST_DTYPES:
            rtol = 1e-2 if dtype == torch.float16 else 1e-5
            for margin in [0.5, 1, 3.5]:
                embeddings = make_embeddings(dtype).requires_grad_()
                loss = DivergenceLoss(NUM_LEARNERS, margin)(embeddings)
                loss.backward()

                copy = embeddings.detach().double().requires_grad_()
                correct_loss = sum(loss_of_one_sample(x, margin) for x in copy)
                correct_loss = correct_loss / len(copy)
                correct_loss.backward()

                self.assertTrue(correct_loss > 0)
                self.assertTrue(loss.dtype == dtype)
                self.assertTrue(torch.isclose(loss.double(), correct_loss, rtol=rtol))
                self.assertTrue(
                    torch.allclose(
                        embeddings.grad.double(), copy.grad, rtol=rtol, atol=rtol
                    )
                )

    def test_computed_by_hand(self):
        for dtype in TEST_DTYPES:
            for second, correct_loss in [
                ([2.0, 0.0], 1.0),
                ([0.8, 0.6], 0.6),
                ([0.0, 3.0], 0.0),
                ([-1.0, 0.0], 0.0),
            ]:
                embeddings = torch.tensor([[1.0, 0.0] + second], device=TEST_DEVICE)
                loss = DivergenceLoss(num_learners=2)(embeddings.type(dtype))
                self.assertAlmostEqual(loss.item(), correct_loss, places=2)

    def test_learners_of_zeros(self):
        for dtype in TEST_DTYPES:
            embeddings = make_embeddings(dtype)
            embeddings[0, :SIZE] = 0
            embeddings.requires_grad_()
            DivergenceLoss(NUM_LEARNERS, margin=3)(embeddings).backward()
            self.assertTrue(torch.all(embeddings.grad[0, :SIZE] == 0))
            self.assertTrue(torch.any(embeddings.grad[0, SIZE:] != 0))
            self.assertTrue(torch.all(torch.isfinite(embeddings.grad)))

    def test_one_learner(self):
        for dtype in TEST_DTYPES:
            embeddings = make_embeddings(dtype).requires_grad_()
            loss = DivergenceLoss(1, collect_stats=True)(embeddings)
            loss.backward()
            self.assertEqual(loss.item(), 0)
            self.assertTrue(torch.all(embeddings.grad == 0))

    def test_labels_are_ignored(self):
        for dtype in TEST_DTYPES:
            embeddings = make_embeddings(dtype)
            labels = torch.arange(len(embeddings), device=TEST_DEVICE)
            loss_func = DivergenceLoss(NUM_LEARNERS)
            self.assertEqual(
                loss_func(embeddings, labels).item(), loss_func(embeddings).item()
            )

    def test_reducer_input(self):
        for dtype in TEST_DTYPES:
            embeddings = make_embeddings(dtype)
            loss_func = DivergenceLoss(NUM_LEARNERS, reducer=DoNothingReducer())
            output = loss_func(embeddings)["loss"]
            self.assertEqual(output["reduction_type"], "element")
            self.assertEqual(output["losses"].shape, (len(embeddings),))
            self.assertTrue(torch.all(output["indices"].cpu() == torch.arange(9)))

    def test_stats(self):
        embeddings = torch.tensor([[1.0, 0, 2, 0], [1, 0, 0, 1]], device=TEST_DEVICE)
        for dtype in TEST_DTYPES:
            loss_func = DivergenceLoss(num_learners=2, collect_stats=True)
            loss_func(embeddings.type(dtype))
            self.assertAlmostEqual(loss_func.learner_similarity, 0.5, places=3)

    def test_bad_input(self):
        embeddings = make_embeddings(TEST_DTYPES[0])
        index = torch.zeros(1, device=TEST_DEVICE, dtype=torch.long)
        for kwargs in [
            {"num_learners": 0},
            {"num_learners": 2, "margin": 0},
            {"num_learners": 2, "distance": None},
        ]:
            with self.assertRaises(ValueError):
                DivergenceLoss(**kwargs)
        with self.assertRaises(ValueError):
            DivergenceLoss(5)(embeddings)
        with self.assertRaises(ValueError):
            DivergenceLoss(NUM_LEARNERS)(embeddings, indices_tuple=(index,) * 3)
        with self.assertRaises(ValueError):
            DivergenceLoss(NUM_LEARNERS)(embeddings, ref_emb=embeddings + 1)
