"""How far the output is from the float64 result rounded once, element by element, on real-sized tensors.

The reference is written here from the formulas in NumPy float64, with nothing of geomerge in it, and rounded to bfloat16 in one
step on the bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

import geomerge as gm

TENSORS = (
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.11.mlp.gate_proj.weight",
    "model.layers.11.self_attn.q_proj.weight",
    "model.layers.23.input_layernorm.weight",
)


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float64 to bfloat16, ties to even, in one rounding: the 16 bits as a signed ordered integer."""
    bits = values.view(np.uint64)
    sign = (bits >> np.uint64(63)).astype(np.int64)
    magnitude = np.abs(values)
    # bfloat16's numbers of this binade stand 2^(e-7) apart (2^-133 below the normal range).
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, -126)
    step = np.ldexp(1.0, exponent - 7)
    rounded = np.rint(magnitude / step) * step
    code = rounded.astype(np.float32).view(np.uint32) >> 16
    return np.where(sign == 1, -code.astype(np.int64), code.astype(np.int64))


def ordered_bits(tensor: torch.Tensor) -> np.ndarray:
    """A bfloat16 tensor's bits as signed ordered integers: neighbours differ by one."""
    code = tensor.contiguous().view(torch.int16).numpy().astype(np.int64) & 0xFFFF
    return np.where(code >> 15 == 1, -(code & 0x7FFF), code)


def linear(x: list[np.ndarray]) -> np.ndarray:
    """A weighted mean whose weights are no simple ratio: 0.3 and 0.7 would put many results exactly between two bfloat16."""
    return 0.31831 * x[1] + 0.68169 * x[2]


def slerp(x: list[np.ndarray]) -> np.ndarray:
    """The great circle between base and a at t = 0.3."""
    p, q = x[0].ravel(), x[1].ravel()
    u, v = p / np.linalg.norm(p), q / np.linalg.norm(q)
    omega = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    return (np.sin(0.7 * omega) * x[0] + np.sin(0.3 * omega) * x[1]) / np.sin(omega)


def ties(x: list[np.ndarray], weights: tuple[float, ...], density: float) -> np.ndarray:
    """Trim to the largest ⌊density·n⌋ (of equals the first), elect by the weighted sum, average what agrees."""
    signed = []
    for w, expert in zip(weights, x[1:], strict=True):
        delta = (expert - x[0]).ravel()
        keep = np.argsort(-np.abs(delta), kind="stable")[: int(density * delta.size + 1e-9)]
        trimmed = np.zeros_like(delta)
        trimmed[keep] = delta[keep]
        signed.append(w * trimmed)
    elected = np.where(sum(signed) >= 0, 1.0, -1.0)
    total = sum(np.where(s * elected > 0, s, 0.0) for s in signed)
    shares = sum(np.where(s * elected > 0, w, 0.0) for s, w in zip(signed, weights, strict=True))
    return x[0] + (total / np.where(shares == 0, 1.0, shares)).reshape(x[0].shape)


def measure(folder: Path) -> list[dict[str, Any]]:
    """One row a method: correctly rounded share, largest distance in ulps, elements compared."""
    models = []
    for name in ("base", "a", "b", "c"):
        with safe_open(folder / name / "model.safetensors", "pt") as file:
            models.append({t: file.get_tensor(t) for t in TENSORS})
    base, a, b, c = models
    cases: dict[str, tuple[Callable[[list[np.ndarray]], np.ndarray], Callable[[str], torch.Tensor]]] = {
        "linear": (linear, lambda t: gm.methods.linear([a[t], b[t]], weight=[0.31831, 0.68169])),
        "slerp": (slerp, lambda t: gm.methods.slerp(base[t], [a[t]], t=0.3)),
        "ties": (
            lambda x: ties(x, (1.0, 1.0, 1.0), 0.5),
            lambda t: gm.methods.ties(base[t], [a[t], b[t], c[t]], weight=1.0, density=0.5),
        ),
        "ties, unequal weights": (
            lambda x: ties(x, (0.3, 0.5, 0.7), 0.3),
            lambda t: gm.methods.ties(base[t], [a[t], b[t], c[t]], weight=[0.3, 0.5, 0.7], density=0.3),
        ),
    }
    rows = []
    for name, (reference, merge) in cases.items():
        right = total = worst = 0
        for tensor in TENSORS:
            values = [m[tensor].double().numpy() for m in models]
            distance = np.abs(ordered_bits(merge(tensor)) - to_bfloat16_bits(reference(values)))
            right += int(np.count_nonzero(distance == 0))
            worst = max(worst, int(distance.max()))
            total += distance.size
        rows.append(
            {"what": f"accuracy of {name}", "kind": "accuracy", "method": name, "exact": right / total, "ulps": worst,
             "elements": total}
        )  # fmt: skip
    return rows
