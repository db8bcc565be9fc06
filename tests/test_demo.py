"""The demo's pieces, at a size that takes seconds."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import geomerge

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def demo() -> Any:
    """The demo as a module, with its neighbour `skills`."""
    import importlib

    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("demo")
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in ("demo", "skills"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def skills(demo: ModuleType) -> Any:
    """The module of tasks and training that `demo` uses."""
    return sys.modules["skills"]


@pytest.fixture(scope="module")
def trained(demo: ModuleType, skills: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, two experts and the recipes, trained for a few steps; torch's random state is put back."""
    import torch

    out = tmp_path_factory.mktemp("demo")
    settings = skills.Settings(hidden=16, layers=2, base_steps=3, expert_steps=3, batch=8)
    state = torch.get_rng_state()
    try:
        skills.train_base(out, settings)
        for skill in skills.SKILLS:
            skills.train_expert(out, skill, settings)
    finally:
        torch.set_rng_state(state)
    demo.write_recipes(out)
    return out


def test_questions_are_right_and_held_out_answers_are_never_taught(skills: ModuleType) -> None:
    """Answers follow the skill's rule, and no answer is both taught and examined."""
    for skill in skills.SKILLS:
        for length in skills.HARD[skill]:
            taught = set(itertools.islice(skills.questions(skill, length, 1, held_out=False), 300))
            examined = set(itertools.islice(skills.questions(skill, length, 1, held_out=True), 50))
            assert not {a for _, a in taught} & {a for _, a in examined}
            for asked, answer in taught | examined:
                given = asked[5:-1]
                rest = set("0123456789") - set(given) if skill == "miss" else set(given)
                assert answer == "".join(sorted(rest)) + "."
                assert len(answer) == length + 1


def test_one_token_for_each_character(skills: ModuleType) -> None:
    """The tokenizer splits questions into characters and puts them together again."""
    tokens = skills.tokenizer()
    ids, start = skills.encode(tokens, [("sort:cab=", "abc."), ("sort:fed=", "def.")])
    assert ids.shape == (2, 13)
    assert start == 9
    assert tokens.decode(ids[0]) == "sort:cab=abc."
    assert tokens.unk_token_id not in ids


def test_training_lowers_the_loss(skills: ModuleType) -> None:
    """Thirty steps on one skill make its answers likelier."""
    import torch

    settings = skills.Settings(hidden=16, layers=1, batch=16)
    tokens = skills.tokenizer()
    state = torch.get_rng_state()
    pairs = list(itertools.islice(skills.questions("miss", 3, "x", held_out=True), 10))
    ids, start = skills.encode(tokens, pairs)

    def loss(model: Any) -> float:
        with torch.inference_mode():
            logits = model(input_ids=ids[:, :-1]).logits[:, start - 1 :]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, start:].flatten()))

    try:
        model = skills.new_model(settings, tokens)
        before = loss(model)
        skills.train(model, tokens, ("miss",), {"miss": (3,)}, 30, 1e-2, settings)
        assert loss(model) < 0.8 * before
    finally:
        torch.set_rng_state(state)


def test_every_recipe_merges_into_a_model_that_answers(
    demo: ModuleType, skills: ModuleType, trained: Path, tmp_path: Path
) -> None:
    """Each merge loads with transformers, has the parents' tensors, and generates text after a question."""
    from safetensors import safe_open

    with safe_open(trained / "base" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    for name in demo.RECIPES:
        report = geomerge.merge(trained / f"{name}.yml", tmp_path / name)
        assert report.tensors == len(names)
        assert set(skills.accuracy(tmp_path / name, count=6)) == set(skills.SKILLS)
        assert re.fullmatch(r"[a-z0-9:=._]*", skills.answer(tmp_path / name, "sort:cab="))


def test_accuracy_counts_whole_right_answers_as_generation_gives_them(
    skills: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that has learned one question by heart is right in that one and wrong in those that it never saw."""
    import torch

    kinds = [(skill, n) for skill in skills.SKILLS for n in skills.HARD[skill]]
    known = {kind: next(skills.questions(*kind, "known", held_out=False)) for kind in kinds}
    new = {kind: next(skills.questions(*kind, "new", held_out=True)) for kind in kinds}
    settings, tokens = skills.Settings(hidden=32, layers=1, batch=4), skills.tokenizer()
    state = torch.get_rng_state()
    monkeypatch.setattr(
        skills,
        "questions",
        lambda skill, n, seed, *, held_out: itertools.cycle(
            [known[skill, n], new[skill, n]] if held_out else [known[skill, n]]
        ),
    )
    try:
        model = skills.new_model(settings, tokens)
        skills.train(model, tokens, ("miss",), skills.HARD, 200, 1e-2, settings)
        model.save_pretrained(tmp_path)
        tokens.save_pretrained(tmp_path)
    finally:
        torch.set_rng_state(state)
    assert skills.accuracy(tmp_path, count=6)["miss"] == 0.5
    for n in skills.HARD["miss"]:
        for (question, truth), right in ((known["miss", n], True), (new["miss", n], False)):
            assert skills.answer(tmp_path, question).startswith(truth) == right


def test_the_table_has_a_row_a_model_and_marks_the_best_merge(demo: ModuleType) -> None:
    """The best merge is the one with the highest mean of the merges, even when an expert's is higher."""
    names = ("base", "expert-sort", "expert-miss", *demo.RECIPES)
    scores = {name: {"sort": 0.1 * i, "miss": 0.5} for i, name in enumerate(names)}
    scores["expert-sort"]["sort"] = 1.0
    table = demo.results_table(scores)
    assert table.row_count == len(names)
    assert demo.best_merge(scores) == "ties"
    assert [str(cell) for cell in table.columns[0].cells][-1] == "ties ★"


def test_trained_models_are_used_again_only_with_the_same_settings(
    demo: ModuleType, skills: ModuleType, tmp_path: Path
) -> None:
    """Other settings, a damaged record or none mean training anew."""
    import json
    from dataclasses import asdict

    assert not demo.models_ready(tmp_path, skills.Settings())
    (tmp_path / "settings.json").write_text(json.dumps(asdict(skills.Settings())))
    assert demo.models_ready(tmp_path, skills.Settings())
    assert not demo.models_ready(tmp_path, skills.Settings(seed=2))
    (tmp_path / "settings.json").write_text("{")
    assert not demo.models_ready(tmp_path, skills.Settings())
