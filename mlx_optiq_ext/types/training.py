"""What a user may set for the training of an adapter, and what a training reports.

Plain data; knows no model. Options become flags through ``formats.arguments``; records are the lines of
metrics.jsonl.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

__all__ = [
    "CURVE_FILE",
    "METRICS_FILE",
    "Metric",
    "PartSize",
    "RenderedSample",
    "TextPiece",
    "TrainOptions",
    "TrainPreview",
    "TrainRecord",
    "TrainSummary",
    "ValidationRecord",
]

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.svg"


def _d(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class TrainOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an adapter is trained."""

    method: Annotated[
        Literal["sft", "dpo"],
        _d("sft: imitate the answers; dpo: prefer the chosen answer to the rejected one of each pair."),
    ] = "sft"
    train_on: Annotated[
        Literal["answers", "last", "all"],
        _d("Tokens that are learnt: every assistant turn, the last one only, or everything (sft)."),
    ] = "answers"
    max_length: Annotated[
        int, msgspec.Meta(ge=8, description="Tokens kept of an example; what is cut is reported.")
    ] = 2048
    validation_share: Annotated[
        float,
        msgspec.Meta(ge=0, le=0.5, description="Examples held out where the data has no validation file."),
    ] = 0.05
    epochs: Annotated[int, msgspec.Meta(ge=1, description="Passes over the data.")] = 1
    steps: (
        Annotated[int, msgspec.Meta(ge=1, description="Updates of the adapter, in place of --epochs.")] | None
    ) = None
    batch_size: Annotated[int, msgspec.Meta(ge=1, description="Examples in one forward pass.")] = 4
    accumulate: Annotated[
        int,
        msgspec.Meta(
            ge=1, description="Forward passes per update; the same as a --batch-size so many times larger."
        ),
    ] = 1
    learning_rate: Annotated[float, msgspec.Meta(gt=0, description="Highest learning rate.")] = 2e-4
    warmup: Annotated[
        float, msgspec.Meta(ge=0, le=1, description="Share of the updates in which the rate rises.")
    ] = 0.05
    final_rate: Annotated[
        float, msgspec.Meta(ge=0, le=1, description="Share of the rate that the cosine ends at.")
    ] = 0.1
    weight_decay: Annotated[float, msgspec.Meta(ge=0, description="Weight decay of AdamW.")] = 0.0
    clip: Annotated[
        float, msgspec.Meta(ge=0, description="Largest norm of the gradient; 0 does not clip.")
    ] = 1.0
    dropout: Annotated[
        float, msgspec.Meta(ge=0, lt=1, description="Dropout in front of the adapter's matrices.")
    ] = 0.0
    validate_every: Annotated[
        int, msgspec.Meta(ge=1, description="Updates between validations; the last update is validated too.")
    ] = 50
    patience: Annotated[
        int,
        msgspec.Meta(ge=0, description="Stop after so many validations without a lower loss; 0 never."),
    ] = 0
    save_every: Annotated[int, msgspec.Meta(ge=1, description="Updates between checkpoints.")] = 50
    report_every: Annotated[int, msgspec.Meta(ge=1, description="Updates per line of metrics.")] = 10
    grad_checkpoint: Annotated[
        bool, _d("Compute each block again in the backward pass: less memory, about a third more time.")
    ] = False
    beta: Annotated[float, msgspec.Meta(gt=0, description="How strongly DPO holds on to the base model.")] = (
        0.1
    )
    dpo_loss: Annotated[
        Literal["sigmoid", "ipo"],
        _d("sigmoid: the original loss; ipo: a squared margin that cannot run away."),
    ] = "sigmoid"
    label_smoothing: Annotated[
        float,
        msgspec.Meta(
            ge=0, lt=0.5, description="Share of pairs taken to be labelled the wrong way (conservative DPO)."
        ),
    ] = 0.0
    seed: Annotated[
        int, msgspec.Meta(ge=0, description="Decides the split, the order, the start and the dropout.")
    ] = 0
    resume: Annotated[bool, _d("Continue a stopped training of the same output.")] = True


class TrainRecord(msgspec.Struct, frozen=True, kw_only=True, tag="train", tag_field="kind"):
    """Means over the updates since the last such record."""

    step: int
    """Updates done."""
    loss: float
    """SFT: nats per learnt token; DPO: per pair."""
    learning_rate: float
    gradient_norm: float
    """Of the last update, before clipping."""
    num_tokens: int
    """Tokens read since the start, padding not counted."""
    tokens_per_s: float
    peak_memory_nbytes: int
    values: dict[str, float] = {}
    """DPO: margin, accuracy, chosen and rejected reward."""


class ValidationRecord(msgspec.Struct, frozen=True, kw_only=True, tag="validation", tag_field="kind"):
    """The whole validation set after an update; step 0 is the untrained adapter."""

    step: int
    loss: float
    is_best: bool
    values: dict[str, float] = {}


Metric: TypeAlias = TrainRecord | ValidationRecord
"""One line of metrics.jsonl."""


class TrainSummary(msgspec.Struct, frozen=True, kw_only=True):
    """How a training ended."""

    steps: int
    """Updates done."""
    kept_step: int
    """Update whose adapter was kept: the lowest validation loss, or the last one without validation."""
    stopped_early: bool
    train_loss: float | None
    first_validation: ValidationRecord | None
    validation: ValidationRecord | None
    """At the adapter that was kept."""
    test_loss: float | None = None
    """Of the kept adapter, where the data has a test part."""
    num_tokens: int
    seconds: float
    """Of training, without validation; earlier sessions included."""
    peak_memory_nbytes: int


class PartSize(msgspec.Struct, frozen=True, kw_only=True):
    """How much there is in one part of a data set, after cutting."""

    examples: int
    """Of dpo: pairs."""
    tokens: int
    learnt_tokens: int
    longest: int
    """Tokens of the longest example."""


class TextPiece(msgspec.Struct, frozen=True, kw_only=True):
    """Text of consecutive tokens."""

    text: str
    is_learnt: bool


class RenderedSample(msgspec.Struct, frozen=True, kw_only=True):
    """An example as the model reads it: through its chat template, after cutting."""

    where: str
    """File and line."""
    pieces: tuple[TextPiece, ...]


class TrainPreview(msgspec.Struct, frozen=True, kw_only=True):
    """What a training would do."""

    train: PartSize
    valid: PartSize
    test: PartSize
    updates_per_epoch: int
    updates: int
    done_updates: int = 0
    """Of a stopped training that would go on."""
    num_parameters: int
    """Of the adapter."""
    samples: tuple[RenderedSample, ...] = ()
    """The first training examples; of dpo the chosen answer, then the rejected one."""
