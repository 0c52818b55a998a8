"""Generation: greedy search, beams and sampling, on the device."""

from flax_switch.config.generation import GenerationConfig
from flax_switch.generation.generate import GenerationOutput, generate

__all__ = ["GenerationConfig", "GenerationOutput", "generate"]
