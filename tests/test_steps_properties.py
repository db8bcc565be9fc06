"""What the steps' pages say stays true: of task arithmetic with the step, and that what they leave out does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import geomerge as gm
from geomerge.methods.after import explained_steps
from geomerge.methods.chain import Step
from geomerge.methods.properties import NAMES

MATRIX, VECTOR = "model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"
SETTINGS = {
    "trim": "{density: 0.5}",
    "dare": "{density: 0.5}",
    "della": "{density: 0.5, epsilon: 0.15}",
    "breadcrumbs": "{density: 0.5, gamma: 0.1}",
    "svd_compress": "{ratio: 0.3}",
    "scale": "0.5",
    "lines": "{alpha: auto, beta: 0.5}",
    "aim": "{statistics: act.safetensors, omega: 0.4}",
}

Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({MATRIX: torch.arange(1.0, 17.0)}, "act.safetensors")


def random(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {MATRIX: (24, 16), VECTOR: (40,)}
    return {
        n: torch.round(torch.randn(s, generator=generator, dtype=torch.float64) * 2**20) / 2**20
        for n, s in shapes.items()
    }


BASE = random(0)


def merged(step: str, taus: Sequence[Weights]) -> Weights:
    """The merged task vector of experts with these task vectors."""
    models = {"base": BASE} | {f"m{k}": {n: BASE[n] + t[n] for n in t} for k, t in enumerate(taus)}
    experts = ", ".join(f"{{model: m{k}}}" for k in range(len(taus)))
    found = gm.merge_state_dicts(
        f"merge_method: task_arithmetic\nbase_model: base\nmodels: [{experts}]\nparameters: {{weight: 1}}\n"
        f"dtype: float64\nsteps: [{{{step}: {SETTINGS[step]}}}]\n",
        models,
    )
    return {n: found[n] - BASE[n] for n in found}


def alike(found: Weights, wanted: Weights) -> bool:
    return all(torch.allclose(found[n], wanted[n], rtol=0, atol=1e-9) for n in wanted)


def times(factor: float, tau: Weights) -> Weights:
    return {n: factor * t for n, t in tau.items()}


@pytest.mark.parametrize("step", explained_steps(), ids=lambda step: step.name)
def test_declared_properties(step: type[Step]) -> None:
    """Each listed property holds, and each that is not listed does not."""
    taus = [random(k) for k in (1, 2, 3)]
    left, right = (
        torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))[0]
        for n in (24, 16)
    )

    def turned(tau: Weights) -> Weights:
        return {MATRIX: left @ tau[MATRIX] @ right, VECTOR: tau[VECTOR]}

    def with_taus(changed: Sequence[Weights]) -> Weights:
        return merged(step.name, changed)

    plain = with_taus(taus)
    holds = {
        "permutation": alike(with_taus(taus[::-1]), plain),
        "base": alike(with_taus([times(0, tau) for tau in taus]), times(0, plain)),
        "single": alike(with_taus(taus[:1]), taus[0]),
        "identical": alike(with_taus(taus[:1] * 3), taus[0]),
        "scale": alike(with_taus([times(4, tau) for tau in taus]), times(4, plain)),
        "sign": alike(with_taus([times(-1, tau) for tau in taus]), times(-1, plain)),
        "rotation": alike(with_taus([turned(tau) for tau in taus]), turned(plain)),
    }
    assert [name for name in NAMES if holds[name]] == [name for name in NAMES if name in step.properties]
