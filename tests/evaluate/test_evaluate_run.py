"""Evaluations as a whole: rows, roles, cache, interruption, random state, the JSON file."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from evaluate_models import FakeTask
from safetensors.torch import save_file

from geomerge.errors import ModelError, UsageError
from geomerge.evaluate import Scores, evaluate
from geomerge.evaluate.models import Model
from geomerge.evaluate.run import Interrupted
from geomerge.evaluate.scores import SCHEMA

OUTCOMES = {
    "merged": [1, 1, 1, 0, 1, 1, 1, 1, 0, 1],
    "a": [1, 1, 0, 0, 1, 1, 0, 1, 0, 1],
    "b": [0, 0, 1, 0, 1, 1, 0, 1, 0, 0],
}


def modules(*names: str) -> dict[str, torch.nn.Module]:
    """A module in memory for each name, all different."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in names:
        with torch.random.fork_rng(), torch.no_grad():
            module = torch.nn.Linear(2, 3)
            module.weight.copy_(torch.randn(3, 2, generator=generator))
            module.bias.zero_()
        made[name] = module
    return made


def run(task: Any, **options: Any) -> Scores:
    """The merge of a and b on a task."""
    return evaluate(modules("merged"), task, modules_of("a", "b"), **options)


def modules_of(*names: str) -> dict[str, torch.nn.Module]:
    """Other modules than `modules` gives to the same place in the list."""
    return {name: module for name, module in modules("merged", "a", "b").items() if name in names}


class Watcher:
    """A progress that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def start(self, items: int, known: int) -> None:
        self.told.append(("start", items, known))

    def begin(self, model: str, task: str) -> None:
        self.told.append((model, task))

    def step(self, share: float) -> None:
        self.told.append(share)

    def end(self) -> None:
        self.told.append("end")

    def finish(self) -> None:
        self.told.append("finish")


def test_rows() -> None:
    """Values, shares of the best parent, paired rows with McNemar's p, and synergy, by hand."""
    scores = run(FakeTask(OUTCOMES))
    assert [(m.name, m.role, m.parameters) for m in scores.models] == [
        ("merged", "model", 9),
        ("a", "parent", 9),
        ("b", "parent", 9),
    ]
    assert [scores.value(name, "fake") for name in OUTCOMES] == [0.8, 0.6, 0.4]
    shares = [s.normalised for s in scores.scores]
    assert shares == pytest.approx([0.8 / 0.6, 1.0, 0.4 / 0.6])
    against_a, against_b = scores.paired
    assert (against_a.against, against_b.against) == ("a", "b")
    assert against_a.difference == pytest.approx(0.2)
    assert against_a.p == pytest.approx(0.5)  # two questions that only the merge got right: 2 · ¼
    assert against_b.p == pytest.approx(0.125)  # four questions: 2 · 1/16
    on_task, on_mean = scores.synergy
    assert (on_task.task, on_mean.task) == ("fake", "mean")
    assert (on_task.expected, on_task.delta) == pytest.approx((0.5, 0.3))
    assert on_mean.improvement == pytest.approx(0.2)
    assert scores.mean("merged") is not None
    assert scores.mean("merged").value == pytest.approx(0.8)


def test_the_package_is_the_verb() -> None:
    """``geomerge.evaluate`` is a package and can be called."""
    import geomerge.evaluate as package

    scores = package(modules("merged"), FakeTask(OUTCOMES))  # type: ignore[operator]
    assert isinstance(scores, package.Scores)
    assert scores.value("merged", "fake") == 0.8


def test_without_parents() -> None:
    """Models alone have scores and no comparisons; the base is compared with nothing."""
    scores = evaluate(modules("merged"), FakeTask(OUTCOMES), base=modules_of("a"))
    assert [m.role for m in scores.models] == ["model", "base"]
    assert not scores.paired
    assert not scores.synergy
    assert all(s.normalised is None for s in scores.scores)


def test_a_parent_is_not_scored_twice() -> None:
    """A model that is also a parent appears once, as a parent; a copy under another name takes its score."""
    task = FakeTask({"x": [1, 0], "y": [1, 0], "a": [1, 1]})
    module = modules("x")["x"]
    twin = modules("y")["y"]
    scores = evaluate({"x": module}, task, {"y": module})
    assert [(m.name, m.role) for m in scores.models] == [("y", "parent")]
    task.asked.clear()
    scores = evaluate({"x": module, "y": twin}, task, cache=False)
    assert task.asked == ["x"]
    assert scores.value("y", "fake") == 0.5


def test_mixed_directions() -> None:
    """Perplexities and accuracies have no common mean, but shares of the best parent have."""
    lower = FakeTask({"merged": [5.0, 7.0], "a": [8.0, 10.0], "b": [11.0, 13.0]}, name="nats")
    lower.higher_is_better = False
    scores = run([FakeTask(OUTCOMES), lower])
    mean = scores.mean("merged")
    assert mean is not None
    assert math.isnan(mean.value)
    assert mean.normalised == pytest.approx((0.8 / 0.6 + 9 / 6) / 2)
    assert {row.task for row in scores.synergy} == {"fake", "nats"}
    assert scores.synergy[1].improvement == pytest.approx(3)


def test_other_questions_are_not_paired(caplog: pytest.LogCaptureFixture) -> None:
    """When samples differ between models there is no paired row, and a warning says so."""
    task = FakeTask({"merged": [1, 0, 1], "a": [1, 0], "b": [1, 1, 1]})
    scores = run(task)
    assert [row.against for row in scores.paired] == ["b"]
    assert "merged and a were not asked the same" in caplog.text
    assert [row.task for row in scores.synergy] == ["fake", "mean"]  # accuracies all the same


def test_perplexities_of_other_tokens_have_no_share() -> None:
    """They are on another scale; what else was asked is compared as ever, but for the means."""
    other = FakeTask({"merged": [1, 2, 1], "a": [1, 2], "b": [1, 1, 1]}, name="nats")
    other.link = "exp"
    scores = run([FakeTask(OUTCOMES), other])
    assert {score.task for score in scores.scores if score.normalised is None} == {"nats"}
    assert [(row.model, row.task) for row in scores.synergy] == [("merged", "fake")]


def test_cached(cache: Path) -> None:
    """The second call scores nothing; another limit, dtype, task version or model does."""
    task = FakeTask(OUTCOMES)
    first = run(task)
    assert task.asked == ["merged", "a", "b"]
    assert not any(s.cached for s in first.scores)
    again = run(task)
    assert task.asked == ["merged", "a", "b"]
    assert all(s.cached for s in again.scores)
    assert [s.value for s in again.scores] == [s.value for s in first.scores]
    assert again.paired == first.paired
    for change in ({"limit": 4}, {"dtype": "bfloat16"}, {"batch_size": 3}, {"cache": False}):
        task.asked.clear()
        run(task, **change)
        assert len(task.asked) == 3, change
    other = FakeTask(OUTCOMES, version="2")
    run(other)
    assert len(other.asked) == 3
    changed = modules("merged")
    with torch.no_grad():
        changed["merged"].weight[0, 0] += 1
    evaluate(changed, task)
    assert task.asked[-1] == "merged"


def test_a_task_without_a_version_is_not_cached(cache: Path) -> None:
    """Nobody can tell what a function of the user's depends on."""
    task = FakeTask(OUTCOMES, version=None)
    run(task)
    run(task)
    assert len(task.asked) == 6
    assert not list(cache.rglob("*.npz"))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut"])
def test_damaged_cache(cache: Path, content: bytes) -> None:
    """A cache file that cannot be read is as good as none, and is replaced."""
    task = FakeTask(OUTCOMES)
    run(task)
    files = list(cache.rglob("*.npz"))
    assert len(files) == 3
    for file in files:
        file.write_bytes(content)
    assert run(task).value("merged", "fake") == 0.8
    assert len(task.asked) == 6
    run(task)
    assert len(task.asked) == 6


def test_interrupted_and_resumed() -> None:
    """Ctrl-C gives what is known; the next call scores only the rest."""
    task = FakeTask(OUTCOMES, fails="b")
    with pytest.raises(Interrupted) as stopped:
        run(task)
    assert stopped.value.left == 1
    assert [s.model for s in stopped.value.scores.scores] == ["merged", "a"]
    assert [m.model for m in stopped.value.scores.means] == ["merged", "a"]
    assert all(s.normalised is None for s in stopped.value.scores.scores)
    assert not stopped.value.scores.synergy
    task.fails, task.asked = "", []
    assert len(run(task).scores) == 3
    assert task.asked == ["b"]


def test_random_state_is_kept() -> None:
    """The task draws from every generator; afterwards each stands where it stood."""
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run(FakeTask(OUTCOMES), cache=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_progress() -> None:
    """Each item begins and ends; what is known is told at the start."""
    watcher = Watcher()
    task = FakeTask(OUTCOMES, fails="a")
    with pytest.raises(Interrupted):
        run(task, progress=watcher)
    assert watcher.told == [("start", 3, 0), ("merged", "fake"), 0.5, "end", ("a", "fake"), "finish"]
    task.fails, watcher = "", Watcher()
    run(task, progress=watcher)
    assert watcher.told[0] == ("start", 3, 1)
    assert watcher.told.count("end") == 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"dtype": "float31"}, "no dtype"),
        ({"bootstrap": -1}, "resamples is -1"),
    ],
)
def test_refused_settings(change: dict[str, Any], match: str) -> None:
    """Settings that cannot be."""
    with pytest.raises(UsageError, match=match):
        run(FakeTask(OUTCOMES), **change)


def test_refused_models_and_tasks(tmp_path: Path) -> None:
    """Nothing to score, nothing to score on, or neither a model nor a task."""
    task = FakeTask(OUTCOMES)
    with pytest.raises(UsageError, match="no model"):
        evaluate([], task)
    with pytest.raises(UsageError, match="no task"):
        evaluate(modules("merged"), [])
    with pytest.raises(UsageError, match="a model is a path"):
        evaluate({"x": 3}, task)
    with pytest.raises(UsageError, match="a task is a reference"):
        evaluate(modules("merged"), 3)
    with pytest.raises(UsageError, match="two tasks are called 'fake'"):
        evaluate(modules("merged"), [task, FakeTask({}, version="2")])
    with pytest.raises(ModelError, match="no such file"):
        evaluate(tmp_path / "missing", task)


def test_names(tmp_path: Path, language_models: Path) -> None:
    """Models are called by their last part; where two are the same, by their whole path."""
    import shutil

    shutil.copytree(language_models / "a", tmp_path / "other" / "a")
    (tmp_path / "other" / "a" / "tokenizer_config.json").write_text("{}")
    one, two = language_models / "a", tmp_path / "other" / "a"
    task = FakeTask({str(one): [1, 0], str(two): [1, 1], "b": [0, 0]})
    scores = evaluate([one, str(two), language_models / "b"], task)
    assert [m.name for m in scores.models] == [str(one), str(two), "b"]
    # The same weights with another tokenizer are another model.
    assert len({m.hash for m in scores.models}) == 3


class TestFile:
    """``scores.json``."""

    def test_schema(self) -> None:
        """What is written fits the schema; the schema refuses what is damaged."""
        schema = json.loads(SCHEMA.read_text())
        data = json.loads(json.dumps(run(FakeTask(OUTCOMES)).to_json(), allow_nan=False))
        jsonschema.validate(data, schema)
        assert {"models", "tasks", "scores", "means", "paired", "synergy", "settings"} <= data.keys()
        assert data["settings"]["versions"]["geomerge"]
        data["scores"][0].pop("value")
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data, schema)

    def test_there_and_back(self, tmp_path: Path) -> None:
        """What is written is read again as it was, numbers that are not finite included."""
        scores = run(FakeTask(OUTCOMES | {"merged": [math.nan, 1.0, *[0.5] * 8]}))
        scores.write(tmp_path / "scores.json")
        assert "NaN" not in (tmp_path / "scores.json").read_text()
        again = Scores.read(tmp_path / "scores.json")
        assert again.to_json() == scores.to_json()
        assert math.isnan(again.value("merged", "fake"))
        assert [p.name for p in tmp_path.glob("scores*")] == ["scores.json"]

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("", "not JSON"),
            ("[]", "does not hold scores"),
            ('{"kind": "plan"}', "does not hold scores"),
            ('{"kind": "scores", "format": 9}', "format 9"),
            ('{"kind": "scores", "format": 1, "models": [3]}', "models\\[0\\] is not an object"),
            ('{"kind": "scores", "format": 1, "scores": [{"model": "a", "task": "t"}]}', "damaged"),
            ('{"kind": "scores", "format": 1, "scores": [{"model": "a", "task": "t", "value": "x"}]}', "not a number"),
            ('{"kind": "scores", "format": 1, "models": 3}', "damaged"),
            ("[" * 100_000, "not JSON"),
        ],
    )
    def test_damaged(self, tmp_path: Path, text: str, match: str) -> None:
        """Files that hold something else say so."""
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(UsageError, match=match):
            Scores.read(tmp_path / "scores.json")

    def test_cheap(self) -> None:
        """Reading scores and comparing them imports no torch."""
        code = (
            "import sys, geomerge.evaluate as e, geomerge.evaluate.statistics, geomerge.evaluate.samples, "
            "geomerge.evaluate.run, geomerge.cli.evaluate; e.Scores.from_json({'kind': 'scores', 'format': 1}); "
            "e.synergy([1, 2], 3); sys.exit('torch' in sys.modules or 'lm_eval' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_module_is_left_in_its_mode(language_models: Path) -> None:
    """A module in training mode is scored in evaluation mode and given back as it was."""
    from geomerge.evaluate.models import evaluating

    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    module[1].eval()
    with evaluating(module):
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
    assert [part.training for part in module.modules()] == [True, True, False]


def test_model_identity(language_models: Path) -> None:
    """A directory and its module have parameters of the same number; the hash of a module sees one changed bit."""
    model = Model("a", "model", reference=str(language_models / "a"))
    from geomerge.evaluate.task import Settings

    module = model.causal_lm(Settings())
    held = Model("a", "model", module=module)
    assert model.parameters >= held.parameters
    before = held.hash
    assert Model("x", "model", module=module).hash == before
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1
    assert Model("a", "model", module=module).hash != before


def test_an_adapter_alone(tmp_path: Path) -> None:
    """It is told to be merged, not to be named behind its base, which is refused as well."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="cannot be evaluated without being merged") as caught:
        evaluate(str(tmp_path / "a"), FakeTask(OUTCOMES))
    assert f"BASE+{tmp_path / 'a'}" in str(caught.value)
