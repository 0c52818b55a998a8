"""The quickstart's recipe, trained for long enough to see that it learns what the model is for."""

import pytest

from flax_switch.config.recipes import load_recipe
from flax_switch.workflows.pretrain import pretrain

STEPS = 700


@pytest.mark.slow
def test_the_quickstarts_model_uses_its_encoder(tmp_path):
    settings = [f"train.{name}={STEPS}" for name in ("steps", "eval_every", "checkpoint_every")]
    settings += ["model.num_encoder_layers=2", "model.num_decoder_layers=2"]  # three of each take a third longer
    found = pretrain(load_recipe("tiny", settings), tmp_path / "run").evaluation
    assert found is not None
    assert found["encoder_gain/infilling"] >= 0.5
    assert found["encoder_gain/masked"] > 0.05
    assert found["masked_accuracy"] > 2 * found["masked_accuracy_of_most_frequent"]
    assert max(found["routers/fraction_tokens_left_behind"]) < 0.05
