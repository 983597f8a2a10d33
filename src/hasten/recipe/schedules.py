"""How the learning rate, and what else is scheduled, follows the progress of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from typing_extensions import Self

from hasten.duration import Duration
from hasten.errors import RecipeError
from hasten.recipe.fields import Choices, Span, SpanOrNone
from hasten.recipe.schema import Expected
from hasten.schedules import SCHEDULES, Schedule, parse, warmup
from hasten.schedules.curves import MOST_CYCLES, TWO_STAGES

# What a schedule says beside the learning rate's own curve: each a setting of `hasten.schedules.apply`.
BESIDE = ("weight_decay", "momentum", "beta1", "beta2")


def _as_printed(text: str) -> str:
    """Return a schedule's text as its ``repr``: equal schedules are then equal choices."""
    try:
        return repr(parse(text))
    except RecipeError as error:
        raise ValueError(str(error)) from None


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _rising(levels: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    try:
        SCHEDULES["stages"](*levels)
    except RecipeError as error:
        raise ValueError(str(error)) from None
    return levels


Factor = Annotated[float, Field(ge=0.0, le=1.0)]
Shape = Literal["sqrt", "linear", "cosine"]
Expression = Annotated[str, AfterValidator(_as_printed), Expected("a schedule as text, such as 'linear(floor=0.5)'")]
Levels = Annotated[
    tuple[tuple[float, float], ...],
    BeforeValidator(_as_tuples),
    Field(min_length=1),
    AfterValidator(_rising),
    Expected("a list of [progress, factor], as [[0.5, 0.1], [0.75, 0.01]]"),
]


class ScheduleChoices(Choices):
    """What every schedule can say beside the learning rate's own curve.

    Args:
        weight_decay: schedule of the weight decay, a factor of its own value; none: it stays. The decay of a step is
            this times the learning rate, unless ``optimizer.decay_follows_lr=false``.
        momentum: schedule of the momentum.
        beta1: schedule of the first beta.
        beta2: schedule of the second beta.
    """

    weight_decay: Expression | None = None
    momentum: Expression | None = None
    beta1: Expression | None = None
    beta2: Expression | None = None

    def build(
        self,
        *,
        total_steps: int,
        tokens_per_step: float,
        steps_per_epoch: float | None = None,
        seconds: float | None = None,
    ) -> Schedule:
        """Return the learning rate's schedule in a run of `total_steps`.

        Args:
            total_steps: optimizer steps of the whole run.
            tokens_per_step: rows times row length of a step.
            steps_per_epoch: steps of one pass over the data; needed where a span is given in epochs.
            seconds: the run's wall-clock budget; needed where a span is given in seconds.

        Raises:
            RecipeError: a warm-up or a cool-down takes the whole run, or cannot be converted.
        """
        raise NotImplementedError

    def build_all(self, **run: Any) -> dict[str, Schedule]:
        """Return every schedule of the run by the setting it is of, ``lr`` first; as `hasten.schedules.apply` takes it.

        Args:
            **run: the arguments of `build`, with its errors.
        """
        beside = {name: getattr(self, name) for name in BESIDE}
        return {"lr": self.build(**run), **{name: parse(text) for name, text in beside.items() if text is not None}}


class CustomChoices(ScheduleChoices):
    """Any schedule, written as `hasten.schedules` prints it.

    Args:
        expression: calls of warmup, hold, cosine, linear, sqrt, power, inverse_sqrt, stages, cycles, cooldown, wsd and
            constant, joined by a vertical bar; every share is of the whole run.
    """

    name: Literal["custom"] = "custom"
    expression: Expression = "warmup(0.02, start=0.01) | cosine(floor=0.01)"

    @property
    def warmup(self) -> Duration:
        """No warm-up besides what the expression says."""
        return Duration(0.0, "steps")

    @property
    def warmup_start(self) -> float:
        """As `warmup`."""
        return 0.0

    def build(self, **run: Any) -> Schedule:
        """Return the learning rate's schedule; as `ScheduleChoices.build`."""
        return parse(self.expression)

    def warmup_share(self, **run: Any) -> float:
        """Return the share of the run that `warmup` takes."""
        return 0.0


class WarmupChoices(ScheduleChoices):
    """A warm-up before anything else; the base of every schedule but the custom one.

    Args:
        warmup: a duration; 0 for none.
        warmup_start: factor of the peak that the first step begins at, in [0, 1].
    """

    warmup: SpanOrNone = Duration.parse("2%")
    warmup_start: Factor = 0.01

    def build(self, **run: Any) -> Schedule:
        """Return the learning rate's schedule; as `ScheduleChoices.build`."""
        share = self.warmup_share(**run)
        if share >= 1:
            raise RecipeError(
                f"schedule.warmup={self.warmup} is as long as the run of {run['total_steps']} steps: shorten it, or "
                "give a larger budget."
            )
        rest = self._rest(share, run)
        return warmup(share, start=self.warmup_start) | rest if share > 0 else rest

    def warmup_share(self, **run: Any) -> float:
        """Return the share of the run that the warm-up takes; the arguments and errors are those of `build`."""
        return self.warmup.share_of_run("schedule.warmup", **run)

    def _rest(self, warmup_share: float, run: dict[str, Any]) -> Schedule:
        """Return what follows the warm-up."""
        raise NotImplementedError


class ConstantChoices(WarmupChoices):
    """The peak throughout."""

    name: Literal["constant"] = "constant"

    def _rest(self, warmup_share: float, run: dict[str, Any]) -> Schedule:
        return SCHEDULES["constant"]()


class DecayChoices(WarmupChoices):
    """A decay after the warm-up.

    Args:
        floor: factor of the peak that the last step ends at, in [0, 1].
        start: factor of the peak that the decay begins at; none: the peak. For a run that goes on from another one,
            without a warm-up.
    """

    floor: Factor = 0.01
    start: Annotated[float, Field(ge=0.0)] | None = None

    @model_validator(mode="after")
    def _begins_once(self) -> Self:
        if self.start is not None and self.warmup.value > 0:
            raise ValueError(
                f"schedule.start={self.start:g} begins the decay elsewhere than schedule.warmup={self.warmup} ends, at "
                "1: give schedule.warmup=0, or leave start out."
            )
        return self

    def _rest(self, warmup_share: float, run: dict[str, Any]) -> Schedule:
        name = getattr(self, "name")  # noqa: B009
        return SCHEDULES[name](floor=self.floor, start=self.start)


class CosineChoices(DecayChoices):
    """Half a cosine from the peak to the floor."""

    name: Literal["cosine"] = "cosine"


class LinearChoices(DecayChoices):
    """A straight line from the peak to the floor."""

    name: Literal["linear"] = "linear"


class SqrtChoices(DecayChoices):
    """Square-root decay: ``floor + (1 - floor) * (1 - sqrt(x))``."""

    name: Literal["sqrt"] = "sqrt"


class PowerChoices(DecayChoices):
    """Polynomial decay: ``floor + (1 - floor) * (1 - x) ** exponent``.

    Args:
        exponent: 1 is a straight line, above 1 it falls fast first.
    """

    name: Literal["power"] = "power"
    exponent: Annotated[float, Field(gt=0.0, le=100.0)] = 2.0

    def _rest(self, warmup_share: float, run: dict[str, Any]) -> Schedule:
        return SCHEDULES["power"](self.exponent, self.floor, start=self.start)


class InverseSqrtChoices(WarmupChoices):
    """The inverse square root: ``sqrt(timescale / (timescale + x))`` after the warm-up.

    Args:
        timescale: a duration; none: that of the warm-up, so that it is ``sqrt(warmup / step)``.
        floor: factor of the peak that the last step ends at; none: as the curve falls.
    """

    name: Literal["inverse_sqrt"] = "inverse_sqrt"
    timescale: Span | None = None
    floor: Factor | None = None

    def _rest(self, warmup_share: float, run: dict[str, Any]) -> Schedule:
        scale = self.timescale and self.timescale.share_of_run("schedule.timescale", **run)
        return SCHEDULES["inverse_sqrt"](scale, self.floor)


class WSDChoices(WarmupChoices):
    """The peak held, then a cool-down: a trapezoid, or warm-up, stable, decay.

    Args:
        cooldown: how much of the run decays at its end.
        shape: of the cool-down; ``sqrt`` falls as ``1 - sqrt(x)``.
        floor: factor of the peak that the last step ends at, in [0, 1].
    """

    name: Literal["wsd"] = "wsd"
    cooldown: Span = Duration.parse("20%")
    shape: Shape = "sqrt"
    floor: Factor = 0.01

    def _rest(self, warmup_share: float, run: dict[str, Any]) -> Schedule:
        share = self.cooldown.share_of_run("schedule.cooldown", **run)
        if warmup_share + share >= 1 - 1e-9:
            raise RecipeError(
                f"schedule.warmup={self.warmup} and schedule.cooldown={self.cooldown} leave nothing of the run of "
                f"{run['total_steps']} steps to hold the peak: shorten them, or give schedule={self.shape}."
            )
        return SCHEDULES["wsd"](share, self.shape, self.floor)


class StagesChoices(WarmupChoices):
    """A learning rate that changes in steps.

    Args:
        levels: where it changes, and to which factor of the peak: pairs of progress (of the whole run, in [0, 1)) and
            factor.
    """

    name: Literal["stages"] = "stages"
    levels: Levels = TWO_STAGES

    def _rest(self, warmup_share: float, run: dict[str, Any]) -> Schedule:
        return SCHEDULES["stages"](*self.levels)


class CyclesChoices(WarmupChoices):
    """Several decays, each but the first after a new warm-up from the floor.

    Args:
        count: how many cycles.
        shape: of each decay.
        floor: factor of the peak that each cycle ends at, in [0, 1].
        rewarm: a duration of the new warm-up, the mean of the cycles; 0 to jump back to the peak.
        shrink: factor from one peak to the next, above 0 to 1.
        stretch: factor from one cycle's length to the next.
    """

    name: Literal["cycles"] = "cycles"
    count: Annotated[int, Field(ge=1, le=MOST_CYCLES)] = 4
    shape: Shape = "cosine"
    floor: Factor = 0.01
    rewarm: SpanOrNone = Duration.parse("2%")
    shrink: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    stretch: Annotated[float, Field(ge=0.1, le=10.0)] = 1.0

    def _rest(self, warmup_share: float, run: dict[str, Any]) -> Schedule:
        # Of a cycle: every cycle rises over the same share of itself, and they are alike where stretch is 1.
        cycle = (1.0 - warmup_share) / self.count
        rewarm = self.rewarm.share_of_run("schedule.rewarm", **run) / cycle if self.count > 1 else 0.0
        if rewarm >= 1 - 1e-9:
            raise RecipeError(
                f"schedule.rewarm={self.rewarm} is as long as one of the {self.count} cycles of a run of "
                f"{run['total_steps']} steps: shorten it, or give a smaller schedule.count."
            )
        return SCHEDULES["cycles"](
            self.count,
            shape=self.shape,
            floor=self.floor,
            rewarm=rewarm,
            shrink=self.shrink,
            stretch=self.stretch,
        )


Schedules = Annotated[
    CosineChoices
    | LinearChoices
    | SqrtChoices
    | ConstantChoices
    | WSDChoices
    | PowerChoices
    | InverseSqrtChoices
    | StagesChoices
    | CyclesChoices
    | CustomChoices,
    Field(discriminator="name"),
]
