import copy
import multiprocessing
import pickle

import numpy as np
import pytest
from PIL import Image

from pml_ext.datasets import ClassSubset, ImageReader
from pml_ext.datasets.image_files import ImageFiles, broken_images
from tests.datasets.test_image_reader import write_png

LABELS = [0, 1, 0, 1, 0, 2]


@pytest.fixture
def files(tmp_path):
    """Image i has the value 10 * i; 2 and 3 have checksums that are right and pixels that are cut."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.new("L", (4, 4), 10 * i).save(path)
    for path in paths[2:4]:
        cut(path)
    return ImageFiles(paths, LABELS, transform=lambda image: int(np.asarray(image)[0, 0, 0]))


def cut(path):
    """Write a PNG whose checksums are right and whose pixels are cut: the check before a training does not notice."""
    write_png(path, 8, 0, np.random.default_rng(0).integers(0, 256, (4, 4)).tolist(), keep=12)
    assert broken_images([path]) == {}


def test_the_error_names_the_file(files):
    with pytest.raises(
        ValueError, match=r"cannot read image .*2\.png: .*; with skip_broken, another of its class takes"
    ):
        files[2]
    assert not files.broken.any()


def test_another_image_of_the_class_takes_its_place(files):
    files.skip_broken = True
    with pytest.warns(UserWarning, match=r"cannot read image .*2\.png: .*; another image of its class takes") as warned:
        assert files[2] == (40, 0)  # the next one
    assert len(warned) == 1
    with pytest.warns(UserWarning, match=r"3\.png"):
        assert files[-3] == (10, 1)  # the next one, from the beginning
    assert [files[i] for i in range(6)] == [(0, 0), (10, 1), (40, 0), (10, 1), (40, 0), (50, 2)]  # without a warning
    assert files.broken.tolist() == [False, False, True, True, False, False]
    files.skip_broken = False
    with pytest.raises(ValueError, match=r"cannot read image .*2\.png"):
        files[2]


def test_a_class_of_broken_images(files):
    files.skip_broken = True
    files.broken[1] = True  # known before
    message = r"cannot read any of the 2 images of a class, such as .*1\.png"
    with pytest.warns(UserWarning, match=r"3\.png"), pytest.raises(ValueError, match=message):
        files[1]


def test_copies_and_views_share_what_is_broken(files):
    view = ClassSubset(files, [1, 0])
    view.dataset.skip_broken = True
    view.transform = np.asarray
    with pytest.warns(UserWarning, match="cannot read"):
        image, label = view[2]
    assert (image.max(), label) == (40, 1)
    assert files.broken.tolist() == copy.copy(files).broken.tolist() == [False, False, True, False, False, False]
    assert not files.skip_broken


def read_all(files):
    for i in range(6):
        files[i]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore")
def test_processes_that_load_images_share_what_is_broken(files):
    files.skip_broken = True
    process = multiprocessing.get_context("fork").Process(target=read_all, args=(files,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert files.broken.tolist() == [False, False, True, True, False, False]


def test_skip_broken_is_checked_and_kept(files):
    with pytest.raises(TypeError, match="skip_broken must be True or False, got 1"):
        files.skip_broken = 1
    files.transform = None
    kept = pickle.loads(pickle.dumps(ImageFiles(files.paths, LABELS, skip_broken=True, reader=ImageReader(white=9))))
    assert kept.skip_broken and kept.reader == ImageReader(white=9) and kept.paths == files.paths


def test_the_reader_is_used(tmp_path):
    Image.new("RGBA", (2, 2)).save(tmp_path / "a.png")
    files = ImageFiles([tmp_path / "a.png"], [0], reader=ImageReader(background="black"))
    assert np.asarray(files[0][0]).max() == 0
    assert np.asarray(ImageFiles([tmp_path / "a.png"], [0])[0][0]).min() == 255


def test_the_largest_value_of_all_files_becomes_white(tmp_path):
    for name, largest in (("a", 400), ("b", 1600), ("c", 800)):
        Image.fromarray(np.array([[0, largest]], dtype=np.uint16)).save(tmp_path / f"{name}.png")
    (tmp_path / "d.png").write_text("no image")
    Image.new("L", (2, 1), 77).save(tmp_path / "e.png")
    paths = [tmp_path / f"{name}.png" for name in "abcde"]
    files = ImageFiles(paths, [0, 1, 1, 1, 1], reader=ImageReader("black", white="largest"))
    assert files.reader == ImageReader("black", white=1600)
    assert [np.asarray(files[i][0]).max() for i in (0, 1, 2, 4)] == [64, 255, 128, 77]
    without = ImageFiles(paths[3:], [0, 1], reader=ImageReader(white="largest"))  # nothing to scale
    assert without.reader.white == 65535
