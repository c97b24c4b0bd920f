"""Looks into a trained net: pictures of what it learned and why it answers as it does, and a page with all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from alexnet import explain, explain_pictures
from alexnet.explain_pictures import TOP, Answer
from alexnet.trained import TrainedNet
from orchestrator.base.shown import LONGEST_VALUE, shown
from orchestrator.base.storage import StoragePath
from orchestrator.base.terminal import percent
from orchestrator.data.shards import MANIFEST, read_manifest
from orchestrator.data.sources import Entry
from orchestrator.models import film
from orchestrator.models.evaluate import check_named
from orchestrator.models.evidence import NEIGHBOURS, Progress, Seen, Validation, nearest, see, validate
from orchestrator.models.film import png
from orchestrator.models.find import FoundModel
from orchestrator.models.planes import planes
from orchestrator.models.predict import EntryReader
from orchestrator.models.stored import Images, Part, Stored
from orchestrator.models.words import in_words
from orchestrator.report.page import Picture, Section, Table, page

PAGE = "look.html"
LESS = "no images but those of --image are looked at; give the data with --data"
EXPLAINED = 6  # images with maps of what speaks for a class


def own_images(trained: TrainedNet, files: list[Path]) -> list[tuple[Images, str]]:
    """The user's images as they would be stored, and their names. Raises ValueError of one line."""
    for file in files:
        try:
            file.stat()
        except OSError as error:
            raise ValueError(f"--image {shown(file)}: cannot be read ({error.strerror})") from None
    entries = [Entry(number, 0, str(file), path=str(file.absolute())) for number, file in enumerate(files)]
    reader = EntryReader(trained.image_size, exif=trained.description.applies_exif)
    pixels = reader.decode(entries, reader.fetch(entries), lambda decode, parts: [decode(part) for part in parts])
    for name, reason in pixels.rejected:
        raise ValueError(f"--image {name}: {reason}")
    return [(image, file.name) for image, file in zip(pixels.stored, files, strict=True)]


def data_of(found: FoundModel, trained: TrainedNet, given: str | None) -> tuple[StoragePath | None, str | None]:
    """The shards to look at, and a line about them where they are not there or not those of the training.

    given: --data, which must be there. Raises ValueError of one line if it does not fit the net.
    """
    text = given or found.data
    if text is None:
        return None, f"it is not known what it was trained on: {LESS}"
    data = StoragePath.of(text)
    if given is None and (data / MANIFEST).size() is None:
        return None, f"its data, {data}, is not there: {LESS}"
    manifest, named = read_manifest(data), trained.description.classes
    if manifest.classes != named:
        check_named(found.text, trained)
        has = f"{len(manifest.classes)} classes, and the net {len(named)}"
        if len(manifest.classes) == len(named):
            label = next(i for i, (a, b) in enumerate(zip(manifest.classes, named, strict=True)) if a != b)
            has = f"the class {manifest.classes[label]!r} where the net has {named[label]!r}"
        raise ValueError(f"--data {data}: has {shown(has)}; give the data that it was trained on")
    if manifest.image_size != trained.image_size:
        raise ValueError(
            f"--data {data}: has images of {manifest.image_size} pixels, and the net was trained on "
            f"{trained.image_size}; prepare them with --image-size {trained.image_size}"
        )
    known = trained.description.digest
    changed = f"the images in {data} are not those that it was trained on: their digest is {manifest.digest}"
    return data, changed if known and known != manifest.digest else None


@dataclass
class Look:
    """Draws pictures of a net, and collects them."""

    trained: TrainedNet
    name: str  # of the model
    progress: Progress = lambda what, done, total: None
    files: dict[str, bytes] = field(default_factory=dict)  # by their names, the page among them
    sections: list[Section] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """What the net's outputs are called."""
        described = self.trained.description
        words = [name.split(",")[0] for name in described.class_names]
        named = in_words(described.classes, words, self.trained.classes)
        return [shown(name, LONGEST_VALUE) for name in named]

    def kernels(self) -> None:
        """The first layer."""
        net = self.trained.net
        weights = net.get_parameter("conv1.weight").detach().float().numpy()
        shares = explain.colouredness_of_columns(weights, net.preset.columns)
        values = " and ".join(f"{share:.2f}" for share in shares)
        what = "its columns are" if net.preset.columns > 1 else "it is"
        text = f"How coloured {what}: {values}; 0 is gray, and noise has {explain.NOISE:.2f}."
        figure = explain_pictures.kernels(weights, net.preset.columns, f"{self.name}: kernels of conv1")
        caption = "A weight of 0 is gray; each kernel is drawn up to its own largest weight."
        pictures = {"kernels.png": (figure, f"The {len(weights)} kernels of conv1, each column apart", caption)}
        self._add("Kernels of the first layer", [text], pictures)

    def film(self, kernels: Mapping[str, NDArray[np.float32]]) -> None:
        """The first layer at several epochs."""
        self.files["film.png"] = film.film(
            dict(kernels), self.trained.net.preset.columns, f"{self.name}: kernels of conv1"
        )
        picture = Picture(self.files["film.png"], f"The kernels of conv1 at {', '.join(kernels)}")
        text = "A kernel is drawn on one scale throughout: up to its largest weight of all epochs."
        self.sections.append(Section("The first layer as it learned", [text], [picture]))

    def images(self, own: list[tuple[Images, str]], train: Part | None, val: Part | None) -> None:
        """What the net says of the user's images and of a data set. Raises DamagedData, JobError."""
        seen = see(self.trained, own)
        found = validate(self.trained, val, self.progress) if val and val.rows else None
        shown_images = found.shown if found else []
        queries = [*seen, *shown_images]
        if val and not found:
            self.sections.append(Section("Validation images", [f"{val.data} has none."]))
        if not queries:
            return
        self._predictions(queries)
        if train and train.rows:
            self._neighbours(queries, nearest(self.trained, train, queries, self.progress), train)
        if val and found:
            self._mistakes(found, val)
        mistakes = found.mistakes[: EXPLAINED // 2] if found else []
        others = [each for each in shown_images if each.name not in {mistake.name for mistake in mistakes}]
        self._grad_cam([*seen, *mistakes, *others][: max(EXPLAINED, len(seen))])
        self._maps(seen or queries[:1])
        if found:
            self._planes(found)

    def page(self, facts: list[str]) -> str:
        """The page with all pictures, also among `files`."""
        text = page(f"A look into {self.name}", facts, self.sections)
        self.files[PAGE] = text.encode()
        return text

    def _predictions(self, seen: list[Seen]) -> None:
        rows = []
        for each in seen:
            top = each.best(TOP)
            truth = "" if each.label is None else self.names[each.label]
            likely = "; ".join(f"{self.names[label]} {percent(each.probabilities[label])}" for label in top)
            rows.append((each.name, truth, likely))
        figure = explain_pictures.predictions([self._answer(each) for each in seen], f"{self.name}: predictions")
        text = f"The likeliest {min(TOP, len(self.names))} classes; green is right. The net sees the centre crop."
        table = Table("as text", ("image", "is", "predictions"), rows)
        self._add("Predictions", [text], {"predictions.png": (figure, "Images with bars of probabilities", "")}, table)

    def _neighbours(self, seen: list[Seen], near: list[list[tuple[Stored, float]]], part: Part) -> None:
        drawn = [[(s.image, f"{self.names[s.label]}, {distance:.3g}") for s, distance in each] for each in near]
        title = f"{self.name}: nearest training images"
        figure = explain_pictures.neighbours([self._answer(each) for each in seen], drawn, title)
        text = (
            f"Each row: an image, then the {NEIGHBOURS} of {_count(part)} training images whose features in fc7 are "
            "nearest, and their Euclidean distances."
        )
        rows = [
            (query.name, *(f"{s.name} ({self.names[s.label]}, {distance:.4g})" for s, distance in each))
            for query, each in zip(seen, near, strict=True)
        ]
        titles = ("image", *(str(number + 1) for number in range(max(map(len, near)))))
        pictures = {"neighbours.png": (figure, "Images, and those nearest to them in fc7", "")}
        self._add("Nearest training images", [text], pictures, Table("as text", titles, rows))

    def _mistakes(self, found: Validation, part: Part) -> None:
        share = percent(found.wrong / found.images)
        text = f"{found.wrong:,} of {_count(part)} validation images are wrong ({share})"
        if not found.mistakes:
            self.sections.append(Section("Surest mistakes", [f"{text}."]))
            return
        verdicts = [(self._percent(each, each.answer), self._percent(each, each.label)) for each in found.mistakes]
        captions = [(answer, f"is {truth}") for answer, truth in verdicts]
        images = [each.image for each in found.mistakes]
        figure = explain_pictures.captioned(images, captions, f"{self.name}: surest mistakes")
        rows = [(each.name, *verdict) for each, verdict in zip(found.mistakes, verdicts, strict=True)]
        pictures = {"mistakes.png": (figure, "Images that the net is sure and wrong about", "")}
        table = Table("as text", ("image", "prediction", "is"), rows)
        self._add("Surest mistakes", [f"{text}; these with the highest probability."], pictures, table)

    def _grad_cam(self, seen: list[Seen]) -> None:
        others = [self._other(each) for each in seen]
        stored = np.stack([each.image for each in seen])
        crops = explain.center_crop(self.trained, stored)
        images, captions = [], []
        maps = [explain.grad_cam(self.trained, stored, np.array(labels))
                for labels in ([each.answer for each in seen], others)]  # fmt: skip
        for i, each in enumerate(seen):
            truth = "" if each.label is None else f"is {self.names[each.label]}"
            images += [crops[i], *(explain_pictures.overlay(crops[i], heat[i]) for heat in maps)]
            captions += [[truth], *([f"for {self._percent(each, label)}"] for label in (each.answer, others[i]))]
        figure = explain_pictures.captioned(images, captions, f"{self.name}: where it looks", across=3)
        text = (
            "Grad-CAM on the last convolution: red speaks most for the class above the picture, dark blue not at all. "
            "In the middle its answer; on the right the true class, or the second likeliest."
        )
        pictures = {"grad_cam.png": (figure, "Images with class-activation maps", "")}
        self._add("Where it looks", [text], pictures, narrow=True)

    def _maps(self, seen: list[Seen]) -> None:
        pictures = {}
        for number, each in enumerate(seen, start=1):
            maps = explain.feature_maps(self.trained, each.image)
            crop = explain.center_crop(self.trained, each.image[None])[0]
            figure = explain_pictures.feature_maps(
                crop, maps, self.trained.net.preset.columns, f"{self.name}: feature maps"
            )
            name = "maps.png" if len(seen) == 1 else f"maps-{number}.png"
            pictures[name] = (figure, f"Feature maps of {each.name}", each.name)
        text = "The strongest maps after each convolution and ReLU, each drawn from 0 to its largest value."
        self._add("Feature maps", [text], pictures)

    def _planes(self, found: Validation) -> None:
        points = planes(found.features)
        title = f"{self.name}: validation images in fc7"
        figure = explain_pictures.planes(points, found.labels, self.names, title)
        text = f"{len(found.labels):,} validation images by their features in fc7, coloured by their true class."
        self._add("fc7 in two dimensions", [text], {"fc7.png": (figure, "A point for each image", "")})

    def _answer(self, seen: Seen) -> Answer:
        order = seen.best(TOP)
        top = [(self.names[label], float(seen.probabilities[label]), label == seen.label) for label in order]
        return Answer(seen.image, shown(seen.name) if seen.label is None else self.names[seen.label], top)

    def _other(self, seen: Seen) -> int:
        """The true class of a mistake, otherwise the second likeliest."""
        if seen.label not in (None, seen.answer):
            return int(seen.label)  # type: ignore[arg-type]
        return seen.best(2)[1]

    def _percent(self, seen: Seen, label: int | None) -> str:
        assert label is not None
        return f"{self.names[label]} ({100 * seen.probabilities[label]:.0f} %)"

    def _add(
        self,
        title: str,
        text: list[str],
        figures: dict[str, tuple[Figure, str, str]],
        table: Table | None = None,
        *,
        narrow: bool = False,
    ) -> None:
        """A section of pictures: file name to figure, what it shows, caption."""
        pictures = []
        for name, (figure, alt, caption) in figures.items():
            self.files[name] = png(figure)
            pictures.append(Picture(self.files[name], alt, caption, narrow))
        self.sections.append(Section(title, text, [*pictures, *([table] if table else [])]))


def _count(part: Part) -> str:
    """How many images are looked at."""
    return f"{part.rows:,}" + (f" of the {part.total:,}" if part.rows < part.total else "")
