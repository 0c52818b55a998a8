"""The encoder's and the decoder's stack of layers, unrolled or scanned."""

import dataclasses
import operator

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from flax_switch.config import StackConfig, SwitchConfig
from flax_switch.nn.attention import RelativePositionBias
from flax_switch.nn.cache import DecoderCache, KeyValue
from flax_switch.nn.fused import FusedLayer
from flax_switch.nn.layer import Layer, LayerInputs, ScanBlock, remat, zero_padding
from flax_switch.nn.layers import Dropout, Embedding, norm_of
from flax_switch.nn.outputs import LayerOutput
from flax_switch.ops import Size

SCAN_AXIS = 1  # of stacked parameters, as in T5X's scanned checkpoints


class Stack(nn.Module):
    """Layers with their shared relative position table, input and output dropout, and final norm."""

    config: SwitchConfig
    stack: StackConfig
    in_parts: bool = False  # whether parameters are (`Placement.in_parts`)

    def setup(self) -> None:
        config, stack = self.config, self.stack
        if config.separate_embeddings or config.decoder_only:
            self.token_embedder = Embedding(config)
        if config.has_bias_tables and not config.relative_attention_per_layer:
            self.relpos_bias = RelativePositionBias(config, bidirectional=not stack.causal)
        form = FusedLayer if config.layer_form == "fused" else Layer
        if config.scan_layers:
            block = nn.scan(
                remat(ScanBlock, config.remat_policy, in_parts=self.in_parts),
                variable_axes={"params": SCAN_AXIS},
                split_rngs={"params": True, "dropout": True, "jitter": True},
                in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType] - flax takes a tuple, one for each argument
                length=stack.num_blocks,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            setattr(self, stack.name, block(config, stack, form))
        else:
            layer = remat(form, config.remat_policy, in_parts=self.in_parts)
            self.layers = [layer(config, stack, sparse=i in stack.sparse_layers) for i in range(stack.num_layers)]
        norm = norm_of(config)
        setattr(self, f"{stack.name}_norm", norm)
        self.dropout = Dropout(config.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        inputs: LayerInputs,
        *,
        cache: DecoderCache | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[Float[Array, "B Q D"], list[LayerOutput], tuple[Array, ...] | None]:
        """Runs all layers; returns the normalised output, the layers' outputs and, if asked for, their hidden states."""
        config = self.config
        if cache is None and config.has_bias_tables and not config.relative_attention_per_layer:
            inputs = dataclasses.replace(inputs, bias=self.relpos_bias(x.shape[1], inputs.mask))
        x = self.dropout(x, deterministic=inputs.deterministic)
        hidden_states: list[Array | None] = [x]
        if config.scan_layers:
            if cache is not None:
                raise ValueError(
                    "Decoding with a cache needs unrolled layers; unstack the parameters (convert.scan.unstack_layers) and "
                    "use config.replace(scan_layers=False)."
                )
            x, stacked = getattr(self, self.stack.name)(x, inputs, output_hidden_states)
            outputs, hidden = _unstack(stacked, self.stack.num_blocks)
            hidden_states += hidden
        else:
            outputs = []
            for i, layer in enumerate(self.layers):
                if cache is not None:
                    inputs = dataclasses.replace(inputs, bias=cache.bias(i, x.shape[1]))
                x, output = layer(x, inputs, None if cache is None else cache.layers[i])
                outputs.append(output)
                hidden_states.append(x)
        x = getattr(self, f"{self.stack.name}_norm")(inputs.devices.keep_batch_split(x))
        x = zero_padding(x, inputs.padding_mask, config)
        x = self.dropout(x, deterministic=inputs.deterministic)
        hidden_states[-1] = x
        return x, outputs, tuple(h for h in hidden_states if h is not None) if output_hidden_states else None

    def cross_keys_values(self, encoded: Float[Array, "B S D"]) -> tuple[KeyValue, ...]:
        """Returns every layer's keys and values of the encoder's output."""
        return tuple(layer.cross_keys_values(encoded) for layer in self.layers)

    def bias_tables(self, max_length: Size) -> tuple[Float[Array, "H relative"], ...]:
        """Returns each layer's table of relative position biases for a cache of `max_length` places, or the one they share."""
        if not self.config.has_bias_tables:
            return ()
        holders = self.layers if self.config.relative_attention_per_layer else (self,)
        return tuple(holder.relpos_bias.for_cache(max_length) for holder in holders)


def _unstack(stacked: tuple, blocks: int | None) -> tuple[list[LayerOutput], list[Array | None]]:
    """Returns the outputs of scanned blocks, layer by layer in order."""
    outputs, hidden = [], []
    assert blocks is not None  # the config refuses to scan layers that do not repeat
    for block in range(blocks):
        for output, x in jax.tree.map(operator.itemgetter(block), stacked):
            outputs.append(output)
            hidden.append(x)
    return outputs, hidden
