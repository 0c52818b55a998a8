"""What a stream gives, for its tests."""

import itertools

from flax_switch.data.streams import Place, TextStream


def take(prepared, count, rows=None):
    """The first batches."""
    return everything(prepared, count, rows)[0]


def everything(prepared, count, rows=None):
    """The first batches, and the position before each."""
    iterator = prepared.train_iterator(rows)
    states, batches = [], []
    for _ in range(count):
        states.append(iterator.get_state())
        batches.append(next(iterator))
    iterator.close()
    return batches, states


def documents_of_epochs(prepared, count):
    """The documents of whole epochs as ids, in the order in which they are laid end to end."""
    stream = TextStream(prepared.train.paths, prepared.config, prepared.vocabulary, prepared.config.seed)
    epochs = [[] for _ in range(count)]
    for block in itertools.takewhile(lambda block: block.place.epoch < count, stream.blocks(Place())):
        epochs[block.place.epoch] += [tuple(block.text.document(i).tolist()) for i in range(block.text.num_documents)]
    return epochs
