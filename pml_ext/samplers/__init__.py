"""Which images a batch has."""

from pml_ext.samplers.shuffled_pass_sampler import ShuffledPassSampler

__all__ = ["ShuffledPassSampler"]
