"""Run the peer's merges over the grids and store its outputs as the tests' reference (see README.md).

    PEER_ENVIRONMENT/bin/python tests/peer/make_cases.py [FOLDER]

Everything happens in one process with one thread. The default folder is ``tests/data/mergekit``; what is there is replaced.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before the peer is imported: nothing here may reach the network, and sets of strings must iterate alike in every run.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
if os.environ.get("PYTHONHASHSEED") != "0":
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})

import grid
import statistics_of_draws
import structures
import tiny_models
import torch
import vocabularies
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.scripts.multimerge import main as run_pipeline
from recipes import Case
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
log = logging.getLogger("make_cases")


class Peer:
    """Runs recipes in a scratch folder; the current directory is the data folder, so ``models/...`` resolves."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.runs = 0

    def merge(self, case: Case, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path]:
        """Run one recipe: tensors, config.json, and the folder it wrote."""
        self.runs += 1
        out = self.scratch / str(self.runs)
        torch.manual_seed(seed)
        options = {"copy_tokenizer": case.copy_tokenizer, "write_model_card": False, "quiet": True, "random_seed": seed}
        if len(case.methods) == 1:
            recipe = MergeConfiguration.model_validate(yaml.safe_load(case.yaml))
            run_merge(recipe, str(out), MergeOptions(**options))
        else:
            written = self.scratch / f"{self.runs}.yml"
            written.write_text(case.yaml)
            words = [str(written), "-I", str(self.scratch / f"{self.runs}-between"), "--out-path", str(out)]
            words += ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--random-seed", str(seed)]
            run_pipeline(words, standalone_mode=False)
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(out.glob("*.safetensors")):
            tensors |= load_file(file)
        return dict(sorted(tensors.items())), json.loads((out / "config.json").read_text()), out


class Store:
    """Collects outputs: one flat float32 vector a case, names and shapes in layouts that cases share."""

    def __init__(self) -> None:
        self.layouts: dict[str, list[list[Any]]] = {}
        self.names: dict[str, str] = {}
        self.vectors: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensors: dict[str, torch.Tensor]) -> str:
        """Store one output; its layout's name."""
        layout = [[key, list(value.shape)] for key, value in tensors.items()]
        key = json.dumps(layout)
        if key not in self.names:
            self.names[key] = f"layout{len(self.names)}"
            self.layouts[self.names[key]] = layout
        self.vectors[name] = torch.cat([value.to(torch.float32).flatten() for value in tensors.values()])
        return self.names[key]


def dtypes_of(tensors: dict[str, torch.Tensor]) -> str | dict[str, str]:
    """The common dtype, or each tensor's when they differ."""
    each = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
    common = set(each.values())
    return common.pop() if len(common) == 1 else each


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """What the peer patches in config.json."""
    wanted = ("num_hidden_layers", "num_layers", "num_decoder_layers", "vocab_size", "tie_word_embeddings")
    return {key: config[key] for key in wanted if key in config}


def remarks(case: Case) -> dict[str, Any]:
    """Marks and notes, where there are any."""
    marks, notes = case.all_marks, case.notes
    return ({"marks": marks} if marks else {}) | ({"notes": notes} if notes else {})


def in_canonical_order(peer: Peer, case: Case) -> Case:
    """The case, its paths respelt so that the peer meets the models in the recipe's order.

    The peer orders a union's new tokens by a set of model references, whose hashes differ from process to process.
    Spelling a path ``./models`` or ``././models`` changes the hash, so some spelling gives the wanted order.
    """
    wanted = vocabularies.canonical(case.yaml)
    for dots in range(40):
        respelt = replace(case, yaml=case.yaml.replace("models/", "./" * dots + "models/"))
        if vocabularies.read(peer.merge(respelt, 1)[2]) == wanted:
            return respelt
    raise SystemExit(f"{case.name}: no spelling gives the tokens in the order {wanted}")


def exact_case(peer: Peer, case: Case, store: Store) -> dict[str, Any]:
    """Run a case with two seeds; store its output when both agree."""
    asked = case.yaml
    if case.copy_tokenizer:
        case = in_canonical_order(peer, case)
    tensors, config, out = peer.merge(case, 1)
    again, _, _ = peer.merge(case, 2)
    same = tensors.keys() == again.keys() and all(torch.equal(tensors[key], again[key]) for key in tensors)
    if not same:
        raise SystemExit(f"{case.name}: the output depends on the seed; mark the case as random")
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise SystemExit(f"{case.name}: the output is not finite; list the case as a failure")
    row = {
        "name": case.name,
        "methods": case.methods,
        "deterministic": True,
        "layout": store.add(case.name, tensors),
        "dtype": dtypes_of(tensors),
        "config": settings_of(config),
        "yaml": asked,
    }
    if case.copy_tokenizer:
        row["vocabulary"] = vocabularies.read(out)
    return row | remarks(case)


def random_case(peer: Peer, case: Case) -> dict[str, Any]:
    """Statistics of a random method over its seeds."""
    statistics = statistics_of_draws.measure(lambda seed: peer.merge(case, seed)[0], Path("models"), case.yaml)
    row = {"name": case.name, "methods": case.methods, "deterministic": False, "yaml": case.yaml}
    return row | remarks(case) | {"statistics": statistics}


def failure(peer: Peer, case: Case) -> dict[str, Any]:
    """What the peer does with a recipe it cannot run well: the class of its error, or what is wrong with the output."""
    try:
        tensors, _, _ = peer.merge(case, 1)
    except Exception as error:  # noqa: BLE001 - whatever the peer raises is the answer
        outcome = f"raises {type(error).__name__}"
    else:
        finite = all(bool(torch.isfinite(value).all()) for value in tensors.values())
        outcome = "writes an output" if finite else "writes values that are not finite"
    return {"name": case.name, "peer": outcome, "notes": case.notes, "yaml": case.yaml}


def write_json(path: Path, value: Any) -> None:
    """Write JSON with one line for each entry of the lists and mappings of the first level."""
    if isinstance(value, list):
        text = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]\n"
    else:
        text = "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()) + "\n}\n"
    path.write_text(text)


def main() -> None:
    """Write models, run everything, store."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger().setLevel(logging.ERROR)
    log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "data" / "mergekit"
    folder = folder.resolve()
    shutil.rmtree(folder / "models", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    tiny_models.write_all(folder / "models")
    vocabularies.write_all(folder / "models")

    store = Store()
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        peer = Peer(Path(scratch))
        rows = []
        for case in sorted([*grid.cases(), *structures.CASES, *vocabularies.CASES], key=lambda case: case.name):
            try:
                rows.append(exact_case(peer, case, store))
            except (SystemExit, Exception) as error:  # noqa: BLE001 - report all of them at once
                problems.append(f"{case.name}: {type(error).__name__}: {error}")
        rows += [random_case(peer, case) for case in sorted(grid.random_cases(), key=lambda case: case.name)]
        failures = [failure(peer, case) for case in structures.FAILURES]
    names = [row["name"] for row in rows]
    if len(set(names)) < len(names):
        problems.append("names are not unique")
    write_json(folder / "cases.json", rows)
    write_json(folder / "layouts.json", store.layouts)
    write_json(folder / "peer_failures.json", failures)
    save_file(store.vectors, folder / "outputs.safetensors")
    (folder / "outputs.safetensors").chmod(0o644)
    crc = zlib.crc32((folder / "outputs.safetensors").read_bytes())
    log.info("%d cases, %d runs, outputs' crc32 %08x", len(rows), peer.runs, crc)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
