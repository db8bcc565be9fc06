"""The gates of a mixture of experts: for every block one vector for each expert, whose inner product with a token's state is
the expert's score.

=================  =====================================================================================================
``hidden``         the base model's hidden states before each block at the prompts' last tokens, as in mergekit
``hidden_avg``     the same, averaged over each prompt's tokens
``mlp_input``      the normalised states that each block's router will see, averaged over each prompt's tokens
``cheap_embed``    the sum of the prompts' token embeddings, the same for every block: no model is run
``random``         normal numbers
``uniform_random`` uniform numbers in ±1/√d, as fresh linear layers have
=================  =====================================================================================================

A gate is the mean over the positive prompts, less the mean over the negative ones, scaled to length 1. Prompts are run one by
one, so padding plays no part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from geomerge.devices import placed
from geomerge.errors import ModelError, first_line
from geomerge.quietly import quiet_transformers

if TYPE_CHECKING:
    from geomerge.moe.spec import Expert

Mode = Literal["hidden", "hidden_avg", "hidden_last", "mlp_input", "cheap_embed", "random", "uniform_random"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Embed = Callable[[Sequence[int]], Array]
"""Rows of the base's token embedding: shape ``(ids, d)``, float64."""

ALIKE = 0.999
"""Two gates of one block with a larger cosine tell their experts hardly apart."""


def random_gates(mode: Mode, blocks: int, experts: int, width: int, seed: int) -> Array:
    """Random gates, each block from a stream of its own: shape ``(blocks, experts, width)``."""
    gates = np.empty((blocks, experts, width))
    for block in range(blocks):
        generator = np.random.Generator(np.random.PCG64DXSM([seed, block]))
        if mode == "random":
            gates[block] = generator.standard_normal((experts, width))
        else:
            gates[block] = generator.uniform(-1.0, 1.0, (experts, width)) / np.sqrt(width)
    return gates


def prompt_gates(
    mode: Mode, experts: Sequence[Expert], blocks: int, folder: Path, embed: Embed, *, device: str = "cpu"
) -> Array:
    """Gates from the experts' prompts: shape ``(blocks, experts, width)``.

    Args:
        mode: One that uses prompts.
        experts: With positive prompts.
        blocks: How many blocks the base has.
        folder: The base's directory: its tokenizer, and the model that is run.
        embed: Gives token embeddings, for ``cheap_embed``.
        device: Where the model is run.

    Raises:
        ModelError: transformers cannot load the tokenizer or the model.
        UsageError: The device cannot be used.
    """
    states = _Embedded(folder, blocks, embed) if mode == "cheap_embed" else _Run(folder, mode, device)
    gates = []
    for expert in experts:
        gate = states.of(expert.positive)
        if expert.negative:
            gate = gate - states.of(expert.negative)
        norms = np.linalg.norm(gate, axis=1, keepdims=True)
        gates.append(gate / np.where(norms > 0, norms, 1.0))
    return np.stack(gates, axis=1)


def alike(gates: Array) -> list[tuple[int, int, int]]:
    """(experts i and j, in how many blocks) whose gates point the same way, so that the router cannot tell them apart."""
    norms = np.linalg.norm(gates, axis=2, keepdims=True)
    unit = gates / np.where(norms > 0, norms, 1.0)
    cosines = unit @ unit.transpose(0, 2, 1)
    close = (cosines > ALIKE).sum(axis=0)
    return [(i, j, int(close[i, j])) for i in range(len(close)) for j in range(i + 1, len(close)) if close[i, j]]


class _Prompts:
    """Tokenizes prompts as mergekit does: the beginning of text, if the model has one, and nothing else added."""

    def __init__(self, folder: Path) -> None:
        import transformers

        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            raise ModelError(
                f"its tokenizer cannot be loaded: {first_line(error)}",
                where=str(folder),
                hint="`gate_mode: random` needs none",
            ) from error

    def ids(self, prompt: str) -> list[int]:
        text = (self._tokenizer.bos_token or "") + prompt
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise ModelError(f"the prompt {prompt!r} has no tokens")
        return ids


class _Embedded(_Prompts):
    """Prompts as the sum of their token embeddings."""

    def __init__(self, folder: Path, blocks: int, embed: Embed) -> None:
        super().__init__(folder)
        self._blocks, self._embed = blocks, embed

    def of(self, prompts: Sequence[str]) -> Array:
        """Shape ``(blocks, d)``, length 1: positive and negative prompts count alike however many there are."""
        total = np.sum([self._embed(self.ids(prompt)).sum(axis=0) for prompt in prompts], axis=0)
        norm = float(np.linalg.norm(total))
        return np.tile(total / norm if norm > 0 else total, (self._blocks, 1))


class _Run(_Prompts):
    """Prompts as what the base model makes of them."""

    def __init__(self, folder: Path, mode: Mode, device: str) -> None:
        import transformers

        super().__init__(folder)
        self._mode, self._device = mode, device
        try:
            with quiet_transformers():
                self._model: Any = transformers.AutoModel.from_pretrained(
                    str(folder), dtype="auto", local_files_only=True, trust_remote_code=False
                )
        except Exception as error:
            raise ModelError(
                f"it cannot be loaded by transformers: {first_line(error)}",
                where=str(folder),
                hint="`gate_mode: cheap_embed` and `random` do not run the model",
            ) from error
        self._model = placed(self._model, device)
        self._seen: list[Any] = []
        if mode == "mlp_input":
            for layer in self._model.layers:
                layer.mlp.register_forward_pre_hook(lambda _, inputs: self._seen.append(inputs[0]))

    def of(self, prompts: Sequence[str]) -> Array:
        """Shape ``(blocks, d)``: the mean over the prompts."""
        return np.asarray(np.mean([self._states(self.ids(prompt)) for prompt in prompts], axis=0))

    def _states(self, ids: list[int]) -> Array:
        import torch

        self._seen.clear()
        with torch.inference_mode():
            tokens = torch.tensor([ids], device=self._device)
            output = self._model(input_ids=tokens, output_hidden_states=True, use_cache=False)
            states = self._seen if self._mode == "mlp_input" else output.hidden_states[:-1]
            stacked = torch.stack([state[0].double().cpu() for state in states])
            last = self._mode in ("hidden", "hidden_last")
            return np.asarray((stacked[:, -1] if last else stacked.mean(dim=1)).numpy())
