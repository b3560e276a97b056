"""How many graphs torch.compile makes."""

import torch


def graphs_of_batches(loss_func, sizes, dtype=torch.float32, width=8):
    """Return how many graphs there are after each batch, with ``dynamic=True``; each batch has the value of eager."""
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter, counts = CompileCounter(), []
    compiled = torch.compile(loss_func, backend=counter, dynamic=True)
    try:
        for seed, size in enumerate(sizes):
            generator = torch.Generator().manual_seed(seed)
            emb = torch.randn(size, width, generator=generator).to(dtype).requires_grad_()
            loss = compiled(emb, torch.arange(size) // 3)
            (grad,) = torch.autograd.grad(loss, emb)
            assert loss > 0
            assert grad.any()
            counts.append(counter.frame_count)
    finally:
        torch.compiler.reset()
    return counts
