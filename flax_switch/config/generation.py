"""The controls of generation: names, meanings and defaults of Hugging Face's `generate`. What cannot be is refused by name."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Self

import numpy as np

from flax_switch.config.base import _Section, check, one_of
from flax_switch.config.model import SwitchConfig
from flax_switch.config.ranges import Natural, Range

ROUTINGS = ("auto", "dropless", "as_trained")
SEARCHES = ("huggingface", "t5x")

# Neutral values, with which a control changes nothing. Only sampling, or only beams, heed these controls.
SAMPLING_ONLY = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
BEAMS_ONLY = {
    "search": "huggingface", "length_penalty": 1.0, "brevity_penalty": None, "early_stopping": False, "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}  # fmt: skip
T5X_ALPHA = 0.6  # T5X's default

_Length = Annotated[int, Range(1, largest=2**20)]
_Rows = Annotated[int, Range(1, largest=2**16)]


@dataclasses.dataclass(frozen=True)
class GenerationConfig(_Section):
    """How tokens are chosen. Lengths are in tokens; every id is an id of the model's vocabulary.

    Raises `ConfigError` naming the control that is impossible, or that contradicts another one.
    """

    # --- length
    max_new_tokens: _Length = 20  # after the decoder's prefix
    min_new_tokens: Natural = 0  # EOS is impossible before
    # --- beams
    num_beams: _Rows = 1  # 1: greedy search, or sampling
    num_return_sequences: _Rows = 1  # of every source: its best beams, or independent samples
    search: str = "huggingface"  # whose beam search; "t5x": T5X's, with its brevity_penalty (None: 0.6)
    # a beam's score is its summed log-probabilities / length**length_penalty
    length_penalty: Annotated[float, Range(-10, 10)] = 1.0
    # T5X's alpha, in place of length_penalty: / ((5 + length) / 6)**alpha
    brevity_penalty: Annotated[float, Range(0, 10, off="None turns it off.")] | None = None
    early_stopping: bool | str = False  # True: at num_beams finished ones; False: by a heuristic; "never": only when it is certain
    num_beam_groups: _Rows = 1  # diverse beam search: groups, each of which is kept from what those before it say
    diversity_penalty: Annotated[float, Range(0, 1e6, off="0 turns it off.")] = (
        0.0  # off a token for each beam of them that says it
    )
    # --- contrastive search: the top_k most probable tokens compete
    penalty_alpha: Annotated[float, Range(0, 1, off="None turns it off.")] | None = None  # weight of likeness to what was said
    # --- sampling
    do_sample: bool = False
    temperature: Annotated[float, Range(1e-10, off="do_sample=False takes the most probable token.")] = 1.0
    top_k: Annotated[int, Range(0, off="0 turns it off.")] = 50  # 0: all; of contrastive search the candidates
    top_p: Annotated[float, Range(above=0, most=1, off="1 turns it off.")] = 1.0
    min_p: Annotated[float, Range(0, 1, off="None turns it off.")] | None = None  # relative to the most probable token
    typical_p: Annotated[float, Range(above=0, most=1, off="1 turns it off.")] = 1.0
    # --- what may be said
    repetition_penalty: Annotated[float, Range(1e-6, 1e6, off="1 turns it off.")] = 1.0
    no_repeat_ngram_size: Natural = 0
    encoder_no_repeat_ngram_size: Natural = 0  # n-grams of the source that may not be repeated
    bad_words_ids: tuple[tuple[Natural, ...], ...] | None = None
    suppress_tokens: tuple[Natural, ...] | None = None
    begin_suppress_tokens: tuple[Natural, ...] | None = None
    forced_bos_token_id: Natural | None = None  # the token after the start token, if the prefix is that token alone
    forced_eos_token_id: Natural | tuple[Natural, ...] | None = None  # the last of max_new_tokens
    # --- special tokens; None: the model config's
    eos_token_id: Natural | tuple[Natural, ...] | None = None  # several end a sequence alike
    pad_token_id: Natural | None = None
    decoder_start_token_id: Natural | None = None
    # --- beyond the tokens
    output_scores: bool = False  # return the processed scores of every step, [steps, rows, V]
    routing: str = "auto"  # of sparse layers: "dropless", "as_trained", or as_trained for fixed capacities and else dropless

    def __post_init__(self) -> None:
        for name in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "eos_token_id"):
            object.__setattr__(self, name, tuples(getattr(self, name)))
        super().__post_init__()
        check(
            self.early_stopping in (False, True, "never"),
            f"early_stopping must be False, True or 'never'; it is {self.early_stopping!r}.",
        )
        one_of("routing", self.routing, ROUTINGS)
        one_of("search", self.search, SEARCHES)
        self._check_together()

    def _check_together(self) -> None:
        check(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens ({self.max_new_tokens}).",
        )
        for needed, controls in (("do_sample=True", SAMPLING_ONLY), ("num_beams of at least 2", BEAMS_ONLY)):
            if self.do_sample if controls is SAMPLING_ONLY else self.num_beams > 1:
                continue
            for name, neutral in controls.items():
                if name == "top_k" and self.penalty_alpha is not None:
                    continue
                check(
                    getattr(self, name) == neutral,
                    f"{name}={getattr(self, name)!r} has no effect without {needed}; set that, or leave {name} out.",
                )
        check(
            self.length_penalty == 1.0 or self.brevity_penalty is None,
            "length_penalty and brevity_penalty both say how a beam's length counts; set one of them.",
        )
        for name, neutral in {"do_sample": False, "length_penalty": 1.0, "early_stopping": False, "num_beam_groups": 1}.items():
            check(
                self.search != "t5x" or getattr(self, name) == neutral,
                f"{name}={getattr(self, name)!r} is none of T5X's beam search; leave it out, or set search='huggingface'.",
            )
        self._check_groups()
        if self.penalty_alpha is not None:
            for name, neutral in {"do_sample": False, "num_beams": 1}.items():
                check(
                    getattr(self, name) == neutral,
                    f"{name}={getattr(self, name)!r} is none of contrastive search; leave it out, or penalty_alpha.",
                )
            check(self.top_k > 1, f"penalty_alpha needs a top_k of at least 2, of which it chooses; it is {self.top_k}.")
        if self.num_beams > 1:
            check(
                self.num_return_sequences <= self.num_beams,
                f"num_return_sequences ({self.num_return_sequences}) is more than num_beams ({self.num_beams}).",
            )
        else:
            check(
                self.do_sample or self.num_return_sequences == 1,
                f"num_return_sequences={self.num_return_sequences} needs do_sample=True or beams: greedy search finds one.",
            )
        suppressed = set(self.suppress_tokens or ())
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = set(as_ids(getattr(self, name)))
            check(
                not forced or not forced <= suppressed,
                f"{name} forces {sorted(forced)}, which suppress_tokens forbids; take them out of one of the two.",
            )
        for word in self.bad_words_ids or ():
            check(len(word) > 0, "bad_words_ids holds an empty word; every word needs at least one id.")

    def _check_groups(self) -> None:
        groups, penalty = self.num_beam_groups, self.diversity_penalty
        check(
            self.num_beams % groups == 0,
            f"num_beams ({self.num_beams}) must be a multiple of num_beam_groups ({groups}); groups have the same size.",
        )
        check(groups == 1 or penalty > 0, f"num_beam_groups={groups} needs a diversity_penalty above 0: the groups would be alike.")
        check(
            groups > 1 or penalty == 0,
            f"diversity_penalty={penalty!r} has no effect without num_beam_groups of at least 2; set that, or leave it out.",
        )
        check(
            groups == 1 or not self.do_sample,
            f"do_sample=True is none of diverse beam search; leave it out, or num_beam_groups={groups}.",
        )

    def for_model(self, config: SwitchConfig) -> Self:
        """Returns a copy with the model's special tokens filled in and every id checked against its vocabulary."""
        filled = dataclasses.replace(
            self,
            eos_token_id=(
                (config.eos_token_id, *config.extra_eos_token_ids) if self.eos_token_id is None else as_ids(self.eos_token_id)
            ),
            pad_token_id=config.pad_token_id if self.pad_token_id is None else self.pad_token_id,
            decoder_start_token_id=(
                config.decoder_start_token_id if self.decoder_start_token_id is None else self.decoder_start_token_id
            ),
            forced_eos_token_id=None if self.forced_eos_token_id is None else as_ids(self.forced_eos_token_id),
            top_k=self.top_k if self.penalty_alpha is None else min(self.top_k, config.vocab_size),
        )
        if config.decoder_only:
            neutral = {"search": "huggingface", "forced_bos_token_id": None}
            for name, value in neutral.items():
                check(
                    getattr(self, name) == value,
                    f"{name}={getattr(self, name)!r} is for models with an encoder, whose decoder begins with its start token; "
                    "leave it out.",
                )
        V = config.vocab_size
        for name in _IDS:
            for token in _flat(getattr(filled, name)):
                check(token < V, f"{name} holds {token!r}, which is no id of the vocabulary of {V}.")
        ends = as_ids(filled.eos_token_id)
        check(len(ends) > 0, "eos_token_id is empty; to ignore EOS, set min_new_tokens to max_new_tokens.")
        check(len(ends) < V, f"eos_token_id names all {V} tokens of the vocabulary; leave at least one.")
        check(
            len(set(filled.suppress_tokens or ())) < V,
            f"suppress_tokens forbids all {V} tokens of the vocabulary; leave at least one.",
        )
        if filled.routing == "dropless" and config.is_sparse:
            check(
                config.router_type != "experts_choose",
                "routing='dropless' needs tokens that choose; this model has router_type='experts_choose'. Use 'as_trained'.",
            )
        return filled

    @property
    def group_size(self) -> int:
        """How many beams compete with each other: all of a source, or of a group."""
        return self.num_beams // self.num_beam_groups

    @property
    def num_candidates(self) -> int:
        """How many continuations of a group's beams are compared: enough that as many remain if EOS tokens lead."""
        return max(2, 1 + len(as_ids(self.eos_token_id))) * self.group_size

    @property
    def rows_together(self) -> int:
        """How many rows may read each other's past: beams of a source, or the candidates of contrastive search."""
        return self.num_beams if self.penalty_alpha is None else self.top_k

    @property
    def rows_per_source(self) -> int:
        """How many rows of a batch share one source: those that are together, or samples."""
        return self.rows_together if self.rows_together > 1 else self.num_return_sequences


# transformers' options that are no controls here: the one value that says what happens anyway, and what to do about others.
_FIXED = {
    "use_cache": (True, "generation always keeps a cache, and finds the tokens that it would find without; leave it out"),
    "return_dict_in_generate": (True, "what comes back is always a GenerationOutput, whose .sequences are the ids; leave it out"),
    "past_key_values": (None, "the cache lives inside the compiled program; give the tokens so far as decoder_input_ids"),
    "cache": (None, "the cache lives inside the compiled program; give the tokens so far as decoder_input_ids"),
    "streamer": (None, "iterate over stream(...), which takes the same arguments and gives tokens as they are made"),
    "max_length": (None, "it counts the start token; set max_new_tokens, one less"),
    "min_length": (None, "it counts the start token; set min_new_tokens, one less"),
}

INSTEAD = {name: instead for name, (_, instead) in _FIXED.items()}  # what is no control here -> what to do


def make_controls(values: Mapping[str, Any], config: SwitchConfig) -> GenerationConfig:
    """Returns controls for a model, from keyword arguments; an unknown name is an error that suggests the nearest one."""
    for name, (fixed, instead) in _FIXED.items():
        value = values.get(name)
        check(value is None or value is fixed, f"{name}={value!r} is no control: {instead}.")
    values = {name: value for name, value in values.items() if name not in _FIXED}
    return GenerationConfig(**values).for_model(config)


def split_numbers(controls: GenerationConfig) -> tuple[GenerationConfig, dict[str, np.ndarray | np.generic]]:
    """Returns the controls that shape a program, and the numbers that it takes as inputs: one program serves all their values.

    Of a number, the first part keeps only whether it is neutral. `length_divisors[n]` is what the score of a beam of n new
    tokens is divided by.
    """
    numbers: dict[str, Any] = {name: np.float32(getattr(controls, name) or 0.0) for name in _ON_VALUES if name != "min_new_tokens"}
    numbers["min_new_tokens"] = np.int32(controls.min_new_tokens)
    lengths = np.arange(controls.max_new_tokens + 1, dtype=np.float64)
    lengths[0] = 1.0  # no sequence is without a token
    alpha = controls.length_penalty if controls.brevity_penalty is None else controls.brevity_penalty
    base = lengths if controls.brevity_penalty is None else (5.0 + lengths) / 6.0
    numbers["length_divisors"] = (base**alpha).astype(np.float32)
    changes: dict[str, Any] = {name: on for name, on in _ON_VALUES.items() if getattr(controls, name) != _NEUTRAL[name]}
    changes.update(brevity_penalty=None, length_penalty=1.0 if alpha > 0 or controls.search == "t5x" else 0.0)
    if controls.search == "t5x":
        numbers["brevity_penalty"] = np.float32(T5X_ALPHA if controls.brevity_penalty is None else controls.brevity_penalty)
    return dataclasses.replace(controls, **changes), numbers


def as_ids(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns one id, several or none as a tuple, each once."""
    if value is None:
        return ()
    return tuple(dict.fromkeys(value)) if isinstance(value, (tuple, list)) else (value,)


_IDS = (
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "eos_token_id",
    "pad_token_id", "decoder_start_token_id",
)  # fmt: skip
_NEUTRAL = {
    "temperature": 1.0, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "repetition_penalty": 1.0, "min_new_tokens": 0,
    "diversity_penalty": 0.0, "penalty_alpha": None,
}  # fmt: skip
_ON_VALUES = {
    "temperature": 0.5, "top_p": 0.5, "min_p": 0.5, "typical_p": 0.5, "repetition_penalty": 2.0, "min_new_tokens": 1,
    "diversity_penalty": 0.5, "penalty_alpha": 0.5,
}  # fmt: skip


def tuples(value: Any) -> Any:
    """Returns lists and arrays as tuples, so that controls can be hashed."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _flat(value: Any) -> list[Any]:
    if value is None:
        return []
    return [token for v in value for token in _flat(v)] if isinstance(value, tuple) else [value]
