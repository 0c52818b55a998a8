"""The head's losses, whole and in chunks, beside a retelling in numpy; in a model, over a mesh, and under pmap."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.ops.kernels import head_loss
from flax_switch.ops.kernels.head_loss import Head, Known, Terms, soft_cross_entropy
from flax_switch.ops.losses import seq2seq_loss
from flax_switch.parallel.mesh import create_mesh
from flax_switch.parallel.placement import ONE_DEVICE, OnMesh
from flax_switch.plan.memory import batch_structs
from flax_switch.training.state import build_run, init_state
from flax_switch.training.step import compile_train_step, eval_step, loss_and_grads
from flax_switch.training.stepper import build_stepper

B, L, D, V = 8, 5, 12, 46
random = np.random.default_rng(0)
STATES, OTHERS = random.normal(size=(2, B, L, D)).astype(np.float32)
TABLE, OTHER_TABLE = random.normal(size=(2, V, D)).astype(np.float32)
TARGETS = random.integers(0, V, (B, L)).astype(np.int32)
WEIGHTS = np.where(random.random((B, L)) < 0.3, 0, random.random((B, L))).astype(np.float32)
LABELS = jnp.asarray(TARGETS), jnp.asarray(WEIGHTS)
TERMS = {
    "cross-entropy alone": Terms(),
    "z-loss and smoothing": Terms(z_loss=0.1, label_smoothing=0.2),
    "a teacher": Terms(z_loss=0.1, label_smoothing=0.1, teacher_weight=0.25),
}
MODEL = SwitchConfig(
    vocab_size=166, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1, label_smoothing=0.1,
    num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, dropout_rate=0.0, z_loss_coef=0.01, init_scale=1.0,
)  # fmt: skip
CONFIG = ExperimentConfig(
    model=MODEL, data=DataConfig(batch_size=8, inputs_length=11, targets_length=28), train=TrainConfig(steps=3),
    optimizer=OptimizerConfig(name="adamw", schedule="constant", learning_rate=1e-2, warmup_steps=0),
)  # fmt: skip
MESH = MeshConfig(data=2, expert=2, model=2)


@pytest.fixture
def eights(monkeypatch):
    """Logits are made for eight tokens at a time, however few they are."""
    monkeypatch.setattr(head_loss, "WHOLE", 0)
    monkeypatch.setattr(head_loss, "CHUNKS", {"cpu": 400, "other": 400})


def head_of(states, table, *, tied=True, devices=ONE_DEVICE):
    return Head(jnp.asarray(states), jnp.asarray(table if tied else table.T), V, 0.5, tied, devices)


def retold(terms):
    """The weighted sum, losses, hits, and the sum's gradients by states and table, in float64."""
    states, table = STATES.astype(np.float64), TABLE.astype(np.float64)
    logits = 0.5 * states @ table.T
    log_z = np.log(np.exp(logits).sum(-1))
    probs = np.exp(logits - log_z[..., None])
    s = terms.label_smoothing
    smoothed = np.where(np.arange(V) == TARGETS[..., None], 1 - s, s / (V - 1))
    entropy = -(smoothed * np.log(smoothed)).sum(-1) if s else 0.0
    cross_entropy = -(smoothed * np.log(probs)).sum(-1) - entropy
    z_loss = terms.z_loss * log_z**2
    taught = np.exp(0.5 * OTHERS.astype(np.float64) @ OTHER_TABLE.T)
    taught /= taught.sum(-1, keepdims=True)
    share = terms.teacher_weight
    wanted = (1 - share) * cross_entropy - share * (taught * np.log(probs)).sum(-1)
    slope = probs * (1 + 2 * terms.z_loss * log_z)[..., None] - (1 - share) * smoothed - share * taught
    slope *= 0.5 * WEIGHTS[..., None]
    hits = logits.argmax(-1) == TARGETS
    gradients = (slope @ table, np.einsum("blv,bld->vd", slope, states))
    return ((wanted + z_loss) * WEIGHTS).sum(), cross_entropy, z_loss, hits, gradients


def computed(implementation, terms, *, tied=True, devices=ONE_DEVICE, dtype=jnp.float32):
    def loss(states, table):
        head = head_of(states.astype(dtype), table, tied=tied, devices=devices)
        teacher = head_of(OTHERS, OTHER_TABLE, tied=not tied, devices=devices) if terms.teacher_weight else None
        found = head_loss.head_loss(head, *LABELS, terms._replace(with_hits=True), teacher=teacher, implementation=implementation)
        return found.loss, found

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(STATES, TABLE)
    return *found, gradients


def assert_same(found, wanted, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("case", TERMS)
@pytest.mark.parametrize(
    ("implementation", "tied", "mesh"),
    [("whole", True, None), ("chunks", True, None), ("chunks", False, None), ("chunks", True, MESH)],
)
def test_losses_hits_and_gradients_are_those_of_a_retelling(eights, implementation, tied, mesh, case):
    devices = ONE_DEVICE if mesh is None else OnMesh(create_mesh(mesh, jax.devices()[:8]))
    assert_same(computed(implementation, TERMS[case], tied=tied, devices=devices), retold(TERMS[case]))


@pytest.mark.parametrize("mesh", [None, MESH])
@pytest.mark.parametrize("k", [1, 5, V])
def test_what_is_known_of_a_teacher_teaches_in_chunks_what_it_teaches_whole_logits(eights, k, mesh):
    """By the cross-entropy that is held to a loop over ids in tests/workflows/test_cached_teacher.py."""
    devices = ONE_DEVICE if mesh is None else OnMesh(create_mesh(mesh, jax.devices()[:8]))
    probs = jax.nn.softmax(head_of(OTHERS, OTHER_TABLE).logits())
    teacher, terms = Known(*reversed(jax.lax.top_k(probs, k))), Terms(z_loss=0.1, label_smoothing=0.1, teacher_weight=0.25)

    def in_chunks(states, table):
        head = head_of(states, table, devices=devices)
        return head_loss.head_loss(head, *LABELS, terms, teacher=teacher, implementation="chunks").loss

    def of_logits(states, table):
        head = head_of(states, table)
        alone = head_loss.head_loss(head, *LABELS, terms, implementation="whole")
        soft = soft_cross_entropy(head.logits(), teacher.ids, teacher.probs)
        return alone.loss + 0.25 * ((soft - alone.cross_entropy) * WEIGHTS).sum()

    found, wanted = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(STATES, TABLE) for f in (in_chunks, of_logits))
    assert_same(found, wanted)


@pytest.mark.parametrize("size", [1, 46 * 16, 46 * 24, 46 * 64])
def test_any_number_of_tokens_at_a_time_gives_the_same(eights, monkeypatch, size):
    monkeypatch.setattr(head_loss, "CHUNKS", {"cpu": size, "other": size})
    assert_same(computed("chunks", TERMS["a teacher"]), retold(TERMS["a teacher"]))


def test_states_in_bfloat16_are_summed_in_float32(eights):
    terms = TERMS["z-loss and smoothing"]
    whole, chunks = (computed(implementation, terms, dtype=jnp.bfloat16) for implementation in ("whole", "chunks"))
    assert_same(chunks[:4], whole[:4])
    assert_same(chunks[4][1], whole[4][1])
    assert_same(chunks[4][0], whole[4][0], rtol=2**-8)  # rounded to bfloat16, in which one step is 2**-8


def test_of_equal_logits_the_first_is_the_hit(eights):
    for devices in (ONE_DEVICE, OnMesh(create_mesh(MESH, jax.devices()[:8]))):
        head = head_of(STATES, np.zeros_like(TABLE), devices=devices)
        targets = jnp.where(jnp.arange(L)[None] % 2 == 1, LABELS[0], 0)
        found = head_loss.head_loss(head, targets, LABELS[1], Terms(with_hits=True), implementation="chunks")
        np.testing.assert_array_equal(found.hits, targets == 0)


# --- in a model
def batch_of(config):
    rows, (source, target) = config.data.batch_size, (11, 28)
    random = np.random.default_rng(1)
    labels = random.integers(3, 166, (rows, target))
    labels[:, 20:] = np.where(np.arange(rows)[:, None] % 3, labels[:, 20:], -100)
    ids = random.integers(3, 166, (rows, source))
    decoder = np.concatenate([np.zeros((rows, 1), int), np.maximum(labels[:, :-1], 0)], 1)
    arrays = {
        "input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels, "decoder_input_ids": decoder,
        "decoder_attention_mask": np.ones_like(labels),
    }  # fmt: skip
    return {name: x.astype(np.int32) for name, x in arrays.items()}


def run_on(config, devices):
    return build_run(config, create_mesh(config.mesh, jax.devices()[:devices]))


def with_logits(config, params, batch):
    """The loss and its gradients, of a model that returns its logits."""
    run = run_on(config.replace(mesh=MeshConfig()), 1)

    def loss(params):
        inputs = ("input_ids", "decoder_input_ids", "attention_mask", "decoder_attention_mask")
        output = run.model.apply({"params": params}, *(batch[name] for name in inputs))
        return seq2seq_loss(output, batch["labels"], config.model).loss

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(("changes", "mesh"), [({}, MESH), ({"tie_word_embeddings": False}, MeshConfig())])
def test_a_training_step_has_the_loss_and_the_gradients_of_whole_logits(eights, changes, mesh):
    config = CONFIG.replace(model=MODEL.replace(**changes), mesh=mesh)
    run, batch = run_on(config, 8 if mesh is MESH else 1), batch_of(config)
    params = init_state(run).params
    grads, metrics = jax.jit(lambda *arrays: loss_and_grads(run, *arrays))(params, batch, jax.random.key(0))
    loss, wanted = with_logits(config, jax.device_get(params), batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_same(grads, wanted, rtol=1e-4)


def test_evaluation_sums_what_whole_logits_give(monkeypatch):
    run, batch = run_on(CONFIG, 1), batch_of(CONFIG)
    params, batch = init_state(run).params, {**batch, "text_mask": np.float32(batch["labels"] % 2)}
    whole = jax.jit(lambda *arrays: eval_step(run, *arrays))(params, batch)
    monkeypatch.setattr(head_loss, "WHOLE", 0)
    monkeypatch.setattr(head_loss, "CHUNKS", {"cpu": 2000, "other": 2000})
    assert_same(jax.jit(lambda *arrays: eval_step(run, *arrays))(params, batch), whole)


@pytest.mark.slow
def test_pmap_makes_the_updates_of_one_device(eights):
    batch, losses = batch_of(CONFIG), []
    for mesh, devices in ((MeshConfig(), 1), (MeshConfig(data=2, expert=2, mode="pmap"), 4)):
        run = run_on(CONFIG.replace(mesh=mesh), devices)
        stepper = build_stepper(run)
        state = stepper.hold(init_state(run))
        for _ in range(3):
            state, metrics = stepper.step(state, batch)
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[3:], losses[:3], rtol=1e-5)


def largest_with_vocabulary(mesh, devices):
    """Of arrays of a lowered train step that have the vocabulary, or a device's half of it, as an axis: the most other numbers."""
    config = CONFIG.replace(mesh=mesh)
    run = run_on(config, devices)
    text = compile_train_step(run).lower(run.abstract_state, batch_structs(config, run.mesh)).as_text()
    shapes = {tuple(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<((?:\d+x)+)[a-z]", text + "x") if dims}
    sizes = [np.prod(shape) // v for shape in shapes for v in (166, 83) if v in shape]
    return max(sizes)


@pytest.mark.parametrize(("mesh", "devices"), [(MeshConfig(), 1), (MESH, 8)])
def test_a_training_step_has_no_array_of_all_tokens_and_the_vocabulary(eights, monkeypatch, mesh, devices):
    tokens = 8 * 28 // (1 if devices == 1 else 4)
    assert largest_with_vocabulary(mesh, devices) < tokens  # the table has 16 numbers for an id, a chunk of logits eight
    monkeypatch.setattr(head_loss, "WHOLE", 2**20)
    assert largest_with_vocabulary(mesh, devices) >= tokens
