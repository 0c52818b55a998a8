"""The rule engine: both directions of every row, and errors that name tensors."""

import numpy as np
import pytest

from flax_switch import CheckpointError, SwitchConfig
from flax_switch.convert.canonical import canonical_shapes
from flax_switch.convert.huggingface import SWITCH_RULES, T5_RULES
from flax_switch.convert.mapping import SAME, TRANSPOSE, Rule, rule_of, to_canonical, to_foreign
from flax_switch.convert.tensors import LazyTensor, from_array

SPARSE = SwitchConfig(
    vocab_size=7, d_model=4, num_heads=2, d_kv=3, d_ff=5, num_encoder_layers=2, num_decoder_layers=3,
    num_sparse_encoder_layers=1, decoder_sparse_layers=(0, 2), num_sparse_decoder_layers=1, num_experts=3, router_bias=True,
    tie_word_embeddings=False, separate_embeddings=True, relative_attention_num_buckets=8,
)  # fmt: skip
DENSE = SPARSE.replace(
    num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, decoder_sparse_layers=None, separate_embeddings=False,
    mlp_activations=("gelu_new", "linear"),
)  # fmt: skip


def random_tree(config: SwitchConfig) -> dict[str, LazyTensor]:
    rng = np.random.default_rng(0)
    return {path: from_array(rng.random(shape, np.float32)) for path, shape in canonical_shapes(config).items()}


@pytest.mark.parametrize(("config", "rules"), [(SPARSE, SWITCH_RULES), (DENSE, T5_RULES)], ids=["switch", "t5"])
def test_a_tree_survives_the_way_to_foreign_names_and_back(config, rules):
    tree = random_tree(config)
    foreign = to_foreign(tree, rules)
    back = to_canonical(foreign, rules, canonical_shapes(config))
    assert back.keys() == tree.keys()
    for path, tensor in tree.items():
        np.testing.assert_array_equal(back[path].numpy(), tensor.numpy())


@pytest.mark.parametrize(("config", "rules"), [(SPARSE, SWITCH_RULES), (DENSE, T5_RULES)], ids=["switch", "t5"])
def test_every_canonical_path_has_exactly_one_rule(config, rules):
    for path in canonical_shapes(config):
        assert rule_of(path, rules) in rules


def test_expert_stacks_become_one_tensor_for_each_expert_transposed():
    kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    rule = Rule("mlp/expert/{w}/kernel", "experts.expert_{e}.{w}.weight", TRANSPOSE)
    foreign = rule.to_foreign("mlp/expert/wi/kernel", from_array(kernel))
    assert list(foreign) == ["experts.expert_0.wi.weight", "experts.expert_1.wi.weight"]
    np.testing.assert_array_equal(foreign["experts.expert_1.wi.weight"].numpy(), kernel[1].T)


def damaged(change) -> tuple[dict[str, LazyTensor], dict]:
    foreign = to_foreign(random_tree(SPARSE), SWITCH_RULES)
    change(foreign)
    return foreign, canonical_shapes(SPARSE)


def test_missing_left_over_and_misshapen_tensors_are_all_named():
    def change(foreign):
        del foreign["encoder.block.1.layer.1.mlp.experts.expert_2.wo.weight"]
        foreign["surplus.weight"] = from_array(np.zeros(2))
        foreign["shared.weight"] = from_array(np.zeros((3, 3)))

    foreign, expected = damaged(change)
    with pytest.raises(CheckpointError) as error:
        to_canonical(foreign, SWITCH_RULES, expected)
    for words in ("expert_2.wo.weight", "surplus.weight", r"shared.weight is [3, 3] where [7, 4] was expected", "--allow-missing"):
        assert words in str(error.value)


def test_forgiveness_is_by_name_and_never_for_a_wrong_shape():
    def change(foreign):
        del foreign["encoder.block.1.layer.1.mlp.experts.expert_2.wo.weight"]
        foreign["surplus.weight"] = from_array(np.zeros(2))

    foreign, expected = damaged(change)
    names = ("encoder.block.1.layer.1.mlp.experts.expert_2.wo.weight", "surplus.*")
    tree = to_canonical(foreign, SWITCH_RULES, expected, allow_missing=names)
    assert expected.keys() - tree.keys() == {"encoder/layers_1/mlp/expert/wo/kernel"}
    with pytest.raises(CheckpointError, match="surplus.weight"):
        to_canonical(foreign, SWITCH_RULES, expected, allow_missing=names[:1])
    foreign["shared.weight"] = from_array(np.zeros((3, 3)))
    with pytest.raises(CheckpointError, match="shared.weight is"):
        to_canonical(foreign, SWITCH_RULES, expected, allow_missing=("*",))


def test_ambiguous_and_absent_rules_are_errors_that_name_the_tensor():
    rules = (Rule("{stack}/norm", "{stack}.a"), Rule("encoder/norm", "encoder.b"))
    with pytest.raises(CheckpointError, match=r"several rules \({stack}.a, encoder.b\) for the tensor 'encoder/norm'"):
        rule_of("encoder/norm", rules)
    with pytest.raises(CheckpointError, match="no rule for the tensor 'decoder/other'"):
        rule_of("decoder/other", rules)


def test_two_tensors_under_one_foreign_name_are_an_error():
    rules = (Rule("{stack}/norm", "norm", SAME),)
    tree = {f"{stack}/norm": from_array(np.zeros(2)) for stack in ("encoder", "decoder")}
    with pytest.raises(CheckpointError, match="'norm'"):
        to_foreign(tree, rules)


def test_experts_of_different_dtypes_are_an_error():
    foreign = to_foreign(random_tree(SPARSE), SWITCH_RULES)
    name = "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight"
    foreign[name] = from_array(foreign[name].numpy().astype(np.float16))
    with pytest.raises(CheckpointError, match="float16.*float32"):
        to_canonical(foreign, SWITCH_RULES, canonical_shapes(SPARSE))
