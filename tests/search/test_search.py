"""The search: its spaces, its promise never to lose to a preset, its memory of interrupted runs, its bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import geomerge as gm
import tiny
import token_samples
from cli_samples import Program
from geomerge.engine.schedule import Schedule
from geomerge.recipe.values import NOWHERE
from geomerge.search.objective import Half, Measured, TextJudge
from geomerge.search.run import RECIPE, RESULT, search
from geomerge.search.space import EXACT, FIRST, preset, space
from geomerge.search.study import Study, load_study, make_study
from geomerge.search.tasks import TaskJudge

STUDY = {"parents": ["a", "b"], "objective": {"tasks": ["lab:skills"]}, "budget": 12}


class Part:
    """What a schedule asks of a tensor."""

    def __init__(self, role: str, depth: float) -> None:
        self.role, self.depth, self.name, self.position = role, depth, role, "block"


class TestSpaces:
    @pytest.mark.parametrize("name", EXACT)
    @pytest.mark.parametrize("blocks", [1, 2, 5, 24])
    def test_six_scalars_express_presets_exactly(self, name: str, blocks: int) -> None:
        """At every block, in attention, MLP and elsewhere."""
        six = space("six_scalars")
        point = six.point(name)
        if name == "H+":
            point = dict(zip(six.box, EXACT[name], strict=True))
        assert point is not None
        made = Schedule(six.schedule(point, blocks), NOWHERE)
        expected = Schedule(preset(name), NOWHERE)
        for block in range(blocks):
            depth = block / (blocks - 1) if blocks > 1 else 0.0
            for role in ("attention", "mlp", "norm"):
                part: Any = Part(role, depth)
                assert made(part) == pytest.approx(expected(part), abs=1e-12)

    def test_coefficients_are_clipped(self) -> None:
        point = dict(zip(space("six_scalars").box, (0.8, 0.3, 1, -0.3, -1, 0.3), strict=True))
        curve = space("six_scalars").schedule(point, 3)
        assert curve == {
            "attention": [pytest.approx(0.6), 1.0, 1.0],
            "mlp": [1.0, 0.5, pytest.approx(0.0)],
            "default": 1.0,
        }

    def test_anchors_express_s_and_only_presets_of_their_length(self) -> None:
        five = space("anchors:5")
        point = five.point("S")
        assert point is not None
        assert five.schedule(point, 24) == {
            "attention": [0, 0.5, 0.3, 0.7, 1],
            "mlp": [1, 0.5, 0.7, 0.3, 0],
            "default": 0.5,
        }
        assert len(five.box) == 11
        assert space("anchors:3").point("S") is None
        assert space("six_scalars").point("S") is None

    def test_a_role_that_no_tensor_has(self) -> None:
        """The roles that there are, not the nearest word, which is the same."""
        made = Schedule({"attention": 0.2, "default": 0.5}, NOWHERE)
        for role in ("mlp", "norm"):
            made(cast("Any", Part(role, 0.0)))
        with pytest.raises(gm.RecipeError, match="roles are: mlp, norm"):
            made.check_used()

    @pytest.mark.parametrize("name", ["seven_scalars", "anchors:1", "anchors:x", ""])
    def test_unknown(self, name: str) -> None:
        with pytest.raises(gm.UsageError, match="no search space"):
            space(name)


class Near:
    """Likes merges whose first MLP matrix lies near a point between the parents; every sample is one of its rows."""

    def __init__(self, wish: float = 0.62, after: Callable[[int], None] = lambda n: None) -> None:
        self.wish, self.after, self.calls = wish, after, 0
        self.target: torch.Tensor | None = None
        self.name = "model.layers.1.mlp.up_proj.weight"

    def load(self, path: str) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def measure(self, module: torch.nn.Module, half: Half) -> Measured:
        if half == "search":
            self.calls += 1
            self.after(self.calls)
        if self.target is None:
            a, b = (self.load(m).state_dict()[self.name] for m in "ab")
            self.target = (1 - self.wish) * a + self.wish * b
        rows = (module.state_dict()[self.name] - self.target).norm(dim=1).double().numpy()
        samples = -rows[0::2] if half == "search" else -rows[1::2]
        return Measured(float(samples.mean()), {"near": float(samples.mean())}, {"near": samples})


@pytest.fixture
def parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models a and b of three blocks in the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny.family(tmp_path, "a b", num_hidden_layers=3)


@pytest.mark.usefixtures("parents")
class TestSearch:
    @pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
    def test_never_worse_than_the_best_preset(self, sampler: str) -> None:
        """The presets come first, in their order; the winner is the maximum; the recipe it writes makes that merge."""
        found = search(make_study({**STUDY, "sampler": sampler}), "out", judge=Near())
        assert [t.name for t in found.trials] == [*FIRST, *["trial"] * 6]
        assert found.trials[found.best].value == max(t.value for t in found.trials)
        assert found.trials[found.best].value >= found.trials[found.best_preset].value
        written = json.loads(Path("out", RESULT).read_text())
        assert written["held_out"][0]["value"] == pytest.approx(found.trials[found.best].value - written["optimism"])
        gm.merge(Path("out", RECIPE), "merged")
        module = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
        assert Near().measure(module, "search").value == pytest.approx(found.trials[found.best].value, abs=1e-6)

    def test_it_finds_what_it_looks_for(self) -> None:
        """24 trials come nearer to a wish that no preset meets than every preset does."""
        found = search(make_study({**STUDY, "budget": 24, "space": "global"}), "out", judge=Near(0.62))
        best = found.trials[found.best]
        assert best.name == "trial"
        assert best.point["t"] == pytest.approx(0.62, abs=0.05)
        assert found.difference[0] > 0

    @pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
    def test_an_interrupted_search_goes_on_as_if_nothing_had_been(self, sampler: str) -> None:
        """Ctrl-C keeps what is known and says so; --resume makes the same trials as a run that was not stopped."""

        def stop(calls: int) -> None:
            if calls == 15:
                raise KeyboardInterrupt

        study = make_study({**STUDY, "budget": 20, "sampler": sampler})
        whole = search(study, "whole", judge=Near())
        part = search(study, "part", judge=Near(after=stop))
        assert (part.stopped, len(part.trials)) == ("interrupted", 14)
        with pytest.raises(gm.UsageError, match="lies there already"):
            search(study, "part", judge=Near())
        again = search(study, "part", judge=Near(), resume=True)
        assert [t.point for t in again.trials] == [t.point for t in whole.trials]
        assert [t.value for t in again.trials] == [t.value for t in whole.trials]

    def test_another_study_is_not_gone_on_with(self) -> None:
        search(make_study({**STUDY, "budget": 1}), "out", judge=Near())
        with pytest.raises(gm.UsageError, match="sampler"):
            search(make_study({**STUDY, "sampler": "gp"}), "out", judge=Near(), resume=True)

    def test_time_runs_out(self) -> None:
        found = search(make_study({**STUDY, "budget": {"minutes": 1e-9}}), "out", judge=Near())
        assert (found.stopped, len(found.trials)) == ("time", 1)

    def test_progress(self) -> None:
        """After each trial: the trial, the best so far, the total, the time left."""
        seen: list[Any] = []
        search(make_study({**STUDY, "budget": 3}), "out", judge=Near(), progress=lambda *a: seen.append(a))
        assert [s[0].number for s in seen] == [0, 1, 2]
        assert all(s[1].value == max(x[0].value for x in seen[: i + 1]) for i, s in enumerate(seen))
        assert seen[-1][2:] == (3, 0.0)

    def test_wrong_parents_write_nothing(self) -> None:
        with pytest.raises(gm.ModelError, match="nowhere"):
            search(make_study({**STUDY, "parents": ["a", "nowhere"]}), "out", judge=Near())
        assert not Path("out").exists()


@pytest.fixture
def tiny_lm(tmp_path: Path) -> Path:
    """A causal language model of random weights with a tokenizer of its own."""
    (folder := tmp_path / "lm").mkdir()
    texts = ["the cat sat on the mat and the dog sat on the cat"]
    tokenizer = token_samples.bpe(texts, 300)
    tiny.llama(folder, 0, vocab_size=tokenizer.get_vocab_size())
    token_samples.save(folder, tokenizer)
    return folder


class TestTextJudge:
    @pytest.mark.parametrize(
        ("content", "message"), [(b"", "empty"), (b"\xff\xfe\x00", "not UTF-8"), (None, "cannot be read")]
    )
    def test_bad_text(self, content: bytes | None, message: str, tmp_path: Path, tiny_lm: Path) -> None:
        file = tmp_path / "text.txt"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(gm.UsageError, match=message):
            TextJudge([str(file)], [str(tiny_lm)], None)

    def test_likelihood_is_that_of_the_model(self, tmp_path: Path, tiny_lm: Path) -> None:
        """Against a loop over single tokens; the best parent scores −1."""
        file = tmp_path / "text.txt"
        file.write_text("the cat sat on the mat and the dog sat on the cat " * 60)
        judge = TextJudge([str(file)], [str(tiny_lm)], None)
        module = judge.load(str(tiny_lm))
        judge.calibrate([module])
        assert judge.measure(module, "search").value == pytest.approx(-1, abs=1e-12)
        windows = judge._windows["text"]["held_out"]
        ids = torch.tensor([windows[0]])
        with torch.no_grad():
            logits = module(input_ids=ids).logits.double().log_softmax(-1)[0]
        loop = -np.mean([float(logits[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1)])
        best = judge._best["text", "held_out"]
        assert -judge.measure(module, "held_out").samples["text"][0] * best == pytest.approx(loop, rel=1e-5)


BAD = {
    "no parents": ({"objective": "lab:skills"}, "parents"),
    "one parent": ({"parents": ["a"], "objective": "lab:skills"}, "at least two"),
    "twice": ({"parents": ["a", "a"], "objective": "lab:skills"}, "listed twice"),
    "no objective": ({"parents": ["a", "b"]}, "objective"),
    "both": ({"parents": ["a", "b"], "objective": {"tasks": ["x"], "text": ["y"]}}, "either"),
    "unknown": ({**STUDY, "sampel": 1}, "no key 'sampel'"),
    "sampler": ({**STUDY, "sampler": "tpo"}, "no sampler"),
    "budget 0": ({**STUDY, "budget": 0}, "at least one trial"),
    "budget empty": ({**STUDY, "budget": {}}, "budget must be"),
    "minutes": ({**STUDY, "budget": {"minutes": -1}}, "positive"),
    "seed": ({**STUDY, "seed": -1}, "'seed'"),
    "space": ({**STUDY, "space": "six"}, "no search space"),
    "limit": ({**STUDY, "objective": {"tasks": ["x"], "limit": 0}}, "'limit'"),
    "method": ({**STUDY, "method": "slurp"}, "no method 'slurp'"),
    "dtype": ({**STUDY, "dtype": "float17"}, "float17"),
    "recipe's keys": ({**STUDY, "recipe": {"paramters": {}}}, "paramters"),
    "recipe": ({**STUDY, "recipe": {"schedule": "S"}}, "the study itself sets"),
}


class TestStudyFiles:
    @pytest.mark.parametrize("case", BAD)
    def test_bad(self, case: str) -> None:
        data, message = BAD[case]
        with pytest.raises(gm.RecipeError, match=message):
            make_study(data)

    def test_lines(self, tmp_path: Path) -> None:
        """An error names the file and the line of the key."""
        file = tmp_path / "study.yml"
        file.write_text("parents: [a, b]\nobjective: lab:skills\nbudget: 0\n")
        with pytest.raises(gm.RecipeError, match=r"study\.yml:3.*at least one trial"):
            load_study(file)
        file.write_text("parents: [a, b]\nobjective: lab:skills\nrecipe: {paramters: {}}\n")
        with pytest.raises(gm.RecipeError, match=r"study\.yml:3.*paramters"):
            load_study(file)
        file.write_text("- a\n- b\n")
        with pytest.raises(gm.RecipeError, match="not a list"):
            load_study(file)

    def test_good(self, tmp_path: Path) -> None:
        file = tmp_path / "study.yml"
        file.write_text(
            "parents: [a, b]\nobjective: {text: [x.txt], limit: 9}\nbudget: {trials: 30, minutes: 5}\nsampler: gp\n"
        )
        study = load_study(file)
        assert (study.trials, study.minutes, study.sampler) == (30, 5.0, "gp")
        assert study.objective.text == ("x.txt",)
        assert isinstance(study, Study)


@pytest.mark.usefixtures("parents")
class TestTaskJudge:
    def test_halves_are_all_samples(self, tmp_path: Path) -> None:
        """The two halves of a user's own task are different samples, together all of them; lower-is-better is turned."""
        own = tmp_path / "own.py"
        own.write_text(
            "def first_rows(model):\n"
            "    return model.state_dict()['model.layers.1.mlp.up_proj.weight'].abs().mean(1).tolist()\n"
        )
        judge = TaskJudge([f"{own}:first_rows"], "a", None)
        module = judge.load("a")
        one, other = judge.measure(module, "search"), judge.measure(module, "held_out")
        (name,) = one.samples
        rows = module.state_dict()["model.layers.1.mlp.up_proj.weight"].abs().mean(1).double().numpy()
        assert sorted([*one.samples[name], *other.samples[name]]) == pytest.approx(sorted(rows))
        assert len(one.samples[name]) >= 1
        assert one.value == pytest.approx(one.samples[name].mean())

    @pytest.mark.parametrize("count", [2, 3, 4])
    def test_few_samples_have_two_halves(self, count: int, tmp_path: Path) -> None:
        """Also where all hashes are even or all odd."""
        own = tmp_path / "own.py"
        for trial in range(8):
            names = [f"{trial}-{i}" for i in range(count)]
            own.write_text(
                f"def few(model):\n    return {{'values': {[float(i) for i in range(count)]}, 'hashes': {names}}}\n"
            )
            judge = TaskJudge([f"{own}:few"], "a", None)
            module = judge.load("a")
            halves: tuple[Half, Half] = ("search", "held_out")
            found = [list(*judge.measure(module, half).samples.values()) for half in halves]
            assert all(found)
            assert sorted(found[0] + found[1]) == list(range(count))

    def test_one_sample_has_no_halves(self, tmp_path: Path) -> None:
        """What was searched with is never called held out."""
        own = tmp_path / "own.py"
        own.write_text("def one(model):\n    return [1.0]\n")
        judge = TaskJudge([f"{own}:one"], "a", None)
        with pytest.raises(gm.UsageError, match="needs at least 2 different samples"):
            judge.measure(judge.load("a"), "search")


OWN = """
import os, signal, pathlib
def near(model):
    asked = pathlib.Path("asked")
    asked.write_text(asked.read_text() + "x" if asked.exists() else "x")
    if len(asked.read_text()) == NUMBER:
        os.kill(os.getpid(), signal.SIGTERM)
    return (-model.state_dict()["model.layers.1.mlp.up_proj.weight"].abs().mean(1)).tolist()
"""


@pytest.mark.usefixtures("parents")
class TestVerb:
    @pytest.fixture
    def run(self, capsys: pytest.CaptureFixture[str]) -> Program:
        return Program(capsys)

    def write(self, term: int = 0) -> None:
        Path("own.py").write_text(OWN.replace("NUMBER", str(term)))
        Path("s.yml").write_text("parents: [a, b]\nobjective: own.py:near\nbudget: 4\n")

    def test_bad_places_are_refused_before_the_search(self, run: Program) -> None:
        """A report's, a merge's and the results' own: nothing was scored."""
        self.write()
        assert run("search", "s.yml", "--report", "no/x.html").code == 2
        assert run("search", "s.yml", "--merge", "a").code == 2
        code, _, err = run("search", "s.yml", "--out", "/proc/x")
        assert (code, err) == (1, "error: /proc/x: No such file or directory\n")
        assert not Path("asked").exists()

    def test_terminated_and_resumed(self, run: Program) -> None:
        """SIGTERM is Ctrl-C: the best so far is written; --resume goes on, and says so where there is nothing."""
        self.write(term=3)
        code, out, err = run("search", "s.yml", "--resume", "--merge", "won")
        assert code == 130, err
        assert "--resume --merge won" in err
        assert not Path("won").exists()  # which would not be replaced in the end
        assert "nothing to go on with in s: the search begins" in err
        assert "interrupted" in out
        assert Path("s/best.yml").is_file()
        self.write()
        code, out, err = run("search", "s.yml", "--resume", "--merge", "won")
        assert code == 0, err
        assert Path("won/config.json").is_file()
        assert "nothing to go on with" not in err
        assert "4 (budget)" in out
