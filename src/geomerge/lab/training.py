"""The one training loop of all suites, and the random numbers that they are made with."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn


def seed_for(seed: int, purpose: str) -> int:
    """A seed of its own for one purpose: 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}".encode()).digest()[:8], "little") >> 1


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A torch generator for one purpose."""
    import torch

    return torch.Generator().manual_seed(seed_for(seed, purpose))


def numpy_generator_for(seed: int, purpose: str) -> np.random.Generator:
    """A NumPy generator for one purpose."""
    import numpy as np

    return np.random.default_rng(seed_for(seed, purpose))


@contextlib.contextmanager
def reproducible(seed: int, threads: int | None = 1) -> Iterator[None]:
    """Inside, torch's global generator is seeded and sums are made by a fixed number of threads; afterwards all is as before.

    What initialises weights and drops out takes its numbers from the global generator and from nowhere else.

    Args:
        seed: For the global generator.
        threads: torch's threads; `None` leaves them alone (their number may change the last bit of a sum).
    """
    import torch

    before = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def schedule(step: int, steps: int, warmup: float = 0.1, floor: float = 0.0) -> float:
    """The factor of the learning rate at a step: a linear rise, then half a cosine down to `floor`.

    Args:
        step: From 0.
        steps: In all.
        warmup: The share of the steps that the rise takes.
        floor: The factor at the end.
    """
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    along = (step - rise) / max(steps - rise, 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * along))


def train(
    model: nn.Module,
    batches: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    warmup: float = 0.1,
    constant: bool = False,
    clip: float | None = 1.0,
    threads: int | None = 1,
    tick: Callable[[int], None] | None = None,
) -> list[float]:
    """Train a model in place with AdamW.

    Args:
        model: Whatever of it requires a gradient is trained; it is left in evaluation mode.
        batches: The batch of a step, counted from 0.
        loss: A scalar from the model and a batch.
        steps: How many.
        learning_rate: The highest; see `schedule`.
        seed: For dropout.
        weight_decay: On weights of two or more dimensions; gains, biases and vectors are left alone.
        betas: AdamW's.
        warmup: The share of the steps in which the learning rate rises.
        constant: The learning rate stays where it is: neither rise nor fall.
        clip: The largest norm of a gradient.
        threads: torch's; with another number the last bits may differ.
        tick: Called after each step.

    Returns:
        The loss of each step.
    """
    import torch

    wanted = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in wanted if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in wanted if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas)
    losses = []
    with reproducible(seed, threads), torch.enable_grad():
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1.0 if constant else schedule(step, steps, warmup))
            value = loss(model, batches(step))
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(wanted, clip)
            optimizer.step()
            losses.append(float(value.detach()))
            if tick is not None:
                tick(1)
        model.eval()
    return losses
