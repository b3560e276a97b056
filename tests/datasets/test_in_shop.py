import pytest
from PIL import Image

from pml_ext.datasets import InShop

ROWS = (
    "img/WOMEN/Dresses/id_00000002/02_1_front.jpg     id_00000002  train",
    "img/WOMEN/Dresses/id_00000002/02_2_side.jpg      id_00000002  train",
    "img/MEN/Denim/id_00000001/01_1_front.jpg         id_00000001  query",
    "img/MEN/Denim/id_00000001/01_2_side.jpg          id_00000001  gallery",
    "img/MEN/Denim/id_00000007/01_1_front.jpg         id_00000007  train",
    "img/MEN/Denim/id_00000005/01_1_front.jpg         id_00000005  gallery",
    "img/MEN/Denim/id_00000005/01_2_side.jpg          id_00000005  query",
)
HEADER = "image_name item_id evaluation_status"


def make_in_shop(root, rows=ROWS, folder=".", images="."):
    """Write a data set in the official layout; image i is gray with value 10 * i."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "list_eval_partition.txt").write_text("\n".join([str(len(rows)), HEADER, *rows, ""]))
    for i, row in enumerate(rows):
        path = root / images / row.split()[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6), 10 * i).save(path, quality=100)
    return root


@pytest.mark.parametrize(("folder", "images"), [(".", "."), ("Eval", "Img")])
def test_items(tmp_path, folder, images):
    make_in_shop(tmp_path, folder=folder, images=images)
    train, query, gallery = (InShop(tmp_path, split) for split in ("train", "query", "gallery"))
    assert train.labels.tolist() == [0, 0, 1]
    assert query.labels.tolist() == [2, 3]
    assert gallery.labels.tolist() == [2, 3]
    names = ["id_00000002", "id_00000007", "id_00000001", "id_00000005"]
    assert train.class_names == query.class_names == gallery.class_names == names
    image, label = query[1]
    assert (image.mode, image.getpixel((0, 0)), type(label), label) == ("RGB", (60, 60, 60), int, 3)
    assert [str(path) for path in gallery.paths] == [str(tmp_path / images / ROWS[i].split()[0]) for i in (3, 5)]
    gallery.transform = lambda image: image.size
    assert gallery[0] == ((8, 6), 2)


def test_queries_and_gallery_share_labels_where_items_differ(tmp_path):
    make_in_shop(tmp_path, rows=[row for row in ROWS if not ("id_00000001" in row and "query" in row)])
    assert InShop(tmp_path, "query").labels.tolist() == [3]
    assert InShop(tmp_path, "gallery").labels.tolist() == [2, 3]


def test_missing_data_tells_where_to_ask(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*list_eval_partition\.txt or .*Eval.*: ask for .*DeepFashion"):
        InShop(tmp_path / "nowhere", "train")
    make_in_shop(tmp_path, images="elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no .*02_1_front\.jpg or .*Img.*: ask for .*DeepFashion"):
        InShop(tmp_path, "train")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["1", HEADER, "img/a.jpg id_1"],
            r"partition\.txt, line 3: must be image, item and train, .*got 'img/a.jpg id_1'",
        ),
        (
            ["2", HEADER, "img/a.jpg id_1 train", "img/a.jpg id_2 val"],
            "line 4: must be image, item and train, query or",
        ),
        (["3", HEADER, "img/a.jpg id_1 train"], "line 1: must be the number of images, 1 here, got '3'"),
        (["many", HEADER, "img/a.jpg id_1 train"], "line 1: must be the number of images, 1 here, got 'many'"),
        (["1", "img/a.jpg id_1 train", "img/b.jpg id_1 train"], "line 2: must be image_name item_id evaluation_status"),
        ([], "line 1: must be the number of images, 0 here, got ''"),
        (["2", HEADER, "img/a.jpg id_1 train", "img/b.jpg id_1 query"], "item id_1 must not be both in train and in"),
        (["1", HEADER, "img/a.jpg id_1 query"], "must list images of split 'train', got 0"),
    ],
)
def test_malformed_list(tmp_path, lines, message):
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        InShop(tmp_path, "train")


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="split must be one of train, query, gallery, got 'test'"):
        InShop(make_in_shop(tmp_path), "test")
