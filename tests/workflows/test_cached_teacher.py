"""A teacher's probabilities on disk: with all of them a student is the online teacher's; what does not fit is refused by name."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_distill import argv, computed, teacher, vocabulary  # noqa: F401 - fixtures

from flax_switch import cli
from flax_switch.config import ConfigError
from flax_switch.config.distillation import DistillationConfig
from flax_switch.data.cached_teacher import IDS, LISTED, PROBS, CachedTeacher
from flax_switch.ops.kernels.head_loss import soft_cross_entropy
from flax_switch.pretrained import load_pretrained
from flax_switch.workflows import cached_teacher

random = np.random.default_rng(0)
LOGITS, TEACHERS = random.normal(0, 2, (2, 2, 3, 11)).astype(np.float32)
PROBABILITIES = np.exp(TEACHERS) / np.exp(TEACHERS).sum(-1, keepdims=True)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_the_ids_that_are_not_kept_are_one_class(k):
    order = np.argsort(-PROBABILITIES, -1)[..., :k]
    kept = np.take_along_axis(PROBABILITIES, order, -1)
    loss = jax.value_and_grad(lambda logits: soft_cross_entropy(logits, jnp.asarray(order), jnp.asarray(kept)).sum())
    soft, gradient = loss(jnp.asarray(LOGITS))
    expected = 0.0
    for place in np.ndindex(2, 3):
        student = np.exp(LOGITS[place].astype(np.float64)) / np.exp(LOGITS[place].astype(np.float64)).sum()
        ids = order[place]
        expected -= (PROBABILITIES[place][ids] * np.log(student[ids])).sum()
        others = np.setdiff1d(np.arange(11), ids)
        if len(others):
            expected -= PROBABILITIES[place][others].sum() * np.log(student[others].sum())
    assert float(soft) == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(loss(jnp.asarray(TEACHERS))[1], 0, atol=1e-6)  # a student that agrees has nothing to learn


def test_batches_are_kept_by_number_and_what_has_changed_is_refused(tmp_path):
    identity = {"the teacher (by hash)": "a", "distillation.top_k": 2}
    ids = random.integers(0, 9, (5, 4, 3, 2)).astype(np.int32)
    probs = random.random((5, 4, 3, 2)).astype(np.float32)
    cached = CachedTeacher(tmp_path / "kept", identity)
    cached.add(ids[:2], probs[:2])
    (tmp_path / "kept" / "steps_00000002.npy").write_bytes(b"what a kill left")
    cached = CachedTeacher(tmp_path / "kept", identity)
    assert cached.steps == 2
    cached.add(ids[2:], probs[2:])
    cached = CachedTeacher(tmp_path / "kept", identity)
    for number in (0, 4, 1, 3):
        np.testing.assert_array_equal(cached.rows(number, np.array([1, 3]))[IDS], ids[number, [1, 3]])
        np.testing.assert_array_equal(cached.rows(number, None)[PROBS], probs[number])
    with pytest.raises(ConfigError, match="holds 5 batches, and batch 5 is asked for"):
        cached.rows(5, None)
    with pytest.raises(ConfigError, match=r"of something else: the teacher \(by hash\) was 'a', is 'b'\."):
        CachedTeacher(tmp_path / "kept", {**identity, "the teacher (by hash)": "b"})
    content = bytearray((tmp_path / "kept" / "steps_00000002.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "kept" / "steps_00000002.npy").write_bytes(content)
    cached = CachedTeacher(tmp_path / "kept", identity)
    cached.rows(1, None)
    with pytest.raises(ConfigError, match="steps_00000002.npy is missing or has changed"):
        cached.rows(2, None)
    with pytest.raises(ConfigError, match=r"distillation\.top_k is of probabilities that are kept"):
        DistillationConfig(top_k=4)


def kept(argv, folder, *more):  # noqa: F811
    return [*argv, f"--config.distillation.cached_teacher={folder}", *more]


@pytest.mark.slow
def test_with_all_probabilities_a_student_is_the_online_teachers_and_the_teacher_is_loaded_once(
    argv,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    assert cli.main(argv) == 0
    online, params = computed(tmp_path / "run"), load_pretrained(tmp_path / "run").params
    shutil.rmtree(tmp_path / "run")
    assert cli.main(kept(argv, tmp_path / "kept")) == 0
    offline, params2 = computed(tmp_path / "run"), load_pretrained(tmp_path / "run").params
    for one, other in zip(online, offline, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"kind"}:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, params2)
    monkeypatch.setattr(cached_teacher, "_compute", lambda *_: pytest.fail("all of it is there"))
    shutil.rmtree(tmp_path / "run")
    assert cli.main(kept(argv, tmp_path / "kept")) == 0
    assert computed(tmp_path / "run") == offline
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert cli.main(kept(argv, tmp_path / "kept")) == 0  # resumed at the batch that comes next
    assert computed(tmp_path / "run") == offline


@pytest.mark.slow
def test_a_caching_that_is_killed_continues_and_another_teacher_or_text_is_refused(
    argv,  # noqa: F811
    teacher,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.setattr(cached_teacher, "BYTES_AT_ONCE", 1)  # a batch in each file
    few = kept(argv, tmp_path / "kept", "--config.distillation.top_k=4")
    assert cli.main(few) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert len(whole) == 5 and np.load(tmp_path / "kept" / "steps_00000003.npy").shape == (1, 8, 8, 4)
    shutil.rmtree(tmp_path / "kept")
    shutil.rmtree(tmp_path / "run")
    add = CachedTeacher.add

    def killed(self, *arrays):
        if self.steps == 2:
            raise KeyboardInterrupt
        add(self, *arrays)

    with monkeypatch.context() as patch:
        patch.setattr(CachedTeacher, "add", killed)
        assert cli.main(few) == 130
    assert len(json.loads((tmp_path / "kept" / LISTED).read_text())["files"]) == 2
    assert cli.main(few) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == whole

    elsewhere = [text.replace(str(tmp_path / "run"), str(tmp_path / "other")) for text in few]
    capsys.readouterr()
    assert cli.main([*elsewhere, "--config.data.seed=3"]) == 2
    assert "is of something else: data.seed was 0, is 3." in capsys.readouterr().err
    assert cli.main([*elsewhere, "--config.distillation.top_k=5"]) == 2
    assert "distillation.top_k was 4, is 5" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text(text.read_text() + "\nban dote kiso")
    assert cli.main(elsewhere) == 2
    assert "corpus, vocabulary and objectives (by hash) was" in capsys.readouterr().err
    text.write_text("\n".join(text.read_text().splitlines()[:-1]))
    loaded = load_pretrained(teacher)
    changed = jax.tree.map(jnp.array, loaded.params)
    changed["encoder"]["layers_1"]["mlp"]["expert"]["wi"]["kernel"] += 0.01
    loaded.replace(params=changed).save_pretrained(tmp_path / "teacher", format="flax_switch")
    assert cli.main([*elsewhere, "--teacher", str(tmp_path / "teacher")]) == 2
    assert "the teacher (by hash) was" in capsys.readouterr().err
    assert not (tmp_path / "other" / "config.json").exists()
