"""The suite of seconds: four small classification tasks on vectors, a shared encoder, frozen orthonormal heads.

Each class of a task is a mixture of Gaussian clusters in 24 dimensions; the whole task is then multiplied by a random
matrix of its own. The encoder (24 → 64 → 64 → 32, ReLU) is shared, each task's head is four times an orthonormal
frame. The base has seen a little of every task, each expert much of one.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomerge.errors import ModelError, first_line
from geomerge.lab.classification import ClassificationTask
from geomerge.lab.kinds import LabTask, Requirement, Split, Tick
from geomerge.lab.training import generator_for, reproducible, seed_for, train

if TYPE_CHECKING:
    from torch import Tensor, nn

MODEL_TYPE = "geomerge_mlp"


@dataclass(frozen=True)
class Settings:
    """Sizes of the data and of the training.

    Attributes:
        generator: The version of what makes the data; raised when it changes.
        tasks, classes, clusters: How many tasks, classes a task, Gaussian clusters a class.
        spread: The standard deviation of the clusters' centres (the noise around them has 1).
        widths: Of the encoder's layers, input and output included.
        head_scale: The factor of the orthonormal heads.
        base_samples: Of each task, seen by the base.
        base_steps, base_learning_rate: The base's training, on all its samples at once.
        samples: Training samples of each task, seen by its expert.
        steps, learning_rate, batch: The experts' training.
        calibration, validation, test: Samples of the other splits.
        gain, gap: See `Requirement`.
    """

    generator: int = 1
    tasks: int = 4
    classes: int = 5
    clusters: int = 3
    spread: float = 1.35
    widths: tuple[int, ...] = (24, 64, 64, 32)
    head_scale: float = 4.0
    base_samples: int = 100
    base_steps: int = 350
    base_learning_rate: float = 1.5e-3
    samples: int = 1500
    steps: int = 800
    learning_rate: float = 1.5e-3
    batch: int = 128
    calibration: int = 400
    validation: int = 400
    test: int = 1000
    gain: float = 0.04
    gap: float = 0.03


SIZES = {
    "tiny": Settings(),
    "easy": Settings(base_samples=200, gain=0.02, gap=0.015),
    "hard": Settings(tasks=6, classes=6, clusters=4, base_samples=30, gain=0.20, gap=0.05),
}
"""``tiny`` is the "medium" setting of the published figures that methods are checked against; its experts
gain 12 points, so it asks for less than the other suites do; ``hard`` asks for as much."""


@functools.cache
def _data(settings: Settings, seed: int, task: int, split: Split | str) -> tuple[Tensor, Tensor]:
    """Inputs ``(samples, 24)`` and labels of one split of one task."""
    import torch

    world = generator_for(seed, f"mlp/{task}/world")
    width = settings.widths[0]
    centres = settings.spread * torch.randn(settings.classes, settings.clusters, width, generator=world)
    mixing = torch.randn(width, width, generator=world) / width**0.5
    generator = generator_for(seed, f"mlp/{task}/{split}")
    count = settings.base_samples + settings.samples if split == "train" else int(getattr(settings, split))
    labels = torch.randint(settings.classes, (count,), generator=generator)
    clusters = torch.randint(settings.clusters, (count,), generator=generator)
    inputs = centres[labels, clusters] + torch.randn(count, width, generator=generator)
    return inputs @ mixing, labels


def _head(settings: Settings, seed: int, task: int) -> Tensor:
    """The frozen head of a task: ``(classes, width)``, orthonormal rows times `head_scale`."""
    import torch

    generator = generator_for(seed, f"mlp/{task}/head")
    frame, _ = torch.linalg.qr(
        torch.randn(settings.widths[-1], settings.classes, generator=generator, dtype=torch.float64)
    )
    head: Tensor = (settings.head_scale * frame.T).float().contiguous()
    return head


def _encoder(widths: tuple[int, ...]) -> nn.Module:
    """The encoder; its tensors are called ``layers.0.weight``, ``layers.2.weight`` and so on."""
    from collections import OrderedDict

    from torch import nn

    parts: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        parts += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*parts[:-1])))


def _forward(model: nn.Module, inputs: Tensor) -> Tensor:
    features: Tensor = model(inputs)
    return features


def _save(model: nn.Module, settings: Settings, out_dir: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.state_dict(), str(out_dir / "model.safetensors"), metadata={"format": "pt"})
    config = {"model_type": MODEL_TYPE, "widths": list(settings.widths), "torch_dtype": "float32"}
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class MlpKind:
    """See `geomerge.lab.kinds.SuiteKind`."""

    name = "mlp"
    title = "small tasks on vectors, trained in seconds"
    kind = "mlp"
    sizes: tuple[str, ...] = tuple(SIZES)
    others: tuple[str, ...] = ()
    has_heads = True
    in_process = True

    def requirement(self, size: str) -> Requirement:
        return Requirement(SIZES[size].gain, SIZES[size].gap)

    def settings(self, size: str) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(SIZES[size])))  # type: ignore[no-any-return]

    def steps(self, size: str) -> dict[str, int]:
        s = SIZES[size]
        return {"base": s.base_steps} | dict.fromkeys(_names(s), s.steps)

    def tasks(self, size: str, seed: int, heads: Mapping[str, Path] | None = None) -> dict[str, LabTask]:
        s = SIZES[size]
        return {
            name: ClassificationTask(
                name=name,
                suite=self.name,
                kind=self.kind,
                title=f"{s.classes} classes of vectors, task {name}",
                version=f"{seed_for(seed, json.dumps(self.settings(size)) + name):016x}",
                classes=tuple(str(c) for c in range(s.classes)),
                data=functools.partial(_split, s, seed, index),
                features=_forward,
                head=(heads or {}).get(name),
            )
            for index, name in enumerate(_names(s))
        }

    def make_heads(self, base_dir: Path, size: str, seed: int, out_dir: Path) -> None:
        from safetensors.torch import save_file

        s = SIZES[size]
        for index, name in enumerate(_names(s)):
            save_file({"weight": _head(s, seed, index)}, str(out_dir / f"{name}.safetensors"))

    def train_base(self, size: str, seed: int, out_dir: Path, tick: Tick) -> None:
        import torch
        from torch.nn import functional

        s = SIZES[size]
        parts = [_data(s, seed, task, "train") for task in range(s.tasks)]
        heads = torch.stack([_head(s, seed, task) for task in range(s.tasks)])
        inputs = torch.stack([inputs[: s.base_samples] for inputs, _ in parts])
        labels = torch.cat([labels[: s.base_samples] for _, labels in parts])
        with reproducible(seed_for(seed, "mlp/weights")):
            model = _encoder(s.widths)

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            logits = torch.einsum("tnw,tcw->tnc", model(batch), heads)
            return functional.cross_entropy(logits.flatten(0, 1), labels)

        train(
            model,
            lambda _: inputs,
            loss,
            steps=s.base_steps,
            learning_rate=s.base_learning_rate,
            seed=seed,
            weight_decay=0.0,
            constant=True,
            clip=None,
            tick=tick,
        )
        _save(model, s, out_dir)

    def train_expert(
        self, base_dir: Path, task: str, size: str, seed: int, out_dir: Path, tick: Tick, head: Path | None = None
    ) -> None:
        import torch
        from torch.nn import functional

        s = SIZES[size]
        index = _names(s).index(task)
        inputs, labels = _split(s, seed, index, "train")
        frozen = _head(s, seed, index)
        model = self.load_model(base_dir)
        order = torch.randint(len(labels), (s.steps, s.batch), generator=generator_for(seed, f"mlp/{task}/order"))

        def loss(model: nn.Module, rows: Tensor) -> Tensor:
            return functional.cross_entropy(model(inputs[rows]) @ frozen.T, labels[rows])

        train(
            model,
            lambda step: order[step],
            loss,
            steps=s.steps,
            learning_rate=s.learning_rate,
            seed=seed,
            weight_decay=0.0,
            constant=True,
            clip=None,
            tick=tick,
        )
        _save(model, s, out_dir)

    def train_other(self, base_dir: Path, name: str, size: str, seed: int, out_dir: Path, tick: Tick) -> None:
        raise NotImplementedError("the suite has no other models")

    def load_model(self, path: Path) -> nn.Module:
        """An encoder from its directory.

        Raises:
            ModelError: The directory holds no such model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            with reproducible(0, None):
                model = _encoder(tuple(config["widths"]))
            model.load_state_dict({k: v.float() for k, v in load_file(str(path / "model.safetensors")).items()})
        except KeyError as error:
            raise ModelError(
                f"it is not a model of the suite mlp: its config has no {error}", where=str(path)
            ) from None
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"it is not a model of the suite mlp: {first_line(error)}", where=str(path)) from None
        return model.eval()


def _names(settings: Settings) -> tuple[str, ...]:
    return tuple("abcdefgh"[: settings.tasks])


def _split(settings: Settings, seed: int, task: int, split: Split) -> tuple[Tensor, Tensor]:
    """A split as the task shows it: the samples that the base has seen are not among the experts' training samples."""
    inputs, labels = _data(settings, seed, task, split)
    skip = settings.base_samples if split == "train" else 0
    return inputs[skip:], labels[skip:]


KIND = MlpKind()
