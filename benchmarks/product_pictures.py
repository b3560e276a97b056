"""Computer-made pictures of products, for retrieval.py.

python benchmarks/product_pictures.py products      makes products/train and products/test

A class is a package: a few coloured shapes on one ground. Each picture shows it at another place, size, angle and
brightness, before other blurred spots. 40 training classes and 40 test classes, 20 pictures of 96 x 96 each.
"""

from pathlib import Path

import numpy as np
from harness import make_parser
from PIL import Image, ImageDraw, ImageFilter

SIZE = 96
FORMATS = ((60, 90), (90, 60), (76, 76), (50, 96))  # width and height


def colour(rng):
    return tuple(int(x) for x in rng.integers(20, 236, 3))


def make_product(rng):
    """Return the picture of a package, twice as large as it can be seen."""
    width, height = FORMATS[rng.integers(len(FORMATS))]
    package = Image.new("RGBA", (2 * width, 2 * height), (*colour(rng), 255))
    pen = ImageDraw.Draw(package)
    palette = [colour(rng) for _ in range(4)]
    for _ in range(rng.integers(4, 8)):
        left, top = rng.uniform(0, 0.8, 2)
        right, bottom = np.minimum(np.add((left, top), rng.uniform(0.12, 0.5, 2)), 1)
        box = np.multiply((left, top, right, bottom), 2 * np.array([width, height] * 2)).tolist()
        corners = [(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])]
        draw = (pen.rectangle, pen.ellipse, lambda box, fill, corners=corners: pen.polygon(corners, fill=fill))
        draw[rng.integers(3)](box, fill=palette[rng.integers(4)])
    return package


def photograph(package, rng):
    """Return a picture of a package somewhere before spots."""
    scale = rng.uniform(0.55, 1) * SIZE / 220
    seen = package.resize([round(scale * x) for x in package.size]).rotate(
        rng.uniform(-25, 25), expand=True, resample=Image.Resampling.BILINEAR
    )
    picture = Image.new("RGB", (SIZE, SIZE), colour(rng))
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        (x, y), radius = rng.integers(0, SIZE, 2).tolist(), int(rng.integers(8, 40))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour(rng))
    picture = picture.filter(ImageFilter.GaussianBlur(6))
    margin = SIZE // 10  # as far a package may stand out
    picture.paste(seen, [int(rng.integers(-margin, max(1, SIZE - x + margin))) for x in seen.size], seen)
    pixels = np.asarray(picture) * rng.uniform(0.6, 1.3) + rng.normal(0, 8, (SIZE, SIZE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def main(folder, classes=40, pictures=20, seed=0):
    """Write train/ and test/, a folder for each class."""
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for number in range(classes):
            package, place = make_product(rng), Path(folder) / split / f"{split}-{number:02d}"
            place.mkdir(parents=True)
            for i in range(pictures):
                photograph(package, rng).save(place / f"{i}.png")


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("folder", help="to be made")
    parser.add_argument("--classes", type=int, default=40, help="of each part")
    parser.add_argument("--pictures", type=int, default=20, help="of a class")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
