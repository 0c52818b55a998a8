"""Arrays of libraries that are not imported here, as numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np


def is_torch(value: Any) -> bool:
    """Returns whether a value is a torch tensor, by what it can do: torch need not be installed."""
    return hasattr(value, "detach") and hasattr(value, "cpu")


def from_torch(tensor: Any) -> np.ndarray:
    """Returns a torch tensor's values, wherever it lies; bfloat16, which numpy lacks, becomes float32 with the same values."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy()
