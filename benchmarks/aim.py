"""Does activation-informed merging help? TIES with and without the step `aim` on the lab's skills suite that ships.

    python benchmarks/aim.py            # a markdown table; a minute on one core

Activations: 50 texts of each task at the base's level (350), from the calibration split. ω and λ are as published and as
shipped; nothing is chosen on the test split.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from geomerge.engine.live import LiveMerge
from geomerge.lab.skills.generators import questions
from geomerge.lab.skills.language import encode
from geomerge.lab.suite import load_suite
from geomerge.observe import activations
from geomerge.recipe import loads

TIES = "merge_method: ties\nbase_model: base\nparameters: {weight: 1, density: 0.2}\n"
ROWS = {
    "base": None,
    "task arithmetic, λ 0.3": TIES.replace("ties", "task_arithmetic").replace("1, density: 0.2", "0.3"),
    "task arithmetic, λ 0.3, then aim (ω 0.4)": TIES.replace("ties", "task_arithmetic").replace(
        "1, density: 0.2", "0.3"
    )
    + "steps: [{aim: {statistics: FILE, omega: 0.4}}]\n",
    "ties": TIES,
    "ties, then aim (ω 0.4)": TIES + "steps: [{aim: {statistics: FILE, omega: 0.4}}]\n",
    "ties, then aim (ω 0)": TIES + "steps: [{aim: {statistics: FILE, omega: 0.0}}]\n",
    "ties, then scale 0.9": TIES + "steps: [{scale: 0.9}]\n",
}


def main() -> None:
    """Print the table."""
    suite = load_suite("skills:tiny:0")
    tasks = {name: task for name, task in suite.tasks().items() if name in suite.experts}
    module = suite.load("base")
    batches = []
    for task in tasks:
        texts = encode(questions(task, "easy", 0, "calibration", 50), whole=True).ids
        batches.append({"input_ids": texts, "attention_mask": (texts != 0).long()})
    live = LiveMerge(dict(suite.models), module)
    lines = [f"| merge | {' | '.join(tasks)} | mean |", "|---" * (len(tasks) + 2) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "act.safetensors"
        save_file(activations(suite.load("base"), batches), file)
        for name, text in ROWS.items():
            if text is not None:
                models = f"models: [{', '.join(f'{{model: {e}}}' for e in suite.experts)}]\n"
                live.blend(loads(text.replace("FILE", str(file)) + models))
            scores = 100 * np.array([task.correct(module, "test").mean() for task in tasks.values()])
            lines.append(f"| {name} | {' | '.join(f'{s:.1f}' for s in scores)} | {scores.mean():.1f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
