"""What a head says, as text: of words whose tokens were cut off it says what stands outside of everything."""

import types

import numpy as np
import pytest

from flax_switch.config import SwitchConfig
from flax_switch.data.examples import Example
from flax_switch.workflows.task_predictions import said

WORDS = types.SimpleNamespace(encode=lambda text: [3] * len(text.split()[0]))  # a token a letter


@pytest.mark.parametrize("labels, beyond", [(("O", "B-x", "I-x"), "O"), (("y", "x"), "y")])
@pytest.mark.parametrize("kept", range(1, 7))
def test_a_word_has_the_tag_at_its_first_token_if_that_was_read(kept, labels, beyond):
    config = SwitchConfig(head="token_classification", labels=labels)
    logits = np.zeros((kept + 1, len(labels)), np.float32)  # the last is EOS, or of a token that took its place
    logits[:, 1] = 1
    starts = [0, 2, 3]  # of "ab", "c" and "def"
    expected = [labels[1] if start < kept else beyond for start in starts]
    assert said(config, [Example("ab c def", ("",))], [logits], WORDS) == [" ".join(expected)]
