"""Tiny language models and image classifiers of transformers for the tests of `geomerge.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomerge.evaluate.models import Model
from geomerge.evaluate.samples import Link, Samples, hash_text
from geomerge.evaluate.task import Settings, Tick

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:?\n"


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def save_language_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Llama with random weights and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(LETTERS) + 3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_image_classifier(folder: Path, seed: int = 0) -> Path:
    """A ViT with random weights and two classes, ``dark`` and ``light``, and its processor."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        id2label={0: "dark", 1: "light"},
        label2id={"dark": 0, "light": 1},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


class FakeTask:
    """A task whose outcomes are given by model name; counts how often it is asked.

    Args:
        outcomes: Each model's values.
        name: The task's.
        fails: The model at which the user presses Ctrl-C.
    """

    source = "fake"
    metric = "accuracy"
    higher_is_better = True
    chance = 0.5
    link: Link = "mean"

    def __init__(
        self, outcomes: dict[str, list[float]], name: str = "fake", version: str | None = "1", fails: str = ""
    ) -> None:
        self.outcomes, self.name, self.version, self.fails = outcomes, name, version, fails
        self.asked: list[str] = []

    def prepare(self, settings: Settings) -> None:
        pass

    def score(self, model: Model, settings: Settings, tick: Tick) -> Samples:
        if model.name == self.fails:
            raise KeyboardInterrupt
        self.asked.append(model.name)
        torch.rand(3)
        np.random.rand(3)
        tick(0.5)
        values = self.outcomes[model.name][: settings.limit]
        return Samples.of(values, [hash_text(str(i)) for i in range(len(values))], link=self.link)
