"""The dense model with as much arithmetic a token as `tiny`, to compare with: the same data and optimiser.

Command:   flax-switch pretrain --config configs/t5_tiny.py --workdir runs/t5_tiny
Hardware:  2 CPU cores.
Expect:    figures close to those of `tiny`; docs/pretraining.md has both side by side.
"""

from flax_switch.config.recipes import load_recipe, to_config_dict


def get_config():
    sparse = load_recipe("tiny")
    return to_config_dict(sparse.replace(model=sparse.model.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)))
