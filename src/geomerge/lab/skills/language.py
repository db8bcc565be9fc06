"""The skills' tokenizer and model: single characters, and a small Qwen2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomerge.errors import ModelError, first_line
from geomerge.lab.skills.generators import ALPHABET, Question
from geomerge.lab.training import reproducible
from geomerge.quietly import quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from geomerge.lab.skills.kind import Settings

PAD, START, UNKNOWN, END = "<pad>", "<s>", "<unk>", "."
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
"""The instruct model's template: the question in brackets."""

IGNORED = -100


def make_tokenizer(*, chat: bool = False) -> Any:
    """One token for each character of the suite's alphabet; the full stop ends an answer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((PAD, START, UNKNOWN, *ALPHABET))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, bos_token=START, unk_token=UNKNOWN, eos_token=END
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


_IDS = {token: index for index, token in enumerate((PAD, START, UNKNOWN, *ALPHABET))}


@dataclass(frozen=True)
class Encoded:
    """Questions with answers as tensors, padded on the right.

    Attributes:
        ids: Shape ``(questions, longest)``.
        labels: The same where a token belongs to the answer, `IGNORED` elsewhere.
    """

    ids: Tensor
    labels: Tensor

    def batch(self, rows: Any) -> Encoded:
        """Some of the questions, cut to the longest of them."""
        ids, labels = self.ids[rows], self.labels[rows]
        length = int((ids != 0).sum(1).max())
        return Encoded(ids[:, :length], labels[:, :length])

    def __len__(self) -> int:
        return len(self.ids)


def encode(questions: Sequence[Question], *, chat: bool = False, whole: bool = False) -> Encoded:
    """Questions as tensors.

    Args:
        questions: At least one.
        chat: Put the prompt into the chat template.
        whole: The prompt is to be predicted, too (pre-training).
    """
    import torch

    prompts = [f"[{q.prompt}]" if chat else q.prompt for q in questions]
    longest = max(len(p) + len(q.answer) + 1 for p, q in zip(prompts, questions, strict=True))
    ids = torch.zeros(len(questions), longest, dtype=torch.long)
    labels = torch.full((len(questions), longest), IGNORED)
    for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        tokens = torch.tensor([_IDS[c] for c in prompt + question.answer + END])
        ids[row, : len(tokens)] = tokens
        first = 0 if whole else len(prompt)
        labels[row, first : len(tokens)] = tokens[first:]
    return Encoded(ids, labels)


def loss(model: nn.Module, batch: Encoded) -> Tensor:
    """The mean cross-entropy of the tokens that are to be predicted."""
    from torch.nn import functional

    logits = model(input_ids=batch.ids).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)


def new_model(settings: Settings, seed: int) -> nn.Module:
    """An untrained Qwen2."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(_IDS),
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=_IDS[PAD],
        bos_token_id=_IDS[START],
        eos_token_id=_IDS[END],
    )
    with reproducible(seed):
        model: nn.Module = Qwen2ForCausalLM(config)
    return model


def save_model(model: nn.Module, out_dir: Path, *, chat: bool = False) -> None:
    """Write a model directory in bfloat16 with its tokenizer; the model itself is left as it is."""
    import copy

    import torch

    copied: Any = copy.deepcopy(model).to(torch.bfloat16)
    with quiet_transformers():
        copied.save_pretrained(out_dir)
    make_tokenizer(chat=chat).save_pretrained(out_dir)


def load_model(path: Path) -> nn.Module:
    """A model directory in float32.

    Raises:
        ModelError: It holds no causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"it cannot be loaded as a causal language model: {first_line(error)}", where=str(path)
        ) from None
    return model.eval()
