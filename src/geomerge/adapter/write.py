"""Writing an adapter as PEFT does, so that PEFT and geomerge read it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geomerge.adapter.layers import Layer
from geomerge.adapter.low_rank import Factors
from geomerge.checkpoint.dtypes import from_torch
from geomerge.checkpoint.hub import is_hub_id
from geomerge.checkpoint.lora import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from geomerge.checkpoint.output_place import ADAPTER
from geomerge.checkpoint.writer import OutputDirectory, disk_error
from geomerge.version import __version__

REPORT_NAME = "geomerge.json"


@dataclass(frozen=True)
class Content:
    """What goes into an adapter.

    Attributes:
        layers: The low-rank layers and their factors; the scale is in them, so α = r.
        whole: Tensors that replace the base's, by name.
        base, base_revision: What the config says the base is.
        fan_in_fan_out: Linear layers are stored as (in, out) in the base.
        settings: Further keys of the config.
        copies: Files to copy, by name.
    """

    layers: Sequence[tuple[Layer, Factors]]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    base: str | None = None
    base_revision: str | None = None
    fan_in_fan_out: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)

    @property
    def modules_to_save(self) -> list[str]:
        """The modules that are whole; a bias alone or beside a low-rank change makes no module whole."""
        adapted = {layer.module for layer, _ in self.layers}
        named = (name.rpartition(".") for name in self.whole)
        return list(dict.fromkeys(m for m, _, leaf in named if leaf != "bias" and m not in adapted))

    @property
    def biases(self) -> bool:
        """Whether there are biases beside those of whole modules."""
        saved = set(self.modules_to_save)
        return any(name.endswith(".bias") and name.removesuffix(".bias") not in saved for name in self.whole)


def config(content: Content) -> dict[str, Any]:
    """The content of ``adapter_config.json``."""
    ranks = {layer.module: factors.rank for layer, factors in content.layers}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    # PEFT reads these keys as regular expressions for the end of a module's path; ^ makes them mean the whole of it.
    others = {f"^{module}": rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": content.base,
        "revision": content.base_revision,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "all" if content.biases else "none",
        "fan_in_fan_out": content.fan_in_fan_out,
        "init_lora_weights": True,
        "target_modules": list(ranks),
        "modules_to_save": content.modules_to_save or None,
        **content.settings,
    }


def tensors(content: Content, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's tensors by their stored names; low-rank factors in `dtype`, whole tensors as they are."""
    made: dict[str, Tensor] = {}
    adapted = {layer.module for layer, _ in content.layers}
    for layer, factors in content.layers:
        made |= {name: value.to(dtype).contiguous() for name, value in layer.stored(factors).items()}
    for name, value in content.whole.items():
        module, _, leaf = name.rpartition(".")
        made[f"{module}.base_layer.{leaf}" if module in adapted else name] = value.contiguous()
    return {PREFIX + name: value for name, value in made.items()}


def write(
    out: Path | str,
    content: Content,
    report: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    inputs: Sequence[Path],
    force: bool,
) -> tuple[Path, int]:
    """Make the adapter's directory; it appears whole or not at all. Returns it and the bytes of its tensors.

    Raises:
        UsageError: Its place is taken or lies in an input.
        RunError: It cannot be written.
    """
    from safetensors.torch import save_file

    from_torch(dtype)
    made = tensors(content, dtype)
    nbytes = sum(value.nbytes for value in made.values())
    with OutputDirectory(out, force, inputs=inputs, kind=ADAPTER) as output:
        try:
            path = output.partial / WEIGHTS_NAME
            try:
                save_file(made, path, metadata={"format": "pt"})
            except OSError as error:
                raise disk_error(error, path, nbytes) from None
            output.write_json(CONFIG_NAME, config(content))
            output.write_json(REPORT_NAME, {"geomerge": __version__, **report, "bytes": nbytes})
            output.write_text("README.md", _card(content, report))
            for name, place in content.copies.items():
                output.copy(place, name)
        except BaseException:
            output.abandon()
            raise
        return output.finish(), nbytes


def _card(content: Content, report: Mapping[str, Any]) -> str:
    """The model card: a base only where it is an id of the hub."""
    base = f"base_model: {content.base}\n" if content.base and is_hub_id(content.base) else ""
    return (
        f"---\n{base}library_name: peft\ntags: [lora, merge, geomerge]\n---\n\n"
        f"A LoRA adapter: {report['how']}. What truncation left out: {report['relative_error']:.3%} of ‖ΔW‖; "
        f"layer by layer in `{REPORT_NAME}`.\n"
    )
