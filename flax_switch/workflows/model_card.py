"""A model card for the Hugging Face hub: what a model is, how to use it, and, of a run of ours, how it was made and what it scores.

A card goes out into the world: it names no host, no user and no folder of this machine.
"""

import json
from typing import Any

import numpy as np
from etils import epath

from flax_switch.config import SwitchConfig
from flax_switch.config.sizes import count_parameters, shorten
from flax_switch.training.findings import findings, run_findings, sparse_layer_names
from flax_switch.training.progress import duration
from flax_switch.workflows.record import RunRecord

CURVES = "loss.png"  # the picture that a card shows where there is one
_MADE = {"pretraining": "pre-trained", "finetuning": "fine-tuned", "distillation": "distilled from a teacher"}
_EVERYWHERE = ("switch_transformers", "mixture-of-experts", "jax", "flax", "flax_switch")


def model_card(
    name: str,
    config: SwitchConfig,
    *,
    licence: str,
    encoder_only: bool = False,
    record: RunRecord | None = None,
    languages: tuple[str, ...] = (),
    prefixes: tuple[str, ...] = (),
    curves: bool = False,
) -> str:
    """Returns the text of README.md.

    Args:
      name: the repository's, "owner/model".
      licence: an identifier that the hub knows, such as "apache-2.0".
      record: the run that made the model, for what it was trained on and what it scores.
      languages: codes of the text's languages, such as "en".
      prefixes: what a fine-tuned model wants before its inputs, one of several where tasks were mixed.
      curves: whether there is a picture of the curves beside the card.
    """
    made = _MADE[record.config.kind] if record else "stored"
    parts = [
        _head(name, config, licence, encoder_only, record, languages),
        f"# {name.rpartition('/')[2]}\n\nA {_kind(config, encoder_only)}, {made} with flax_switch. {_size(config)}\n",
        _use(name, config, encoder_only, prefixes),
    ]
    if record is not None:
        parts += [_results(record), _training(record, curves), _experts(record), _settings(record)]
    return "\n".join(part for part in parts if part)


def _head(
    name: str, config: SwitchConfig, licence: str, encoder_only: bool, record: RunRecord | None, languages: tuple[str, ...]
) -> str:
    """Returns what the hub reads: the block of YAML at the top."""
    import yaml

    tags = [tag for tag in _EVERYWHERE if config.is_sparse or tag not in _EVERYWHERE[:2]]
    task = "feature-extraction" if encoder_only else "text2text-generation"
    values: dict[str, Any] = {"license": licence, "library_name": "transformers", "pipeline_tag": task, "tags": tags}
    if languages:
        values["language"] = list(languages)
    if record is not None and record.evals:
        metrics = [
            {"type": "loss" if "entropy" in one.name else "score", "name": one.name, "value": round(float(one.value), 4)}
            for one in record.results()
            if "second" not in one.name and "training" not in one.name
        ]
        about = {"type": "text2text-generation", "name": _MADE[record.config.kind]}
        data = {"type": "custom", "name": "held-out examples of the training's data"}
        values["model-index"] = [
            {"name": name.rpartition("/")[2], "results": [{"task": about, "dataset": data, "metrics": metrics}]}
        ]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _kind(config: SwitchConfig, encoder_only: bool) -> str:
    family = "Switch Transformer" if config.is_sparse else "T5 model"
    return f"{family}'s encoder" if encoder_only else family


def _size(config: SwitchConfig) -> str:
    size, sparse = count_parameters(config), sum(stack.num_sparse for stack in config.stacks)
    layers = " and ".join(f"{stack.num_layers} {stack.name}" for stack in config.stacks)
    experts = f", {sparse} of them with {config.num_experts} experts each" if sparse else ""
    active = f", {shorten(size.active)} of them at work for a token" if sparse else ""
    return (
        f"It has {shorten(size.total)} parameters{active}: {layers} layers{experts}; "
        f"width {config.d_model}, MLP {config.d_ff}, {config.vocab_size} ids."
    )


def _use(name: str, config: SwitchConfig, encoder_only: bool, prefixes: tuple[str, ...]) -> str:
    example = f"{prefixes[0]}A text of yours." if prefixes else "A <extra_id_0> walks into a bar."
    classes = ("SwitchTransformersEncoderModel", "T5EncoderModel") if encoder_only else _FULL
    model = classes[0 if config.is_sparse else 1]
    last = (
        "print(model(**inputs).last_hidden_state.shape)"
        if encoder_only
        else "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=32)))"
    )
    encoded = "print(model.encode(**model.vocabulary(text)).last_hidden_state.shape)"
    ours = encoded if encoder_only else "print(model.generate(text, max_new_tokens=32).texts)"
    return f"""## Use it

With transformers (PyTorch):

```python
from transformers import AutoTokenizer, {model}

tokenizer, model = AutoTokenizer.from_pretrained("{name}"), {model}.from_pretrained("{name}")
inputs = tokenizer({json.dumps(example, ensure_ascii=False)}, return_tensors="pt")
{last}
```

With flax_switch (JAX):

```python
import flax_switch as fs

model = fs.load_pretrained("{name}")
text = {json.dumps(example, ensure_ascii=False)}
{ours}
```
"""


_FULL = ("SwitchTransformersForConditionalGeneration", "T5ForConditionalGeneration")


def _results(record: RunRecord) -> str:
    rows = [f"| {one.name} | {one.value:{one.form}} |" for one in record.results()]
    said = [*(findings(record.config.model, record.evals[-1]) if record.evals else []), *run_findings(record.train)]
    worth = "\n".join(["", "Worth knowing:", "", *(f"- {one}" for one in said), ""]) if said else ""
    return "## Results\n\n| | |\n|---|---|\n" + "\n".join(rows) + f"\n{worth}"


def _training(record: RunRecord, curves: bool) -> str:
    config, starts = record.config, [line for line in record.sessions if line["event"] == "start"]
    step = record.train[-1]["step"]
    facts = [f"{step:,} of {config.train.steps:,} steps, {duration(record.seconds)} of training"]
    if record.started:
        facts += [f"begun {record.started}"]
    if starts:
        last = starts[-1]
        facts += [f"on {last['devices']} × {last['device']}", f"Python {last['python']}, {_versions(last['versions'])}"]
        facts += [_data(about) for about in last["data"]]
    picture = f"\n![Cross-entropy by step]({CURVES})\n" if curves else ""
    return "## Training\n\n" + "\n".join(f"- {fact}" for fact in facts) + f"\n{picture}"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _data(about: dict[str, Any]) -> str:
    source = about.get("source", about.get("task", ""))
    names = [_file_name(one) for one in (source if isinstance(source, list) else [source])]
    counted = []
    for kind, word in (("train", "for training"), ("validation", "for validation"), ("heldout", "held out")):
        numbers = [f"{count:,} {unit}" for unit, count in (about.get(kind) or {}).items() if isinstance(count, int)]
        counted += [f"{' with '.join(numbers)} {word}"] if numbers else []
    data = "the corpus that comes with flax_switch" if names == ["default"] else ", ".join(names)
    return f"data: {data}" + (f" ({'; '.join(counted)})" if counted else "")


def _file_name(value: Any) -> Any:
    """Returns the last part of what is a path, and all else as it is."""
    return epath.Path(value).name if isinstance(value, str) and "/" in value else value


def _experts(record: RunRecord) -> str:
    """Returns how evenly the experts were used at the last evaluation; '' for a dense model."""
    layers, last = sparse_layer_names(record.config.model), record.evals[-1] if record.evals else record.train[-1]
    loads = last.get("routers/tokens_per_expert")
    if not layers or loads is None:
        return ""
    rows, experts = [], record.config.model.num_experts
    for i, layer in enumerate(layers):
        shares = np.asarray(loads[i], float) / max(float(np.sum(loads[i])), 1.0) * experts
        dropped, entropy = (last.get(f"routers/{n}") for n in ("fraction_tokens_left_behind", "router_entropy"))
        rows.append(
            f"| {layer} | {shares.min():.2f} to {shares.max():.2f} | "
            f"{'–' if entropy is None else f'{entropy[i]:.2f} of {np.log(experts):.2f}'} | "
            f"{'–' if dropped is None else f'{100 * dropped[i]:.1f} %'} |"
        )
    head = "| layer | experts' load, 1 being even | entropy of the router, nats | tokens dropped |\n|---|---|---|---|\n"
    return f"## Experts\n\n{head}" + "\n".join(rows) + "\n"


def _settings(record: RunRecord) -> str:
    values = {
        section: {name: _cleaned(value) for name, value in fields.items() if name != "cache_dir"}
        if isinstance(fields, dict)
        else fields
        for section, fields in record.config.to_dict().items()
    }
    shown = json.dumps(values, indent=2, ensure_ascii=False)
    return f"## Recipe\n\n<details><summary>All settings of the run</summary>\n\n```json\n{shown}\n```\n\n</details>\n"


def _cleaned(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cleaned(one) for one in value]
    if isinstance(value, dict):
        return {name: _cleaned(one) for name, one in value.items()}
    return _file_name(value)
