"""Every method on another device: the tests' own, which is as strict as an accelerator (elsewhere.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import elsewhere
import geomerge as gm
import tiny
from geomerge.methods import direct, registry
from geomerge.testing import Case, cases

DEVICE = elsewhere.NAME
NEUTRAL = {case.method.name: dict(case.neutral) for case in cases()}


@pytest.fixture(autouse=True)
def _device() -> None:
    elsewhere.begin()


def test_the_device_is_strict() -> None:
    """It does not mix its tensors with the processor's, and these are no NumPy arrays and have no address."""
    x = torch.arange(6.0, device=DEVICE).view(2, 3)
    assert float((x @ x.T).sum()) == float((x.cpu() @ x.cpu().T).sum())
    x[0] = 7
    assert x.cpu().tolist() == [[7, 7, 7], [3, 4, 5]]
    with pytest.raises(RuntimeError, match="same device"):
        x.add_(torch.ones(2, 3))
    with pytest.raises(RuntimeError):
        x.numpy()
    with pytest.raises(RuntimeError):
        x.data_ptr()


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_bits_are_those_of_the_processor(case: Case) -> None:
    """Nothing is computed where the models are not, or looked for there."""
    for shape, dtype in (((24, 40), torch.float32), ((700,), torch.bfloat16)):
        inputs = [m.to(dtype) for m in case.models(shape)]
        expected = direct.merge_tensors(case.made(), inputs)
        found = direct.merge_tensors(case.made(), [m.to(DEVICE) for m in inputs])
        assert found.device.type == DEVICE
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(
    "method", [name for name, method in registry.all_methods().items() if method.family == "matrix"]
)
def test_large_matrices(method: str) -> None:
    """Where the processor's come from SciPy's library, and a device's from its own."""
    case = cases(method)[-1]
    inputs = case.models((270, 300))
    expected = direct.merge_tensors(case.made(), inputs)
    found = direct.merge_tensors(case.made(), [m.to(DEVICE) for m in inputs]).cpu()
    change = torch.linalg.matrix_norm(expected - inputs[0])
    assert float(torch.linalg.matrix_norm(found - expected)) <= 1e-7 * float(change)


@pytest.mark.parametrize("shape", [(6, 60), (60, 6)])
def test_long_matrices(shape: tuple[int, int]) -> None:
    """Which LoRE turns into the directions that its experts have."""
    case = cases("lore")[2]
    inputs = case.models(shape)
    found = direct.merge_tensors(case.made(), [m.to(DEVICE) for m in inputs])
    assert torch.equal(found.cpu(), direct.merge_tensors(case.made(), inputs))


def recipe(root: Path, method: str, more: str) -> str:
    """Of as many experts as the method takes, up to three."""
    made = registry.get(method)
    count = max(made.models[0], min(3, made.models[1] or 3))
    models = [{"model": str(root / name), "parameters": WEIGHT.get(method, {})} for name in "abc"[:count]]
    base = {"base_model": str(root / "base")} if made.base_use != "ignored" else {}
    head = {"merge_method": method, "models": models, **base}
    return yaml.safe_dump(head | {"parameters": NEUTRAL[method] | MORE.get(method, {})}) + more


WEIGHT = {
    name: {"weight": 0.5}
    for name, method in registry.all_methods().items()
    if "weight" in method.parameters() and method.parameters()["weight"].per_model
}
MORE = {"knots": {"full_weights": True}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three experts."""
    made = tmp_path_factory.mktemp("elsewhere")
    tiny.family(made, dtype=torch.bfloat16, num_hidden_layers=2)
    return made


STEPPED = {
    "ties": "steps: [{dare: 0.5}, {lines: {alpha: 0.3, beta: 0.7}}]\n",
    "tsvm": "steps: [{della: 0.5}]\n",
    "sce": "steps: [{breadcrumbs: {density: 0.5, gamma: 0.1}}]\n",
    "task_arithmetic": "steps: [{svd_compress: {ratio: 0.5}}]\n",
}


PLAIN = [(name, "") for name in registry.all_methods()]


@pytest.mark.parametrize(("method", "steps"), [*PLAIN, *STEPPED.items()])
def test_merges(method: str, steps: str, root: Path, tmp_path: Path) -> None:
    """From files to files, with surveys, whole matrices and rows: the bytes that the processor makes."""
    text = recipe(root, method, f"dtype: bfloat16\n{steps}")
    gm.merge(text, tmp_path / "here")
    gm.merge(text, tmp_path / "there", device=DEVICE)
    ours, theirs = tiny.read(tmp_path / "there"), tiny.read(tmp_path / "here")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), name


def test_matrices_are_decomposed_there(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not copied back to the processor."""
    seen = []
    real = elsewhere._compute

    def watched(op: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(op._schema.name)
        return real(op, *args, **kwargs)

    monkeypatch.setattr(elsewhere, "_compute", watched)
    gm.merge(recipe(root, "tsvm", "dtype: bfloat16\n"), tmp_path / "out", device=DEVICE)
    assert {"aten::linalg_eigh", "aten::matmul"} <= set(seen)
