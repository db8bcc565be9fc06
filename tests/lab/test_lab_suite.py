"""Finding suites, refusing what is none, and the requirement on their score tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from geomerge.errors import ModelError, RunError, UsageError
from geomerge.lab import kinds
from geomerge.lab.build import NotWorthMerging, build, failures, plain_mean
from geomerge.lab.kinds import Requirement, Tick
from geomerge.lab.mlp import MlpKind
from geomerge.lab.suite import Suite, load_model, load_suite, read_suite, suites


class Lazy(MlpKind):
    """A suite whose experts are their base."""

    name = "lazy"

    def requirement(self, size: str) -> Requirement:
        return Requirement()

    def steps(self, size: str) -> dict[str, int]:
        return dict.fromkeys(super().steps(size), 1)

    def train_expert(
        self, base_dir: Path, task: str, size: str, seed: int, out_dir: Path, tick: Tick, head: Path | None = None
    ) -> None:
        shutil.copytree(base_dir, out_dir, dirs_exist_ok=True)


LAZY = Lazy()


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setitem(kinds.KINDS, "lazy", f"{__name__}:LAZY")


class TestReferences:
    """From a name to a suite."""

    @pytest.mark.parametrize(
        "reference",
        [
            "",
            "\0",
            "mlp\0",
            "..",
            "../../etc/passwd",
            "/etc/passwd",
            "mlp:huge",
            "mlp:tiny:-1",
            "mlp:tiny:1:2",
            "mlp:tiny:" + "9" * 40,
            "mlp:tiny:٣",
            "mlp/../mlp",
            "mlp-tiny-0-../../..",
            "MLP",
            "nosuch",
            "x" * 100_000,
            "a/" * 5000,
            "\x1b[31mred",
            "mlp:tiny\n",
            "os:system",
            "geomerge.lab.mlp:KIND",
        ],
    )
    def test_hostile_names(self, reference: str, cache: Path) -> None:
        """What is no suite is a usage error, whatever it is."""
        with pytest.raises(UsageError):
            load_suite(reference)

    def test_a_directory_that_is_none(self, tmp_path: Path, cache: Path) -> None:
        """The error says what a suite's directory has."""
        with pytest.raises(UsageError, match="holds no suite"):
            load_suite(tmp_path)

    def test_not_built(self, cache: Path) -> None:
        """The error says the command that builds it."""
        with pytest.raises(UsageError) as caught:
            load_suite("mlp:hard:7")
        assert caught.value.hint == "geomerge lab build mlp --size hard --seed 7"

    def test_built(self, warm: Path) -> None:
        """Every way to name a built suite gives that suite."""
        built = build("mlp")
        for reference in ("mlp", "mlp-tiny", "mlp:tiny", "mlp:tiny:0", "mlp-tiny:0", built.root, str(built.root)):
            assert load_suite(reference) == built

    def test_changed_settings_are_another_suite(self, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A suite built with other settings is not found."""
        build("mlp")
        monkeypatch.setattr(MlpKind, "settings", lambda self, size: {"generator": 99})
        with pytest.raises(UsageError, match="not been built"):
            load_suite("mlp")

    def test_list(self, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The list has every size, and which seeds were built."""
        monkeypatch.setattr(kinds, "KINDS", {"mlp": kinds.KINDS["mlp"]})
        monkeypatch.setattr("geomerge.lab.suite.KINDS", {"mlp": kinds.KINDS["mlp"]})
        built = [build("mlp", seed=seed).root for seed in (0, 1)]
        listed = {(s.name, s.size): s for s in suites()}
        assert list(listed) == [("mlp", "tiny"), ("mlp", "easy"), ("mlp", "hard")]
        assert listed["mlp", "tiny"].built == dict(enumerate(built))
        assert not listed["mlp", "hard"].built


class TestDamaged:
    """A suite.json that cannot be believed."""

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"base": "../../base"}, "outside"),
            ({"base": "/etc"}, "outside"),
            ({"experts": {"a": "experts/../../../x"}}, "outside"),
            ({"heads": {"a": "a\0b"}}, "outside"),
            ({"format": 2}, "format"),
            ({"suite": "nosuch"}, "no suite"),
            ({"suite": ["mlp"]}, "no suite"),
            ({"size": "huge"}, "no size"),
            ({"seed": "x"}, "describe a suite"),
            ({"experts": ["a"]}, "describe a suite"),
            ({"experts": {"a": 3}}, "describe a suite"),
            ({"scores": {"base": {"a": "much"}}}, "describe a suite"),
        ],
    )
    def test_wrong_content(self, mlp: Suite, tmp_path: Path, change: dict, said: str) -> None:
        """Whatever is wrong is a model error that names the file."""
        data = json.loads((mlp.root / "suite.json").read_text()) | change
        (tmp_path / "suite.json").write_text(json.dumps(data))
        with pytest.raises(ModelError, match=said) as caught:
            read_suite(tmp_path)
        assert caught.value.where == str(tmp_path / "suite.json")

    @pytest.mark.parametrize("text", ["", "[]", "null", "{", "{}", "[" * 100_000, "\xff", " " * 5_000_000])
    def test_no_json(self, tmp_path: Path, text: str) -> None:
        """So is a file that is no description at all."""
        (tmp_path / "suite.json").write_text(text, encoding="latin-1")
        with pytest.raises(ModelError):
            load_suite(tmp_path)

    def test_no_config(self, tmp_path: Path) -> None:
        """A model directory needs a configuration that can be read."""
        with pytest.raises(ModelError, match=r"config\.json"):
            load_model(tmp_path)
        (tmp_path / "config.json").write_text("[]")
        with pytest.raises(ModelError, match=r"config\.json"):
            load_model(tmp_path)


class TestRequirement:
    """Experts must be worth merging."""

    def table(self, base: float, own: float, average: float) -> dict[str, dict[str, float]]:
        return {
            "base": {"x": base, "y": base},
            "x": {"x": own, "y": 0.0},
            "y": {"x": 0.0, "y": own},
            "average": {"x": average, "y": average},
        }

    @pytest.mark.parametrize(
        ("base", "own", "average", "wrong"),
        [
            (0.5, 0.9, 0.7, 0),
            (0.5, 0.7, 0.65, 0),
            (0.5, 0.69, 0.6, 2),
            (0.5, 0.9, 0.86, 1),
            (0.5, 0.9, 0.95, 1),
            (0.5, 0.9, 0.5, 0),
            (0.5, 0.6, 0.4, 2),
        ],
    )
    def test_literal(self, base: float, own: float, average: float, wrong: int) -> None:
        """20 points of gain for each expert, and 5 from the average to the experts."""
        assert len(failures(self.table(base, own, average), ("x", "y"), Requirement())) == wrong

    def test_fails_when_it_should(self, lazy: None) -> None:
        """Experts that have learned nothing make the build fail, say which, and leave no suite behind."""
        with pytest.raises(NotWorthMerging, match=r"'a' is 0\.0 points better than the base") as caught:
            build("lazy")
        assert isinstance(caught.value, RunError)
        assert caught.value.exit_code == 1
        assert caught.value.scores["a"] == caught.value.scores["base"] == caught.value.scores["average"]
        with pytest.raises(UsageError, match="not been built"):
            load_suite("lazy")

    def test_mean_of_models(self) -> None:
        """The plain mean, weight by weight; the models themselves stay."""
        a, b = nn.Linear(1, 2), nn.Linear(1, 2)
        with torch.no_grad():
            for model, value in ((a, 1.0), (b, 4.0)):
                model.weight.fill_(value)
                model.bias.fill_(-value)
        mean = plain_mean([a, b])
        assert mean.weight.flatten().tolist() == [2.5, 2.5]
        assert mean.bias.tolist() == [-2.5, -2.5]
        assert a.weight.flatten().tolist() == [1.0, 1.0]


class TestOut:
    """A copy for the user."""

    def test_copy(self, warm: Path, tmp_path: Path, files) -> None:
        """The copy is the cached suite, without what belongs to the cache."""
        built = build("mlp", out=tmp_path / "here")
        assert built.root == tmp_path / "here"
        assert files(built.root) == files(build("mlp").root)
        assert not (built.root / "lock").exists()
        with pytest.raises(UsageError, match="a suite is there already"):
            build("mlp", out=tmp_path / "here")
        assert build("mlp", seed=1, out=tmp_path / "here", force=True).seed == 1

    def test_taken(self, cache: Path, tmp_path: Path) -> None:
        """Nothing else is ever replaced, not even with `force`; and nothing is trained for it."""
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "thesis.txt").write_text("x")
        for place in ("taken", "taken/thesis.txt"):
            with pytest.raises(UsageError, match="something else"):
                build("mlp", out=tmp_path / place, force=True)
        assert (tmp_path / "taken" / "thesis.txt").exists()
        assert not cache.exists()

    @pytest.mark.parametrize(("suite", "size", "seed"), [("nosuch", None, 0), ("mlp", "huge", 0), ("mlp", None, -1)])
    def test_no_such_suite(self, cache: Path, suite: str, size: str | None, seed: int) -> None:
        """Names and seeds are checked before anything is made."""
        with pytest.raises(UsageError):
            build(suite, size, seed)
        assert not cache.exists()

    def test_cache_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A cache that is no directory is an error of the run, not a traceback."""
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(RunError, match="cannot be written"):
            build("mlp")
