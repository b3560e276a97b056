import numpy as np
import pytest
from PIL import Image

from pml_ext.datasets import ImageFolder, ImageReader
from pml_ext.datasets.image_files import broken_images
from pml_ext.datasets.image_reader import read_image


def save(path, value=0, mode="RGB", size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def root(tmp_path):
    save(tmp_path / "dog" / "b.PNG", (1, 2, 3))
    save(tmp_path / "dog" / "a.jpeg", (200, 200, 200))
    save(tmp_path / "cat" / "day 1" / "deep" / "x.bmp", 50, "L")
    save(tmp_path / "cat" / "y.gif", 60, "L")
    save(tmp_path / ".hidden" / "z.png")
    save(tmp_path / "cat" / "._y.png")
    save(tmp_path / "cat" / ".thumbnails" / "y.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "readme.md").write_text("no class")
    return tmp_path


def test_items(root):
    dataset = ImageFolder(root)
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert [str(path).removeprefix(str(root)) for path in dataset.paths] == [
        "/cat/day 1/deep/x.bmp",
        "/cat/y.gif",
        "/dog/a.jpeg",
        "/dog/b.PNG",
    ]
    image, label = dataset[3]
    assert (image.mode, image.size, image.getpixel((0, 0)), type(label), label) == ("RGB", (6, 4), (1, 2, 3), int, 1)
    assert dataset[0][0].getpixel((0, 0)) == (50, 50, 50)


def test_classes_and_transform(root):
    save(root / "ant" / "0.png", (9, 9, 9))
    dataset = ImageFolder(root, transform=lambda image: image.size, classes=["dog", "ant"])
    assert dataset.class_names == ["dog", "ant"]
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset[2] == ((6, 4), 1)
    dataset.transform = lambda image: image.getpixel((0, 0))
    assert dataset[2] == ((9, 9, 9), 1)


def test_images_are_opened_when_asked_for(root):
    whole = (root / "dog" / "a.jpeg").read_bytes()
    (root / "dog" / "a.jpeg").write_bytes(whole[: len(whole) - 30])
    (root / "dog" / "c.png").write_bytes(b"text")
    dataset = ImageFolder(root)
    assert dataset[3][0].size == (6, 4)
    for index, name in ((2, "a.jpeg"), (4, "c.png")):
        with pytest.raises(ValueError, match=rf"cannot read image .*{name}: ") as error:
            dataset[index]
        assert isinstance(error.value.__cause__, OSError)
    (root / "dog" / "b.PNG").unlink()
    with pytest.raises(ValueError, match=r"cannot read image .*b\.PNG: "):
        dataset[3]


def test_wide_gray_values_are_not_clipped(tmp_path):
    (tmp_path / "a").mkdir()
    values = np.array([[0, 256, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a" / "0.tif")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "a" / "1.tif")
    dataset = ImageFolder(tmp_path)
    assert np.asarray(dataset[0][0])[0, :, 0].tolist() == [0, 1, 255]
    with pytest.raises(ValueError, match=r"1\.tif: its mode 'F' has no fixed range of values"):
        dataset[1]


@pytest.fixture
def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_broken_images(suffix, noise, tmp_path):
    whole = tmp_path / f"whole.{suffix}"
    noise.save(whole)
    content = whole.read_bytes()
    paths = [whole, tmp_path / "missing.png"]
    for size in (0, 3, 100, len(content) // 2, len(content) - 30):
        paths.append(tmp_path / f"{size}.{suffix}")
        paths[-1].write_bytes(content[:size])
    broken = broken_images(paths)
    for i, reason in broken.items():
        with pytest.raises(ValueError, match="cannot read") as error:
            read_image(paths[i])
        assert str(error.value) == f"cannot read image {paths[i]}: {reason}"
    for i in set(range(len(paths))) - set(broken):
        assert read_image(paths[i]).size == (50, 40)
    assert set(broken) >= {1, 2, 3, 4, 5} and 0 not in broken


def test_most_images_are_not_decoded(noise, tmp_path, monkeypatch):
    noise.save(tmp_path / "a.jpg")
    noise.save(tmp_path / "a.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    paths = [tmp_path / f"a.{suffix}" for suffix in ("jpg", "png", "tif")]
    assert broken_images(paths) == {2: "its mode 'F' has no fixed range of values"}
    monkeypatch.setattr(ImageReader, "__call__", None)
    assert broken_images(paths[:2]) == {}


def test_images_with_oddities_that_can_be_read_are_not_broken(noise, tmp_path):
    noise.save(tmp_path / "a.jpg")
    noise.save(tmp_path / "a.png")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + b"more")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[-16] ^= 1  # of the checksum of the pixels
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(SyntaxError), Image.open(tmp_path / "a.png") as image:
        image.verify()
    assert broken_images([tmp_path / "a.jpg", tmp_path / "a.png"]) == {}


def test_bad_folders(root):
    with pytest.raises(FileNotFoundError, match=r"root must be a folder, got .*nowhere"):
        ImageFolder(root / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"root must be a folder, got .*readme\.md"):
        ImageFolder(root / "readme.md")
    with pytest.raises(ValueError, match=r"root must have a sub-folder for each class, got .*dog without any"):
        ImageFolder(root / "dog")
    with pytest.raises(ValueError, match=r"classes must be sub-folders of .*, got 'cow'"):
        ImageFolder(root, classes=["cat", "cow"])
    for classes in ([], ["cat", "cat"]):
        with pytest.raises(ValueError, match="classes must be different and at least one"):
            ImageFolder(root, classes=classes)
    (root / "eel").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*eel must contain images \(\.png, "):
        ImageFolder(root, classes=["cat", "eel"])
    (root / "new" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"root must have a sub-folder with images for each class, got .*new without"):
        ImageFolder(root / "new")
    save(root / "eel" / "day 2" / "1.png")
    save(root / "eel" / "day 1" / "more" / "1.png")
    deeper = "class folder .*eel must contain images of its own, got some only in day 1/more, day 2: each folder direc"
    with pytest.raises(ValueError, match=deeper):
        ImageFolder(root)
