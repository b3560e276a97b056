import pytest

from pml_ext.visualization import plot_curves


def test_draws_every_series(tmp_path):
    figure = plot_curves({"a": [3.0, 2.0, 1.0], "b": [1.0]}, ylabel="loss", path=tmp_path / "curves.png")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert axes.lines[0].get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_that_lie_on_each_other_stay_visible():
    (axes,) = plot_curves({name: [1.0] * 60 for name in "abcd"}).axes
    for style in ("linestyle", "marker", "markersize"):
        styles = [getattr(line, f"get_{style}")() for line in axes.lines]
        assert len(set(styles)) == 4
    assert styles == sorted(styles, reverse=True)  # the marks of what is drawn later are smaller
    assert {(line.get_fillstyle(), line.get_markevery()) for line in axes.lines} == {("none", 4)}


def test_bad_arguments():
    with pytest.raises(ValueError, match="curves must hold at least one series, got none"):
        plot_curves({})
    with pytest.raises(ValueError, match="got 'a' without values"):
        plot_curves({"a": []})
