"""What a model's layers see: the mean absolute value of every input feature over some texts, as the step `aim` takes it.

model = AutoModelForCausalLM.from_pretrained("./base", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("./base")
batches = [tokenizer(text, return_tensors="pt") for text in texts]
save_file(activations(model, batches), "act.safetensors")      # safetensors.torch.save_file
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from geomerge.anatomy.memory_names import on_disk
from geomerge.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


def activations(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean |xⱼ| of each input feature j of every linear layer and norm.

    Args:
        model: A PyTorch module; its parameters' names are those of the checkpoint, or transformers knows what they are there.
            It is put into evaluation mode meanwhile.
        batches: What the model is called with, one after the other: mappings of keyword arguments (as tokenizers give them),
            tuples of arguments, or single tensors. Positions that an ``attention_mask`` of shape ``(batch, length)`` leaves out
            do not count.

    Returns:
        Weight name on disk → float64 vector: of the input features for Linear and GPT-2's Conv1D, of its own elements for
        LayerNorm and RMSNorm. Layers that no batch reaches and heads that share their weight with an embedding are left out.

    Raises:
        UsageError: No batch reaches any such layer.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    mask: list[Tensor | None] = [None]

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            weight = _mask(mask[0], x)
            rows = x.reshape(-1, x.shape[-1]).to(torch.float64).abs_()
            seen = rows.sum(0) if weight is None else weight @ rows
            sums[name] = seen if name not in sums else sums[name].add_(seen)
            counts[name] = counts.get(name, 0.0) + (len(rows) if weight is None else float(weight.sum()))

        return hook

    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    handles = [
        module.register_forward_pre_hook(watch(f"{name}.weight" if name else "weight"))
        for name, module in model.named_modules()
        if _observed(module) and id(module.weight) not in looked_up
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                if isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(*(batch if isinstance(batch, tuple) else (batch,)))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    stored = on_disk(model)
    found = {stored(name): (total / counts[name]).cpu() for name, total in sums.items() if counts[name]}
    if not found:
        raise UsageError("no batch reached a linear layer or norm of the model", hint="are there any batches?")
    return found


def _observed(module: nn.Module) -> bool:
    """Whether a module multiplies its input's last dimension by a weight: Linear, Conv1D, LayerNorm, any RMSNorm."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    name = type(module).__name__
    if weight.dim() == 2:
        return isinstance(module, torch.nn.Linear) or name == "Conv1D"
    return weight.dim() == 1 and (isinstance(module, torch.nn.LayerNorm) or name.endswith("RMSNorm"))


def _mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The weight of each position of a layer's input, if the mask is one of its positions."""
    if mask is None or mask.dim() != 2 or x.shape[:-1] != mask.shape:
        return None
    return mask.reshape(-1).to(x.device, torch.float64)
