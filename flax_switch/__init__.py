"""Switch Transformers in JAX and Flax.

Public names are imported when they are first used (PEP 562), so that reading a config or preparing data never starts JAX. Type
checkers see them as imports.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax_switch.config import ConfigError, SwitchConfig
    from flax_switch.config.presets import PRESETS
    from flax_switch.config.recipes import load_recipe
    from flax_switch.convert import CheckpointError
    from flax_switch.generation.generate import GenerationOutput, generate
    from flax_switch.generation.stream import stream
    from flax_switch.nn.init import init_params
    from flax_switch.nn.outputs import ModelOutput
    from flax_switch.nn.transformer import SwitchEncoder, SwitchTransformer
    from flax_switch.ops.losses import LossOutput, seq2seq_loss
    from flax_switch.pretrained import Pretrained, load_adapter, load_pretrained, quantize, save_pretrained
    from flax_switch.training.custom import optimizer, train_step
    from flax_switch.training.state import TrainState
    from flax_switch.workflows.finetune import finetune
    from flax_switch.workflows.pretrain import pretrain

__version__ = "0.1.0"  # setup.cfg reads it here, without importing the package

_HOME = {
    "ConfigError": "flax_switch.config",
    "SwitchConfig": "flax_switch.config",
    "PRESETS": "flax_switch.config.presets",
    "SwitchTransformer": "flax_switch.nn.transformer",
    "SwitchEncoder": "flax_switch.nn.transformer",
    "ModelOutput": "flax_switch.nn.outputs",
    "seq2seq_loss": "flax_switch.ops.losses",
    "LossOutput": "flax_switch.ops.losses",
    "generate": "flax_switch.generation.generate",
    "GenerationOutput": "flax_switch.generation.generate",
    "stream": "flax_switch.generation.stream",
    "CheckpointError": "flax_switch.convert",
    "Pretrained": "flax_switch.pretrained",
    "load_adapter": "flax_switch.pretrained",
    "load_pretrained": "flax_switch.pretrained",
    "quantize": "flax_switch.pretrained",
    "save_pretrained": "flax_switch.pretrained",
    "init_params": "flax_switch.nn.init",
    "optimizer": "flax_switch.training.custom",
    "train_step": "flax_switch.training.custom",
    "TrainState": "flax_switch.training.state",
    "load_recipe": "flax_switch.config.recipes",
    "pretrain": "flax_switch.workflows.pretrain",
    "finetune": "flax_switch.workflows.finetune",
}  # public name -> the module that defines it

__all__ = [
    "CheckpointError",
    "ConfigError",
    "GenerationOutput",
    "LossOutput",
    "ModelOutput",
    "PRESETS",
    "Pretrained",
    "SwitchConfig",
    "SwitchEncoder",
    "SwitchTransformer",
    "TrainState",
    "__version__",
    "finetune",
    "generate",
    "init_params",
    "load_adapter",
    "load_pretrained",
    "load_recipe",
    "optimizer",
    "pretrain",
    "quantize",
    "save_pretrained",
    "seq2seq_loss",
    "stream",
    "train_step",
]

if not TYPE_CHECKING:  # to a type checker, a module with __getattr__ has every name

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            import difflib

            near = difflib.get_close_matches(name, _HOME, n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            if name.startswith(("SwitchTransformers", "T5", "Auto")):  # transformers' names
                hint = ". What transformers' classes open, fs.load_pretrained(folder or name on the hub) opens."
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value  # found directly from now on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "importlib"})
