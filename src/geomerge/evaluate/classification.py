"""``classification:DIR``: images in a folder for each class, and a model with a classifier of its own.

The names of the folders are the model's labels (``config.json``'s ``label2id``), or their indices.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomerge.errors import DataError, ModelError, UsageError, did_you_mean
from geomerge.evaluate.models import Model, evaluating
from geomerge.evaluate.samples import Samples
from geomerge.evaluate.task import Settings, Tick

PREFIX = "classification:"
_BATCH = 32
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageFolderTask:
    """The accuracy of an image classifier on a folder of images.

    Attributes:
        folder: Holds a folder for each class.
        name: What it is called in the tables.
    """

    folder: Path
    name: str

    source = "classification"
    metric = "accuracy"
    higher_is_better = True

    @functools.cached_property
    def images(self) -> tuple[tuple[Path, str], ...]:
        """Each image with its class, classes taking turns, so that the first few are of all classes.

        Raises:
            DataError: There are none.
        """
        classes = sorted(p for p in self.folder.iterdir() if p.is_dir())
        files = [sorted(f for f in c.iterdir() if f.suffix.lower() in _IMAGES) for c in classes]
        longest = max((len(found) for found in files), default=0)
        made = [(found[i], c.name) for i in range(longest) for c, found in zip(classes, files) if i < len(found)]
        if not made:
            raise DataError(
                "there are no images in it",
                where=str(self.folder),
                hint=f"it has to hold a folder for each class with images in it ({', '.join(_IMAGES)})",
            )
        return tuple(made)

    @functools.cached_property
    def _hashes(self) -> tuple[str, ...]:
        try:
            return tuple(
                hashlib.sha256(label.encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
                for path, label in self.images
            )
        except OSError as error:
            raise DataError(f"an image cannot be read: {error.strerror}", where=error.filename) from None

    @functools.cached_property
    def version(self) -> str:
        """A hash of all images and their classes."""
        return hashlib.sha256("\n".join(("1", *self._hashes)).encode()).hexdigest()[:16]

    @property
    def chance(self) -> float:
        return 1 / len({label for _, label in self.images})

    def prepare(self, settings: Settings) -> None:
        """Find the images."""
        assert self.images

    def score(self, model: Model, settings: Settings, tick: Tick) -> Samples:
        """See `geomerge.evaluate.task.Task`."""
        module, processor = model.image_classifier(settings), model.image_processor(settings)
        chosen = self.images[: settings.limit]
        wanted = [_label(label, module, model) for _, label in chosen]
        parameter = next(module.parameters())
        size = settings.batch(_BATCH)
        right: list[bool] = []
        with evaluating(module):
            for start in range(0, len(chosen), size):
                batch = chosen[start : start + size]
                pixels = processor(images=[_open(path) for path, _ in batch], return_tensors="pt")["pixel_values"]
                logits = module(pixel_values=pixels.to(parameter.device, parameter.dtype)).logits
                found = logits.argmax(-1).tolist()
                right += [a == b for a, b in zip(found, wanted[start : start + len(batch)])]
                tick(len(right) / len(chosen))
        return Samples.of(right, self._hashes[: len(right)])


def classification_task(reference: str) -> ImageFolderTask:
    """The task of a reference ``classification:DIR``.

    Raises:
        UsageError: No folder is named.
        DataError: It is not there.
    """
    text = reference.removeprefix(PREFIX)
    if not text:
        raise UsageError("classification needs a folder of images", hint="--tasks classification:DIR")
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise DataError(
            "there is no such directory",
            where=text,
            hint="classification:DIR takes a folder with a folder for each class",
        )
    return ImageFolderTask(folder, f"{PREFIX}{folder.resolve().name}")


def _label(name: str, module: Any, model: Model) -> int:
    """The index of a class in a model's output."""
    config = module.config
    labels = {str(label).casefold(): int(i) for label, i in (config.label2id or {}).items()}
    found = labels.get(name.casefold())
    if found is None and name.isdecimal():
        found = int(name)
    if found is None or not 0 <= found < config.num_labels:
        known = [str(label) for label in (config.label2id or {})]
        raise ModelError(
            f"it has no class {name!r}", where=model.reference or model.name, hint=did_you_mean(name, known)
        )
    return found


def _open(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the image cannot be read: {error}", where=str(path)) from None
