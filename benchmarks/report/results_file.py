"""A file of results, read and checked: whatever is made of it may rely on these fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmarks.report.tables import plain
from perl.types import UserError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """Extra keys are those of newer benchmarks, and are left alone."""

    model_config = ConfigDict(frozen=True)


class Row(_Part):
    """A provider in a contest, as `benchmarks.harness.results.Row.asdict` writes it."""

    op: str
    case: str
    shape: dict[str, Any]
    axis: str = ""
    provider: str
    package: str = ""
    ours: bool
    note: str = ""
    status: str
    reason: str = ""
    median: Positive | None = None
    """Seconds."""
    turns: list[list[Positive]] = []
    """Seconds of every round, by turn."""
    peak_extra_bytes: NotNegative | None = None
    error: Finite | None = None
    """Relative, against fp64."""
    fraction: Positive | None = None
    """Of the bound that the device's peaks set: 1 is as fast as can be."""

    @model_validator(mode="after")
    def _has_its_axis(self) -> Row:
        if self.axis:
            at = self.shape.get(self.axis)
            if not isinstance(at, int | float) or at <= 0:
                raise ValueError(f"shape has no positive number {self.axis!r}, which is its axis")
        return self

    @property
    def timed(self) -> bool:
        return self.status == "timed" and self.median is not None

    @property
    def dtype(self) -> str:
        """Of the inputs; empty where the shape does not tell."""
        size = self.shape.get("itemsize")
        return {2: "bfloat16", 4: "float32"}.get(size, "elements") if size else ""

    @property
    def package_name(self) -> str:
        """Without its version; empty for this repository."""
        return self.package.partition(" ")[0]


class Peaks(_Part):
    bytes_per_s: Positive
    flops_per_s: Positive
    dtype: str


class Failed(_Part):
    failed: str

    @property
    def why_not(self) -> str:
        """Why there are no figures; empty if there are."""
        return f"not measured: {plain(self.failed)}."


class Variant(_Part):
    """A way to make a training step."""

    lm_tokens: int
    images_encoded: int
    flops: Positive
    flops_by_part: dict[str, NotNegative] = {}
    """Of tower, language model and head."""
    seconds: Positive
    seconds_by_round: list[Positive] = []
    peak_bytes: NotNegative
    max_rel_grad_diff: Finite


class TrainStep(_Part):
    """What `bench_train_step.py` reports."""

    variants: dict[Literal["padded", "packed", "shared"], Variant]
    setting: dict[str, Any]
    why_not: ClassVar = ""


class Side(_Part):
    """A trainer's step."""

    seconds: Positive
    seconds_by_round: list[Positive] = []
    parts: dict[str, Finite] = {}
    """Seconds of each."""
    lm_tokens: int
    images_encoded: int
    micro_batch_tokens: int | None = None
    """Of the largest that is trained on."""
    peak_bytes: NotNegative


class Trainer(_Part):
    """What `bench_trainer.py` reports."""

    available: bool
    reason: str = ""
    setting: dict[str, Any] = {}
    trainers: dict[Literal["trl", "perl"], Side] = {}
    proof: dict[str, Any] = {}
    differences: list[str] = []

    @property
    def why_not(self) -> str:
        return "" if self.available else f"not compared: {plain(self.reason)}."

    @model_validator(mode="after")
    def _has_both_sides(self) -> Trainer:
        if self.available and len(self.trainers) < 2:
            raise ValueError("trainers are not both there")
        return self


class Steps(_Part):
    train_step: TrainStep | Failed | None = None
    trainer: Trainer | Failed | None = None


class Results(_Part):
    schema_: Literal[1] = Field(alias="schema")
    date: str
    commit: str
    mode: str
    minutes: Finite
    machine: dict[str, Any]
    peaks: Peaks | None
    rows: list[Row]
    steps: Steps = Steps()
    load: tuple[Finite, Finite] | None = None
    """Of one minute, before the benchmarks and behind them: the second counts their own work too."""
    only: str = ""
    """The words that chose the benchmarks of a partial run."""
    interrupted: bool = False


def read(file: Path) -> Results:
    """
    Raises:
        UserError: there is no such file, or no whole results are in it.
    """
    try:
        return Results.model_validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; give a file of results") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"{part}." for part in first["loc"]).removesuffix(".")
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise UserError(
            f"{file}: {what}; these are no results of the benchmarks that this version can read"
        ) from error
