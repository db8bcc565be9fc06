"""``perplexity:FILE``: how surprised a language model is by a text file, token by token.

The file is read and tokenised piece by piece, so its size does not matter. A window of `CONTEXT` tokens slides over it by
half its length; each token is scored once, with at least half a window of context (but for the first window).
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomerge.errors import DataError, ModelError, UsageError
from geomerge.evaluate.models import Model, evaluating
from geomerge.evaluate.samples import Samples, hash_text
from geomerge.evaluate.task import Settings, Tick

if TYPE_CHECKING:
    from torch import Tensor, nn

PREFIX = "perplexity:"
CONTEXT = 1024
"""Tokens in a window; fewer when the model takes fewer."""

_PIECE = 1 << 16
_BATCH = 4
"""Windows at a time: the logits of one, with a vocabulary of 150,000, take 600 MB."""


@dataclass(frozen=True)
class _Window:
    """Token ids, of which the last `scored` are scored; the others are context."""

    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class PerplexityTask:
    """The perplexity of a text: exp of the mean negative log-likelihood of its tokens. A sample is a window.

    Attributes:
        path: A UTF-8 text file.
        name: What it is called in the tables.
    """

    path: Path
    name: str

    source = "perplexity"
    metric = "perplexity"
    higher_is_better = False
    chance = None

    @functools.cached_property
    def version(self) -> str:
        """A hash of the text and of how it is cut."""
        return hashlib.sha256(f"1 {CONTEXT} {_digest(self.path)}".encode()).hexdigest()[:16]

    def prepare(self, settings: Settings) -> None:
        """Check that the whole file is text."""
        for _ in read_text(self.path):
            pass

    def score(self, model: Model, settings: Settings, tick: Tick) -> Samples:
        """See `geomerge.evaluate.task.Task`; `Settings.limit` is a number of windows."""
        module, tokenizer = model.causal_lm(settings), model.tokenizer(settings)
        context = min(CONTEXT, _longest(module, tokenizer))
        size = max(self.path.stat().st_size, 1)
        means: list[float] = []
        counts: list[int] = []
        hashes: list[str] = []
        batch: list[_Window] = []

        def flush() -> None:
            means.extend(window_nll(module, batch))
            counts.extend(window.scored for window in batch)
            hashes.extend(hash_text(str(w.ids), str(w.scored)) for w in batch)
            batch.clear()

        read = [0]
        with evaluating(module):
            for window in windows(self._tokens(tokenizer, read), context):
                if settings.limit is not None and len(means) + len(batch) >= settings.limit:
                    break
                batch.append(window)
                # Windows of one length make a batch; the last one may be shorter.
                if len(batch) == settings.batch(_BATCH) or len(window.ids) != len(batch[0].ids):
                    last = batch.pop() if len(window.ids) != len(batch[0].ids) else None
                    flush()
                    batch += [] if last is None else [last]
                    tick(read[0] / size)
            if batch:
                flush()
        if not means:
            raise DataError("the text has no two tokens", where=str(self.path))
        return Samples.of(means, hashes, weights=counts, link="exp")

    def _tokens(self, tokenizer: Any, read: list[int]) -> Iterator[int]:
        """Token ids of the file: the beginning-of-text token where the tokenizer has one, then line by line.

        Args:
            tokenizer: transformers'.
            read: Its one number is raised by the bytes that are read.
        """
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is not None:
            yield int(start)
        rest = ""
        for piece in read_text(self.path):
            read[0] += len(piece.encode())
            # Tokens rarely reach over a line's end, so a text is cut there; one without lines is cut where it must be.
            rest += piece
            cut = rest.rfind("\n") + 1
            if cut or len(rest) > 16 * _PIECE:
                done, rest = (rest[:cut], rest[cut:]) if cut else (rest, "")
                yield from tokenizer(done, add_special_tokens=False, verbose=False)["input_ids"]
        if rest:
            yield from tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"]


def perplexity_task(reference: str) -> PerplexityTask:
    """The task of a reference ``perplexity:FILE``.

    Raises:
        UsageError: No file is named.
        DataError: It is not there.
    """
    text = reference.removeprefix(PREFIX)
    if not text:
        raise UsageError("perplexity needs a text file", hint="--tasks perplexity:FILE")
    path = Path(text).expanduser()
    if not path.is_file():
        raise DataError("there is no such file", where=text, hint="perplexity:FILE takes a text file in UTF-8")
    return PerplexityTask(path, f"{PREFIX}{path.name}")


def read_text(path: Path) -> Iterator[str]:
    """A file's text in pieces.

    Raises:
        DataError: It cannot be read, is empty, or is no UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position, empty = 0, True
    try:
        with path.open("rb") as file:
            while data := file.read(_PIECE):
                piece = decoder.decode(data)
                position += len(data)
                if piece:
                    empty = empty and not piece.strip()
                    yield piece
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(
            f"the file is not UTF-8: {error.reason} near byte {position + error.start}",
            where=str(path),
            hint="convert it: iconv -f LATIN1 -t UTF-8 FILE",
        ) from None
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from None
    if empty:
        raise DataError("the file is empty", where=str(path))


def windows(tokens: Iterator[int], context: int) -> Iterator[_Window]:
    """Windows over a stream of tokens, of which each but the first is scored exactly once.

    Args:
        tokens: Token ids.
        context: The longest window; at least 2.
    """
    stride = max(context // 2, 1)
    held: list[int] = []
    new = 0
    for token in tokens:
        held.append(token)
        new += 1
        if len(held) == context:
            yield _Window(tuple(held), min(new, context - 1))
            held, new = held[stride:], 0
    if new and len(held) > 1:
        yield _Window(tuple(held), min(new, len(held) - 1))


def window_nll(module: nn.Module, batch: list[_Window]) -> list[float]:
    """The mean negative log-likelihood, in nats, of each window's scored tokens.

    Args:
        module: A language model.
        batch: Windows of one length.
    """
    import torch
    from torch.nn.functional import cross_entropy

    device = next(module.parameters()).device
    ids = torch.tensor([window.ids for window in batch], device=device)
    logits: Tensor = module(input_ids=ids).logits
    found = []
    for i, window in enumerate(batch):
        first = len(window.ids) - window.scored
        losses = cross_entropy(logits[i, first - 1 : -1].float(), ids[i, first:], reduction="none")
        found.append(float(losses.double().mean()))
    return found


def _longest(module: nn.Module, tokenizer: Any) -> int:
    """The longest window that a model takes."""
    config = getattr(module, "config", None)
    if config is None:
        raise ModelError("perplexity needs a language model with a config", where=type(module).__name__)
    told = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    longest = int(told) if told else CONTEXT
    limit = getattr(tokenizer, "model_max_length", math.inf)
    return max(2, min(longest, int(limit)) if limit < 1e9 else longest)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from None
    return digest.hexdigest()
