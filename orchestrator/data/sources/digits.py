"""The bundled data set: scikit-learn's handwritten digits, which need no download."""

import io

from orchestrator.data.sources.listing import SPLITS, Entry, Source

DIGITS = "digits"


def open_digits() -> Source:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships: 1,437 train, 360 val, classes balanced.

    Source: E. Alpaydin, C. Kaynak, UCI Optical Recognition of Handwritten Digits (1998), its test part.
    """
    import numpy as np
    import PIL.Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    gray = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    train, val = train_test_split(np.arange(len(gray)), test_size=360, stratify=bunch.target, random_state=0)
    splits: dict[str, list[Entry]] = {}
    for split, indices in zip(SPLITS, (train, val), strict=True):
        entries = splits[split] = []
        for index in sorted(indices.tolist()):
            png = io.BytesIO()
            PIL.Image.fromarray(gray[index]).save(png, "PNG")
            entries.append(
                Entry(index, int(bunch.target[index]), f"{split}/digit-{index:04d}.png", data=png.getvalue())
            )
    return Source(DIGITS, DIGITS, tuple("0123456789"), splits, image_size=72)
