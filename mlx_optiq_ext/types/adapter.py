"""Values of low-rank adapters: what is adapted, with which ranks, and what a stored adapter says of itself.

Knows nothing of MLX or files. Made by ``lora``; stored in ``adapter_config.json``; read by ``adapters``.
"""

import math
from typing import Annotated, Literal

import msgspec

from mlx_optiq_ext.types.quant import Choice, ModelFingerprint

__all__ = [
    "ADAPTER_GROUPS",
    "DEFAULT_TARGETS",
    "AdapterConfig",
    "AdapterOptions",
    "LoraTarget",
    "RankMap",
    "RankScaling",
    "TargetGroup",
    "TargetKind",
    "TrainingFacts",
]

RankScaling = Literal["by_sensitivity", "by_bits", "constant"]
TargetKind = Literal["linear", "experts", "embedding"]
TargetGroup = Literal["attention", "mlp", "experts", "router", "embeddings"]

ADAPTER_GROUPS: tuple[TargetGroup, ...] = ("attention", "mlp", "experts", "router", "embeddings")
DEFAULT_TARGETS = "attention,mlp,experts"


def _d(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class AdapterOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which modules an adapter changes, and how large it is there."""

    rank: Annotated[
        int,
        msgspec.Meta(
            ge=1, le=1024, description="Rank that a module has on average; of every one if constant."
        ),
    ] = 8
    rank_scaling: Annotated[
        RankScaling | None,
        _d(
            "by_sensitivity: where the output is sensitive, at as many parameters as the constant rank; "
            "constant; by_bits: the published rule, more rank where there are more bits, not where the error "
            "is. Without it: by_sensitivity where a sensitivity file is at hand, else constant."
        ),
    ] = None
    max_parameters: (
        Annotated[int, msgspec.Meta(ge=1, description="Ceiling of the adapter's parameters.")] | None
    ) = None
    targets: Annotated[str, _d("Comma-separated: attention, mlp, experts, router, embeddings.")] = (
        DEFAULT_TARGETS
    )
    adapt: Annotated[tuple[str, ...], _d("PATTERN, repeatable: adapt only matching paths.")] = ()
    num_blocks: (
        Annotated[int, msgspec.Meta(ge=1, description="Adapt only so many blocks, the last ones.")] | None
    ) = None
    scale: Annotated[float, msgspec.Meta(gt=0, description="Factor on the adapter's output.")] = 2.0
    init: Annotated[
        Literal["zero", "error"],
        _d("zero: start as the base model; error: start by undoing its quantization error (--original)."),
    ] = "zero"
    original: Annotated[
        str | None,
        _d("Unquantized weights of the base, folder or Hub id, for --init error."),
    ] = None
    sensitivity: Annotated[
        str | None, _d("Sensitivity file of the base, where it is not in the model's folder.")
    ] = None


class LoraTarget(msgspec.Struct, frozen=True, kw_only=True):
    """One module that can be adapted."""

    path: str
    kind: TargetKind
    group: TargetGroup
    inputs: int
    """I; of an embedding V."""
    outputs: int
    """O; of an embedding D."""
    experts: int = 1
    block: int | None = None
    choice: Choice | None = None
    """How the base stores it; None where it is not quantized."""

    @property
    def parameters_per_rank(self) -> int:
        """Parameters that one more rank costs."""
        return self.experts * (self.inputs + self.outputs)

    @property
    def max_rank(self) -> int:
        """Ranks beyond this add nothing."""
        return min(self.inputs, self.outputs)


class RankMap(msgspec.Struct, frozen=True, kw_only=True):
    """The rank of every target; 0 leaves a module alone."""

    ranks: dict[str, int]
    targets: tuple[LoraTarget, ...]
    scaling: RankScaling
    rank: int
    """What was asked for: ``--rank``."""
    max_parameters: int | None = None
    """The ceiling that was kept; None where the rule has none."""
    gains: dict[str, float] = {}
    """Per path: estimated divergence, nats per token, of its quantization that its ranks can undo."""
    sensitivities: dict[str, float] = {}
    """Per path, where it is known: divergence, nats per token, at 4 bits; where ``gains`` are given, at the
    base's own bits."""
    notes: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Parameters of the adapter."""
        return sum(self.ranks[t.path] * t.parameters_per_rank for t in self.targets)

    @property
    def adapted(self) -> tuple[LoraTarget, ...]:
        """Targets with a rank above 0."""
        return tuple(target for target in self.targets if self.ranks[target.path])


class TrainingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """How an adapter was made, for people; nothing depends on it."""

    method: str = ""
    """``sft``, ``dpo``, ``merge``, ``peft``."""
    data: str = ""
    steps: int = 0
    num_tokens: int = 0
    train_loss: float | None = None
    validation_loss: float | None = None
    settings: dict[str, str | float | bool | None] = {}
    notes: tuple[str, ...] = ()


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stored adapter says of itself: the ``optiq`` block of ``adapter_config.json``."""

    format_version: int = 1
    base: ModelFingerprint | None = None
    """None where whoever wrote it did not say."""
    ranks: dict[str, int]
    """Per adapted path, all above 0."""
    scale: float
    """Factor on B·A·x."""
    scales: dict[str, float] = {}
    """Paths with a factor of their own, from files of others."""
    embeddings: tuple[str, ...] = ()
    """Adapted paths that are embeddings."""
    dropout: float = 0.0
    rank_scaling: RankScaling | None = None
    targets: str = ""
    training: TrainingFacts = TrainingFacts()
    code_version: str = ""

    def scale_of(self, path: str) -> float:
        """Factor of one module."""
        return self.scales.get(path, self.scale)

    @property
    def max_rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values(), default=0)

    def check(self) -> str:
        """What is impossible in it, in words; empty where nothing is."""
        bad = [path for path, rank in self.ranks.items() if rank < 1]
        if not self.ranks or bad:
            return f"ranks must be 1 or more; {bad[0] if bad else 'none is given'}"
        wrong = [path for path in (*self.ranks, "") if not math.isfinite(self.scale_of(path))]
        return f"the scale of {wrong[0] or 'the adapter'} is not finite" if wrong else ""
