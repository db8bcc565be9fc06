"""Two skills for very small language models, and how a model is taught and examined in them. Used by `demo.py`.

    sort:hdma=adhm.       letters in alphabetical order
    miss:4170=235689.     the digits that are not there

A model is a Qwen2 of some 0.3 million weights that reads and writes single characters.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
# For models this small a second thread costs more than it gives.
os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

LETTERS, DIGITS = "abcdefghijklmnop", "0123456789"
SKILLS = ("sort", "miss")
Lengths = Mapping[str, tuple[int, ...]]
EASY: Lengths = {"sort": (3, 4, 5), "miss": (2, 3, 4)}
HARD: Lengths = {"sort": (6, 7, 8), "miss": (5, 6, 7)}
"""How long the answers are that the base and the experts learn; the examination is in the hard ones."""


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
    model: Any, tokens: Any, skills: Sequence[str], lengths: Lengths, steps: int, rate: float, settings: Settings
) -> None:
    """Teach a model to answer: AdamW with a cosine schedule, the loss on the answers only."""
    import torch

    supply = {(s, n): questions(s, n, (settings.seed, s, n), held_out=False) for s in skills for n in lengths[s]}
    draw = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        for skill in skills:
            source = supply[skill, draw.choice(lengths[skill])]
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
        for length in HARD[skill]:
            source = questions(skill, length, ("examination", seed, skill, length), held_out=True)
            # There may be fewer different questions of a kind than are wanted; none is asked twice.
            different = dict.fromkeys(itertools.islice(source, 4 * count))
            ids, start = encode(tokens, list(different)[: count // len(HARD[skill])])
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
