"""The suite glyphs, as it ships: data, models, scores."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import geomerge
from geomerge.errors import ModelError, UsageError
from geomerge.lab.build import experts_mean, failures, mean, plain_mean
from geomerge.lab.glyphs.characters import BASE_RANGES, CLASSES, TITLES, base_characters, may_have
from geomerge.lab.glyphs.data import digits_of
from geomerge.lab.glyphs.images import PROTOTYPE, Warp, handwritten, printed, prototypes, warped
from geomerge.lab.glyphs.kind import KIND
from geomerge.lab.glyphs.settings import SIZES
from geomerge.lab.kinds import SPLITS, Requirement
from geomerge.lab.suite import SHIPPED, Suite, load_model, load_suite

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def glyphs() -> Suite:
    """The suite that ships with the package."""
    return load_suite("glyphs")


class TestCharacters:
    """Which characters there are."""

    def test_eight_tasks(self) -> None:
        """Eight tasks, each character once in its task."""
        assert len(CLASSES) == len(TITLES) == 8
        assert set(CLASSES) == set(TITLES)
        for characters in CLASSES.values():
            assert len(set(characters)) == len(characters) >= 10

    def test_the_base_has_seen_none_of_them(self) -> None:
        """No character of a task is among the base's, which are many and different."""
        base = base_characters()
        assert not set(base) & set("".join(CLASSES.values()))
        assert len(set(base)) == len(base) > 250
        assert all(first <= last for first, last in BASE_RANGES)

    def test_all_are_drawn(self) -> None:
        """Every character has at least two faces, and no two prototypes of one task's characters are all alike."""
        for characters in [*(c for name, c in CLASSES.items() if name != "handwritten"), base_characters()]:
            images, first, count = prototypes(characters)
            assert count.min() >= 2
            assert (first[1:] == first[:-1] + count[:-1]).all()
            assert images.shape == (int(count.sum()), PROTOTYPE, PROTOTYPE)
            assert (images.flatten(1).max(1).values > 100).all()

    def test_computer_modern_is_believed_about_ascii_only(self) -> None:
        """Its faces keep Greek and symbols under code points of other characters."""
        assert may_have("cmr10", "A")
        assert not may_have("cmr10", "¡")
        assert may_have("DejaVuSans", "Ж")


class TestImages:
    """Warping and noise."""

    def test_no_warp_is_the_prototype(self) -> None:
        """Without any change the image is the prototype, scaled down: dark where it is dark."""
        still = Warp(rotation=0, shear=0, scale=(1.0, 1.0), shift=0, contrast=1.0, noise=(0.0, 0.0))
        square = torch.zeros(1, PROTOTYPE, PROTOTYPE, dtype=torch.uint8)
        square[0, : PROTOTYPE // 2, : PROTOTYPE // 2] = 255
        image = warped(square, 4, still, torch.Generator().manual_seed(0))[0, 0]
        expected = torch.full((4, 4), -1.0)
        expected[:2, :2] = 3.0
        assert torch.allclose(image, expected, atol=1e-5)

    def test_same_generator_same_images(self) -> None:
        """All that is random comes from the generator."""
        a, b = (printed("xyz", 50, 24, Warp(), torch.Generator().manual_seed(4)) for _ in range(2))
        assert a[0].equal(b[0])
        assert a[1].equal(b[1])
        assert set(a[1].tolist()) == {0, 1, 2}

    def test_handwritten_digits_are_scikit_learns(self) -> None:
        """All of them, in its order, with its labels."""
        from sklearn.datasets import load_digits

        images, labels = handwritten()
        assert labels.tolist() == load_digits().target.tolist()
        assert images.shape == (1797, PROTOTYPE, PROTOTYPE)


class TestSplits:
    """Splits do not overlap and do not change."""

    @pytest.mark.parametrize("name", ["handwritten", "greek", "shapes"])
    def test_disjoint(self, name: str) -> None:
        """No image is in two splits."""
        task = KIND.tasks("tiny", 0)[name]
        sets = [{e.image.numpy().tobytes() for e in task.examples(split)} for split in SPLITS]
        assert [len(s) for s in sets] == [TINY.train, TINY.calibration, TINY.validation, TINY.test]
        assert all(not a & b for a, b in itertools.combinations(sets, 2))

    def test_digits_are_disjoint(self) -> None:
        """Each of scikit-learn's digits belongs to one split, whatever its warp."""
        parts = [set(digits_of(TINY, 3, split).tolist()) for split in SPLITS]
        assert sum(map(len, parts)) == 1797
        assert len(set.union(*parts)) == 1797

    def test_every_class_occurs(self) -> None:
        """In every split of every task."""
        for task in KIND.tasks("tiny", 1).values():
            for split in SPLITS[1:]:
                labels = {e.label for e in task.examples(split)}
                assert labels == set(range(round(1 / task.chance)))

    def test_seed_decides(self, random_state_kept: None) -> None:
        """Another seed gives other images and another version."""
        a, b = KIND.tasks("tiny", 0)["upper"], KIND.tasks("tiny", 1)["upper"]
        assert a.version != b.version
        assert not a.examples("validation", 1)[0].image.equal(b.examples("validation", 1)[0].image)


class TestShipped:
    """The models of the package."""

    def test_small_enough(self, glyphs: Suite) -> None:
        """At most 10 MB, in bfloat16, with nothing else in the directory."""
        files = [path for path in glyphs.root.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 10_000_000
        assert {path.suffix for path in files} == {".json", ".safetensors"}
        tensors = load_file(glyphs.base / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}

    def test_is_what_build_makes(self, glyphs: Suite) -> None:
        """Seed 0, with today's settings."""
        assert (glyphs.name, glyphs.size, glyphs.seed) == ("glyphs", "tiny", 0)
        assert glyphs.root == SHIPPED / "glyphs-tiny"
        assert glyphs.settings == KIND.settings("tiny")

    def test_worth_merging(self, glyphs: Suite) -> None:
        """The table meets the requirement with the numbers that stand in it."""
        scores, tasks = glyphs.scores, tuple(CLASSES)
        assert not failures(scores, tasks, Requirement())
        assert mean(scores["base"]) + 0.2 <= experts_mean(scores, tasks)
        assert mean(scores["base"]) < mean(scores["average"]) <= experts_mean(scores, tasks) - 0.05

    @pytest.mark.parametrize("model", ["base", "greek", "handwritten"])
    def test_scores_agree(self, glyphs: Suite, model: str) -> None:
        """Scored again, a model does what the table says (another processor may round an image or two otherwise)."""
        loaded = glyphs.load(model)
        for name in ("greek", "handwritten"):
            found = glyphs.tasks()[name].correct(loaded).mean()
            assert found == pytest.approx(glyphs.scores[model][name], abs=0.006)

    def test_transformers_classifies(self, glyphs: Suite, random_state_kept: None) -> None:
        """transformers loads an expert by itself, and a loop over single images agrees with `correct` and `nll`."""
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        with torch.random.fork_rng():
            vit = AutoModel.from_pretrained(glyphs.experts["math"], dtype=torch.float32, add_pooling_layer=False).eval()
        assert type(vit).__name__ == "ViTModel"
        head = load_file(glyphs.heads["math"])
        task = glyphs.tasks()["math"]
        right, losses = [], []
        for example in task.examples("test", 60):
            with torch.no_grad():
                tokens = vit(pixel_values=example.image[None]).last_hidden_state[0].double()
            logits = head["weight"].double() @ tokens.mean(0) + head["bias"].double()
            right.append(int(logits.argmax()) == example.label)
            losses.append(float(logits.exp().sum().log() - logits[example.label]))
        model = load_model(glyphs.experts["math"])
        assert task.correct(model, "test", 60, batch_size=16).tolist() == right
        assert sum(right) > 45
        assert task.nll(model, "test", 60) == pytest.approx(losses, abs=1e-3)

    def test_heads_are_the_bases_class_means(self, glyphs: Suite) -> None:
        """A head's rows are of one length and point to where the base sees the class's first training samples."""
        task = glyphs.tasks()["printed"]
        weight = load_file(glyphs.heads["printed"])["weight"]
        lengths = weight.norm(dim=1)
        assert lengths.tolist() == pytest.approx([float(lengths[0])] * 10, rel=1e-5)
        train = task.examples("train", 600)
        base = glyphs.load("base")
        means = []
        for label in range(10):
            few = torch.stack([e.image for e in train if e.label == label][: TINY.shots])
            with torch.no_grad():
                means.append(base(few).last_hidden_state.mean((0, 1)))
        away = torch.stack(means) - torch.stack(means).mean(0)
        assert torch.cosine_similarity(away, weight, dim=1).min() > 0.999

    def test_merges(self, glyphs: Suite, tmp_path: Path) -> None:
        """geomerge's own linear merge of all experts is the average of the table."""
        recipe = {
            "merge_method": "linear",
            "models": [{"model": str(path), "parameters": {"weight": 1.0}} for path in glyphs.experts.values()],
            "dtype": "float32",
        }
        geomerge.merge(json.dumps(recipe, indent=1), tmp_path / "merged")
        merged = load_model(tmp_path / "merged")
        mean_of_all = plain_mean([glyphs.load(name) for name in glyphs.experts])
        for (name, a), (_, b) in zip(merged.state_dict().items(), mean_of_all.state_dict().items()):
            assert torch.allclose(a, b, atol=1e-6), name
        found = glyphs.tasks()["upper"].correct(merged).mean()
        assert found == pytest.approx(glyphs.scores["average"]["upper"], abs=0.006)

    @pytest.mark.slow
    def test_an_expert_trained_again(self, glyphs: Suite, tmp_path: Path) -> None:
        """Training from the shipped base and head gives an expert as good as the shipped one."""
        steps: list[int] = []
        KIND.train_expert(glyphs.base, "printed", "tiny", 0, tmp_path, steps.append, glyphs.heads["printed"])
        assert sum(steps) == TINY.expert.steps
        found = glyphs.tasks()["printed"].correct(load_model(tmp_path)).mean()
        assert found == pytest.approx(glyphs.scores["printed"]["printed"], abs=0.02)


class TestRefusals:
    """What is no model of the suite."""

    def test_missing_weights(self, glyphs: Suite, tmp_path: Path) -> None:
        """A ViT with tensors missing would be filled with noise by transformers; here it is refused."""
        from safetensors.torch import save_file

        tensors = load_file(glyphs.base / "model.safetensors")
        del tensors["layernorm.weight"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_bytes((glyphs.base / "config.json").read_bytes())
        with pytest.raises(ModelError, match="missing"):
            load_model(tmp_path)

    def test_no_weights(self, glyphs: Suite, tmp_path: Path) -> None:
        """A directory without weights is refused."""
        (tmp_path / "config.json").write_bytes((glyphs.base / "config.json").read_bytes())
        with pytest.raises(ModelError, match="ViT"):
            load_model(tmp_path)

    def test_scikit_learn_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error names the extra that brings it."""
        import sys

        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(UsageError) as caught:
            handwritten.__wrapped__()
        assert "geomerge[eval]" in str(caught.value)


def test_labels_are_balanced() -> None:
    """No class is much more frequent than another: chance is what the task says."""
    for task in KIND.tasks("tiny", 0).values():
        counts = np.bincount([e.label for e in task.examples("train")])
        assert counts.max() < 1.5 * counts.mean()
