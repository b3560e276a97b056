"""Time and memory of proxy losses against the number of classes, beside PML's; run: python benchmarks/proxy_scaling.py.

Every row is measured in processes of its own, in turn with the other rows of its size. The floor is what no exact loss
can avoid: the product of the batch with all proxies and the two products that take its gradient back, in chunks.
``--out benchmarks/results/proxy_scaling-cpu.json`` keeps the figures, ``--show FILE`` prints a table of kept ones and
``--picture docs/proxy_scaling.png`` draws them.
"""

import json
from pathlib import Path

import torch
from harness import make_parser, markdown_table, measure_in_turn, measure_steps, median_and_quartiles, metadata, save

METHODS = {
    "floor": "three matrix products",
    "PML ProxyAnchorLoss": "PML ProxyAnchorLoss",
    "ProxyAnchorLoss": "ProxyAnchorLoss",
    "PML CosFaceLoss": "PML CosFaceLoss",
    "margin softmax": "AdaptiveAdditiveMarginLoss, one margin",
    "margin softmax + classes": "AdaptiveAdditiveMarginLoss, class embeddings",
}
BESIDE = {
    "ProxyAnchorLoss": "PML ProxyAnchorLoss",
    "margin softmax": "PML CosFaceLoss",
    "margin softmax + classes": "PML CosFaceLoss",
}
SIZES = ((10**3, 128, 128), (10**4, 128, 128), (10**5, 128, 128), (10**6, 128, 128), (10**5, 512, 512))
CLASS_WIDTH = 128  # of the class embeddings


class Floor(torch.nn.Module):
    """The three products that every exact proxy loss needs, with the gradients in their places."""

    def __init__(self, num_classes, embedding_size, batch_size):
        super().__init__()
        from pml_ext.streaming.proxy_chunks import auto_chunk_size

        self.proxies = torch.nn.Parameter(torch.randn(num_classes, embedding_size))
        self.chunk_size = auto_chunk_size(batch_size, embedding_size, self.proxies.device)

    @torch.no_grad()
    def step(self, emb, labels):
        size = self.chunk_size
        self.proxies.grad, emb.grad = torch.empty_like(self.proxies), torch.zeros_like(emb)
        memory = emb.new_empty(len(emb) * size)
        for start in range(0, len(self.proxies), size):
            rows = self.proxies[start : start + size]
            block = torch.mm(emb, rows.T, out=memory[: len(emb) * len(rows)].view(len(emb), len(rows)))
            torch.mm(block.T, emb, out=self.proxies.grad[start : start + size])
            emb.grad.addmm_(block, rows)


def make(method, num_classes, batch_size, embedding_size):
    """Return the loss."""
    if method == "floor":
        return Floor(num_classes, embedding_size, batch_size)
    from pytorch_metric_learning import losses

    from pml_ext.losses import AdaptiveAdditiveMarginLoss, ProxyAnchorLoss

    if method.endswith("ProxyAnchorLoss"):
        cls = losses.ProxyAnchorLoss if method.startswith("PML") else ProxyAnchorLoss
        return cls(num_classes, embedding_size)
    if method == "PML CosFaceLoss":
        return losses.CosFaceLoss(num_classes, embedding_size, margin=0.35, scale=64)
    classes = torch.randn(num_classes, CLASS_WIDTH) if method.endswith("classes") else None
    return AdaptiveAdditiveMarginLoss(num_classes, embedding_size, classes, base_margin=0.35, scale=64)


def measure(method, num_classes, batch_size, embedding_size, steps, threads, device):
    """Return the seconds of each step and the peak of memory beyond proxies, their gradient and class embeddings."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    emb = torch.randn(batch_size, embedding_size, device=device, requires_grad=True)
    labels = torch.randint(num_classes, (batch_size // 4,)).repeat_interleave(4).to(device)

    def step(loss_func, labels):
        emb.grad = None
        for parameter in loss_func.parameters():
            parameter.grad = None
        if method == "floor":
            loss_func.step(emb, labels)
        else:
            loss_func(emb, labels).backward()

    step(make(method, 100, batch_size, embedding_size).to(device), labels % 100)  # libraries load what they need
    loss_func = make(method, num_classes, batch_size, embedding_size).to(device)
    measured = measure_steps(lambda: step(loss_func, labels), steps, device)
    gradient = num_classes * embedding_size * 4 / 2**20
    return measured._replace(peak_mb=measured.peak_mb - gradient)


def main(sizes=SIZES, steps=5, rounds=3, threads=2, device="cpu", out=None, picture=None, classes=None):
    """Return the metadata and a row for each size and method; print them as a table."""
    sizes = [size for size in sizes if classes in (None, size[0])]
    jobs = [(method, *size) for size in sizes for method in METHODS]
    results = []
    for (method, *size), measured in measure_in_turn(measure, jobs, rounds, steps, threads, device).items():
        seconds, quartiles = median_and_quartiles(measured.seconds, 6)
        results.append(
            dict(zip(("num_classes", "batch_size", "embedding_size"), size, strict=True))
            | {"method": method, "seconds": seconds, "quartiles": quartiles, "extra_mb": round(measured.peak_mb, 1)}
        )
    about = metadata(device, threads, steps=steps, rounds=rounds, dtype="float32")
    kept = save(out, {"metadata": about, "results": results})
    show(kept)
    if picture is not None:
        draw(kept, picture)
    return kept


def by_size(kept):
    """Return size -> method -> row."""
    sizes = {}
    for row in kept["results"]:
        size = row["num_classes"], row["batch_size"], row["embedding_size"]
        sizes.setdefault(size, {})[row["method"]] = row
    return sizes


def show(kept):
    """Print a table in Markdown."""
    lines = []
    for size, rows in by_size(kept).items():
        for method, name in METHODS.items():
            row, pml = rows[method], rows.get(BESIDE.get(method))
            lines.append([f"{size[0]:,} x {size[1]} x {size[2]}", name, f"{row['seconds'] * 1e3:,.1f}"])
            lines[-1] += [" to ".join(f"{x * 1e3:,.1f}" for x in row["quartiles"])]
            lines[-1] += [f"1/{pml['seconds'] / row['seconds']:.1f}" if pml else ""]
            lines[-1] += [f"{row['seconds'] / rows['floor']['seconds']:.2f}" if method != "floor" else ""]
            share = f"{row['extra_mb'] / pml['extra_mb']:.1%}" if pml and pml["extra_mb"] > 1 else ""
            lines[-1] += [f"{row['extra_mb']:,.0f}", share]
    titles = ["classes x batch x width", "", "ms", "quartiles", "/ PML", "/ floor", "extra MB", "/ PML"]
    print(markdown_table(titles, lines, numbers=6))


def draw(kept, path):
    """Draw time and memory against the number of classes, log-log, for batch and width of the smallest size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = {size: rows for size, rows in by_size(kept).items() if size[1:] == min(s[1:] for s in by_size(kept))}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    styles = ["k:", "C1--o", "C1-o", "C0--s", "C0-s", "C2-^"]
    for (method, name), style in zip(METHODS.items(), styles, strict=True):
        x = [size[0] for size in sizes]
        axes[0].loglog(x, [rows[method]["seconds"] for rows in sizes.values()], style, label=name)
        if method != "floor":
            axes[1].loglog(x, [max(rows[method]["extra_mb"], 0.5) for rows in sizes.values()], style, label=name)
    axes[0].set(xlabel="classes", ylabel="seconds, forward + backward")
    axes[1].set(xlabel="classes", ylabel="peak MB beyond proxies, gradient, class embeddings")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = make_parser(__doc__, "--device", "--out")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each row")
    parser.add_argument("--classes", type=int, help="only sizes with so many")
    parser.add_argument("--picture", default=None, help="PNG file")
    parser.add_argument("--show", default=None, help="JSON file to print instead of measuring")
    arguments = vars(parser.parse_args())
    if (shown := arguments.pop("show")) is None:
        main(**arguments)
    else:
        kept = json.loads(Path(shown).read_text())
        show(kept)
        if arguments["picture"] is not None:
            draw(kept, arguments["picture"])
