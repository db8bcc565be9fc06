"""The published tables of layer-adaptive SLERP: entered without a slip, and what they say about the paper's own claims."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

import geomerge.lab

FILE = Path(geomerge.lab.__file__).parent / "papers" / "geometric_model_merging.yml"
TABLES: dict[str, dict[str, list[float]]] = YAML(typ="safe", pure=True).load(FILE)
ROWS = [(table, name) for table, rows in TABLES.items() for name in rows]
IFEVAL, BBH, MATH, GPQA, MUSR, MMLU_PRO = range(1, 7)


def average(table: str, name: str) -> float:
    return TABLES[table][name][0]


def test_all_rows_are_there() -> None:
    assert len(ROWS) == 66
    assert len(TABLES) == 11


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_average_is_the_mean_of_six(table: str, name: str) -> None:
    row = TABLES[table][name]
    assert len(row) == 7
    assert row[0] == pytest.approx(sum(row[1:]) / 6, abs=0.011)


class TestClaims:
    """docs/layer_adaptive_slerp.md says which claims of the text the tables support."""

    def test_half_a_billion_global_wins(self) -> None:
        """0.5B: global 8.83 > base 8.14 > layer-adaptive 3.61."""
        t = "I_0.5B"
        assert average(t, "slerp_global_t0.7") > average(t, "pretrained") > average(t, "slerp_layer_adapt")

    def test_one_billion_adaptive_beats_global(self) -> None:
        """1B: every layer-adaptive average is above both global ones."""
        rows = TABLES["III_1B_merges"]
        adaptive = [row[0] for name, row in rows.items() if name.startswith("V")]
        assert min(adaptive) > max(rows[n][0] for n in ("ECE_Poirot", "MiniQwenMathExpert"))

    def test_two_billion_one_family_only(self) -> None:
        """2B: merges inside one family beat every parent of it, merges across families lose half of the score."""
        merges = TABLES["V_2B_merges"]
        best = TABLES["IV_2B_parents"]["gemma2_2b_cn_dpo"][0]
        assert min(merges[n][0] for n in ("V1", "V2")) > best
        assert max(merges[n][0] for n in ("V3", "V4")) < best - 7

    def test_three_billion_and_more_no_merge_beats_its_best_parent(self) -> None:
        """1B, 3B, 6B, 7B: contradicts the text's "outclasses" where averages are meant."""
        for merges, parents in (
            ("III_1B_merges", "II_1B_parents"),
            ("VII_3B_merges", "VI_3B_parents"),
            ("IX_6B_merges", "VIII_6B_parent"),
            ("XI_7B_merges", "X_7B_parents"),
        ):
            assert max(r[0] for r in TABLES[merges].values()) < max(r[0] for r in TABLES[parents].values())

    def test_six_of_seven_at_one_billion_is_not_in_the_table(self) -> None:
        """Best layer-adaptive against best global at 1B: ahead in three of six benchmarks, not six of seven."""
        rows = TABLES["III_1B_merges"]
        adaptive = [row for name, row in rows.items() if name.startswith("V")]
        plain = [rows[n] for n in ("ECE_Poirot", "MiniQwenMathExpert")]
        ahead = [b for b in range(1, 7) if max(r[b] for r in adaptive) > max(r[b] for r in plain)]
        assert ahead == [IFEVAL, MUSR, MMLU_PRO]

    def test_six_billion_trades(self) -> None:
        """6B: IFEval −18.8, MUSR +6.6, BBH +0.84 against the parent."""
        merged, parent = TABLES["IX_6B_merges"]["V1"], TABLES["VIII_6B_parent"]["yi15_6b_chat"]
        change = [m - p for m, p in zip(merged, parent, strict=True)]
        assert (change[IFEVAL], change[MUSR], change[BBH]) == pytest.approx((-18.81, 6.6, 0.84))

    def test_the_reversed_schedule_ties(self) -> None:
        """1B: V1 (reversed) has the very scores of V2, the best average: it does not stall."""
        rows = TABLES["III_1B_merges"]
        assert rows["V1"] == rows["V2"]
        assert rows["V1"][0] == max(r[0] for r in rows.values())

    def test_seven_billion_stable_and_collapsed(self) -> None:
        """7B: 31.46 to 32.11 where it works; 10.87, 8.88 and 3.54 where it collapses."""
        values = sorted(row[0] for row in TABLES["XI_7B_merges"].values())
        assert values[:3] == [3.54, 8.88, 10.87]
        assert values[3:] == [31.46, 31.52, 31.92, 32.11]
