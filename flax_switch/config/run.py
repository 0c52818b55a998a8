"""The settings of a run besides its model: data, optimiser, mesh and training loop, and all of them together."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, TypeVar

from flax_switch.config.base import _Section, check, may_change, one_of
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.config.model import SwitchConfig
from flax_switch.config.ranges import Count, Epsilon, Every, Natural, NotNegative, Positive, Range, Rate, Seed, Share


@dataclasses.dataclass(frozen=True)
class BatchConfig(_Section):
    """The batches of any kind of run: the fields that its `data` has beside those that say what is read."""

    section: ClassVar[str] = "data"

    inputs_length: Count = 512  # tokens, sentinels and EOS included
    targets_length: Count = 128
    batch_size: Count = 128  # rows per step over all processes
    packing: bool = False  # put several short examples in a row, with segment ids
    joined: bool = False  # inputs and targets as one sequence of both lengths together: set where model.architecture asks for it
    shuffle: bool = True
    seed: Seed = 0
    # processes that prepare batches; the order never depends on it
    num_workers: Annotated[int, Range(0, largest=1024, off="0 prepares them in this process.")] = may_change(0)
    prefetch: Count = may_change(8)  # batches held ready

    @property
    def array_lengths(self) -> dict[str, int]:
        """The arrays of a batch (`data/batches`), each with the length of its rows."""
        if self.joined:
            names = ("decoder_input_ids", "labels", "decoder_attention_mask", "prefix_mask")
            names += ("decoder_segment_ids",) if self.packing else ()
            return dict.fromkeys(names, self.inputs_length + self.targets_length)
        lengths: dict[str, int] = dict.fromkeys(("input_ids", "attention_mask"), self.inputs_length)
        lengths |= dict.fromkeys(("decoder_input_ids", "decoder_attention_mask", "labels"), self.targets_length)
        if self.packing:
            lengths |= {"input_segment_ids": self.inputs_length, "decoder_segment_ids": self.targets_length}
        return lengths

    def stack_lengths(self, model: SwitchConfig) -> dict[str, int]:
        """Returns how many tokens of a row each stack of a model reads."""
        if model.decoder_only:
            return {"decoder": self.inputs_length + self.targets_length}
        return {"encoder": self.inputs_length, "decoder": self.targets_length}


_Data = TypeVar("_Data", bound=BatchConfig)


@dataclasses.dataclass(frozen=True)
class SourceConfig(_Section):
    """One source of a mixture of texts, such as a language."""

    section: ClassVar[str] = "data.mixture"

    name: str = "text"
    # "default": the embedded corpus; else files, folders or globs, on disks, in object storage or on the hub (hf://datasets/...)
    source: str | tuple[str, ...] = "default"
    rate: Positive | None = None  # its share of the rows, over the sum of all; None: by size ** (1 / data.mixing_temperature)

    @property
    def names(self) -> tuple[str, ...]:
        """What it names, one by one."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclasses.dataclass(frozen=True)
class DataConfig(BatchConfig):
    """What text is read and how examples are made of it."""

    source: str | tuple[str, ...] = "default"  # as `SourceConfig.source`
    mixture: tuple[SourceConfig, ...] = ()  # several sources in place of `source`, whose rows take turns
    mixing_temperature: Annotated[float, Range(least=0.1)] = 1.0  # T: rates are size ** (1/T); large ones make them equal
    # read text while it is trained on, instead of tokenising all of it before; None: text on the hub alone
    streaming: bool | None = None
    # documents of a stream in memory: half of them are shuffled together, half are being read
    shuffle_buffer: Annotated[int, Range(least=2)] = 20_000
    first_documents: Count = 50_000  # of a stream: those that a vocabulary is trained on, and held-out ones are among
    text_field: str = "text"  # the field or column of JSON, tables, parquet and ArrayRecord
    document_separator: str = "line"  # of .txt: "line" (one document a line) or "blank_line"
    heldout_fraction: Share = 0.02  # of documents, chosen by a hash of their text
    vocabulary: str | None = None  # a SentencePiece .model; None: train one of vocabulary_size pieces on the corpus
    vocabulary_size: Count = 32000  # pieces, before sentinels
    num_sentinels: Annotated[int, Range(0, largest=100_000)] = 100
    span_corruption_rate: NotNegative = 1.0  # rates of the objectives in the mixture; they need not sum to 1
    prefix_lm_rate: NotNegative = 0.0
    infilling_rate: NotNegative = 0.0  # inputs of span corruption, but the whole text as targets (BART's text infilling)
    # share of its examples whose spans are widened to whole words, so that more is masked than noise_density says
    infilling_words: Annotated[float, Range(0, 1)] = 0.0
    ul2_rate: NotNegative = 0.0  # UL2's seven denoisers, each as often; with noise of their own
    causal_lm_rate: NotNegative = 0.0  # the whole text as targets, without inputs: for a decoder alone
    # inputs of span corruption begin with the last sentinel, of prefix-LM with the one before, of UL2's with these or the next
    mode_tokens: bool = False
    noise_density: Share = 0.15
    mean_noise_span_length: Annotated[float, Range(least=1)] = 3.0
    targets_length: Count = 114
    cache_dir: str | None = may_change(None)  # of tokenised text; None: a folder in the user's cache directory

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("data.document_separator", self.document_separator, ("line", "blank_line"))
        rates = {f"data.{f.name}": getattr(self, f.name) for f in dataclasses.fields(self) if f.name.endswith("_rate")}
        check(
            sum(rates.values()) > 0,
            f"One of {', '.join(rates)} must be positive; they are {', '.join(map(str, rates.values()))}.",
        )
        self._check_sources()

    def _check_sources(self) -> None:
        names = [source.name for source in self.mixture]
        check(len(set(names)) == len(names), f"The sources of a mixture need different names; these are {', '.join(names)}.")
        check(
            not self.mixture or self.source == "default",
            f"With data.mixture every source names its own text; leave data.source out, which is {self.source!r}.",
        )
        rated = [source.rate is not None for source in self.mixture]
        check(all(rated) or not any(rated), "Either every source of a mixture has a rate, or none: then their sizes decide.")
        check(
            not self.streamed or all("default" not in source.names for source in self.sources),
            "Streams (data.streaming=True, hf://...) are of text in files; the embedded corpus, 'default', is small and tokenised "
            "as a whole. Name other text, or leave data.streaming out.",
        )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources, of which there may be one."""
        return self.mixture or (SourceConfig(source=self.source),)

    @property
    def streamed(self) -> bool:
        """Whether text is read while it is trained on."""
        remote = any(name.startswith("hf://") for source in self.sources for name in source.names)
        return remote if self.streaming is None else self.streaming


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Section):
    """The optimiser and its schedule. The defaults are T5X's for pre-training."""

    section: ClassVar[str] = "optimizer"

    name: str = "adafactor"  # or "adamw", "adamw_rms" (rates relative to a parameter's RMS), "muon" (the same, matrices by Muon)
    schedule: str = "rsqrt"  # learning_rate * rsqrt(max(step, warmup_steps)); or "constant", "linear", "cosine"
    learning_rate: Positive = may_change(1.0)  # the factor in rsqrt; else the peak. Lower it if the loss becomes NaN or infinite
    warmup_steps: Natural = 10_000  # rsqrt: constant until then; others: linear from 0
    final_learning_rate: NotNegative = 0.0  # of linear and cosine, at the last step
    decay_rate: Positive = 0.8  # Adafactor's second moments: 1 - step**-decay_rate
    multiply_by_parameter_scale: bool = True  # Adafactor's; adamw_rms and muon always do, adamw never does
    min_dim_size_to_factor: Count = 128
    # Adafactor's, on the update's RMS, per expert
    clipping_threshold: Annotated[float, Range(above=0, off="None clips no update.")] | None = 1.0
    b1: Rate = 0.9
    b2: Rate = 0.999
    eps: Epsilon = 1e-8
    weight_decay: NotNegative = 0.0
    clip_global_norm: Annotated[float, Range(above=0, off="None clips no gradient.")] | None = None
    # of parameters in bfloat16: the optimiser works in float32, and a sum is rounded up or down by chance, on average to itself
    stochastic_rounding: bool = False
    trainable: str = ".*"  # a regular expression over parameter paths, or a name in training/freezing; all others are frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("optimizer.name", self.name, ("adafactor", "adamw", "adamw_rms", "muon"))
        one_of("optimizer.schedule", self.schedule, ("rsqrt", "constant", "linear", "cosine"))


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Section):
    """How devices are laid out: axes ('data', 'expert', 'model'); one of them may be -1, which takes what is left."""

    section: ClassVar[str] = "mesh"

    data: Annotated[int, Range(least=1, also=(-1,))] = -1
    expert: Annotated[int, Range(least=1, also=(-1,))] = 1
    model: Annotated[int, Range(least=1, also=(-1,))] = 1
    # parameters and optimiser state in parts on all devices of the batch, gathered a layer at a time; experts' over data
    fsdp: bool = False
    # of data and of expert, over how many slices they go that a data centre's network joins, as outermost parts of these axes
    dcn_data: Count = 1
    dcn_expert: Count = 1
    mode: str = "jit"  # or "pmap": the same train step under jax.pmap, for data and expert parallelism

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("mesh.mode", self.mode, ("jit", "pmap"))
        check(
            self.mode == "jit" or (self.model == 1 and not self.fsdp),
            "mesh.mode='pmap' replicates all parameters except the experts' on every device, so it needs model=1 and fsdp=False; "
            f"they are model={self.model} and fsdp={self.fsdp}. Set mesh.mode='jit' to split parameters over these axes.",
        )
        axes = (self.data, self.expert, self.model)
        check(
            axes.count(-1) <= 1,
            f"mesh axes must be positive, at most one of them -1; they are data={self.data}, expert={self.expert}, "
            f"model={self.model}.",
        )
        for name in ("data", "expert"):
            size, slices = getattr(self, name), getattr(self, f"dcn_{name}")
            check(
                size == -1 or size % slices == 0,
                f"mesh.{name} counts the devices of all slices, so mesh.dcn_{name} must divide it; they are {size} and {slices}.",
            )


TRACKERS = ("jsonl", "tensorboard", "wandb")


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Section):
    """The training loop."""

    section: ClassVar[str] = "train"

    steps: Count = may_change(524_288)
    seed: Seed = 0
    microbatches: Count = 1  # a batch is split into this many; the update equals the unsplit batch's
    log_every: Every = may_change(100)
    eval_every: Every = may_change(1000)
    eval_batches: Count = may_change(20)
    checkpoint_every: Every = may_change(1000)
    keep_last: Count = may_change(3)
    # keep checkpoints whose step is a multiple of it for good
    keep_every: Annotated[int, Range(least=1, off="None keeps none for good.")] | None = may_change(None)
    max_nonfinite_steps: Count = may_change(10)  # so many updates in a row that are not finite, and so are skipped, end the run
    # seconds that a step of several processes may take, the wait for others included; then all end, naming those that are missing
    step_timeout: Annotated[float, Range(above=0, off="None waits for ever.")] | None = may_change(None)
    sample_spans: Natural = may_change(4)  # held-out examples shown at the end: with masked spans filled in, or beside predictions
    log_to: tuple[str, ...] | None = may_change(None)  # of TRACKERS, or "module:function"; None: tensorboard where it is installed

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.log_to or ():  # metrics.jsonl is always written: resuming and reports need it
            if ":" not in name:
                one_of("train.log_to", name, TRACKERS)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(_Section):
    """A whole run: what a recipe in configs/ returns and what a checkpoint carries."""

    kind: ClassVar[str] = "pretraining"

    model: SwitchConfig = dataclasses.field(default_factory=SwitchConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = may_change(MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "data", joined_for(self.model, self.data))
        check_microbatches(self.data, self.train)
        self.model.check_trainable()
        check(
            self.model.head == LANGUAGE_MODEL,
            f"model.head={self.model.head!r} is trained by flax-switch finetune (docs/heads.md); here set head={LANGUAGE_MODEL!r}.",
        )
        check(
            self.data.causal_lm_rate == 0 or self.data.joined,
            "data.causal_lm_rate is for a decoder alone, as its examples have no inputs; set model.architecture='decoder_only', or "
            "take data.prefix_lm_rate.",
        )


def joined_for(model: SwitchConfig, data: _Data) -> _Data:
    """Returns settings of data with batches of the form that a model reads; raises where another form was asked for."""
    check(
        model.decoder_only or not data.joined,
        "data.joined is for model.architecture='decoder_only', an encoder reads inputs by themselves; set data.joined=False.",
    )
    return data.replace(joined=True) if model.decoder_only and not data.joined else data


def check_microbatches(data: BatchConfig, train: TrainConfig) -> None:
    """Raises unless the batches of a run split into its micro-batches."""
    check(
        data.batch_size % train.microbatches == 0,
        f"train.microbatches ({train.microbatches}) must divide data.batch_size ({data.batch_size}).",
    )
