"""Text in, batches out: corpora, vocabulary, objectives, packing and iterators, in numpy; neither jax nor flax is imported."""

from flax_switch.data.batches import Batch, text_token_mask
from flax_switch.data.pipeline import Prepared, prepare
from flax_switch.data.statistics import target_token_counts, unigram_entropy
from flax_switch.data.vocabulary import Vocabulary

__all__ = ["Batch", "Prepared", "Vocabulary", "prepare", "target_token_counts", "text_token_mask", "unigram_entropy"]
