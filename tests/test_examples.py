"""Every example runs, briefly."""

from pathlib import Path

import pytest
import torch

from examples import adaptive_margin, attention_ensemble, global_local, intra_batch, quickstart

RUNS = {"adaptive_margin", "attention_ensemble", "global_local", "intra_batch", "quickstart"}


def test_every_example_is_run_here():
    assert {path.stem for path in Path(quickstart.__file__).parent.glob("*.py")} == RUNS


def test_quickstart(tmp_path, capsys):
    table = quickstart.main(epochs=1, samples_per_class=4, width=8, out=tmp_path)
    printed = capsys.readouterr().out
    assert list(table) == ["raw pixels", "PML MultiSimilarityLoss", "PML ProxyAnchorLoss", "pml_ext HybridLoss"]
    for row in table.values():
        assert set(row) == set(quickstart.METRICS)
        assert all(0 < value < 1 for value in row.values())
        assert f"{100 * row['precision_at_1']:.1f}" in printed
    for name in ("quickstart_gallery.png", "quickstart_curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_quickstart_is_deterministic(tmp_path):
    first, same, other = (
        quickstart.main(epochs=1, seed=seed, samples_per_class=2, width=4, out=tmp_path) for seed in (0, 0, 1)
    )
    assert first == same != other


def test_adaptive_margin(tmp_path, capsys):
    results = adaptive_margin.main(epochs=1, seeds=2, samples_per_class=4, width=4, out=tmp_path)
    printed = capsys.readouterr().out
    assert [name.split()[0] for name in results] == ["no", "constant", "distance", "similarity"]
    for found in results.values():
        assert len(found) == 2
        mean = sum(100 * one["precision_at_1"] for one in found) / 2
        assert 0 < mean < 100
        assert f"{mean:.1f} (" in printed
    losses = adaptive_margin.make_losses(4, torch.randn(4, 3)).values()
    margins = [loss_func.get_margins(torch.arange(4)) for loss_func in losses]
    assert all(not torch.equal(a, b) for i, a in enumerate(margins) for b in margins[:i])
    assert margins[1].mean().item() == pytest.approx(margins[2].mean().item(), rel=1e-4)  # constant and distance
    assert (tmp_path / "adaptive_margin.png").read_bytes().startswith(b"\x89PNG")


def test_global_local(tmp_path, capsys):
    """On folders of images, one a class."""
    from PIL import Image

    for split, classes in (("train", "abc"), ("test", "de")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = (255 * torch.rand(20, 24, 3)).byte().numpy()
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    folders = {"train_folder": tmp_path / "train", "test_folder": tmp_path / "test"}
    results = global_local.main(epochs=2, seeds=2, backbone="resnet10t", out=tmp_path, **folders)
    printed = capsys.readouterr().out
    assert list(results) == list(global_local.make_trunks("resnet10t", 3))
    for found in results.values():
        mean = sum(50 * one["precision_at_1"] for one in found)
        assert 0 <= mean <= 100
        assert f"{mean:.1f} (" in printed
    assert "2 unseen classes, resnet10t, 2 epochs" in printed
    for name in ("global_local_curves.png", "global_local_attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_global_local_on_glyphs():
    images, labels = global_local.load(None, "test", samples_per_class=2)
    assert images.shape == (534, 1, 32, 32)
    assert labels.unique().tolist() == list(range(267))
    for make in global_local.make_trunks("resnet10t", 1).values():
        assert make()(images[:2]).shape == (2, global_local.EMBEDDING_SIZE)


def test_attention_ensemble(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention_ensemble, "EMBEDDING_SIZE", 12)
    results = attention_ensemble.main(epochs=1, seeds=2, learners=(2,), samples_per_class=4, out=tmp_path)
    printed = capsys.readouterr().out
    assert list(results) == ["single head", "M = 1", "M = 2, no divergence", "M = 2, with divergence"]
    for found in results.values():
        mean = sum(50 * one["precision_at_1"] for one in found)
        assert 0 < mean < 100
        assert f"{mean:.1f} (" in printed
    collapsed, apart = ([one["cosine"] for one in results[f"M = 2, {x} divergence"]] for x in ("no", "with"))
    assert all(a > b for a, b in zip(collapsed, apart, strict=True))
    assert (tmp_path / "attention_ensemble_masks.png").read_bytes().startswith(b"\x89PNG")


def test_intra_batch(tmp_path, capsys):
    results = intra_batch.main(epochs=1, seeds=2, width=4, samples_per_class=4, out=tmp_path)
    printed = capsys.readouterr().out
    assert list(results) == [*intra_batch.TRAININGS, "+ refinement at test time"]
    for found in results.values():
        for metric in intra_batch.METRICS:
            mean = sum(50 * one[metric] for one in found)
            assert 0 < mean < 100
            assert f"{mean:.1f} (" in printed
    rows = list(results.values())
    assert all(rows[i] != rows[j] for i in range(4) for j in range(i))
    emb = torch.randn(4, intra_batch.EMBEDDING_SIZE)
    alone = intra_batch.Alone(intra_batch.EMBEDDING_SIZE).eval()
    torch.testing.assert_close(alone(emb)[:2], alone(emb[:2]))
    assert (tmp_path / "intra_batch_attention.png").read_bytes().startswith(b"\x89PNG")
