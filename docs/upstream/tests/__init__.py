# A stand-in for the file of this name in pytorch-metric-learning, with what the losses' tests import from it.
import os

import torch

TEST_DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
TEST_DTYPES = [
    getattr(torch, name)
    for name in os.environ.get("TEST_DTYPES", "float16,float32,float64").split(",")
]
