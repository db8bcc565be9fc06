"""Devices that a user names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geomerge.errors import RunError, UsageError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn


def check_device(device: str) -> None:
    """Refuse a device that is not there, or that holds no numbers, before models are read.

    Args:
        device: As torch calls it: ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        UsageError: torch cannot compute on it here.
    """
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        said = first_line(error)
        reason = "torch knows no such kind" if said.startswith("Expected one of") else said
        raise UsageError(
            f"the device {device!r} cannot be used: {reason}",
            hint="an accelerator is called cuda, cuda:1, mps, xpu; without a device it is the processor",
        ) from None


def placed(module: nn.Module, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A model on a device, in evaluation mode.

    Args:
        module: The model.
        device: As torch calls it.
        dtype: Of its weights; by default their own.

    Raises:
        UsageError: There is no such device.
        RunError: It has no room for the model.
    """
    check_device(device)
    try:
        return module.to(device, dtype).eval()
    except RuntimeError as error:
        raise RunError(f"the model cannot be moved to the device {device!r}: {first_line(error)}") from None
