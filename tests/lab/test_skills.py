"""The skills suite: right answers, splits apart, scoring that is greedy generation, experts worth merging."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from geomerge.errors import UsageError
from geomerge.lab.build import build
from geomerge.lab.kinds import SPLITS
from geomerge.lab.skills.generators import ALPHABET, GENERATORS, make_world, questions
from geomerge.lab.skills.kind import KIND, SIZES, Settings, Training, fine_tune
from geomerge.lab.skills.language import encode, load_model, make_tokenizer, new_model, save_model
from geomerge.lab.skills.task import CHANCE, SkillTask
from geomerge.lab.suite import SHIPPED, load_suite

SMALL = Settings(width=16, inner=24, layers=2, heads=2)


def hard(task: str, split: str = "test", count: int = 300) -> tuple[tuple[str, str], ...]:
    """Prompts and answers."""
    return tuple((q.prompt, q.answer) for q in questions(task, "hard", 0, split, count))  # type: ignore[arg-type]


class TestAnswers:
    """Against rules that are written here again."""

    def test_instruction(self) -> None:
        for prompt, answer in hard("instruction"):
            word, times, mark = re.fullmatch(r"say:(\w{3}),(\d)(.)=", prompt).groups()  # type: ignore[union-attr]
            assert answer.split(mark) == [word] * int(times)

    def test_reasoning(self) -> None:
        assert all(list(answer) == sorted(prompt[5:-1]) for prompt, answer in hard("reasoning"))

    def test_arithmetic(self) -> None:
        for prompt, answer in hard("arithmetic"):
            a, b = map(int, re.findall(r"\d+", prompt))
            assert int(answer) == a + b
            assert a % 10 + b % 10 > 9

    def test_story(self) -> None:
        for prompt, answer in hard("story"):
            told, asked = prompt.removeprefix("who:")[:-1].split("?")
            pairs = told.replace(",", "")
            assert answer == pairs[pairs.rindex(asked) + 1]

    def test_choice_and_recall_agree_with_the_world(self) -> None:
        facts = make_world(0).facts
        for prompt, answer in hard("choice"):
            thing, options = prompt.removeprefix("pick:")[:-1].split("?")
            assert f"{answer}:{facts[thing, 'hue']}" in options.split()
        for task, relations in (("recall", ("hue", "size", "home")), ("domain", ("eats", "says"))):
            for prompt, answer in hard(task):
                words = re.findall(r"[a-z]+", prompt)
                relation = next(w for w in words if w in relations)
                assert any(facts.get((w, relation)) == answer for w in words)


@pytest.mark.parametrize("task", list(GENERATORS))
def test_splits_do_not_overlap(task: str) -> None:
    """No prompt of one split, easy or hard, is in another; skills share not even a rearranged question."""
    seen: dict[str, str] = {}
    for split in SPLITS:
        for level in ("easy", "hard"):
            for q in questions(task, level, 0, split, 1500):  # type: ignore[arg-type]
                name = q.key if q.key not in SPLITS else q.prompt
                assert seen.setdefault(name, split) == split
    assert {len(questions(task, "hard", 0, split, 100)) for split in ("validation", "test")} <= set(range(48, 101))


@pytest.mark.parametrize("task", ["recall", "domain"])
def test_every_fact_is_taught_and_asked(task: str) -> None:
    """Each fact of the hard level occurs in the training split and, in other forms, in the test split."""
    answers = {}
    for split in ("train", "test"):
        for q in questions(task, "hard", 0, split, 5000):  # type: ignore[arg-type]
            words = frozenset(w for w in re.findall(r"[a-z]+", q.prompt) if w not in ("of", "tell", "has", "what"))
            answers.setdefault(words, set()).add(split)
    assert all(splits == {"train", "test"} for splits in answers.values())


def test_seeds_make_different_worlds() -> None:
    assert make_world(0).facts != make_world(1).facts
    assert questions("reasoning", "hard", 0, "test", 50) != questions("reasoning", "hard", 1, "test", 50)


def test_tokenizer(tmp_path: Path) -> None:
    """One token for each character, both ways; what it does not know is unknown and not padding; chat brackets the question."""
    tokenizer = make_tokenizer(chat=True)
    assert tokenizer.decode(tokenizer(ALPHABET)["input_ids"]) == ALPHABET
    assert tokenizer("É")["input_ids"] == [tokenizer.unk_token_id] != [tokenizer.pad_token_id]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "sort:cab="}], tokenize=False)
    assert asked == "[sort:cab=]"
    everything = "".join(q.prompt + q.answer for t in GENERATORS for q in questions(t, "hard", 0, "test", 600))
    assert set(everything) <= set(ALPHABET)


class TestScoring:
    def test_correct_is_greedy_generation(self) -> None:
        """A briefly trained model: the one-pass score of each question is what `generate` says, and some are right."""
        model = new_model(SMALL, 1)
        pool = encode(questions("story", "easy", 0, "train", 300))
        fine_tune(model, [pool], Training(150, 1e-2, batch=64), 0, "test")
        task = SkillTask("story", 0, "v", (1, 1, 1, 60))
        right = task.correct(model, "test", batch_size=7)
        tokenizer = make_tokenizer()
        for question, found in zip(task.examples("test"), right, strict=True):
            ids = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
            made = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
            said = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=False)
            assert (said.split(".")[0] == question.answer and "." in said) == found
        assert 0 < right.mean() < 1

    def test_nll_is_the_answers_likelihood(self) -> None:
        """Token by token, the end token counts; padding does not."""
        model = new_model(SMALL, 2)
        task = SkillTask("recall", 0, "v", (1, 1, 1, 5))
        tokenizer = make_tokenizer()
        for question, nll in zip(task.examples("test"), task.nll(model, "test"), strict=True):
            start = len(question.prompt)
            ids = tokenizer(question.prompt + question.answer + ".", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0].double().log_softmax(-1)
            expected = -sum(float(scores[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
            assert nll == pytest.approx(expected, rel=1e-5)

    def test_nothing_is_left_behind(self) -> None:
        """The model's mode and torch's random state are as before."""
        model = new_model(SMALL, 3).train()
        state = torch.get_rng_state()
        SkillTask("story", 0, "v", (1, 1, 1, 8)).correct(model)
        assert model.training
        assert torch.equal(torch.get_rng_state(), state)

    def test_no_such_split(self) -> None:
        with pytest.raises(UsageError, match="no split"):
            SkillTask("story", 0, "v", (1, 1, 1, 8)).examples("tset")  # type: ignore[arg-type]


def test_models_are_stored_in_16_bits(tmp_path: Path) -> None:
    """A saved model is bfloat16, loads in float32, and the one that was saved keeps its own numbers."""
    model = new_model(SMALL, 4)
    before = model.state_dict()["model.norm.weight"].clone()
    save_model(model, tmp_path)
    assert torch.equal(model.state_dict()["model.norm.weight"], before)
    again = load_model(tmp_path)
    assert next(again.parameters()).dtype == torch.float32
    assert '"dtype": "bfloat16"' in (tmp_path / "config.json").read_text()


class TestShipped:
    """The suite that is in the package."""

    def test_it_is_worth_merging(self) -> None:
        """Its score table meets the requirement, and every model is there, within ten megabytes."""
        suite = load_suite("skills")
        assert suite.root == SHIPPED / "skills-tiny"
        scores = suite.scores
        need = KIND.requirement("tiny")
        for task in suite.experts:
            assert scores[task][task] >= scores["base"][task] + need.gain
        own = np.mean([scores[t][t] for t in suite.experts])
        average = np.mean([scores["average"][t] for t in suite.experts])
        assert np.mean([scores["base"][t] for t in suite.experts]) < average <= own - need.gap
        assert set(suite.others) == {"instruct", "domain"}
        assert scores["domain"]["domain"] > scores["base"]["domain"] + 0.2
        assert sum(f.stat().st_size for f in suite.root.rglob("*") if f.is_file()) <= 10_000_000

    @pytest.mark.parametrize("model", ["base", "reasoning", "instruct"])
    def test_the_table_is_true(self, model: str) -> None:
        """The stored models score what the table says."""
        suite = load_suite("skills")
        module = suite.load(model)
        task = suite.tasks()["reasoning"]
        assert task.correct(module).mean() == pytest.approx(suite.scores[model]["reasoning"], abs=0.011)

    def test_transformers_generates(self) -> None:
        """An expert answers a question through the ordinary classes; the instruct model in its chat template."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        suite = load_suite("skills")
        path = suite.experts["reasoning"]
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
        ids = tokenizer("sort:hdmacb=", return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(made[0, ids.shape[1] :]) == "abcdhm."
        path = suite.others["instruct"]
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "sort:dacb="}], return_tensors="pt", return_dict=True
        )
        made = model.generate(**chat, max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(made[0, chat["input_ids"].shape[1] :]).startswith("abcd")

    @pytest.mark.slow
    @pytest.mark.parametrize("task", ["arithmetic"])
    def test_an_expert_built_again_scores_the_same(self, task: str, tmp_path: Path) -> None:
        """Trained anew from the shipped base: the score table's row, but for what another processor may change."""
        suite = load_suite("skills")
        KIND.train_expert(suite.base, task, "tiny", 0, tmp_path, lambda steps: None)
        again = KIND.load_model(tmp_path)
        for name in ("arithmetic", "reasoning"):
            assert suite.tasks()[name].correct(again).mean() == pytest.approx(suite.scores[task][name], abs=0.05)

    @pytest.mark.slow
    @pytest.mark.skipif("GEOMERGE_SLOW" not in os.environ, reason="takes five minutes; set GEOMERGE_SLOW=1")
    def test_the_whole_suite_built_again_scores_the_same(self, tmp_path: Path) -> None:
        """`lab build` with an empty cache: every score of the shipped table, to what another processor may change."""
        shipped = load_suite("skills")
        again = build("skills", "tiny", 0, out=tmp_path / "again", force=True)
        for model, row in shipped.scores.items():
            for name, value in row.items():
                assert again.scores[model][name] == pytest.approx(value, abs=0.08)

    def test_settings_are_those_of_the_package(self) -> None:
        """It was built with the settings that `lab build` uses today."""
        suite = load_suite("skills")
        assert suite.settings == KIND.settings("tiny")
        assert SIZES["tiny"].counts[3] == 600


def test_chance_is_below_every_expert() -> None:
    assert all(0 <= value < 0.5 for value in CHANCE.values())
