"""Task sources that need no lm-eval: lab suites, texts, image folders, functions of the user's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from geomerge.errors import DataError, ModelError, RunError, UsageError
from geomerge.evaluate import evaluate, lab
from geomerge.evaluate.models import Model
from geomerge.evaluate.perplexity import perplexity_task, windows
from geomerge.evaluate.references import find_tasks, of_harness
from geomerge.evaluate.task import Settings

TEXT = "the merge of two models. " * 12 + "\n" + "a line\n" * 10


def silent(share: float) -> None:
    """No progress."""


# -- lab ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeLabTask:
    """A `geomerge.lab.kinds.LabTask` that asks a linear module for the sign of numbers."""

    name: str
    suite: str = "skills"
    kind: str = "causal-lm"
    title: str = "signs"
    chance: float = 0.5
    version: str = "v1"
    asked: list[tuple[str, int | None, int]] = field(default_factory=list, compare=False)

    def correct(self, model: Any, split: str = "test", limit: int | None = None, batch_size: int = 256) -> np.ndarray:
        self.asked.append((split, limit, batch_size))
        inputs = torch.tensor([[1.0], [-1.0], [2.0], [-3.0]])
        with torch.no_grad():
            return (model(inputs)[:, 0] > 0).numpy()[:limit]


class FakeSuite:
    """A suite of two tasks."""

    name = kind = "skills"

    def __init__(self) -> None:
        self.made = {name: FakeLabTask(name) for name in ("signs", "other")}

    def tasks(self) -> dict[str, FakeLabTask]:
        return self.made


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> FakeSuite:
    """What `load_suite` finds."""
    made = FakeSuite()
    monkeypatch.setattr(lab, "load_suite", lambda reference: made)
    return made


class TestLab:
    """Tasks of lab suites."""

    def test_scores(self, suite: FakeSuite) -> None:
        """The test split, with the given limit and batch size; accuracy of the answers that are right."""
        module = torch.nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            module.weight.fill_(1.0)
        scores = evaluate({"m": module}, "skills", limit=3, batch_size=7)
        assert [task.name for task in scores.tasks] == ["signs", "other"]
        assert scores.value("m", "signs") == pytest.approx(2 / 3)
        assert suite.made["signs"].asked == [("test", 3, 7)]
        row = scores.tasks[0]
        assert (row.source, row.metric, row.chance, row.version, row.samples) == (
            "lab:skills",
            "accuracy",
            0.5,
            "v1",
            3,
        )

    @pytest.mark.parametrize(
        ("reference", "names"),
        [
            ("skills", ["signs", "other"]),
            ("lab:skills:small:3", ["signs", "other"]),
            ("skills-tiny/signs", ["signs"]),
            ("lab:skills:tiny:0/other", ["other"]),
            ("classification:skills/other", ["other"]),
            (["skills/signs", "skills"], ["signs", "other"]),
            ("skills/signs,skills/other", ["signs", "other"]),
        ],
    )
    def test_references(self, suite: FakeSuite, reference: Any, names: list[str]) -> None:
        """A whole suite, one task of it, several; each once."""
        assert [task.name for task in find_tasks(reference)] == names

    def test_unknown_task(self, suite: FakeSuite) -> None:
        """A misspelt task gets a suggestion."""
        with pytest.raises(UsageError, match=r"no task 'sings'[\s\S]*did you mean 'signs'"):
            find_tasks("skills/sings")


SHIPPED = Path(lab.__file__).parent.parent / "lab" / "shipped" / "skills-tiny"


@pytest.mark.skipif(not (SHIPPED / "suite.json").is_file(), reason="the skills suite has not been built yet")
def test_shipped_skills_through_lm_eval_and_by_a_loop(tmp_path: Path) -> None:
    """The suite's own scoring, lm-eval's, and a greedy loop written here give the same accuracies."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from geomerge.lab.suite import load_suite

    suite = load_suite("skills")
    name, task = next(iter(suite.tasks().items()))
    n = 40
    models = {"expert": suite.experts[name], "base": suite.base}
    by_loop = {}
    for model_name, folder in models.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        right = []
        for example in task.examples("test", n):
            ids = tokenizer(example.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
            said = ""
            with torch.no_grad():
                while not said.endswith(".") and len(said) < 40:
                    following = model(ids).logits[0, -1].argmax().view(1, 1)
                    ids = torch.cat([ids, following], dim=1)
                    said += tokenizer.decode(following[0])
            right.append(said == example.answer.removesuffix(".") + ".")
        by_loop[model_name] = np.mean(right)
    (tmp_path / "tasks").mkdir()
    task.write_lm_eval(tmp_path / "tasks", limit=n)  # type: ignore[attr-defined]
    tasks = [f"skills/{name}", f"lab_skills_{name}"]
    scores = evaluate(models, tasks, include=[tmp_path / "tasks"], limit=n, cache=False)
    for model_name, share in by_loop.items():
        assert [scores.value(model_name, t.name) for t in scores.tasks] == pytest.approx([share] * 2, abs=1e-12)
    assert by_loop["expert"] > by_loop["base"]


# -- perplexity --------------------------------------------------------------------------------------------------------


class TestPerplexity:
    """Perplexity of a text."""

    def test_against_one_forward_pass(self, language_models: Path, tmp_path: Path) -> None:
        """A text that fits one window: exp of the mean loss that transformers computes for it."""
        (tmp_path / "short.txt").write_text("a short text")
        scores = evaluate(language_models / "a", f"perplexity:{tmp_path / 'short.txt'}")
        model = Model("a", "model", reference=str(language_models / "a"))
        module, tokenizer = model.causal_lm(Settings()), model.tokenizer(Settings())
        ids = torch.tensor(
            [[tokenizer.bos_token_id, *tokenizer("a short text", add_special_tokens=False)["input_ids"]]]
        )
        assert ids.shape[1] == 13
        with torch.no_grad():
            loss = module(input_ids=ids, labels=ids).loss
        assert scores.scores[0].value == pytest.approx(math.exp(loss), rel=1e-5)
        assert scores.tasks[0].samples == 1
        assert not scores.tasks[0].higher_is_better

    def test_against_an_independent_loop(self, language_models: Path, tmp_path: Path) -> None:
        """A text of many windows: every token once, with the context that the window gives it."""
        (tmp_path / "long.txt").write_text(TEXT)
        model = Model("a", "model", reference=str(language_models / "a"))
        module, tokenizer = model.causal_lm(Settings()), model.tokenizer(Settings())
        ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
        total, count, end = 0.0, 0, 0
        for start in range(0, len(ids), 16):
            window = torch.tensor([ids[start : start + 32]])
            first = max(end, start + 1)
            end = start + window.shape[1]
            if first >= end:
                break
            with torch.no_grad():
                logs = module(input_ids=window).logits[0].double().log_softmax(-1)
            for position in range(first, end):
                total -= float(logs[position - 1 - start, ids[position]])
                count += 1
        assert count == len(ids) - 1
        for batch_size in (1, 4):
            found = evaluate(model.reference, f"perplexity:{tmp_path / 'long.txt'}", batch_size=batch_size)
            assert found.scores[0].value == pytest.approx(math.exp(total / count), rel=1e-5)

    @pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 12, 13, 50])
    def test_windows_score_each_token_once(self, length: int) -> None:
        """All tokens but the first are scored, each once, in order."""
        scored = [i for w in windows(iter(range(length)), 8) for i in w.ids[len(w.ids) - w.scored :]]
        assert scored == list(range(1, length))

    def test_limit(self, language_models: Path, tmp_path: Path) -> None:
        """A limit is a number of windows."""
        (tmp_path / "long.txt").write_text(TEXT)
        scores = evaluate(language_models / "a", f"perplexity:{tmp_path / 'long.txt'}", limit=3)
        assert scores.tasks[0].samples == 3

    @pytest.mark.parametrize(
        ("content", "match"),
        [(b"", "empty"), (b" \n\n", "empty"), (b"gr\xfc\xdfe", "not UTF-8"), (b"cut \xe2\x82", "not UTF-8")],
    )
    def test_bad_files(self, language_models: Path, tmp_path: Path, content: bytes, match: str) -> None:
        """Empty files and files in other encodings are refused before a model is loaded."""
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(DataError, match=match) as refused:
            evaluate(language_models / "a", f"perplexity:{tmp_path / 'bad.txt'}")
        assert refused.value.exit_code == 3

    def test_missing(self) -> None:
        """A file that is not there, and none at all."""
        with pytest.raises(DataError, match="no such file"):
            perplexity_task("perplexity:nowhere.txt")
        with pytest.raises(UsageError, match="needs a text file"):
            perplexity_task("perplexity:")

    def test_module_needs_a_tokenizer(self, language_models: Path, tmp_path: Path) -> None:
        """A module in memory takes the tokenizer that it is given, and says when there is none."""
        (tmp_path / "short.txt").write_text("a short text")
        task = f"perplexity:{tmp_path / 'short.txt'}"
        module = Model("a", "model", reference=str(language_models / "a")).causal_lm(Settings())
        with pytest.raises(ModelError, match="no tokenizer"):
            evaluate({"a": module}, task)
        given = evaluate({"a": module}, task, tokenizer=language_models / "a")
        beside = evaluate({"a": module, "b": language_models / "b"}, task)
        path = evaluate(language_models / "a", task)
        assert given.scores[0].value == beside.scores[0].value == path.scores[0].value
        assert next(module.parameters()).requires_grad


# -- images ------------------------------------------------------------------------------------------------------------


def save_images(root: Path, classes: Sequence[str] = ("dark", "light")) -> Path:
    """Three images of each class."""
    for i, label in enumerate(classes):
        (root / label).mkdir(parents=True)
        for j in range(3):
            Image.new("RGB", (8, 8), (40 * j + 120 * i,) * 3).save(root / label / f"{j}.png")
    return root


class TestClassification:
    """Folders of images."""

    def test_against_a_loop(self, image_classifier: Path, tmp_path: Path) -> None:
        """The same accuracy as the model and its processor called here, image by image."""
        folder = save_images(tmp_path / "images")
        scores = evaluate(image_classifier, f"classification:{folder}", batch_size=2)
        model = Model("vit", "model", reference=str(image_classifier))
        module, processor = model.image_classifier(Settings()), model.image_processor(Settings())
        right = []
        for path in sorted(folder.rglob("*.png")):
            with Image.open(path) as image, torch.no_grad():
                logits = module(**processor(images=image, return_tensors="pt")).logits
            right.append(module.config.id2label[int(logits.argmax())] == path.parent.name)
        assert scores.scores[0].value == pytest.approx(np.mean(right))
        assert scores.tasks[0].chance == 0.5
        assert scores.tasks[0].samples == 6

    def test_limit_takes_all_classes(self, image_classifier: Path, tmp_path: Path) -> None:
        """The first samples are of all classes; folders may be called by index."""
        folder = save_images(tmp_path / "images", ("0", "1"))
        task = find_tasks(f"classification:{folder}")[0]
        assert [label for _, label in task.images[:2]] == ["0", "1"]  # type: ignore[attr-defined]
        assert evaluate(image_classifier, task, limit=2).tasks[0].samples == 2

    def test_refused(self, image_classifier: Path, language_models: Path, tmp_path: Path) -> None:
        """No folder, no images, a class that the model lacks, a broken image, a model of another kind."""
        with pytest.raises(DataError, match="no such directory"):
            find_tasks("classification:nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="no images"):
            evaluate(image_classifier, f"classification:{tmp_path / 'empty'}")
        with pytest.raises(ModelError, match=r"no class 'lihgt'[\s\S]*did you mean 'light'"):
            evaluate(image_classifier, f"classification:{save_images(tmp_path / 'typo', ('dark', 'lihgt'))}")
        broken = save_images(tmp_path / "broken")
        (broken / "dark" / "0.png").write_bytes(b"no image")
        with pytest.raises(DataError, match="cannot be read"):
            evaluate(image_classifier, f"classification:{broken}")
        with pytest.raises(ModelError, match="cannot be loaded by AutoModelForImageClassification"):
            evaluate(language_models / "a", f"classification:{save_images(tmp_path / 'images')}")


# -- the user's own ----------------------------------------------------------------------------------------------------


class TestCallable:
    """Functions of the user's."""

    def write(self, folder: Path, text: str) -> str:
        (folder / "mine.py").write_text(text)
        return f"{folder / 'mine.py'}:score"

    def test_values(self, language_models: Path, tmp_path: Path) -> None:
        """An array of values; the model is loaded, in evaluation mode, without gradients."""
        reference = self.write(
            tmp_path,
            "import torch\n"
            "def score(model, tokenizer, settings):\n"
            "    assert not model.training and not torch.is_grad_enabled()\n"
            "    ids = tokenizer('abc', return_tensors='pt')['input_ids']\n"
            "    return [model(ids).logits.shape[-1], settings.batch_size, 1.0]\n"
            "score.metric = 'things'\nscore.chance = 0.25\nscore.higher_is_better = False\n",
        )
        scores = evaluate(language_models / "a", reference, batch_size=5)
        assert scores.scores[0].value == pytest.approx((45 + 5 + 1) / 3)
        row = scores.tasks[0]
        assert (row.name, row.source, row.metric) == ("mine.py:score", "python", "things")
        assert (row.chance, row.higher_is_better, row.samples) == (0.25, False, 3)

    @pytest.mark.parametrize(
        ("returned", "value"),
        [("0.5", 0.5), ("torch.tensor([1, 0])", 0.5), ("{'values': [1, 4], 'weights': [1, 2]}", 3.0), ("True", 1.0)],
    )
    def test_forms(self, language_models: Path, tmp_path: Path, returned: str, value: float) -> None:
        """A float, a tensor, a mapping; without loading a model when only the path is asked for."""
        reference = self.write(
            tmp_path, f"import torch\ndef score(path):\n    assert path.is_dir()\n    return {returned}\n"
        )
        scores = evaluate(language_models / "a", reference)
        assert scores.scores[0].value == pytest.approx(value)
        if returned == "True":
            assert math.isnan(scores.scores[0].low)

    def test_cached_only_with_a_version(self, language_models: Path, tmp_path: Path) -> None:
        """A function with a version is called once; with another version, again."""
        text = "def score(path):\n    with open({!r}, 'a') as f: f.write('x')\n    return 1.0\n"
        text = text.format(str(tmp_path / "calls"))
        counts = []
        for extra in ("", "", "score.version = 1\n", "score.version = 1\n", "score.version = 2\n"):
            evaluate(language_models / "a", self.write(tmp_path, text + extra))
            counts.append(len((tmp_path / "calls").read_text()))
        assert counts == [1, 2, 3, 3, 4]

    @pytest.mark.parametrize(
        ("text", "error", "match"),
        [
            ("raise OSError('no disk')", RunError, "the file fails: OSError: no disk"),
            ("def scoer(path): return 1", UsageError, "no function 'score'[\\s\\S]*'scoer'"),
            ("def score(weights): return 1", UsageError, "asks for 'weights'"),
            ("def score(path): return 1 / 0", RunError, "ZeroDivisionError"),
            ("def score(path): return 'much'", RunError, "no numbers"),
            ("def score(path): return [[1], [2]]", RunError, "shape"),
            ("def score(path): return []", RunError, "returned no values"),
            ("def score(path): pass", RunError, "returned nothing[\\s\\S]*`return`"),
            ("def score(path): return [1, float('nan')]", RunError, "nan for sample 2 of 2"),
            ("def score(path): return 97.5\nscore.metric = 'accuracy'", RunError, "97.5 as an accuracy"),
            ("def score(path): return {'value': 1}", RunError, "no 'values'"),
            ("def score(model): return 1\nscore.kind = 'speech'", UsageError, "kind is 'speech'"),
        ],
    )
    def test_refused(
        self, language_models: Path, tmp_path: Path, text: str, error: type[Exception], match: str
    ) -> None:
        """What is wrong with the user's file is said with its name."""
        with pytest.raises(error, match=match):
            evaluate(language_models / "a", self.write(tmp_path, text + "\n"))

    def test_a_file_without_a_function(self, language_models: Path) -> None:
        """Is refused at once, not looked up among lm-eval's tasks."""
        with pytest.raises(UsageError, match=r"mine\.py names no function[\s\S]*mine\.py:FUNCTION"):
            evaluate(language_models / "a", "mine.py")

    def test_a_function_itself(self, language_models: Path) -> None:
        """The Python face takes functions."""

        def half(model: Any) -> float:
            return 0.5

        assert evaluate(language_models / "a", half).value("a", "half") == 0.5

    def test_missing_file(self) -> None:
        """A file that is not there."""
        with pytest.raises(DataError, match="no such file"):
            find_tasks("nowhere.py:score")


class TestLoading:
    """Models that cannot be loaded say why."""

    def test_pickles_and_missing_tensors(self, language_models: Path, tmp_path: Path) -> None:
        """No pickle is opened; a tensor that is missing is not made up."""
        import shutil

        from safetensors.torch import load_file, save_file

        (tmp_path / "t.txt").write_text("abc")
        task = f"perplexity:{tmp_path / 't.txt'}"
        pickled = tmp_path / "pickled"
        shutil.copytree(language_models / "a", pickled)
        tensors = load_file(pickled / "model.safetensors")
        (pickled / "model.safetensors").unlink()
        torch.save(tensors, pickled / "pytorch_model.bin")
        with pytest.raises(ModelError, match="weights in a pickle"):
            evaluate(pickled, task)
        lacking = tmp_path / "lacking"
        shutil.copytree(language_models / "a", lacking)
        tensors.pop("model.norm.weight")
        save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"lacks model\.norm\.weight"):
            evaluate(lacking, task)
        with pytest.raises(ModelError, match="single file"):
            evaluate((lacking / "model.safetensors").rename(lacking / "other.safetensors"), task)

    def test_foreign_code_is_not_run(self, language_models: Path, tmp_path: Path) -> None:
        """A model with its own code needs permission; its code does not run without."""
        import json
        import shutil

        (tmp_path / "t.txt").write_text("abc")
        folder = tmp_path / "foreign"
        shutil.copytree(language_models / "a", folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(ModelError, match="--trust-remote-code"):
            evaluate(folder, f"perplexity:{tmp_path / 't.txt'}")
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("reference", "says"), [("skill/reasoning", "'skills'"), ("glyph/a", "'glyphs'"), (" ", "no task")]
)
def test_misspelt_suites(reference: str, says: str) -> None:
    """Before lm-eval's thousands of tasks are looked through for them."""
    assert of_harness(reference) == []
    with pytest.raises(UsageError, match=says):
        find_tasks(reference)
