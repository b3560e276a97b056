"""Time and peak memory of SecondOrderAttention; run: python benchmarks/second_order_attention.py.

Forward and backward on one feature map, each row in processes of its own: ours, the same block with an explicit softmax
(Q K^T) V, and timm's NonLocalAttn, a relative with fewer channels inside. ``--out FILE`` keeps the figures.
"""

import torch
from harness import make_parser, markdown_table, measure_in_turn, measure_steps, median_and_quartiles, metadata, save

METHODS = {
    "ours": "SecondOrderAttention",
    "explicit": "explicit matrix",
    "timm": "timm NonLocalAttn, 1/8 of the channels",
}
SIZES = ((14, 1024), (28, 512), (56, 64))  # side and channels: conv4 and conv3 of ResNet-50, and a large map
BATCH_SIZE = 8


def make(method, channels):
    """Return the block."""
    if method == "timm":
        from timm.layers import NonLocalAttn

        return NonLocalAttn(channels)
    from pml_ext.trunks import SecondOrderAttention

    block = SecondOrderAttention(channels, attention_scale=channels**-0.5)
    if method == "ours":
        return block

    class Explicit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, features):
            value = block.value(features).flatten(2).transpose(1, 2)
            gathered = (block.attention_map(features) @ value).transpose(1, 2)
            return features + block.out(gathered.reshape(features.shape))

    return Explicit()


def measure(method, side, channels, steps, threads, device):
    """Return the seconds of each step and the peak of memory above what was there before."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def step(block, features):
        features.grad = None
        block.zero_grad()
        block(features).sum().backward()

    block = make(method, channels).to(device)
    step(block, torch.randn(BATCH_SIZE, channels, 4, 4, device=device, requires_grad=True))
    features = torch.randn(BATCH_SIZE, channels, side, side, device=device, requires_grad=True)
    return measure_steps(lambda: step(block, features), steps, device)


def main(sizes=SIZES, steps=10, rounds=3, threads=2, device="cpu", out=None):
    """Return the metadata and a row for each size and method; print them as a table."""
    jobs = [(method, *size) for size in sizes for method in METHODS]
    measured = measure_in_turn(measure, jobs, rounds, steps, threads, device)
    results, lines = [], []
    for (method, side, channels), (seconds, peak) in measured.items():
        median, quartiles = median_and_quartiles(seconds, 2, 1e3)
        row = {"side": side, "channels": channels, "method": method}
        results.append(row | {"ms": median, "quartiles": quartiles, "peak_mb": round(peak, 1)})
        share = peak / measured["explicit", side, channels].peak_mb
        cells = [
            f"{side} x {side} x {channels}",
            METHODS[method],
            f"{median:.1f}",
            "{:.1f} to {:.1f}".format(*quartiles),
        ]
        lines.append([*cells, f"{peak:.0f}", f"{share:.2f}"])
    titles = [f"map x channels, batch {BATCH_SIZE}", "", "ms", "quartiles", "peak MB", "peak / explicit"]
    print(markdown_table(titles, lines, numbers=4))
    about = metadata(device, threads, batch_size=BATCH_SIZE, steps=steps, rounds=rounds, dtype="float32")
    return save(out, {"metadata": about, "results": results})


if __name__ == "__main__":
    main(**vars(make_parser(__doc__, "--device", "--out").parse_args()))
