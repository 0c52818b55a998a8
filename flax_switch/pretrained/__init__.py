"""Any checkpoint in, a model with its parameters out, and back."""

from flax_switch.pretrained.adapter import load_adapter
from flax_switch.pretrained.loading import from_checkpoint, load_pretrained, quantize
from flax_switch.pretrained.model import Pretrained
from flax_switch.pretrained.saving import save_pretrained

__all__ = ["Pretrained", "from_checkpoint", "load_adapter", "load_pretrained", "quantize", "save_pretrained"]
