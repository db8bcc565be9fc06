"""Arithmetic on LoRA adapters, always on ΔW = s·B·A and never on A and B apart: combining adapters, extracting them."""
