"""What accelerators can do at most, by their data sheets."""

from __future__ import annotations

# bfloat16 FLOP/s of a chip, without sparsity.
PEAK_FLOPS = {"v5e": 197e12, "v6e": 918e12, "v5p": 459e12, "a100": 312e12, "h100": 989e12, "h200": 989e12}
# What JAX calls the chips, in lower case; a part of the name will do, and the first that fits counts.
_KINDS = {
    "v5 lite": "v5e", "v5e": "v5e", "v6 lite": "v6e", "v6e": "v6e", "tpu v5": "v5p", "a100": "a100", "h100": "h100", "h200": "h200",
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak of a device that JAX names so, in bfloat16; None for CPUs and what is not known here."""
    name = device_kind.lower()
    return next((PEAK_FLOPS[chip] for part, chip in _KINDS.items() if part in name), None)
