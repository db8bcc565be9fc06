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
import itertools
import json
import math
import multiprocessing
import os
import random
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

from rich.console import Console
from rich.table import Table

import geomerge

LETTERS, DIGITS = "abcdefghijklmnop", "0123456789"
SKILLS = ("sort", "miss")
EASY, HARD = (3, 4, 5), (6, 7, 8)
"""Lengths of the answers that the base and the experts learn; the examination is in the hard ones."""

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


@dataclass(frozen=True)
class Settings:
    """How the models are made. Trained models are used again as long as nothing here changes."""

    hidden: int = 96
    layers: int = 3
    base_steps: int = 450
    expert_steps: int = 100
    base_rate: float = 3e-3
    expert_rate: float = 2e-4
    batch: int = 128
    seed: int = 1


def question(skill: str, length: int, draw: random.Random) -> tuple[str, str]:
    """A question whose answer has `length` characters, and the answer with its full stop."""
    if skill == "sort":
        given = draw.sample(LETTERS, length)
        answer = sorted(given)
    else:
        given = draw.sample(DIGITS, len(DIGITS) - length)
        answer = sorted(set(DIGITS) - set(given))
    return f"{skill}:{''.join(given)}=", "".join(answer) + "."


def questions(skill: str, length: int, seed: object, *, held_out: bool) -> Iterator[tuple[str, str]]:
    """Endless questions. One answer in eight is held out: no model ever sees it in training, in whatever order."""
    draw = random.Random(str(seed))
    while True:
        asked, answer = question(skill, length, draw)
        if (zlib.crc32(answer.encode()) % 8 == 0) == held_out:
            yield asked, answer


def tokenizer() -> Any:
    """One token for each character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(dict.fromkeys("_.:=" + "sort" + "miss" + LETTERS + DIGITS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="_", unk_token="_", eos_token=".")


def encode(tokens: Any, pairs: Sequence[tuple[str, str]]) -> tuple[Any, int]:
    """Token ids of questions with answers, all equally long: shape ``(pairs, length)``; and where the answers begin."""
    import torch

    return torch.tensor(tokens([q + a for q, a in pairs])["input_ids"]), len(pairs[0][0])


def new_model(settings: Settings, tokens: Any) -> Any:
    """An untrained Qwen2 of some 0.3 million weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=settings.hidden,
        intermediate_size=5 * settings.hidden // 2,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def train(
    model: Any, tokens: Any, skills: Sequence[str], lengths: Sequence[int], steps: int, rate: float, settings: Settings
) -> None:
    """Teach a model to answer: AdamW with a cosine schedule, the loss on the answers only."""
    import torch

    torch.set_num_threads(1)  # for a model this small a second thread costs more than it gives
    supply = {(s, n): questions(s, n, (settings.seed, s, n), held_out=False) for s in skills for n in lengths}
    draw = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        for skill in skills:
            source = supply[skill, draw.choice(lengths)]
            ids, start = encode(tokens, [next(source) for _ in range(settings.batch // len(skills))])
            logits = model(input_ids=ids[:, :-1]).logits[:, start - 1 :]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, start:].flatten())
            (loss / len(skills)).backward()
        optimizer.step()
    model.eval()


def train_base(out: Path, settings: Settings) -> None:
    """Train the base on the easy versions of both skills and save it."""
    tokens = tokenizer()
    model = new_model(settings, tokens)
    train(model, tokens, SKILLS, EASY, settings.base_steps, settings.base_rate, settings)
    model.save_pretrained(out / "base")
    tokens.save_pretrained(out / "base")


def train_expert(out: Path, skill: str, settings: Settings) -> None:
    """Take the base on to the hard version of one skill and save it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(out / "base")
    model = AutoModelForCausalLM.from_pretrained(out / "base")
    train(model, tokens, (skill,), HARD, settings.expert_steps, settings.expert_rate, settings)
    model.save_pretrained(out / f"expert-{skill}")
    tokens.save_pretrained(out / f"expert-{skill}")


def models_ready(out: Path, settings: Settings) -> bool:
    """Whether all three models are there and were trained with these settings."""
    try:
        made = json.loads((out / "settings.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(made == asdict(settings))


def write_recipes(out: Path) -> None:
    """Write the recipes beside the models. Model paths in a recipe are relative to where geomerge is started."""
    for name, text in RECIPES.items():
        for model in ("base", *(f"expert-{s}" for s in SKILLS)):
            text = text.replace(f": {model}", f": {json.dumps(str(out / model))}")
        (out / f"{name}.yml").write_text(text, "utf-8")


def accuracy(path: Path, count: int = 300, seed: int = 0) -> dict[str, float]:
    """The share of held-out hard questions (at most `count`) that a model answers without one wrong character, by skill.

    All characters are predicted in one pass over question and true answer: greedy generation gives the same answer
    exactly when each of these predictions is right.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    scores = {}
    for skill in SKILLS:
        right = asked = 0
        for length in HARD:
            source = questions(skill, length, ("examination", seed, skill, length), held_out=True)
            # Of some kinds there are but a dozen different questions; none is asked twice.
            different = dict.fromkeys(itertools.islice(source, 4 * count))
            ids, start = encode(tokens, list(different)[: count // len(HARD)])
            with torch.inference_mode():
                predicted = model(input_ids=ids[:, :-1]).logits[:, start - 1 :].argmax(-1)
            right += int((predicted == ids[:, start:]).all(1).sum())
            asked += len(ids)
        scores[skill] = right / asked
    return scores


def answer(path: Path, asked: str) -> str:
    """What a model generates after a question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    ids = tokens(asked, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=12, do_sample=False)
    return str(tokens.decode(made[0, ids["input_ids"].shape[1] :]))


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
    parser = argparse.ArgumentParser(description="Train three small models, merge them, and see what the merges can do.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    parser.add_argument("--retrain", action="store_true", help="train anew although the models are there")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    out, settings, begun = given.out, Settings(seed=given.seed), time.perf_counter()
    if given.retrain or not models_ready(out, settings):
        out.mkdir(parents=True, exist_ok=True)
        (out / "settings.json").unlink(missing_ok=True)
        console.print("Training a base on the easy versions of two skills, then an expert in the hard version of each …")
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
        asked, right = next(questions(skill, HARD[-1], "shown", held_out=True))
        console.print(f"  {best} is asked [bold]{asked}[/]  and answers [bold]{answer(out / best, asked)}[/]  (right: {right})")
    console.print(f"\nModels, merges and recipes lie in {out}/. Try next:")
    for line in (f"plan {out / best}.yml", f"inspect {out / best}", f"merge {out / 'ties'}.yml {out / 'mine'}"):
        console.print(f"  geomerge {line}")
    console.print(f"or edit a recipe in {out}/ first. ({time.perf_counter() - begun:.0f} s in all)")


if __name__ == "__main__":
    main()
