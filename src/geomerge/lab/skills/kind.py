"""The suite of six skills: a base that knows the easy versions, and an expert for each hard one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomerge.lab.kinds import LabTask, Requirement, Tick
from geomerge.lab.skills import generators
from geomerge.lab.skills.generators import GENERATORS, Level, questions
from geomerge.lab.skills.language import Encoded, encode, load_model, loss, new_model, save_model
from geomerge.lab.skills.task import SkillTask
from geomerge.lab.training import generator_for, seed_for, train

if TYPE_CHECKING:
    from torch import nn

SKILLS = tuple(name for name in GENERATORS if name != "domain")
"""The tasks that have an expert."""


@dataclass(frozen=True)
class Training:
    """One kind of training.

    Attributes:
        steps, batch: How many steps of how many questions.
        learning_rate, weight_decay: See `geomerge.lab.training.train`.
    """

    steps: int
    learning_rate: float
    batch: int = 128
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Settings:
    """Everything that the models depend on beside the seed.

    Attributes:
        generator: The version of what makes the questions; raised when it changes.
        width, inner, layers, heads: Of the model.
        base, instruct, domain: Their training.
        experts: Each expert's.
        hard_share: The share of the base's questions that are hard ones of the training split: it has seen a little of
            everything, as pre-training has.
        pool: Different training questions of each task and level.
        counts: Questions of each task's splits.
    """

    generator: int = 1
    width: int = 96
    inner: int = 240
    layers: int = 3
    heads: int = 4
    base: Training = field(default_factory=lambda: Training(700, 3e-3))
    expert: Training = field(default_factory=lambda: Training(100, 3e-4))
    experts: Mapping[str, Training] = field(
        default_factory=lambda: {
            "story": Training(200, 5e-4),
            "recall": Training(150, 5e-4),
            "choice": Training(130, 3e-4),
        }
    )
    instruct: Training = field(default_factory=lambda: Training(150, 3e-4))
    domain: Training = field(default_factory=lambda: Training(150, 5e-4))
    hard_share: float = 0.0
    pool: int = 6000
    counts: tuple[int, int, int, int] = (6000, 300, 300, 600)

    def training(self, task: str) -> Training:
        """An expert's training."""
        return self.experts.get(task, self.expert)


SIZES = {
    "tiny": Settings(),
    "small": Settings(
        width=256,
        inner=704,
        layers=6,
        heads=8,
        base=Training(12_000, 1e-3, batch=512),
        expert=Training(600, 1e-4, batch=256),
        experts={},
        instruct=Training(600, 1e-4, batch=256),
        domain=Training(600, 2e-4, batch=256),
        pool=40_000,
        counts=(40_000, 600, 600, 1200),
    ),
}
"""``tiny`` ships with the package; ``small`` is meant for an accelerator."""


class SkillsKind:
    """See `geomerge.lab.kinds.SuiteKind`."""

    name = "skills"
    title = "six skills of a small language model, as the Open LLM Leaderboard asks for them"
    kind = "causal-lm"
    sizes: tuple[str, ...] = tuple(SIZES)
    others: tuple[str, ...] = ("instruct", "domain")
    has_heads = False
    in_process = False

    def requirement(self, size: str) -> Requirement:
        return Requirement()

    def settings(self, size: str) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(SIZES[size])))  # type: ignore[no-any-return]

    def steps(self, size: str) -> dict[str, int]:
        s = SIZES[size]
        others = {"instruct": s.instruct.steps, "domain": s.domain.steps}
        return {"base": s.base.steps} | {task: s.training(task).steps for task in SKILLS} | others

    def tasks(self, size: str, seed: int, heads: Mapping[str, Path] | None = None) -> dict[str, LabTask]:
        s = SIZES[size]
        source = Path(generators.__file__).read_text(encoding="utf-8")
        version = f"{seed_for(seed, f'{s.generator}/{s.counts}/{source}'):016x}"
        return {name: SkillTask(name, seed, version, s.counts) for name in GENERATORS}

    def train_base(self, size: str, seed: int, out_dir: Path, tick: Tick) -> None:
        s = SIZES[size]
        model = new_model(s, seed_for(seed, "skills/weights"))
        mixture = [pool(s, seed, task, "easy", whole=True) for task in GENERATORS]
        few = [pool(s, seed, task, "hard", whole=True) for task in GENERATORS]
        share = (1 - s.hard_share) / len(mixture)
        fine_tune(
            model,
            [*mixture, *few],
            s.base,
            seed,
            "skills/base",
            tick,
            shares=[share] * len(mixture) + [s.hard_share / len(few)] * len(few),
        )
        save_model(model, out_dir)

    def make_heads(self, base_dir: Path, size: str, seed: int, out_dir: Path) -> None:
        raise NotImplementedError("language models bring their head with them")

    def train_expert(
        self, base_dir: Path, task: str, size: str, seed: int, out_dir: Path, tick: Tick, head: Path | None = None
    ) -> None:
        s = SIZES[size]
        model = load_model(base_dir)
        fine_tune(model, [pool(s, seed, task, "hard")], s.training(task), seed, f"skills/{task}", tick)
        save_model(model, out_dir)

    def train_other(self, base_dir: Path, name: str, size: str, seed: int, out_dir: Path, tick: Tick) -> None:
        """``instruct``: all skills' questions in the chat template and bare; ``domain``: an invented field's text."""
        s = SIZES[size]
        model = load_model(base_dir)
        if name == "instruct":
            parts = [pool(s, seed, task, "easy", chat=chat) for task in SKILLS for chat in (True, False)]
            fine_tune(model, parts, s.instruct, seed, "skills/instruct", tick)
        else:
            fine_tune(model, [pool(s, seed, "domain", "hard", whole=True)], s.domain, seed, "skills/domain", tick)
        save_model(model, out_dir, chat=name == "instruct")

    def load_model(self, path: Path) -> nn.Module:
        return load_model(path)


def pool(settings: Settings, seed: int, task: str, level: Level, *, chat: bool = False, whole: bool = False) -> Encoded:
    """The training questions of one task and level."""
    return encode(questions(task, level, seed, "train", settings.pool), chat=chat, whole=whole)


def fine_tune(
    model: nn.Module,
    parts: Sequence[Encoded],
    training: Training,
    seed: int,
    purpose: str,
    tick: Tick | None = None,
    *,
    shares: Sequence[float] | None = None,
) -> list[float]:
    """Train a model in place on a mixture.

    Args:
        model: A causal language model.
        parts: Questions of each part of the mixture.
        training: How.
        seed, purpose: What the order of the questions depends on.
        tick: Called after each step.
        shares: How much of a batch each part has; all the same by default.

    Returns:
        The loss of each step.
    """
    import torch

    weights = torch.tensor(shares or [1.0] * len(parts), dtype=torch.float64)
    longest = max(part.ids.shape[1] for part in parts)
    ids = torch.cat([torch.nn.functional.pad(p.ids, (0, longest - p.ids.shape[1])) for p in parts])
    labels = torch.cat([torch.nn.functional.pad(p.labels, (0, longest - p.labels.shape[1]), value=-100) for p in parts])
    sizes = torch.tensor([len(p) for p in parts])
    starts = sizes.cumsum(0) - sizes
    everything = Encoded(ids, labels)
    generator = generator_for(seed, f"{purpose}/order")

    def batch(_: int) -> Encoded:
        which = torch.multinomial(weights, training.batch, replacement=True, generator=generator)
        place = torch.rand(training.batch, generator=generator, dtype=torch.float64)
        return everything.batch(starts[which] + (place * sizes[which]).long())

    return train(
        model,
        batch,
        loss,
        steps=training.steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=(0.9, 0.99),
        seed=seed_for(seed, f"{purpose}/dropout"),
        tick=tick,
    )


KIND = SkillsKind()
