"""Every setting of a run, as frozen dataclasses that are validated when built.

Model settings carry the names of the published Hugging Face `config.json`. The recipe's values are those of the
DeepSeek-V3 report (arXiv 2412.19437, §4.2); a run overrides what it needs. A file in `configs/` returns one
`RunConfig` from `get_config()`; `dsv3_jax.config_flags` lets the command line override any field.
"""

import dataclasses
import json
import types
import typing
from typing import Any

PRECISIONS = ("fp32", "bf16", "fp8")
REMAT_POLICIES = ("none", "report", "full")
FP8_INPUT_CACHES = ("e4m3", "bf16")
FP8_ATTENTION_CACHES = ("e5m6", "e4m3", "bf16")
MOMENTS = ("bf16", "fp32")
FP8_MULTIPLE = 16  # what the kernels ask of every dimension that a product contracts


def setting(default: Any, help: str) -> Any:
    """Returns a dataclass field with a default and its one-line description, unit included."""
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def require(claim: bool, field: str, value: Any, fix: str) -> None:
    """Raises a ValueError that names the field, its value and the fix, unless the claim holds."""
    if not claim:
        raise ValueError(f"{field}={value!r}: {fix}")


def _strip_optional(hint: Any) -> tuple[type, bool]:
    """Splits `X | None` into (X, True) and any other type into (type, False)."""
    if isinstance(hint, types.UnionType):
        (inner,) = [arg for arg in hint.__args__ if arg is not types.NoneType]
        return inner, True
    return hint, False


def _require_types(config: Any, prefix: str) -> None:
    """Raises a ValueError for a value that is not of its field's type; an int is a float too."""
    for name, hint in typing.get_type_hints(type(config)).items():
        field_type, is_optional = _strip_optional(hint)
        value = getattr(config, name)
        accepted = (int, float) if field_type is float else (field_type,)
        is_number_as_bool = isinstance(value, bool) and field_type is not bool
        is_right = (is_optional and value is None) or (isinstance(value, accepted) and not is_number_as_bool)
        require(is_right, f"{prefix}{name}", value, f"must be of type {field_type.__name__}")


def _require_positive(config: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}.{name}", value, "must be greater than 0")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071) as DeepSeek-V3 uses it: frequencies interpolated by ramp, softmax scale by mscale²."""

    type: str = setting("yarn", "kind of scaling; only yarn")
    factor: float = setting(40.0, "context extension factor s")
    original_max_position_embeddings: int = setting(4096, "context length before the extension, tokens")
    beta_fast: float = setting(32.0, "rotations above which a frequency is kept")
    beta_slow: float = setting(1.0, "rotations below which a frequency is divided by factor")
    mscale: float = setting(1.0, "coefficient of the cos/sin magnitude; equal to mscale_all_dim leaves them unscaled")
    mscale_all_dim: float = setting(1.0, "coefficient of the softmax scale's magnitude")

    def __post_init__(self):
        prefix = "model.rope_scaling"
        _require_types(self, f"{prefix}.")
        require(self.type == "yarn", f"{prefix}.type", self.type, "only 'yarn' is defined for DeepSeek-V3")
        _require_positive(self, prefix, "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        require(self.factor >= 1, f"{prefix}.factor", self.factor, "must be at least 1")
        require(self.beta_fast > self.beta_slow, f"{prefix}.beta_fast", self.beta_fast,
                f"must exceed beta_slow={self.beta_slow}")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network (§2.1, §2.2, §4.2). Hugging Face field names; defaults are the published 671B values."""

    vocab_size: int = setting(129280, "rows of the embedding, tokens")
    hidden_size: int = setting(7168, "width of the residual stream")
    intermediate_size: int = setting(18432, "width of a dense feed-forward layer")
    moe_intermediate_size: int = setting(2048, "width of one expert")
    num_hidden_layers: int = setting(61, "transformer layers, without MTP modules")
    num_nextn_predict_layers: int = setting(1, "MTP modules D; 0 turns multi-token prediction off")
    num_attention_heads: int = setting(128, "attention heads")
    n_shared_experts: int = setting(1, "experts that every token visits")
    n_routed_experts: int = setting(256, "experts that the router chooses from, per layer")
    routed_scaling_factor: float = setting(2.5, "factor on the normalised gate weights")
    kv_lora_rank: int = setting(512, "width of the compressed key-value latent")
    q_lora_rank: int | None = setting(1536, "width of the compressed query latent; none: queries are not compressed")
    qk_rope_head_dim: int = setting(64, "rotary part of a query or key head")
    qk_nope_head_dim: int = setting(128, "position-free part of a query or key head")
    v_head_dim: int = setting(128, "width of a value head")
    n_group: int = setting(8, "groups that the routed experts form")
    topk_group: int = setting(4, "groups a token may choose experts from")
    num_experts_per_tok: int = setting(8, "routed experts per token")
    first_k_dense_replace: int = setting(3, "leading layers with a dense feed-forward instead of experts")
    norm_topk_prob: bool = setting(True, "normalise the chosen gate weights to sum 1")
    max_position_embeddings: int = setting(163840, "longest sequence, tokens")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies")
    rope_scaling: RopeScaling | None = setting(None, "YaRN context extension; none: plain rotary positions")
    rms_norm_eps: float = setting(1e-6, "epsilon of the RMSNorms (latent norms always use 1e-6)")
    initializer_range: float = setting(0.02, "init std in config.json; training uses train.init_std")
    aux_loss_alpha: float = setting(0.001, "balance factor in config.json; training uses train.balance_loss_alpha")
    bos_token_id: int = setting(0, "id that opens a document")
    eos_token_id: int = setting(1, "id that closes a document")
    precision: str = setting("bf16", f"compute precision of the linears: {' | '.join(PRECISIONS)}")
    fp8_input_cache: str = setting(
        "e4m3", f"what an FP8 linear keeps of its input for the backward pass: {' | '.join(FP8_INPUT_CACHES)}; routed "
        "experts keep the E4M3 rows that reach them, whatever it says",
    )  # fmt: skip
    fp8_attention_cache: str = setting(
        "e5m6", f"what is kept of the attention output with FP8 linears: {' | '.join(FP8_ATTENTION_CACHES)}"
    )
    fp8_swiglu_cache: str = setting(
        "e4m3", f"what is kept of SwiGLU inputs between FP8 linears: {' | '.join(FP8_INPUT_CACHES)}"
    )
    remat_policy: str = setting("none", f"what the backward pass recomputes: {' | '.join(REMAT_POLICIES)}")
    exchange_capacity: float = setting(
        1.25, "room for tokens that travel to experts at one time, relative to what uniform routing needs; "
        "what finds no room travels in further rounds",
    )  # fmt: skip
    n_redundant_experts: int = setting(
        0, "slots for further copies of busy experts, per layer, in prefill and decoding on a mesh; results are the "
        "same; 0 in training",
    )  # fmt: skip

    def __post_init__(self):
        _require_types(self, "model.")
        _require_positive(
            self, "model", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size",
            "num_hidden_layers", "num_attention_heads", "n_routed_experts", "routed_scaling_factor", "kv_lora_rank",
            "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "n_group", "topk_group", "num_experts_per_tok",
            "max_position_embeddings", "rope_theta", "rms_norm_eps", "initializer_range", "exchange_capacity",
        )  # fmt: skip
        for name in ("num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace", "aux_loss_alpha",
                     "n_redundant_experts"):  # fmt: skip
            require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "must not be negative")
        if self.q_lora_rank is not None:
            _require_positive(self, "model", "q_lora_rank")
        require(self.rope_theta > 1, "model.rope_theta", self.rope_theta, "must exceed 1")
        require(self.qk_rope_head_dim % 2 == 0, "model.qk_rope_head_dim", self.qk_rope_head_dim,
                "must be even: rotary positions turn pairs")  # fmt: skip
        require(self.first_k_dense_replace <= self.num_hidden_layers, "model.first_k_dense_replace",
                self.first_k_dense_replace, f"must be at most num_hidden_layers={self.num_hidden_layers}")  # fmt: skip
        require(self.n_routed_experts % self.n_group == 0, "model.n_group", self.n_group,
                f"must divide n_routed_experts={self.n_routed_experts}")  # fmt: skip
        require(self.n_routed_experts // self.n_group >= 2, "model.n_group", self.n_group,
                "leaves fewer than 2 experts in a group, and a group's score is the sum of its best two: "
                f"use at most {self.n_routed_experts // 2} groups")  # fmt: skip
        require(self.topk_group <= self.n_group, "model.topk_group", self.topk_group,
                f"must be at most n_group={self.n_group}")  # fmt: skip
        kept = self.topk_group * (self.n_routed_experts // self.n_group)
        require(self.num_experts_per_tok <= kept, "model.num_experts_per_tok", self.num_experts_per_tok,
                f"exceeds the {kept} experts that topk_group={self.topk_group} groups hold; "
                "lower it or raise topk_group")  # fmt: skip
        for name in ("bos_token_id", "eos_token_id"):
            require(0 <= getattr(self, name) < self.vocab_size, f"model.{name}", getattr(self, name),
                    f"must lie in [0, vocab_size={self.vocab_size})")  # fmt: skip
        require(self.precision in PRECISIONS, "model.precision", self.precision, f"choose one of {PRECISIONS}")
        for name, choices in {"fp8_input_cache": FP8_INPUT_CACHES, "fp8_attention_cache": FP8_ATTENTION_CACHES,
                              "fp8_swiglu_cache": FP8_INPUT_CACHES}.items():  # fmt: skip
            require(getattr(self, name) in choices, f"model.{name}", getattr(self, name), f"choose one of {choices}")
        require(not self.n_redundant_experts or not self.num_nextn_predict_layers, "model.n_redundant_experts",
                self.n_redundant_experts, "is for serving, which runs no MTP modules; set num_nextn_predict_layers=0 "
                "or n_redundant_experts=0")  # fmt: skip
        if self.precision == "fp8":
            self._require_fp8_dimensions()
        require(self.remat_policy in REMAT_POLICIES, "model.remat_policy", self.remat_policy,
                f"choose one of {REMAT_POLICIES}")  # fmt: skip

    def _require_fp8_dimensions(self) -> None:
        for name in ("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank",
                     "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value % FP8_MULTIPLE == 0, f"model.{name}", value,
                    f"must be a multiple of {FP8_MULTIPLE} with precision=fp8; change it or use bf16")  # fmt: skip

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_dense_layers(self) -> int:
        return self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each named axis; their product is the number of devices used. -1 takes what is left."""

    pipe: int = setting(1, "pipeline stages; only 1 so far")
    replica: int = setting(1, "copies of an expert-parallel group")
    node: int = setting(1, "nodes of an expert-parallel group; tokens enter each at most once")
    gpu: int = setting(-1, "devices of a node with sequences of their own; -1: all that the other axes leave")
    tensor: int = setting(1, "devices that share sequences: heads, dense feed-forwards, and tokens between blocks")
    fsdp: bool = setting(False, "gather weights layer by layer where they are used, in both passes, instead of once a "
                         "step: less memory, more traffic")  # fmt: skip

    def __post_init__(self):
        _require_types(self, "mesh.")
        for name in ("pipe", "replica", "node", "gpu", "tensor"):
            value = getattr(self, name)
            require(value > 0 or value == -1, f"mesh.{name}", value, "must be positive, or -1 for what is left")
        require(self.pipe == 1, "mesh.pipe", self.pipe, "pipeline parallelism does not exist yet; use 1")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from. Every batch is a pure function of (train.seed, position in the corpus)."""

    corpus: str = setting("", "directory written by launch/prepare_data.py")
    sequence_length: int = setting(4096, "tokens per training sequence")
    segment_masks: bool = setting(False, "documents packed into one sequence do not see each other, positions begin "
                                  "at 0 with each; False: as the report packs them")  # fmt: skip
    mixture: str = setting("", "weights as SOURCE=WEIGHT,... (not named: 0), phases as TOKENS:SOURCE=WEIGHT,...;TOKENS:"
                           "...; empty: the weights that the corpus was prepared with")  # fmt: skip
    prefetch_windows: int = setting(256, "sequences read ahead of the step")
    reader_threads: int = setting(2, "threads that read ahead; 0: none, every batch is read when it is asked for")

    def __post_init__(self):
        _require_types(self, "data.")
        _require_positive(self, "data", "sequence_length", "prefetch_windows")
        require(self.reader_threads >= 0, "data.reader_threads", self.reader_threads, "must not be negative")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The recipe (§4.2). Schedules are in tokens, as the report gives them; defaults are the report's."""

    seed: int = setting(0, "seed of the initial weights and of the order of the data")
    num_steps: int = setting(0, "optimizer steps to run in all; 0: until the schedule's tokens are used up")
    batch_size: int = setting(15360, "sequences per optimizer step after the ramp")
    batch_size_start: int = setting(3072, "sequences per optimizer step at the start of the ramp")
    batch_ramp_tokens: int = setting(469 * 10**9, "tokens over which the batch grows; 0: batch_size from the start")
    microbatch_size: int = setting(0, "sequences per gradient-accumulation pass, all devices; 0: the smallest batch")
    learning_rate: float = setting(2.2e-4, "peak learning rate")
    learning_rate_decayed: float = setting(2.2e-5, "learning rate after the cosine")
    learning_rate_last: float = setting(7.3e-6, "learning rate of the last phase")
    warmup_steps: int = setting(2000, "optimizer steps of linear warm-up from 0")
    constant_tokens: int = setting(10**13, "tokens until the cosine begins, warm-up included")
    decay_tokens: int = setting(43 * 10**11, "tokens of the cosine")
    decayed_tokens: int = setting(333 * 10**9, "tokens at learning_rate_decayed")
    last_tokens: int = setting(167 * 10**9, "tokens at learning_rate_last")
    adam_b1: float = setting(0.9, "decay of the first moment")
    adam_b2: float = setting(0.95, "decay of the second moment")
    adam_eps: float = setting(1e-8, "added to the root of the second moment")
    adam_moments: str = setting("bf16", f"precision that both moments are kept in: {' | '.join(MOMENTS)}")
    weight_decay: float = setting(0.1, "decoupled weight decay, times the learning rate")
    clip_norm: float = setting(1.0, "largest global gradient norm")
    init_std: float = setting(0.006, "standard deviation of the initial weights")
    balance_loss_alpha: float = setting(1e-4, "factor of the sequence-wise balance loss")
    bias_update_speed: float = setting(0.001, "gamma: step of the router's correction bias")
    bias_update_tokens: int = setting(143 * 10**11, "tokens after which the correction bias stands still")
    mtp_loss_weight: float = setting(0.3, "lambda: weight of the MTP loss")
    mtp_loss_weight_last: float = setting(0.1, "lambda after mtp_loss_weight_tokens")
    mtp_loss_weight_tokens: int = setting(10**13, "tokens after which lambda becomes mtp_loss_weight_last")
    ema_decay: float = setting(0.0, "decay of the parameters' moving average in host memory per update; 0: no average")
    ema_every_steps: int = setting(1, "optimizer steps between updates of the moving average")
    spike_factor: float = setting(0.0, "skip a step whose loss exceeds this many times its running mean; 0: never")
    max_bad_steps: int = setting(20, "skipped steps in a row after which training stops")
    loss_chunk_tokens: int = setting(2048, "tokens whose logits exist at one time in the loss, per device")
    log_every_steps: int = setting(1, "optimizer steps between metric lines")
    eval_every_steps: int = setting(0, "optimizer steps between held-out evaluations; 0: only at the end")
    eval_sequences: int = setting(256, "held-out sequences per evaluation")
    checkpoint_every_steps: int = setting(1000, "optimizer steps between checkpoints; the last step is always saved")
    checkpoints_to_keep: int = setting(3, "most recent checkpoints kept")
    checkpoint_keep_every_steps: int = setting(0, "checkpoints at multiples of this many steps stay for good; 0: none")
    peak_tflops: float = setting(0.0, "peak of one device for the utilisation shown, TFLOP/s; 0: utilisation not shown")

    def __post_init__(self):
        _require_types(self, "train.")
        _require_positive(
            self, "train", "batch_size", "batch_size_start", "learning_rate", "adam_eps", "clip_norm", "init_std",
            "ema_every_steps", "max_bad_steps", "loss_chunk_tokens", "log_every_steps", "eval_sequences",
            "checkpoint_every_steps", "checkpoints_to_keep",
        )  # fmt: skip
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(isinstance(value, str) or value >= 0, f"train.{field.name}", value, "must not be negative")
        for name in ("adam_b1", "adam_b2", "ema_decay"):
            require(getattr(self, name) < 1, f"train.{name}", getattr(self, name), "must be below 1")
        require(self.adam_moments in MOMENTS, "train.adam_moments", self.adam_moments, f"choose one of {MOMENTS}")
        for name in ("adam_b1", "adam_b2"):
            require(self.adam_moments == "fp32" or getattr(self, name) <= 0.98, f"train.{name}", getattr(self, name),
                    "a BF16 moment that moves by less than 2% a step stands still; lower it or set "
                    "train.adam_moments=fp32")  # fmt: skip
        require(self.batch_size_start <= self.batch_size or not self.batch_ramp_tokens, "train.batch_size_start",
                self.batch_size_start, f"the ramp only grows: at most batch_size={self.batch_size}")  # fmt: skip
        for name in ("batch_size", "batch_size_start") if self.batch_ramp_tokens else ("batch_size",):
            require(getattr(self, name) % self.rows_per_pass == 0, f"train.{name}", getattr(self, name),
                    f"must be a multiple of the {self.rows_per_pass} sequences of one gradient-accumulation pass; "
                    "change it or train.microbatch_size")  # fmt: skip
        require(self.spike_factor == 0 or self.spike_factor > 1, "train.spike_factor", self.spike_factor,
                "must exceed 1, or be 0 to turn it off")  # fmt: skip

    @property
    def rows_per_pass(self) -> int:
        """Sequences of one gradient-accumulation pass, all devices together."""
        smallest_batch = self.batch_size_start if self.batch_ramp_tokens else self.batch_size
        return self.microbatch_size if self.microbatch_size else smallest_batch

    @property
    def max_passes(self) -> int:
        """Gradient-accumulation passes of the largest batch."""
        return self.batch_size // self.rows_per_pass

    @property
    def schedule_tokens(self) -> int:
        """Tokens of all phases of the learning-rate schedule."""
        return self.constant_tokens + self.decay_tokens + self.decayed_tokens + self.last_tokens


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run: the network, the devices, the data and the recipe."""

    model: ModelConfig = setting(ModelConfig(), "the network")
    mesh: MeshConfig = setting(MeshConfig(), "the devices")
    data: DataConfig = setting(DataConfig(), "the data")
    train: TrainConfig = setting(TrainConfig(), "the recipe")

    def __post_init__(self):
        _require_types(self, "")
        require(self.data.sequence_length <= self.model.max_position_embeddings, "data.sequence_length",
                self.data.sequence_length, "is longer than model.max_position_embeddings="
                f"{self.model.max_position_embeddings}; shorten it or extend the positions")  # fmt: skip
        require(self.data.sequence_length > self.model.num_nextn_predict_layers, "data.sequence_length",
                self.data.sequence_length, "must exceed model.num_nextn_predict_layers="
                f"{self.model.num_nextn_predict_layers}")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of a configuration: where it is, what it may hold, what it means."""

    path: str  # dotted, e.g. "train.num_steps"
    type: type
    is_optional: bool
    default: Any
    help: str


def settings(config_type: type = RunConfig, prefix: str = "") -> list[Setting]:
    """Lists every leaf setting of a configuration type, in the order of its fields."""
    found = []
    for field in dataclasses.fields(config_type):
        field_type, is_optional = _strip_optional(typing.get_type_hints(config_type)[field.name])
        path = prefix + field.name
        if dataclasses.is_dataclass(field_type):
            found += settings(field_type, path + ".")
        else:
            found.append(Setting(path, field_type, is_optional, field.default, field.metadata["help"]))
    return found


def override(config: Any, values: dict[str, Any]) -> Any:
    """Returns the configuration with some settings replaced, validated anew.

    Args:
      config: any configuration dataclass.
      values: dotted path -> value. A path below an absent section (`model.rope_scaling.factor`) creates the section;
        the section's own path with None removes it.

    Raises:
      ValueError: a path that is no setting, or a value that validation refuses.
    """
    own, below = {}, {}
    names = {field.name for field in dataclasses.fields(config)}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        require(name in names, path, value, f"no such setting; {type(config).__name__} has {', '.join(sorted(names))}")
        if rest:
            below.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    for name, section_values in below.items():
        section = own.get(name, getattr(config, name))
        if section is None:
            section = _strip_optional(typing.get_type_hints(type(config))[name])[0]()
        own[name] = override(section, section_values)
    return dataclasses.replace(config, **own)


def to_json(config: RunConfig) -> str:
    """Writes a configuration as JSON text, every setting resolved."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> RunConfig:
    """Reads what `to_json` wrote.

    Raises:
      ValueError: not JSON, an unknown setting, or a value that validation refuses.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a configuration: {error}") from error
    return _from_dict(RunConfig, values, "")


def _from_dict(config_type: type, values: dict, prefix: str) -> Any:
    require(isinstance(values, dict), prefix.rstrip(".") or "configuration", values, "must be an object of settings")
    names = {field.name for field in dataclasses.fields(config_type)}
    for name in values:
        require(name in names, prefix + name, values[name], "no such setting in this version")
    hints = typing.get_type_hints(config_type)
    built = {}
    for name, value in values.items():
        field_type, _ = _strip_optional(hints[name])
        is_section = dataclasses.is_dataclass(field_type) and value is not None
        built[name] = _from_dict(field_type, value, f"{prefix}{name}.") if is_section else value
    return config_type(**built)
