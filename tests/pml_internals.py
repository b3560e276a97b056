"""What the tests use of PML beyond its public interface; no other test file imports it (PML 3 has other names)."""

from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import distributed as pml_dist
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

__all__ = ["c_f", "lmu", "pml_dist"]
