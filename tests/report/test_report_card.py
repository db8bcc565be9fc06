"""Scores in a model card: the table, the hub's model-index, and an update that can be repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from samples import merged, scores

from geomerge.errors import DamagedCheckpoint, UsageError
from geomerge.report import model_index, scores_table, update_card
from geomerge.report.card import BEGIN, END, YAML_BEGIN


def test_table() -> None:
    """Models down, tasks across; names cannot leave their cells."""
    made = scores(("m|x",), ("<b>p</b>",), ("t*1", "t2"))
    rows = scores_table(made).splitlines()
    assert rows[0] == "| model | t\\*1 | t2 | mean |"
    assert rows[1] == "| --- | ---: | ---: | ---: |"
    assert rows[2].startswith("| m\\|x | ")
    assert rows[3].startswith("| &lt;b&gt;p&lt;/b&gt; (parent) | ")
    value = made.value("m|x", "t2")
    assert f"{100 * value:.1f}" in rows[2]
    assert "95 % intervals" in rows[-1]


def test_index_is_what_the_hub_reads() -> None:
    """Shares are per cent there; the hub's own library reads it."""
    from huggingface_hub.repocard_data import model_index_to_eval_results

    made = scores()
    name, results = model_index_to_eval_results(model_index(made, "merged", name="my-merge"))
    assert name == "my-merge"
    assert [r.dataset_name for r in results] == [t.name for t in made.tasks]
    assert results[0].metric_value == round(100 * made.value("merged", made.tasks[0].name), 2)
    assert results[0].metric_type == "exact_match"
    assert results[0].task_type == "text-generation"


def test_update_is_idempotent(tmp_path: Path) -> None:
    """The second update changes nothing; new scores replace the old; the rest of the card stays."""
    run = merged(tmp_path, "slerp")
    card = run / "README.md"
    before = card.read_text()
    made = scores(("slerp",))
    assert update_card(run, made)
    first = card.read_bytes()
    assert not update_card(run, made)
    assert card.read_bytes() == first
    text = first.decode()
    assert text.count("## Scores") == 1
    assert text.index("## Recipe") < text.index("## Scores") < text.index("## Licence")
    for line in before.splitlines():
        assert line in text.splitlines()
    data = ModelCard.load(card).data
    assert data.eval_results is not None
    assert len(data.eval_results) == 6
    assert data.tags == ["merge", "geomerge", "slerp"]
    assert update_card(run, scores(("slerp",), skill=0.5))
    assert card.read_text().count("## Scores") == 1
    assert update_card(run, made)
    assert card.read_bytes() == first


def test_the_model_is_found_by_its_place(tmp_path: Path) -> None:
    """Of several models the one whose source is the directory; a parent's row never stands for the merge by its name."""
    run = merged(tmp_path, "slerp")
    update_card(run, scores(("whatever",), source=str(run)))
    assert "| whatever |" in (run / "README.md").read_text()
    with pytest.raises(UsageError, match="do not hold this model"):
        update_card(run, scores(("another",), ("slerp",)))
    with pytest.raises(UsageError, match="do not hold this model"):
        update_card(run, scores(), model="nobody")


@pytest.mark.parametrize(
    "text",
    [
        "# mine\n\ntext",
        "---\nlicense: mit\n---\n# mine\n",
        "\ufeff---\r\nlicense: mit\r\n---\r\n# mine\r\n",
        "",
        "---\n---\n",
    ],
)
def test_any_card(tmp_path: Path, text: str) -> None:
    """Cards with and without front matter, with Windows line ends, empty ones: the update holds and can be repeated."""
    (tmp_path / "README.md").write_bytes(text.encode())
    assert update_card(tmp_path, scores((tmp_path.name,)))
    first = (tmp_path / "README.md").read_bytes()
    assert not update_card(tmp_path, scores((tmp_path.name,)))
    assert (b"\r\n" in first) is ("\r\n" in text)
    data = ModelCard(first.decode().removeprefix("\ufeff").replace("\r\n", "\n")).data
    assert data.eval_results
    assert data.license == ("mit" if "license" in text else None)


def test_hostile_names_do_not_break_the_yaml(tmp_path: Path) -> None:
    """Quotes, colons, markers and line breaks in names stay values."""
    names = ('a": [}\n---\n', "b\u2028: 'x'", END, "😀\x7f")
    (tmp_path / "README.md").write_text("---\ntags: [x]\n---\n# t\n")
    made = scores((tmp_path.name,), tasks=names)
    update_card(tmp_path, made)
    assert not update_card(tmp_path, made)
    data = ModelCard.load(tmp_path / "README.md").data
    assert len(data.eval_results or []) == len(names)
    assert data.tags == ["x"]


def test_what_others_wrote_is_kept(tmp_path: Path) -> None:
    """A model-index without our marks is not touched; half a pair of marks is refused and nothing written."""
    card = tmp_path / "README.md"
    card.write_text("---\nmodel-index: []\n---\n# t\n")
    update_card(tmp_path, scores((tmp_path.name,)))
    assert card.read_text().startswith("---\nmodel-index: []\n---\n")
    assert YAML_BEGIN not in card.read_text()
    for text in (f"# t\n{BEGIN}\n", f"{END}\n{BEGIN}\n", f"---\n{YAML_BEGIN}\n---\n"):
        card.write_text(text)
        with pytest.raises(DamagedCheckpoint, match="one pair"):
            update_card(tmp_path, scores((tmp_path.name,)))
        assert card.read_text() == text
    card.write_bytes(b"\xff\xfe")
    with pytest.raises(DamagedCheckpoint, match="UTF-8"):
        update_card(tmp_path, scores((tmp_path.name,)))
    card.unlink()
    with pytest.raises(UsageError, match=r"no README\.md"):
        update_card(tmp_path, scores((tmp_path.name,)))
