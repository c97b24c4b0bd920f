"""What classes are called for a reader."""

from collections import Counter
from collections.abc import Sequence


def in_words(classes: Sequence[str], class_names: Sequence[str], outputs: Sequence[str] = ()) -> tuple[str, ...]:
    """Names in words where the data has them, each once: crane (n02012849), where two classes are called crane.

    outputs: names of all of a net's outputs, of which those beyond the classes are kept as they are.
    """
    twice = Counter(class_names)
    named = class_names or classes
    words = [word if twice[word] < 2 else f"{word} ({name})" for word, name in zip(named, classes, strict=True)]
    return (*words, *outputs[len(classes) :])
