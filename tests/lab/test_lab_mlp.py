"""The suite mlp: its figures, and what every suite owes: determinism, splits, resuming, random state."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from geomerge.errors import ModelError, UsageError
from geomerge.lab.build import build, experts_mean, mean
from geomerge.lab.kinds import SPLITS, get_kind
from geomerge.lab.mlp import KIND, SIZES, _head
from geomerge.lab.suite import Suite, load_model
from geomerge.lab.training import schedule, train


class TestFigures:
    """The published means over three seeds; seeds scatter by 2 to 3 points, and the batch size was not published."""

    @pytest.mark.parametrize(
        ("size", "base", "experts", "average", "within"),
        [
            ("tiny", 83.9, 99.2, 91.2, 2.5),
            ("easy", 91.0, 98.5, 94.3, 2.0),
            ("hard", 50.0, 96.0, 62.1, 4.0),
        ],
    )
    def test_means(
        self, built: Callable[..., Suite], size: str, base: float, experts: float, average: float, within: float
    ) -> None:
        """Base, experts and plain average are where the settings' description says."""
        rows = []
        for seed in range(3):
            suite = built("mlp", size, seed)
            scores, tasks = suite.scores, tuple(suite.experts)
            rows.append((mean(scores["base"]), experts_mean(scores, tasks), mean(scores["average"])))
        found = 100 * np.mean(rows, axis=0)
        assert found == pytest.approx([base, experts, average], abs=within)

    def test_heads_are_orthonormal(self) -> None:
        """Four times an orthonormal frame."""
        head = _head(SIZES["tiny"], 0, 2)
        assert torch.allclose(head @ head.T, 16 * torch.eye(5), atol=1e-5)


class TestBuild:
    """What a build writes."""

    def test_same_bytes_twice(self, mlp: Suite, built: Callable[..., Suite], cache: Path, files) -> None:
        """A seed gives the same bytes in another cache, and another seed gives others."""
        assert files(build("mlp").root) == files(mlp.root)
        other = built("mlp", "tiny", 1)
        assert (
            load_file(other.base / "model.safetensors")["layers.0.weight"]
            .ne(load_file(mlp.base / "model.safetensors")["layers.0.weight"])
            .all()
        )

    def test_random_state_is_kept(self, cache: Path, random_state_kept: None) -> None:
        """Training touches no global generator, nor torch's number of threads."""
        before = torch.get_num_threads()
        build("mlp", seed=2)
        assert torch.get_num_threads() == before

    def test_found_again(self, cache: Path) -> None:
        """The second build reads what the first one wrote."""
        first = build("mlp")
        stamp = (first.root / "suite.json").stat().st_mtime_ns
        assert build("mlp") == first
        assert (first.root / "suite.json").stat().st_mtime_ns == stamp

    def test_resumes_after_a_kill(self, mlp: Suite, cache: Path, files) -> None:
        """Killed after its first expert, a build goes on with the models that are there and ends with the same bytes."""
        code = (
            "import geomerge.lab.mlp as m, time; from geomerge.lab.build import build; t = m.train;"
            "m.train = lambda *a, **k: (time.sleep(0.3), t(*a, **k))[1]; build('mlp')"
        )
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"XDG_CACHE_HOME": str(cache)})
        until = time.monotonic() + 60
        try:
            # Not `rglob`: it would walk into directories that get their final names meanwhile.
            while not (first := list(cache.glob("geomerge/lab/*/experts/a"))) and time.monotonic() < until:
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL
        assert not list(cache.rglob("suite.json"))
        kept = [place / "model.safetensors" for place in (first[0], first[0].parents[1] / "base")]
        stamps = [path.stat().st_mtime_ns for path in kept]

        class Counted:
            total = before = done = 0

            def start(self, total: int, done: int) -> None:
                self.total, self.before, self.done = total, done, done

            def advance(self, steps: int) -> None:
                self.done += steps

            def finish(self) -> None:
                pass

        progress = Counted()
        built = build("mlp", progress=progress)
        assert [path.stat().st_mtime_ns for path in kept] == stamps
        assert progress.before >= 350 + 800
        assert progress.done == progress.total
        assert files(built.root) == files(mlp.root)
        assert not list(cache.rglob("*.partial"))

    def test_describes_itself(self, mlp: Suite) -> None:
        """The contract's fields are in suite.json, and all paths in it are relative and exist."""
        data = json.loads((mlp.root / "suite.json").read_text())
        assert {k: data[k] for k in ("format", "suite", "size", "seed", "kind", "base")} == {
            "format": 1,
            "suite": "mlp",
            "size": "tiny",
            "seed": 0,
            "kind": "mlp",
            "base": "base",
        }
        assert set(data["experts"]) == set(data["heads"]) == {"a", "b", "c", "d"}
        assert set(data["scores"]) == {"base", "average", *data["experts"]}
        for path in [*data["experts"].values(), *data["heads"].values()]:
            assert (mlp.root / path).exists()


class TestTasks:
    """Data and scoring."""

    def test_splits_are_disjoint(self) -> None:
        """No vector is in two splits, nor among what the base has seen."""
        for task in KIND.tasks("tiny", 0).values():
            sets = [{e.image.numpy().tobytes() for e in task.examples(split)} for split in SPLITS]
            assert [len(s) for s in sets] == [1500, 400, 400, 1000]
            assert all(not a & b for a, b in itertools.combinations(sets, 2))

    def test_same_data_every_time(self) -> None:
        """A split is a function of seed, task and split alone; `limit` cuts its beginning out."""
        a, b = KIND.tasks("tiny", 5)["b"], KIND.tasks("tiny", 5)["b"]
        assert a.version == b.version != KIND.tasks("tiny", 6)["b"].version
        assert [e.label for e in a.examples("test", 20)] == [e.label for e in b.examples("test")][:20]
        assert a.examples("test")[7].image.equal(b.examples("test")[7].image)

    def test_correct_is_an_argmax(self, mlp: Suite, random_state_kept: None) -> None:
        """`correct` and `nll` agree with a loop over the samples that knows only the files."""
        task, model = mlp.tasks()["c"], load_model(mlp.experts["c"])
        weights = load_file(mlp.experts["c"] / "model.safetensors")
        head = load_file(mlp.heads["c"])["weight"].double().numpy()
        right, losses = [], []
        for example in task.examples("test", 100):
            h = example.image.double().numpy()
            for i in (0, 2, 4):
                h = weights[f"layers.{i}.weight"].double().numpy() @ h + weights[f"layers.{i}.bias"].double().numpy()
                h = np.maximum(h, 0) if i < 4 else h
            logits = head @ h
            right.append(bool(logits.argmax() == example.label))
            losses.append(np.log(np.exp(logits).sum()) - logits[example.label])
        found = task.correct(model, "test", limit=100, batch_size=7)
        assert found.dtype == np.bool_
        assert found.tolist() == right
        assert task.nll(model, "test", 100) == pytest.approx(losses, abs=1e-4)

    def test_mode_is_left(self, mlp: Suite) -> None:
        """A model that was in training mode still is."""
        model = load_model(mlp.base).train()
        mlp.tasks()["a"].correct(model, limit=5)
        assert all(module.training for module in model.modules())

    def test_needs_its_head(self, mlp: Suite) -> None:
        """Without the built suite there is data, but no score."""
        with pytest.raises(UsageError, match="no head"):
            KIND.tasks("tiny", 0)["a"].correct(load_model(mlp.base))

    def test_no_such_split(self, mlp: Suite) -> None:
        """A split's name is checked."""
        with pytest.raises(UsageError, match="no split"):
            mlp.tasks()["a"].examples("tset")  # type: ignore[arg-type]

    def test_scores_are_those_of_the_tasks(self, mlp: Suite) -> None:
        """The table in suite.json is what `correct` says now."""
        for name, task in mlp.tasks().items():
            for model in ("base", "a", "d"):
                assert task.correct(mlp.load(model)).mean() == pytest.approx(mlp.scores[model][name], abs=1e-6)

    def test_damaged_model(self, mlp: Suite, tmp_path: Path) -> None:
        """A directory that holds something else is refused."""
        (tmp_path / "config.json").write_text('{"model_type": "geomerge_mlp", "widths": [3, 4]}')
        (tmp_path / "model.safetensors").write_bytes((mlp.base / "model.safetensors").read_bytes())
        with pytest.raises(ModelError, match="not a model of the suite mlp"):
            load_model(tmp_path)


class TestTraining:
    """The loop that all suites share."""

    def test_schedule(self) -> None:
        """Up in a line, down in half a cosine."""
        values = [schedule(step, 100) for step in range(100)]
        assert values[0] == pytest.approx(1 / 11)
        assert values[10] == 1.0
        assert values[55] == pytest.approx(0.5)
        assert values[99] == pytest.approx(0.5 * (1 + np.cos(np.pi * 89 / 90)))
        assert max(values) == 1.0

    def test_first_step_is_adams(self) -> None:
        """The first step of Adam moves every weight by the learning rate against the gradient's sign."""
        model = torch.nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        train(
            model,
            lambda _: torch.tensor([[3.0, -1.0]]),
            lambda m, x: m(x).sum(),
            steps=1,
            learning_rate=0.01,
            seed=0,
            weight_decay=0.0,
            constant=True,
            clip=None,
        )
        assert model.weight.detach().flatten().tolist() == pytest.approx([0.99, -1.99], abs=1e-6)
        assert not model.training

    def test_frozen_stays(self) -> None:
        """What requires no gradient is not trained, and vectors are not decayed."""
        model = torch.nn.Linear(2, 2)
        model.weight.requires_grad_(False)
        before = model.weight.clone()
        losses = train(
            model,
            lambda _: torch.ones(1, 2),
            lambda m, x: m(x).square().sum(),
            steps=50,
            learning_rate=0.05,
            seed=0,
        )
        assert model.weight.equal(before)
        assert losses[-1] < losses[0]


def test_kinds_have_no_typos() -> None:
    """A suite's name that is nearly right is answered with the right one."""
    with pytest.raises(UsageError) as caught:
        get_kind("glyps")
    assert caught.value.hint == "did you mean 'glyphs'?"
