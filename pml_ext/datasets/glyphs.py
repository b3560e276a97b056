"""Characters of the typefaces that matplotlib ships: a retrieval data set that needs no download."""

import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_ext.datasets.glyph_characters import TEST_CHARACTERS, TRAIN_CHARACTERS
from pml_ext.extras import comes_with

_FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
_SPLITS = {
    "train": TRAIN_CHARACTERS,
    "test": TEST_CHARACTERS,
    "train+test": TRAIN_CHARACTERS + TEST_CHARACTERS,
}
_OVERSAMPLING = 2  # characters are drawn, turned and scaled at twice the final size, then averaged down
_MAX_ROTATION, _MAX_ZOOM, _MAX_SHIFT = np.deg2rad(15), 0.15, 0.06  # radians, share, share of the image's side


class Glyphs(torch.utils.data.Dataset[tuple[Any, Any]]):
    r"""Letters, digits and signs in 16 typefaces, jittered in size, rotation and position.

    Every class is one Unicode character; its samples are drawn in the 16 DejaVu and STIX faces in turn, each with its
    own size (+-15%), rotation (+-15 degrees) and position (+-6% of the side). Training and test characters are
    disjoint, and so are their families: characters with a common base letter (a, A, Á) or a common look in any face
    (K and Cyrillic Ka) lie in the same half, and of twins (Latin A, Greek Alpha, Cyrillic A) only one is kept. Test
    retrieval is therefore zero-shot.

    The arguments follow torchvision's data sets, with no ``root``, since nothing is stored.

    Args:
        split: "train", "test" or "train+test".
        transform: Applied to the PIL image (mode "L", white ink on black).
        target_transform: Applied to the label.
        samples_per_class: Images of each character. A longer set begins with the images of a shorter one.
        image_size: Side in pixels, at least 8.
        seed: Seed of the jitter. The same seed gives the same images in every split.

    Attributes:
        data: ``(N, image_size, image_size)``, uint8, all images.
        targets: ``(N,)``, int64 labels, sorted. Training labels are 0 to ``num_classes - 1`` and test labels follow
            them, so that no label means two characters.
        classes: The characters of this split.
        class_names: Their Unicode names, in the same order (GREEK SMALL LETTER BETA): a text modality.
        class_to_idx: Character to label.
        num_classes: Characters in this split.

    Raises:
        ValueError: If ``split`` is unknown, ``samples_per_class`` < 1, ``image_size`` < 8 or ``seed`` < 0.
        ImportError: If matplotlib, whose fonts are used, is not installed; the message names the extra.

    Examples:
        >>> dataset = Glyphs(split="test", samples_per_class=2)
        >>> image, label = dataset[0]
        >>> image.size, dataset.class_names[0], dataset.class_to_idx[dataset.classes[0]] == label
        ((32, 32), 'DOLLAR SIGN', True)

    Source:
        Ours. The lists are in ``glyph_characters.py``, so that neither fonts nor Unicode tables change the classes;
        ``benchmarks/glyph_classes.py`` derives them: of 588 characters that all faces draw 534 are left. Bitmaps count
        as equal up to a small difference, so that an accent that sits a pixel lower makes no new class.
    """

    def __init__(
        self,
        split: str = "train",
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        samples_per_class: int = 16,
        image_size: int = 32,
        seed: int = 0,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
        for name, value, smallest in (
            ("samples_per_class", samples_per_class, 1),
            ("image_size", image_size, 8),
            ("seed", seed, 0),
        ):
            if value < smallest:
                raise ValueError(f"{name} must be >= {smallest}, got {value}")
        self.split = split
        self.transform = transform
        self.target_transform = target_transform
        self.samples_per_class = samples_per_class
        self.image_size = image_size
        self.seed = seed
        self.classes = list(_SPLITS[split])
        self.class_names = [unicodedata.name(c) for c in self.classes]
        first_label = len(TRAIN_CHARACTERS) if split == "test" else 0
        self.class_to_idx = {c: i for i, c in enumerate(self.classes, first_label)}
        self.targets = torch.arange(first_label, first_label + self.num_classes).repeat_interleave(samples_per_class)
        self.data = self._draw()

    @property
    def num_classes(self) -> int:
        """Number of characters in this split."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return (image, label), as a PIL image and an int unless the transforms change them."""
        from PIL import Image  # on use: only drawing needs Pillow

        image: Any = Image.fromarray(self.data[index].numpy())
        label: Any = int(self.targets[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label

    def __repr__(self) -> str:
        settings = ", ".join(
            f"{name}={getattr(self, name)!r}" for name in ("split", "samples_per_class", "image_size", "seed")
        )
        return f"{type(self).__name__}({settings}): {len(self)} images of {self.num_classes} characters"

    def _draw(self) -> Tensor:
        size = self.image_size * _OVERSAMPLING
        paths = font_paths()[: self.samples_per_class]
        images = []
        for character in self.classes:
            masters = torch.from_numpy(np.stack([draw_character(character, path, size) for path in paths]))
            which = torch.arange(self.samples_per_class) % len(paths)
            rng = np.random.default_rng([self.seed, ord(character)])  # of its own: splits and lengths agree
            jitter = torch.from_numpy(rng.uniform(-1, 1, (self.samples_per_class, 4)))
            images.append(_jitter(masters[which], jitter))
        return torch.cat(images)


def _jitter(images: Tensor, jitter: Tensor) -> Tensor:
    """Turn, scale and shift uint8 images (n, s, s) by jitter (n, 4) in [-1, 1], then halve their side."""
    angle, zoom = jitter[:, 0] * _MAX_ROTATION, 1 + jitter[:, 1] * _MAX_ZOOM
    matrix = torch.zeros(len(images), 2, 3, dtype=torch.float64)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos() / zoom
    matrix[:, 0, 1], matrix[:, 1, 0] = -angle.sin() / zoom, angle.sin() / zoom
    matrix[:, :, 2] = jitter[:, 2:] * 2 * _MAX_SHIFT  # the grid's coordinates run from -1 to 1
    grid = torch.nn.functional.affine_grid(matrix.float(), [len(images), 1, *images.shape[1:]], align_corners=False)
    turned = torch.nn.functional.grid_sample(images[:, None].float(), grid, align_corners=False)
    return torch.nn.functional.avg_pool2d(turned, _OVERSAMPLING).squeeze(1).round().to(torch.uint8)


def font_paths() -> list[str]:
    """Return the files of the 16 faces."""
    with comes_with("visualization", "matplotlib", "Glyphs"):
        import matplotlib  # on use: it comes with an extra
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [str(folder / f"{face}.ttf") for face in _FACES]


def draw_character(character: str, path: str, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a character's (size, size) uint8 bitmap, white on black, on a common baseline."""
    from PIL import Image, ImageDraw  # on use: only drawing needs Pillow

    image = Image.new("L", (size, size))
    place = (size / 2, round(0.69 * size))
    ImageDraw.Draw(image).text(place, character, fill=255, font=_font(path, round(0.62 * size)), anchor="ms")
    return np.array(image)


@lru_cache(maxsize=64)
def _font(path: str, size: int) -> Any:
    from PIL import ImageFont  # on use: only drawing needs Pillow

    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)  # the same with and without raqm
