"""What an adapter does to one tensor of its base, as a value. `geomerge.engine.lora` carries it out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """W + s·B·A, W scaled to DoRA's magnitudes, or another tensor in W's place.

    The tensor is a matrix with all dimensions after the first flattened.

    Attributes:
        dtype: The safetensors dtype that the tensor is said to have: the base's.
        b, a: The names of the factors; empty when there are none. Without `a`, `b` is a bias: W + s·b.
        scale: s.
        transposed: The tensor is stored as (in, out), so that the change is (B·A)ᵀ.
        magnitude: The name of DoRA's magnitudes m: W' = m·(W + s·B·A)/‖W + s·B·A‖ for each output.
    """

    dtype: str
    b: str = ""
    a: str = ""
    scale: float = 1.0
    transposed: bool = False
    magnitude: str = ""

    @property
    def factors(self) -> tuple[str, ...]:
        """The adapter's tensors that it needs."""
        return tuple(name for name in (self.b, self.a, self.magnitude) if name)
