"""Compressed experts: what goes in comes out as the methods say, in the size that was promised; wrong files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import geomerge as gm
import tiny
from cli_samples import Program
from geomerge.compress import compress, extract
from geomerge.compress.container import FILE
from geomerge.lab.suite import load_suite


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Program:
    """The program in this process."""
    return Program(capsys)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny.family(tmp_path)
    return tmp_path


def experts(root: Path) -> dict[str, Path]:
    return {name: root / name for name in "abc"}


def near(one: tiny.Tensors, other: tiny.Tensors) -> bool:
    return all(torch.allclose(one[n], other[n], rtol=0, atol=1e-6) for n in other) and one.keys() == other.keys()


@pytest.mark.parametrize(("method", "name"), [("tall", "tall_mask"), ("emr", "emr")])
def test_extracted_is_the_methods_model(method: str, name: str, root: Path) -> None:
    """The K-th expert out of the container is the recipe's `task: K`; the directory is a model directory."""
    packed = compress(root / "base", experts(root), root / "packed", method=method)
    for k, task in enumerate("abc", 1):
        extract(root / "packed", task, root / f"{task}-again", base=root / "base")
        models = ", ".join(f"{{model: {root}/{n}}}" for n in "abc")
        recipe = f"merge_method: {name}\nbase_model: {root}/base\nmodels: [{models}]\nparameters: {{task: {k}}}\n"
        assert near(tiny.read(root / f"{task}-again"), gm.merge_state_dicts(recipe))
        assert tiny.config(root / f"{task}-again")["model_type"] == "llama"
    assert list(packed.contents.tasks) == ["a", "b", "c"]


def test_disjoint_changes_come_back_exactly(root: Path) -> None:
    """Experts that changed different elements: each is recovered bit for bit."""
    base = tiny.read(root / "base")
    for k, name in enumerate("xyz"):
        mine = {}
        for n, w in base.items():
            flat = w.clone().reshape(-1)
            flat[k::3] += 0.25
            mine[n] = flat.view_as(w)
        tiny.save(root / name, mine, tiny.config(root / "base"))
    compress(root / "base", {name: root / name for name in "xyz"}, root / "packed")
    for name in "xyz":
        extract(root / "packed", name, root / f"{name}-again", base=root / "base")
        assert near(tiny.read(root / f"{name}-again"), tiny.read(root / name))


def test_by_number(root: Path) -> None:
    """From 1; a name that is a number is a name first."""
    compress(root / "base", {"2": root / "a", "x": root / "b"}, root / "packed")
    for task, number in (("2", 1), ("x", "x")):
        extract(root / "packed", task, root / f"{task}-by-name", base=root / "base")
        extract(root / "packed", number, root / f"{task}-again", base=root / "base")
        assert tiny.same(tiny.read(root / f"{task}-by-name"), tiny.read(root / f"{task}-again"))
    assert not tiny.same(tiny.read(root / "2-by-name"), tiny.read(root / "x-by-name"))


def test_an_only_expert_comes_back(root: Path) -> None:
    for method in ("tall", "emr"):
        compress(root / "base", {"a": root / "a"}, root / method, method=method)
        extract(root / method, "a", root / f"{method}-a", base=root / "base")
        assert near(tiny.read(root / f"{method}-a"), tiny.read(root / "a"))


def test_threads_do_not_show(root: Path) -> None:
    for threads in (1, 3):
        compress(root / "base", experts(root), root / f"packed{threads}", threads=threads)
    assert tiny.digests(root / "packed1") == tiny.digests(root / "packed3")


def test_size_and_recovery_on_real_experts(tmp_path: Path) -> None:
    """Seven experts of the lab: vector and masks take less than a third, and TALL's experts keep their skill."""
    suite = load_suite("skills")
    packed = compress(suite.base, {n: str(p) for n, p in suite.experts.items()}, tmp_path / "packed")
    assert packed.nbytes < 0.33 * packed.experts
    task = suite.tasks()["recall"]
    extract(tmp_path / "packed", "recall", tmp_path / "recall", base=suite.base)
    own = task.correct(suite.load("recall"), "validation").mean()
    again = task.correct(suite.load(tmp_path / "recall"), "validation").mean()
    assert again > own - 0.15


class TestRefused:
    def test_another_base(self, root: Path) -> None:
        compress(root / "base", experts(root), root / "packed")
        with pytest.raises(gm.IncompatibleModels, match="another base"):
            extract(root / "packed", "a", root / "out", base=root / "a")
        assert not (root / "out").exists()

    def test_unknown_expert(self, root: Path) -> None:
        compress(root / "base", {"chat": root / "a"}, root / "packed")
        with pytest.raises(gm.UsageError, match="did you mean 'chat'"):
            extract(root / "packed", "chta", root / "out", base=root / "base")

    @pytest.mark.parametrize("number", ["0", "3", "-1", "1.0"])
    def test_a_number_beyond(self, number: str, root: Path) -> None:
        compress(root / "base", {"chat": root / "a", "code": root / "b"}, root / "packed")
        with pytest.raises(gm.UsageError, match="known: chat, code"):
            extract(root / "packed", number, root / "out", base=root / "base")

    def test_no_container(self, root: Path) -> None:
        with pytest.raises(gm.UsageError, match="no compressed experts"):
            extract(root / "a", "a", root / "out", base=root / "base")

    def test_description_without_a_key(self, root: Path) -> None:
        compress(root / "base", experts(root), root / "packed")
        (root / "packed" / FILE).write_text("{}")
        with pytest.raises(gm.DamagedCheckpoint, match="lacks the key 'geomerge_compressed'"):
            extract(root / "packed", "a", root / "out", base=root / "base")

    @pytest.mark.parametrize("text", ["{", '{"geomerge_compressed": 9}', '{"geomerge_compressed": 1, "tasks": []}'])
    def test_damaged_description(self, text: str, root: Path) -> None:
        compress(root / "base", experts(root), root / "packed")
        (root / "packed" / FILE).write_text(text)
        with pytest.raises(gm.DamagedCheckpoint):
            extract(root / "packed", "a", root / "out", base=root / "base")
        assert not (root / "out").exists()

    def test_masks_of_others(self, root: Path) -> None:
        """The vector and masks of experts of another base, under this description."""
        tiny.save(root / "other", {n: w + 0.5 for n, w in tiny.read(root / "base").items()}, tiny.config(root / "base"))
        compress(root / "base", experts(root), root / "packed")
        compress(root / "other", experts(root), root / "others")
        (root / "packed" / "model.safetensors").write_bytes((root / "others" / "model.safetensors").read_bytes())
        with pytest.raises(gm.DamagedCheckpoint, match="not those that compressed"):
            extract(root / "packed", "a", root / "out", base=root / "base")
        assert not list(root.glob("out*"))

    def test_missing_mask(self, root: Path) -> None:
        compress(root / "base", experts(root), root / "packed")
        tensors = tiny.read(root / "packed")
        del tensors[next(n for n in tensors if n.startswith("mask.2."))]
        tiny.save(root / "packed", tensors)
        with pytest.raises(gm.DamagedCheckpoint, match="do not fit"):
            extract(root / "packed", "b", root / "out", base=root / "base")

    def test_the_base_as_an_expert(self, root: Path) -> None:
        with pytest.raises(gm.UsageError, match="the base and one of the experts"):
            compress(root / "base", {**experts(root), "base": root / "a" / ".." / "base"}, root / "packed")
        assert not (root / "packed").exists()

    def test_hints_are_not_for_recipes(self, root: Path) -> None:
        tiny.llama(root / "b", 9, vocab_size=41)
        with pytest.raises(gm.IncompatibleModels, match="geomerge transplant") as caught:
            compress(root / "base", experts(root), root / "packed")
        assert "tokenizer_source" not in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"method": "tal"}, "did you mean 'tall'"),
            ({"threshold": -1}, "from 0 to 100"),
            ({"threshold": float("nan")}, "from 0 to 100"),
            ({"method": "emr", "threshold": 0.2}, "emr has no threshold"),
        ],
    )
    def test_wrong_words(self, options: dict[str, str], says: str, root: Path) -> None:
        with pytest.raises(gm.UsageError, match=says):
            compress(root / "base", experts(root), root / "packed", **options)
        assert not (root / "packed").exists()


def test_command_line(run: Program, root: Path) -> None:
    """Two verbs, names by NAME=MODEL, JSON, and two experts of one name refused."""
    done = run("compress", root / "base", f"chat={root}/a", root / "b", "--out", root / "packed", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert list(found["tasks"]) == ["chat", "b"]
    assert 0 < found["density"]["chat"] <= 1
    assert run("extract", root / "packed", "chat", root / "out", "--base", root / "base").code == 0
    assert tiny.read(root / "out").keys() == tiny.read(root / "a").keys()
    twice = run("compress", root / "base", root / "a", f"a={root}/b", "--out", root / "again")
    assert twice.code == 2
    assert "give them names" in twice.err


def test_paths_with_an_equals_sign(run: Program, root: Path) -> None:
    """What exists is a path."""
    (root / "eq=dir").mkdir()
    (root / "a").rename(root / "eq=dir" / "chat")
    done = run(
        "compress", root / "base", root / "eq=dir" / "chat", f"code={root}/b", "--out", root / "packed", "--json"
    )
    assert done.code == 0, done.err
    assert list(json.loads(done.out)["tasks"]) == ["chat", "code"]


@pytest.mark.parametrize("verb", ["compress", "extract"])
def test_interrupted(verb: str, run: Program, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 130, nothing is left, and the same command works afterwards."""
    compress(root / "base", experts(root), root / "packed")
    commands = {
        "compress": ("compress", root / "base", root / "a", root / "b", "--out", root / "out"),
        "extract": ("extract", root / "packed", "a", root / "out", "--base", root / "base"),
    }

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("geomerge.engine.execute.Threads.run", interrupted)
        stopped = run(*commands[verb])
    assert (stopped.code, stopped.err) == (130, "interrupted: nothing was made\n")
    assert not list(root.glob("out*"))
    assert run(*commands[verb]).code == 0


def test_an_input_that_changes_is_noticed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that is replaced while an expert is extracted."""
    from geomerge.engine.execute import Threads

    compress(root / "base", experts(root), root / "packed")
    before = Threads.run

    def changing(self: Threads, *args: object, **options: object) -> None:
        before(self, *args, **options)  # type: ignore[arg-type]
        tiny.save(root / "base", tiny.read(root / "a"))

    monkeypatch.setattr("geomerge.engine.execute.Threads.run", changing)
    with pytest.raises(gm.RunError, match="changed"):
        extract(root / "packed", "a", root / "out", base=root / "base")
    assert not list(root.glob("out*"))
