import numpy as np

from pml_ext.visualization.report_choice import first_of_each


def test_first_of_each():
    assert first_of_each(np.array([3, 1, 3, 3, 0, 1]), 2) == {0: [4], 1: [1, 5], 3: [0, 2]}
    assert first_of_each(np.array([], dtype=np.int64), 2) == {}
