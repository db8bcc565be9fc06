"""Tasks of lm-eval from local YAML files, and the leaderboard's arithmetic."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geomerge.errors import DataError, UsageError
from geomerge.evaluate import evaluate
from geomerge.evaluate.harness import Record, outcome
from geomerge.evaluate.leaderboard import BBH_CHOICES, MUSR_CHOICES, PARTS, leaderboard_tasks, put_together
from geomerge.evaluate.models import Model
from geomerge.evaluate.references import find_tasks
from geomerge.evaluate.task import Settings

pytest.importorskip("lm_eval")

COMMON = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
doc_to_text: "{{{{q}}}}"
metadata:
  version: 1.0
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITE = """\
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_target: "{{q}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
ROWS = [{"q": f"{i} plus {i} is", "choices": ["a", "bb", "c"], "gold": i % 3, "answer": "a"} for i in range(15)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tasks: ``letters``, ``more`` (fewer rows), ``write``, ``rolling``, two groups, and broken ones."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (root / "few.jsonl").write_text("\n".join(map(json.dumps, ROWS[4:9])))
    for name, file, kind in (
        ("letters", "rows", CHOICE),
        ("more", "few", CHOICE),
        ("write", "rows", WRITE),
        ("rolling", "rows", ROLLING),
        ("nodata", "gone", CHOICE),
    ):
        (root / f"{name}.yaml").write_text(COMMON.format(name=name, file=root / f"{file}.jsonl") + kind)
    for group, members, weighted in (("pooled", "letters, more", "true"), ("apart", "letters, more", "false")):
        text = f"group: {group}\ntask: [{members}]\naggregate_metric_list: [{{metric: acc_norm, weight_by_size: {weighted}}}]\n"
        (root / f"{group}.yaml").write_text(text)
    (root / "mixed.yaml").write_text("group: mixed\ntask: [letters, write]\n")
    return root


def by_hand(folder: Path, rows: Sequence[dict[str, Any]], *, per_character: bool = False) -> list[bool]:
    """Which choice a model finds likeliest after the question, computed choice by choice."""
    model = Model("m", "model", reference=str(folder))
    module, tokenizer = model.causal_lm(Settings()), model.tokenizer(Settings())
    right = []
    for row in rows:
        likelihoods = []
        for choice in row["choices"]:
            context = tokenizer(row["q"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(row["q"] + " " + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = module(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            total = sum(float(logs[i - 1, whole[i]]) for i in range(len(context), len(whole)))
            likelihoods.append(total / len(choice) if per_character else total)
        right.append(int(np.argmax(likelihoods)) == row["gold"])
    return right


def run(models: Any, names: Any, tasks: Path, **options: Any) -> Any:
    """Evaluate on tasks of the directory."""
    return evaluate(models, names, include=[tasks], **options)


class TestTasks:
    """Tasks and groups from a directory."""

    def test_multiple_choice(self, language_models: Path, tasks: Path) -> None:
        """Accuracies as a loop over the choices gives them, whatever the batch; chance is one in three."""
        folder = language_models / "a"
        right = by_hand(folder, ROWS)
        assert 0 < sum(right) < len(right)
        for batch_size in (1, 8):
            scores = run(folder, "letters", tasks, batch_size=batch_size)
            assert scores.value("a", "letters") == pytest.approx(np.mean(right))
        row = scores.tasks[0]
        assert (row.source, row.metric, row.samples) == ("lm-eval", "accuracy", 15)
        assert row.chance == pytest.approx(1 / 3)

    def test_chosen_metric(self, language_models: Path, tasks: Path) -> None:
        """NAME@METRIC takes another of the task's metrics."""
        folder = language_models / "b"
        right = by_hand(folder, ROWS, per_character=True)
        scores = run(folder, "letters@acc_norm", tasks)
        assert scores.value("b", "letters@acc_norm") == pytest.approx(np.mean(right))
        assert scores.tasks[0].metric == "acc_norm"

    def test_limit_and_pairs(self, language_models: Path, tasks: Path) -> None:
        """A limit takes the first samples; models are paired on them."""
        scores = run(language_models / "merged", "letters", tasks, parents=[language_models / "a"], limit=6)
        a, merged = (by_hand(language_models / name, ROWS[:6]) for name in ("a", "merged"))
        assert scores.tasks[0].samples == 6
        assert scores.paired[0].difference == pytest.approx(np.mean(merged) - np.mean(a))

    def test_groups(self, language_models: Path, tasks: Path) -> None:
        """A group is one task: the mean over all samples, or over its tasks, as it says, of the metric that it names."""
        folder = language_models / "a"
        first = by_hand(folder, ROWS, per_character=True)
        second = by_hand(folder, ROWS[4:9], per_character=True)
        scores = run(folder, "pooled,apart", tasks)
        assert scores.value("a", "pooled") == pytest.approx(np.mean(first + second))
        assert scores.value("a", "apart") == pytest.approx((np.mean(first) + np.mean(second)) / 2)
        assert np.mean(first) != np.mean(second)
        assert [t.samples for t in scores.tasks] == [20, 20]

    def test_perplexities(self, language_models: Path, tasks: Path) -> None:
        """Weighted perplexities are what the harness makes of them (it is compared inside), and lower is better."""
        scores = run(language_models / "a", ["rolling", "rolling@bits_per_byte", "write"], tasks)
        words, bits, _ = (score.value for score in scores.scores)
        text = [row["q"] for row in ROWS]
        nats = bits * math.log(2) * sum(len(t.encode()) for t in text)
        assert words == pytest.approx(math.exp(nats / sum(len(re.split(r"\s+", t)) for t in text)))
        assert [t.higher_is_better for t in scores.tasks] == [False, False, True]

    def test_random_state_and_streams(
        self, language_models: Path, tasks: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """The harness seeds everything and talks a lot; nothing of it is left."""
        torch.manual_seed(3)
        random.seed(3)
        before = torch.get_rng_state(), random.getstate()
        capfd.readouterr()
        run(language_models / "a", "write", tasks, cache=False)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert capfd.readouterr() == ("", "")

    def test_cached_by_content(self, language_models: Path, tasks: Path) -> None:
        """The version follows the task files and the data that they name."""
        version = find_tasks("letters", [tasks])[0].version
        assert find_tasks("letters", [tasks])[0].version == version
        rows = tasks / "rows.jsonl"
        old = rows.read_bytes()
        try:
            rows.write_bytes(old.replace(b"plus", b"less"))
            assert find_tasks("letters", [tasks])[0].version != version
        finally:
            rows.write_bytes(old)

    def test_refused(self, language_models: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No such directory, metric, common metric or data."""
        folder = language_models / "a"
        with pytest.raises(DataError, match="no such directory"):
            evaluate(folder, "letters", include=[tasks / "nowhere"])
        with pytest.raises(UsageError, match=r"no metric 'f1'[\s\S]*acc"):
            run(folder, "letters@f1", tasks)
        with pytest.raises(UsageError, match=r"no metric in common[\s\S]*letters, write"):
            run(folder, "mixed", tasks)
        with pytest.raises(DataError, match=r"'nodata'[\s\S]*there is no .*gone\.jsonl") as refused:
            run(folder, "nodata", tasks)
        assert refused.value.exit_code == 3

    def test_unknown_task(self, language_models: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A misspelt task gets a suggestion (from the index of all tasks, which here is the small one)."""
        from geomerge.evaluate import harness

        real = harness._manager
        monkeypatch.setattr(harness, "_manager", lambda include, defaults: real(include, False))
        with pytest.raises(UsageError, match=r"no task 'leters'[\s\S]*did you mean 'letters'"):
            run(language_models / "a", "leters", tasks)
        with pytest.raises(UsageError, match=r"no task 'skils'[\s\S]*did you mean 'skills'"):
            run(language_models / "a", "skils", tasks)

    def test_data_offline(self, language_models: Path, tmp_path: Path) -> None:
        """A data set of the hub that is not here: which one, which variable, exit 3."""
        text = COMMON.replace("dataset_path: json", "dataset_path: nobody/nothing").replace("{file}", "x.jsonl")
        text = re.sub(r"dataset_kwargs:\n.*\n.*\n", "", text)
        (tmp_path / "far.yaml").write_text(text.format(name="far") + CHOICE)
        with pytest.raises(
            DataError, match=r"'nobody/nothing' of the task 'far'.*HF_HUB_OFFLINE[\s\S]*HF_HOME"
        ) as refused:
            evaluate(language_models / "a", "far", include=[tmp_path])
        assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    ("metric", "found", "value"),
    [
        ("acc", True, (1.0, 1.0, "mean")),
        ("f1", (1, 0), None),
        ("inst_level_strict_acc", [True, False, True, True], (0.75, 4, "mean")),
        ("word_perplexity", (-8.0, 4), (2.0, 4, "exp")),
        ("bits_per_byte", (-8.0, 4), (2.0 / math.log(2), 4, "mean")),
        ("perplexity", -3.0, (3.0, 1, "exp")),
    ],
)
def test_outcomes(metric: str, found: Any, value: tuple[float, float, str] | None) -> None:
    """One sample's outcome as something that can be averaged."""
    made = outcome(metric, found)
    assert (None if made is None else (made.value, made.weight, made.link)) == value


# -- leaderboard -------------------------------------------------------------------------------------------------------


def records(metric: str, **shares: tuple[int, int]) -> dict[str, list[Record]]:
    """So many right answers of so many, by leaf task."""
    return {
        leaf: [Record({metric: float(i < right)}, f"{leaf}{i}", 4) for i in range(n)]
        for leaf, (right, n) in shares.items()
    }


class TestLeaderboard:
    """The Open LLM Leaderboard's normalisation."""

    def test_choices_are_those_of_the_definitions(self) -> None:
        """The numbers of answers are those that lm-eval's own files list."""
        import lm_eval

        folder = Path(lm_eval.__file__).parent / "tasks" / "leaderboard"
        found = {}
        for file in (folder / "bbh_mc").glob("*.yaml"):
            text = file.read_text()
            listed = re.search(r"^doc_to_choice: *(\[.*\])", text, re.MULTILINE)
            if listed is not None:
                found[text.rpartition("leaderboard_bbh_")[2].split()[0]] = len(json.loads(listed[1]))
        assert found == BBH_CHOICES
        text = (folder / "gpqa" / "_template_yaml").read_text()
        assert text.count("{{choice") == PARTS["gpqa"].choices == 4
        assert {f.stem for f in (folder / "musr").glob("musr_*.yaml")} <= {f"musr_{n}" for n in MUSR_CHOICES} | {"musr"}

    def test_musr_as_documented(self) -> None:
        """The leaderboard's own documented example: 0.7 of 2, 0.4 of 5, 0.6 of 3 give 40, 25 and 40."""
        found = put_together(
            "musr",
            records(
                "acc_norm",
                leaderboard_musr_murder_mysteries=(7, 10),
                leaderboard_musr_object_placements=(4, 10),
                leaderboard_musr_team_allocation=(6, 10),
            ),
        )
        assert found.score() == pytest.approx((0.4 + 0.25 + 0.4) / 3)
        assert len(found.parts) == 3

    def test_below_chance_is_zero(self) -> None:
        """A sub-task below guessing counts as 0, not as less."""
        found = put_together(
            "bbh", records("acc_norm", leaderboard_bbh_navigate=(2, 10), leaderboard_bbh_snarks=(8, 10))
        )
        assert found.score() == pytest.approx((0 + 0.6) / 2)

    def test_pooled_tasks(self) -> None:
        """GPQA pools its questions before the baseline goes: 12 of 20 is (0.6 − 0.25) / 0.75, as documented."""
        found = put_together(
            "gpqa", records("acc_norm", leaderboard_gpqa_main=(9, 10), leaderboard_gpqa_diamond=(3, 10))
        )
        assert found.score() == pytest.approx(0.46667, abs=1e-5)
        assert put_together("mmlu_pro", records("acc", leaderboard_mmlu_pro=(55, 100))).score() == pytest.approx(0.5)
        math_hard = records("exact_match", leaderboard_math_algebra_hard=(1, 2), leaderboard_math_geometry_hard=(0, 6))
        assert put_together("math_hard", math_hard).score() == pytest.approx(1 / 8)

    def test_ifeval(self) -> None:
        """The mean of the strict accuracies: 1 of 2 prompts, 3 of 4 instructions."""
        rows = [
            Record({"prompt_level_strict_acc": True, "inst_level_strict_acc": [True]}, "a", 0),
            Record({"prompt_level_strict_acc": False, "inst_level_strict_acc": [True, False, True]}, "b", 0),
        ]
        assert put_together("ifeval", {"leaderboard_ifeval": rows}).score() == pytest.approx((1 / 2 + 3 / 4) / 2)

    def test_unknown_sub_task(self) -> None:
        """A sub-task of a later harness is refused: its baseline is not known."""
        with pytest.raises(UsageError, match="leaderboard_bbh_new"):
            put_together("bbh", records("acc_norm", leaderboard_bbh_new=(1, 2)))

    def test_references(self) -> None:
        """All six in the leaderboard's order, or one."""
        names = [task.name for task in leaderboard_tasks("leaderboard")]
        assert names == [f"leaderboard/{part}" for part in ("ifeval", "bbh", "math_hard", "gpqa", "musr", "mmlu_pro")]
        assert [task.name for task in find_tasks("leaderboard/bbh")] == ["leaderboard/bbh"]
        with pytest.raises(UsageError, match=r"no task 'bhb'[\s\S]*'bbh'"):
            leaderboard_tasks("leaderboard/bhb")

    def test_data_offline(self, language_models: Path) -> None:
        """Without its data a part says so before a model is loaded; the task definitions themselves load."""
        with pytest.raises(DataError, match=r"leaderboard_musr.*HF_HUB_OFFLINE") as refused:
            evaluate(language_models / "a", "leaderboard/musr")
        assert refused.value.exit_code == 3
