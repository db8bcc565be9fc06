"""Three small language models, trained here and now, merged and examined: what `make demo` runs.

A base learns the easy versions of two skills; two copies of it go on to the hard versions, one skill each:

    sort:hdma=adhm.       letters in alphabetical order
    miss:4170=235689.     the digits that are not there

Each expert forgets some of the other's skill. The merges, made without any training, should have both. The models lie as
ordinary model directories under ``demo/``, with the recipes beside them.

    python examples/demo.py [--out DIR] [--retrain] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from skills import HARD, SKILLS, Settings, accuracy, answer, questions, train_base, train_expert

import geomerge

RECIPES: Mapping[str, str] = {
    "linear": """\
merge_method: linear
models:
  - {model: expert-sort, parameters: {weight: 0.5}}
  - {model: expert-miss, parameters: {weight: 0.5}}
dtype: float32
""",
    "slerp": """\
merge_method: slerp
base_model: expert-sort
models: [{model: expert-sort}, {model: expert-miss}]
parameters: {t: 0.5}
dtype: float32
""",
    "task_arithmetic": """\
merge_method: task_arithmetic
base_model: base
models:
  - {model: expert-sort, parameters: {weight: 1.0}}
  - {model: expert-miss, parameters: {weight: 1.0}}
dtype: float32
""",
    "ties": """\
merge_method: ties
base_model: base
models:
  - {model: expert-sort, parameters: {weight: 1.0, density: 0.8}}
  - {model: expert-miss, parameters: {weight: 1.0, density: 0.8}}
parameters: {normalize: false}
dtype: float32
""",
}


def models_ready(out: Path, settings: Settings) -> bool:
    """Whether all three models are there and were trained with these settings."""
    try:
        made = json.loads((out / "settings.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(made == asdict(settings))


def write_recipes(out: Path) -> None:
    """Write the recipes beside the models. Model paths in a recipe are relative to where geomerge is started."""
    for name, recipe in RECIPES.items():
        text = re.sub(r"(?<=: )(base|expert-\w+)", lambda model: json.dumps(str(out / model[1])), recipe)
        (out / f"{name}.yml").write_text(text, "utf-8")


def results_table(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Models down, skills across; the best merge by the mean of both skills is marked."""
    best = best_merge(scores)
    table = Table(title="Right answers to hard questions that no model has seen")
    table.add_column("model")
    for skill in SKILLS:
        table.add_column(skill, justify="right")
    table.add_column("mean", justify="right")
    for name, score in scores.items():
        if name == next(iter(RECIPES)):
            table.add_section()
        values = [score[skill] for skill in SKILLS]
        cells = [f"{100 * value:.1f} %" for value in (*values, sum(values) / len(values))]
        table.add_row(f"{name} ★" if name == best else name, *cells, style="bold green" if name == best else None)
    return table


def best_merge(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The merge with the highest mean accuracy."""
    return max((name for name in scores if name in RECIPES), key=lambda name: sum(scores[name].values()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train (or find) the models, merge, examine, show."""
    parser = argparse.ArgumentParser(
        description="Train three small models, merge them, and see what the merges can do."
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    parser.add_argument("--retrain", action="store_true", help="train anew although the models are there")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    out, settings, begun = given.out, Settings(seed=given.seed), time.perf_counter()
    if given.retrain or not models_ready(out, settings):
        out.mkdir(parents=True, exist_ok=True)
        (out / "settings.json").unlink(missing_ok=True)
        console.print(
            "Training a base on the easy versions of two skills, then an expert in the hard version of each …"
        )
        train_base(out, settings)
        with ProcessPoolExecutor(len(SKILLS), multiprocessing.get_context("spawn")) as pool:
            for made in [pool.submit(train_expert, out, skill, settings) for skill in SKILLS]:
                made.result()
        (out / "settings.json").write_text(json.dumps(asdict(settings)))
        console.print(f"  trained in {time.perf_counter() - begun:.0f} s")
    else:
        console.print(f"The models of the last demo are still in {out}/ (--retrain trains them anew).")
    write_recipes(out)
    for name in RECIPES:
        report = geomerge.merge(out / f"{name}.yml", out / name, force=True)
        console.print(f"  {name}: merged {report.tensors} tensors in {report.seconds:.2f} s")
    models = ("base", *(f"expert-{skill}" for skill in SKILLS), *RECIPES)
    scores = {name: accuracy(out / name) for name in models}
    console.print(results_table(scores))
    best = best_merge(scores)
    for skill in SKILLS:
        asked, right = next(questions(skill, HARD[skill][-1], "shown", held_out=True))
        console.print(
            f"  {best} is asked [bold]{asked}[/]  and answers [bold]{answer(out / best, asked)}[/]  (right: {right})"
        )
    console.print(f"\nModels, merges and recipes lie in {out}/. Try next (after `source .venv/bin/activate`):")
    for line in (f"plan {out / best}.yml", f"inspect {out / best}", f"merge {out / 'ties'}.yml {out / 'mine'}"):
        console.print(f"  geomerge {line}")
    console.print(f"or edit a recipe in {out}/ first. ({time.perf_counter() - begun:.0f} s in all)")


if __name__ == "__main__":
    main()
