"""Other runtimes, as somebody would use them: each opens an exported folder and continues sources greedily."""

import json
import os
import subprocess
import sys

import numpy as np
from models import NEW, padded

ALONE = """
import sys
for name in ("flax", "flax_switch", "optax", "orbax", "sentencepiece", "safetensors", "ml_collections"):
    sys.modules[name] = None  # importing it is an error
sys.path.insert(0, sys.argv[1])
import numpy as np, load
sources, found = np.load(sys.argv[2]), {}
params, new = load.load_params(), int(sys.argv[4])
for i in range(len(sources) // 2):
    ids, mask = sources[f"ids_{i}"], sources[f"mask_{i}"]
    found[f"generate_{i}"] = load.generate(params, ids, mask, new)
    if i > 0:
        continue
    encoded = load.program("encoder")(params, ids, mask)
    tokens = np.zeros((len(ids), 1), np.int32)
    logits, cache = load.program("prefill")(params, encoded, mask, tokens, np.zeros(1 + new, np.int32))
    while tokens.shape[1] <= new:
        token = np.where((tokens == 1).any(1), 0, np.asarray(logits).argmax(-1)).astype(np.int32)
        tokens = np.concatenate([tokens, token[:, None]], axis=1)
        logits, cache = load.program("decode_step")(params, token, mask, cache)
    found[f"steps_{i}"] = tokens
np.savez(sys.argv[3], **found)
"""


def stablehlo(folder, sources, scratch, python=sys.executable):
    """Runs `load.py` in a process that can import nothing of this project; returns tokens, and those made step by step."""
    arrays = {f"{name}_{i}": array for i, pair in enumerate(sources) for name, array in zip(("ids", "mask"), pair, strict=True)}
    np.savez(scratch / "sources.npz", **arrays)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [python, "-c", ALONE, folder, scratch / "sources.npz", scratch / "found.npz", NEW]
    subprocess.run(list(map(str, arguments)), check=True, cwd=scratch, env=environment)
    found = np.load(scratch / "found.npz")
    assert (padded(found["steps_0"]) == padded(found["generate_0"])).all()
    return [padded(found[f"generate_{i}"]) for i in range(len(sources))]


def onnx(folder, sources, scratch):
    """Runs the loop over onnxruntime's sessions that docs/export.md shows."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    sessions = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "start", "decode_step")}

    def run(name, given):
        session = sessions[name]
        values = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
        return {one.name.removeprefix("new_"): value for one, value in zip(session.get_outputs(), values, strict=True)}

    def tokens(ids, mask):
        encoded = run("encoder", dict(input_ids=ids, mask=mask))["encoded"]
        cache = run("start", dict(encoded=encoded, places=np.zeros(1 + NEW, np.int32)))
        cache |= {
            one.name: np.zeros((len(ids), *one.shape[1:3], 1 + NEW), np.float32)
            for one in sessions["decode_step"].get_inputs()
            if "past" in one.name
        }
        found, cache["index"] = np.zeros((len(ids), 1), np.int32), np.array(0, np.int32)
        while found.shape[1] <= NEW:
            cache |= run("decode_step", {**cache, "token": found[:, -1], "mask": mask})
            token = np.where((found == 1).any(1), 0, cache.pop("logits").argmax(-1)).astype(np.int32)
            found = np.concatenate([found, token[:, None]], axis=1)
        return found

    return [tokens(*source) for source in sources]


def ctranslate2(folder, sources, scratch):
    """Opens the folder as CTranslate2's users do, which name tokens by their text."""
    import ctranslate2

    translator = ctranslate2.Translator(str(folder), device="cpu")
    names = json.loads((folder / "shared_vocabulary.json").read_text())
    number = {name: i for i, name in reversed(list(enumerate(names)))}

    def tokens(ids, mask):
        texts = [[names[i] for i in row[real]] for row, real in zip(ids, mask, strict=True)]
        results = translator.translate_batch(
            texts, beam_size=1, max_decoding_length=NEW, min_decoding_length=0, return_end_token=True
        )
        found = np.zeros((len(ids), 1 + NEW), np.int32)
        for row, result in enumerate(results):
            said = [number[name] for name in result.hypotheses[0]][:NEW]
            found[row, 1 : 1 + len(said)] = said
        return found

    return [tokens(*source) for source in sources]


def gguf_ready(folder, sources, scratch):
    """Opens the folder with transformers: llama.cpp itself is no Python package."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()

    def tokens(ids, mask):
        given = dict(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
        return padded(model.generate(**given, max_new_tokens=NEW, do_sample=False, num_beams=1).numpy())

    return [tokens(*source) for source in sources]


RUNTIMES = {"stablehlo": stablehlo, "onnx": onnx, "ctranslate2": ctranslate2, "gguf-ready": gguf_ready}
NEEDS = {"stablehlo": "flatbuffers", "onnx": "jax2onnx", "ctranslate2": "ctranslate2", "gguf-ready": "transformers"}
