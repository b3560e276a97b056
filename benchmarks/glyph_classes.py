"""Derive the character lists of ``pml_ext.datasets.Glyphs`` from matplotlib's fonts.

Run: python benchmarks/glyph_classes.py

1. Characters that all 16 faces draw, in the Unicode categories of letters, digits and signs.
2. One of each group of twins (Latin A, Greek Alpha, Cyrillic A): characters whose bitmaps agree in 8 or more faces.
3. The rest is cut into two halves. Characters that share a base letter (a, A, Á), or that look alike in any face, stay
   in one half, so that a test character is not a variant of a training character.
"""

import unicodedata
from itertools import chain

import numpy as np
from matplotlib.ft2font import FT2Font
from tqdm import tqdm

from pml_ext.datasets.glyphs import draw_character, font_paths

CATEGORIES = {"Lu", "Ll", "Lo", "Nd", "Sm", "Sc"}
SAME = (
    0.15  # two bitmaps agree if their difference is below this share of the fainter one (L2): a pixel or two of accent
)


def shared_characters():
    """Return the characters of CATEGORIES that every face draws."""
    code_points = set.intersection(*(set(FT2Font(path).get_charmap()) for path in font_paths()))
    return sorted(chr(c) for c in code_points if unicodedata.category(chr(c)) in CATEGORIES)


def count_agreements(characters, size=64):
    """Return an (n, n) matrix: in how many of the 16 faces the bitmaps of two characters agree."""
    count = np.zeros((len(characters), len(characters)), dtype=int)
    for path in tqdm(font_paths(), desc="faces"):
        bitmaps = np.stack([draw_character(c, path, size) for c in characters]).reshape(len(characters), -1)
        bitmaps = bitmaps.astype(np.float64) / 255
        energy = (bitmaps**2).sum(axis=1)
        distance = np.maximum(energy[:, None] + energy - 2 * bitmaps @ bitmaps.T, 0)
        count += distance < SAME**2 * np.minimum(energy[:, None], energy)
    return count


def groups(characters, related):
    """Return the connected components of a boolean (n, n) relation, each a list of characters."""
    left, components = set(range(len(characters))), []
    while left:
        todo, group = [min(left)], []
        while todo:
            i = todo.pop()
            if i in left:
                left.remove(i)
                group.append(characters[i])
                todo.extend(np.flatnonzero(related[i]))
        components.append(sorted(group))
    return components


def base_letter(character):
    """Return the letter without case and accents."""
    return unicodedata.normalize("NFD", character)[0].casefold()


def main():
    """Print how many characters each step keeps, and the two lists."""
    characters = shared_characters()
    print(f"{len(characters)} characters in all {len(font_paths())} faces")
    twins = groups(characters, count_agreements(characters) >= 8)
    kept = [min(group) for group in twins]
    print(f"{len(kept)} without twins; dropped:", *("".join(g) for g in twins if len(g) > 1))
    base = np.array([base_letter(c) for c in kept])
    families = groups(kept, (base[:, None] == base) | (count_agreements(kept) >= 1))
    train, test = [], []
    for family in sorted(families, key=lambda group: (-len(group), group)):
        min(train, test, key=len).extend(family)
    assert set(train).isdisjoint(test) and set(chain(train, test)) == set(kept)
    for name, half in (("TRAIN", train), ("TEST", test)):
        print(f"{name}: {len(half)} characters")
        print(" ".join(f"{ord(c):04X}" for c in sorted(half)))


if __name__ == "__main__":
    main()
