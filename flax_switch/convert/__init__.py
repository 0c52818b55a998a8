"""Checkpoints from and to other formats: Hugging Face and T5X both ways, and flax_switch's own.

`mapping` is the rule engine; `huggingface` and `t5x` hold the tables and readers, `t5x_writing` writes, `native` our own folder,
`scan` the one place that stacks layers, `checkpoint` puts them together.
"""

from flax_switch.convert.checkpoint import Checkpoint, convert, detect_format, open_checkpoint
from flax_switch.convert.scan import stack_layers, unstack_layers
from flax_switch.convert.tensors import CheckpointError, LazyTensor

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LazyTensor",
    "convert",
    "detect_format",
    "open_checkpoint",
    "stack_layers",
    "unstack_layers",
]
