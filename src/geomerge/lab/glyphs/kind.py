"""The suite of eight glyph tasks: how its base, heads and experts are made."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomerge.lab.classification import ClassificationTask
from geomerge.lab.glyphs.characters import CLASSES, TITLES, base_characters
from geomerge.lab.glyphs.data import base_data, split_data
from geomerge.lab.glyphs.model import features, load_backbone, new_backbone, save_backbone
from geomerge.lab.glyphs.settings import SIZES, Settings, Training
from geomerge.lab.kinds import LabTask, Requirement, Tick
from geomerge.lab.training import generator_for, reproducible, seed_for, train

if TYPE_CHECKING:
    from torch import Tensor, nn


class GlyphsKind:
    """See `geomerge.lab.kinds.SuiteKind`."""

    name = "glyphs"
    title = "eight tasks of reading characters and symbols, for a small ViT"
    kind = "image-classification"
    sizes: tuple[str, ...] = tuple(SIZES)
    others: tuple[str, ...] = ()
    has_heads = True
    in_process = False

    def requirement(self, size: str) -> Requirement:
        return Requirement()

    def settings(self, size: str) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(SIZES[size])))  # type: ignore[no-any-return]

    def steps(self, size: str) -> dict[str, int]:
        s = SIZES[size]
        return {"base": s.base.steps} | dict.fromkeys(CLASSES, s.expert.steps)

    def tasks(self, size: str, seed: int, heads: Mapping[str, Path] | None = None) -> dict[str, LabTask]:
        s = SIZES[size]
        return {name: _task(s, seed, name, (heads or {}).get(name)) for name in CLASSES}

    def train_base(self, size: str, seed: int, out_dir: Path, tick: Tick) -> None:
        """Train backbone and classifier on the other glyphs; the classifier is thrown away."""
        import torch
        from torch import nn

        s = SIZES[size]
        backbone = new_backbone(s, seed_for(seed, "glyphs/weights"))
        with reproducible(seed_for(seed, "glyphs/classifier")):
            classifier = nn.Linear(s.width, len(base_characters()))
        whole = nn.ModuleDict({"backbone": backbone, "classifier": classifier})

        def logits(_: nn.Module, images: Tensor) -> Tensor:
            scores: Tensor = classifier(features(backbone, images))
            return scores

        _fit(whole, base_data(s, seed), logits, s.base, seed, "glyphs/base", tick, _device(size))
        with torch.no_grad():
            save_backbone(backbone, out_dir)

    def make_heads(self, base_dir: Path, size: str, seed: int, out_dir: Path) -> None:
        """A head of class means: what a few training samples look like to the base.

        Fixed before any fine-tuning and trained by nobody, as are the heads that CLIP's text encoder gives.
        """
        from safetensors.torch import save_file

        s = SIZES[size]
        base = load_backbone(base_dir)
        for name in CLASSES:
            images, labels = split_data(s, seed, name, "train")
            weight, bias = _class_means(base, images, labels, len(CLASSES[name]), s)
            save_file({"weight": weight, "bias": bias}, str(out_dir / f"{name}.safetensors"))

    def train_expert(
        self, base_dir: Path, task: str, size: str, seed: int, out_dir: Path, tick: Tick, head: Path | None = None
    ) -> None:
        s = SIZES[size]
        known = _task(s, seed, task, head)
        frozen = known.load_head()
        model = load_backbone(base_dir)

        def logits(model: nn.Module, images: Tensor) -> Tensor:
            return known.logits(model, images, frozen)

        _fit(model, split_data(s, seed, task, "train"), logits, s.expert, seed, f"glyphs/{task}", tick, _device(size))
        save_backbone(model, out_dir)

    def train_other(self, base_dir: Path, name: str, size: str, seed: int, out_dir: Path, tick: Tick) -> None:
        raise NotImplementedError("the suite has no other models")

    def load_model(self, path: Path) -> nn.Module:
        return load_backbone(path)


def _task(settings: Settings, seed: int, name: str, head: Path | None) -> ClassificationTask:
    content = json.dumps([asdict(settings), CLASSES[name]], sort_keys=True)
    return ClassificationTask(
        name=name,
        suite="glyphs",
        kind="image-classification",
        title=TITLES[name],
        version=f"{seed_for(seed, f'glyphs/{name}/{content}'):016x}",
        classes=tuple(CLASSES[name]),
        data=functools.partial(split_data, settings, seed, name),
        features=features,
        head=head,
    )


def _class_means(
    base: nn.Module, images: Tensor, labels: Tensor, classes: int, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The head of directions from the mean of all class means to each: ``(classes, width)``, and its bias ``(classes,)``."""
    import torch

    with torch.no_grad(), reproducible(0):
        few = [features(base, images[labels == label][: settings.shots]) for label in range(classes)]
    means = torch.stack([part.mean(0) for part in few])
    centre = means.mean(0)
    usual = (torch.cat(few) - centre).norm(dim=1).mean()
    weight = torch.nn.functional.normalize(means - centre, dim=1) * (settings.head_scale / usual)
    return weight.contiguous(), (-weight @ centre).contiguous()


def _device(size: str) -> str:
    """Where a size is trained: tiny ones on the processor, so that a seed gives the same models everywhere."""
    import torch

    return "cuda" if size != "tiny" and torch.cuda.is_available() else "cpu"


def _fit(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    logits: Any,
    training: Training,
    seed: int,
    purpose: str,
    tick: Tick,
    device: str,
) -> None:
    """Train with cross-entropy on random batches; the model is back on the processor afterwards."""
    import torch
    from torch.nn import functional

    model.to(device)
    images, labels = (part.to(device) for part in data)
    generator = generator_for(seed, f"{purpose}/order")

    def batch(_: int) -> Tensor:
        return torch.randint(len(labels), (training.batch,), generator=generator).to(device)

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return functional.cross_entropy(logits(model, images[rows]), labels[rows])

    train(
        model,
        batch,
        loss,
        steps=training.steps,
        learning_rate=training.learning_rate,
        seed=seed_for(seed, f"{purpose}/dropout"),
        weight_decay=training.weight_decay,
        warmup=training.warmup,
        tick=tick,
    )
    model.cpu()


KIND = GlyphsKind()
