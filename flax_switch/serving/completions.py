"""What a request for completions may hold, and what is answered: OpenAI's fields, each checked before anything is computed."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Mapping
from typing import Any

from flax_switch.config import check, one_of
from flax_switch.config.generation import GenerationConfig
from flax_switch.config.ranges import Range, refusal, shown
from flax_switch.generation.pieces import Output
from flax_switch.generation.slots import ALTERNATIVES, MOST_TOP_K, Row
from flax_switch.host.json_text import field
from flax_switch.serving.engine import Job
from flax_switch.serving.engine import Sequence as Decoded
from flax_switch.serving.models import Served

WHERE = "The request"
_NUMBERS = {
    "max_tokens": (int, Range(1, 2**20)),
    "temperature": (float, Range(0, 100)),
    "top_p": (float, Range(above=0, most=1)),
    "top_k": (int, Range(0, MOST_TOP_K)),
    "seed": (int, Range(0, 2**32 - 1)),
    "n": (int, Range(1, 1024)),
    "best_of": (int, Range(1, 1024)),
    "logprobs": (int, Range(0, ALTERNATIVES)),
}
FIELDS = ("model", "prompt", *_NUMBERS, "stop", "stream", "stream_options", "user")
# OpenAI's fields that are no fields here: the values that change nothing, and what to do about others.
REFUSED = {
    "echo": ((None, False), "an output is none of the prompt's tokens; put the two together yourself"),
    "suffix": ((None, ""), "put <extra_id_0> into the prompt where text is missing"),
    "presence_penalty": ((None, 0), "leave it out"),
    "frequency_penalty": ((None, 0), "leave it out"),
    "logit_bias": ((None, {}), "leave it out"),
    "num_beams": ((None, 1), "beams are not served; use flax-switch generate --num-beams, or best_of"),
    "messages": ((None,), "these models take a prompt; give the text as prompt"),
}
_MOST_STOPS, _LONGEST_STOP = 8, 256


@dataclasses.dataclass(frozen=True)
class Completion:
    """A request that can be served."""

    model: str
    prompts: list[list[int]]  # ids
    controls: GenerationConfig
    n: int
    best_of: int
    seed: int
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool

    def job(self) -> Job:
        """Returns the sequences that are wanted: `best_of` for each prompt, one after the other."""
        scored, followed = self.logprobs is not None or self.best_of > self.n, self.stream or bool(self.stop)
        draws = [(prompt, sample) for prompt in range(len(self.prompts)) for sample in range(self.best_of)]
        return Job([Decoded(Row(self.prompts[p], self.controls, (self.seed, p, sample)), scored, followed) for p, sample in draws])

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts."""
        return sum(map(len, self.prompts))


def parse(values: Mapping[str, Any], model: Served) -> Completion:
    """Reads a request's fields. Raises `ConfigError`, one sentence, for what cannot be served."""
    for name, (neutral, instead) in REFUSED.items():
        value = values.get(name, neutral[0])
        check(value in neutral, f"{name} is not served: {instead}.")
    check(model.decoder is not None, f"The model {model.name!r} is an encoder, which completes nothing; ask /v1/embeddings of it.")
    for name in values:
        if name not in REFUSED:
            one_of("A field of the request", name, FIELDS)
    found = numbers(values)
    prompts = [model.ids_of(prompt) for prompt in texts_or_ids(values, "prompt")]
    n = found.get("n", 1)
    best_of = found.get("best_of", n)
    check(best_of >= n, f"best_of ({best_of}) is less than n ({n}); leave it out, or raise it.")
    stream = field(values, "stream", (bool, type(None)), WHERE, None) or False
    check(
        not stream or best_of == n, "best_of cannot be streamed: which is the best shows at the end. Leave out stream or best_of."
    )
    rows, most = len(prompts) * best_of, model.limits.slots
    check(rows <= most, f"{len(prompts)} prompts with {best_of} samples each are {rows} sequences; one request may have {most}.")
    options = field(values, "stream_options", (dict, type(None)), WHERE, None) or {}
    return Completion(
        model=model.name,
        prompts=prompts,
        controls=_controls(found, best_of, model),
        n=n,
        best_of=best_of,
        seed=found.get("seed", secrets.randbelow(2**32)),
        stop=_stop(values),
        logprobs=found.get("logprobs"),
        stream=stream,
        include_usage=field(options, "include_usage", (bool, type(None)), "stream_options", None) or False,
    )


def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers that a request gives, each in its range; null is as good as none."""
    found = {}
    for name, (kind, allowed) in _NUMBERS.items():
        value = field(values, name, (int, type(None)) if kind is int else (int, float, type(None)), WHERE, None)
        if value is None:
            continue
        problem = refusal(name, value, allowed)
        check(not problem, problem)
        found[name] = value
    return found


def texts_or_ids(values: Mapping[str, Any], name: str) -> list[Any]:
    """Returns what a request gives as one text, several, the ids of one, or of several: as several."""
    value = field(values, name, (str, list), WHERE)
    many = [value] if isinstance(value, str) or (value and _is_ids(value)) else value
    right = all(isinstance(one, str) or _is_ids(one) for one in many)
    check(right, f"{name} must be a text, a list of texts, a list of token ids, or a list of such lists.")
    check(len(many) > 0, f"{name} is an empty list; give at least one text.")
    return many


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _stop(values: Mapping[str, Any]) -> tuple[str, ...]:
    found = field(values, "stop", (str, list, type(None)), WHERE, None) or []
    found = [found] if isinstance(found, str) else found
    right = len(found) <= _MOST_STOPS and all(isinstance(one, str) and 0 < len(one) <= _LONGEST_STOP for one in found)
    check(right, f"stop must be a text, or up to {_MOST_STOPS} of them, each of 1 to {_LONGEST_STOP} characters.")
    return tuple(found)


def _controls(found: Mapping[str, Any], best_of: int, model: Served) -> GenerationConfig:
    """Returns the controls of each row: those that `generate` would be given."""
    given = {name: found[name] for name in ("temperature", "top_p", "top_k") if name in found}
    greedy = given.get("temperature") == 0
    check(not greedy or best_of == 1, f"temperature 0 finds one output, not {best_of}; raise it, or leave out n and best_of.")
    if greedy:
        given = {"do_sample": False}  # top_p and top_k then say nothing
    elif given or best_of > 1:
        given["do_sample"] = True
    most = model.limits.max_tokens
    length = found.get("max_tokens", min(model.defaults.get("max_new_tokens", GenerationConfig.max_new_tokens), most))
    check(length <= most, f"max_tokens must be at most {most} on this server; it is {shown(length)}.")
    controls = model.controls({**given, "max_new_tokens": length})
    check(
        controls.top_k <= MOST_TOP_K, f"top_k must be at most {MOST_TOP_K}, or 0 for all; the model's default is {controls.top_k}."
    )
    return controls


class Answer:
    """A completion on its way: the texts of its choices, and the JSON that is sent."""

    def __init__(self, request: Completion, job: Job, model: Served):
        """Takes the request, its job and the model that serves it."""
        self.request, self.job, self.model = request, job, model
        self.outputs = [Output(model.vocabulary, model.config, request.stop) for _ in job.sequences]
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())

    def news(self, index: int) -> str | None:
        """Returns the new text of a sequence, which may be empty at its end; None where there is nothing to tell."""
        sequence, output = self.job.sequences[index], self.outputs[index]
        if output.finish_reason:
            return None
        finished = sequence.finished  # before its tokens, which another thread may add to
        text = output.add(sequence.tokens, finished)
        sequence.cancelled = output.finish_reason is not None  # by a stop sequence: its slot is free for others
        return text if text or output.finish_reason else None

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended, by itself or by a stop sequence."""
        return all(output.finish_reason for output in self.outputs)

    def whole(self) -> dict[str, Any]:
        """Returns the answer to a request that is not streamed."""
        n, of = self.request.n, self.request.best_of
        kept = []
        for first in range(0, len(self.outputs), of):
            several = list(range(first, first + of))
            kept += (several if of == n else sorted(several, key=self._mean_log_prob, reverse=True))[:n]
        choices = [self.choice(i, place, self.outputs[i].told) for place, i in enumerate(kept)]
        for choice, i in zip(choices, kept, strict=True):
            choice["logprobs"] = self._logprobs(i)
        return {**self.head(choices), "usage": self.usage()}

    def head(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the fields that every answer and every event has."""
        common = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model.name}
        return {**common, "seed": self.request.seed, "choices": choices}

    def choice(self, index: int, place: int, text: str) -> dict[str, Any]:
        """Returns a choice, or a piece of one, with the place that it has among the choices."""
        return {"index": place, "text": text, "logprobs": None, "finish_reason": self.outputs[index].finish_reason}

    def event(self, index: int, text: str) -> dict[str, Any]:
        """Returns an event of a stream; log-probabilities come with the last of a choice."""
        choice = self.choice(index, index, text)
        if choice["finish_reason"]:
            choice["logprobs"] = self._logprobs(index)
        return self.head([choice])

    def usage(self) -> dict[str, int]:
        """Returns how many tokens were read and made, those of samples that are not shown included."""
        made = sum(len(output.tokens) for output in self.outputs)
        prompt = self.request.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def _mean_log_prob(self, index: int) -> float:
        length, scores = len(self.outputs[index].tokens), self.job.sequences[index].scores
        assert scores is not None  # `Completion.job` asked for them
        return float(scores.chosen[:length].mean())

    def _logprobs(self, index: int) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        output, scores = self.outputs[index], self.job.sequences[index].scores
        assert scores is not None
        offsets, text = output.offsets(), output.told
        log_probs = scores.chosen[: len(output.shown)].tolist()
        tops = []
        for place in range(len(output.shown)):
            pairs = list(zip(scores.best_ids[place].tolist(), scores.best[place].tolist(), strict=True))
            tops.append({self._name(token): value for token, value in pairs[: self.request.logprobs]})
        return {
            "tokens": [text[start:end] for start, end in zip(offsets, offsets[1:], strict=False)],
            "token_logprobs": log_probs,
            "top_logprobs": tops if self.request.logprobs else None,
            "text_offset": offsets[:-1],
        }

    def _name(self, token: int) -> str:
        return self.model.vocabulary.decode([token], skip_special_tokens=False)
