"""The optimizer of a run: every one by name, with what it can be told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from hasten.duration import Duration
from hasten.recipe.fields import Choices, Count, Span, as_tuple
from hasten.recipe.schema import Expected

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Betas = Annotated[
    tuple[Beta, Beta], BeforeValidator(as_tuple), Expected("a list of two numbers of at least 0 and below 1")
]
ThreeBetas = Annotated[
    tuple[Beta, Beta, Beta], BeforeValidator(as_tuple), Expected("a list of three numbers of at least 0 and below 1")
]
Rate = Annotated[float, Field(gt=0.0, le=100.0)]
Decay = Annotated[float, Field(ge=0.0, le=100.0)]
Small = Annotated[float, Field(gt=0.0, le=1.0)]
Format = Literal["float32", "8bit"]


class OptimizerChoices(Choices):
    """What every optimizer can be told.

    Args:
        lr: peak learning rate.
        weight_decay: decay per step, times the learning rate; not of embeddings, norms and vectors.
        decay_follows_lr: whether the decay follows the schedule of the learning rate, or stays at the peak's.
        cautious: whether elements of a step that point against the gradient are left out.
        cautious_decay: whether only weights decay that the step moves towards zero.
        hyperball: whether matrices keep their norm and take steps of a fixed norm, instead of decay.
        ema: decay rate of an average of the weights that is evaluated and exported instead of them; 0 for none.
        ema_share: share of that average in what is evaluated; the rest is the weights themselves.
    """

    lr: Rate = 0.005
    weight_decay: Decay = 0.1
    decay_follows_lr: bool = True
    cautious: bool = False
    cautious_decay: bool = False
    hyperball: bool = False
    ema: Beta = 0.0
    ema_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    @model_validator(mode="after")
    def _agree_on_average(self) -> Self:
        if self.ema == 0 and self.ema_share != 1:
            raise ValueError(
                f"optimizer.ema_share={self.ema_share:g} has no effect without optimizer.ema: leave it out."
            )
        return self

    def settings(self, *, tokens_per_step: int) -> dict[str, Any]:
        """Return the settings as `hasten.optim.optimizer` takes them.

        Args:
            tokens_per_step: rows times row length of an optimizer step.
        """
        return self.model_dump(exclude={"name"})


class AdamWChoices(OptimizerChoices):
    """AdamW.

    Args:
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        state_format: of the optimizer's state; ``8bit`` takes a quarter of the memory.
    """

    name: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.95)
    eps: Small = 1e-8
    state_format: Format = "float32"


class AdamChoices(AdamWChoices):
    """Adam: its decay is added to the gradient."""

    name: Literal["adam"] = "adam"  # type: ignore[assignment]
    weight_decay: Decay = 0.0


class SGDChoices(OptimizerChoices):
    """SGD with momentum.

    Args:
        momentum: decay rate of the momentum, in [0, 1).
        nesterov: whether the step looks one step ahead along the momentum.
    """

    name: Literal["sgd"] = "sgd"
    lr: Rate = 0.5
    weight_decay: Decay = 0.0
    momentum: Beta = 0.9
    nesterov: bool = True


class RMSpropChoices(OptimizerChoices):
    """RMSprop.

    Args:
        alpha: decay rate of the squared gradient, in [0, 1).
        eps: added to the denominator.
        momentum: decay rate of the momentum, in [0, 1).
        centered: whether the square is taken about the mean of the gradient.
    """

    name: Literal["rmsprop"] = "rmsprop"
    lr: Rate = 0.002
    weight_decay: Decay = 0.0
    alpha: Beta = 0.95
    eps: Small = 1e-8
    momentum: Beta = 0.0
    centered: bool = False


class AdafactorChoices(OptimizerChoices):
    """Adafactor: almost no state.

    Args:
        beta2_decay: exponent of its growing memory, at most 0.
    """

    name: Literal["adafactor"] = "adafactor"
    lr: Rate = 0.05
    beta2_decay: Annotated[float, Field(gt=-1.0, le=0.0)] = -0.8


class LionChoices(OptimizerChoices):
    """Lion: the sign of a momentum."""

    name: Literal["lion"] = "lion"
    lr: Rate = 0.0007
    weight_decay: Decay = 0.5
    betas: Betas = (0.9, 0.99)
    state_format: Format = "float32"


class SignumChoices(OptimizerChoices):
    """Signum: the sign of a momentum."""

    name: Literal["signum"] = "signum"
    lr: Rate = 0.0007
    weight_decay: Decay = 0.5
    momentum: Beta = 0.95
    nesterov: bool = True


class AdEMAMixChoices(OptimizerChoices):
    """AdEMAMix: a second, very slow momentum.

    Args:
        betas: decay rates of the moments, each in [0, 1); the third one is the slow momentum's.
        alpha: weight of the slow momentum.
        alpha_warmup: over how much of the run that weight grows from 0, in steps or percent.
        beta3_warmup: over how much of the run the slow decay rate grows from the fast one, in steps or percent.
    """

    name: Literal["ademamix"] = "ademamix"
    lr: Rate = 0.00125
    betas: ThreeBetas = (0.9, 0.95, 0.99)
    alpha: Annotated[float, Field(ge=0.0, le=1000.0)] = 8.0
    alpha_warmup: Span = Duration.parse("100%")
    beta3_warmup: Span = Duration.parse("100%")
    eps: Small = 1e-8
    state_format: Format = "float32"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for name in ("alpha_warmup", "beta3_warmup"):
            warmup = getattr(self, name)
            if warmup.unit not in ("steps", "share", "tokens"):
                raise ValueError(
                    f"optimizer.{name}={warmup} cannot be turned into steps: give steps, tokens or percent."
                )
            if warmup.unit == "share" and warmup.value > 1:
                raise ValueError(f"optimizer.{name}={warmup} is longer than the run: give at most 100%.")
        return self

    def settings(self, *, tokens_per_step: int) -> dict[str, Any]:
        """Return the settings as `hasten.optim.optimizer` takes them, warm-ups as steps or as a share."""
        return {
            **self.model_dump(exclude={"name"}),
            "alpha_warmup": _steps_or_share(self.alpha_warmup, tokens_per_step),
            "beta3_warmup": _steps_or_share(self.beta3_warmup, tokens_per_step),
        }


def _steps_or_share(span: Duration, tokens_per_step: int) -> int | float:
    if span.unit == "share":
        return float(span.value)
    return max(1, round(span.value / (tokens_per_step if span.unit == "tokens" else 1)))


class ADOPTChoices(OptimizerChoices):
    """ADOPT: divides by the squared gradients before the present one."""

    name: Literal["adopt"] = "adopt"
    betas: Betas = (0.9, 0.99)
    eps: Small = 1e-6
    clip_exponent: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25


class MARSChoices(OptimizerChoices):
    """MARS: gradients corrected by how they changed.

    Args:
        gamma: strength of the correction.
    """

    name: Literal["mars"] = "mars"
    betas: Betas = (0.95, 0.99)
    gamma: Annotated[float, Field(ge=0.0, le=1.0)] = 0.025
    eps: Small = 1e-8


class ScheduleFreeChoices(Choices):
    """Schedule-Free AdamW: for ``schedule=constant``; what it evaluates and exports is its average.

    Args:
        r: how much later steps weigh more in the average.
        weight_lr_power: power of the learning rate in the weights of the average.
    """

    name: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    lr: Rate = 0.005
    weight_decay: Decay = 0.1
    betas: Betas = (0.9, 0.99)
    eps: Small = 1e-8
    r: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    weight_lr_power: Annotated[float, Field(ge=0.0, le=10.0)] = 2.0

    def settings(self, *, tokens_per_step: int) -> dict[str, Any]:
        """Return the settings as `hasten.optim.optimizer` takes them."""
        return self.model_dump(exclude={"name"})


class ProdigyChoices(OptimizerChoices):
    """Prodigy: finds its learning rate; ``lr`` is a factor of it.

    Args:
        use_bias_correction: Adam's correction; needed for small batches.
        safeguard_warmup: whether the warm-up stays out of the estimate.
        d0: first estimate.
        d_coef: factor of the estimate.
    """

    name: Literal["prodigy"] = "prodigy"
    lr: Rate = 1.0
    decay_follows_lr: Literal[True] = True  # type: ignore[assignment]
    betas: Betas = (0.9, 0.99)
    eps: Small = 1e-8
    use_bias_correction: bool = True
    safeguard_warmup: bool = True
    d0: Small = 1e-6
    d_coef: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0


class SophiaChoices(OptimizerChoices):
    """Sophia-G: clipped by an estimate of the curvature, which takes an extra pass every few steps.

    Args:
        rho: how soon elements are clipped.
        estimate_every: steps between two extra passes.
    """

    name: Literal["sophia"] = "sophia"
    lr: Rate = 0.001
    betas: Betas = (0.965, 0.99)
    rho: Small = 0.04
    estimate_every: Count = 10

    def settings(self, *, tokens_per_step: int) -> dict[str, Any]:
        """Return the settings as `hasten.optim.optimizer` takes them, with the tokens that a pass averages over."""
        return {**self.model_dump(exclude={"name"}), "batch_tokens": tokens_per_step}


class MuonChoices(OptimizerChoices):
    """Muon for hidden matrices, AdamW for the rest.

    Args:
        momentum: decay rate of the momentum of matrices, in [0, 1).
        nesterov: whether a matrix's step looks ahead.
        adjust_lr: how the step of a matrix is scaled; with ``match_rms_adamw`` AdamW's learning rates fit.
        orthogonalization: polynomials that make a matrix orthogonal.
        ns_steps: how many of them.
        compute_dtype: of those products; ``auto`` is what is fastest here.
    """

    name: Literal["muon"] = "muon"
    lr: Rate = 0.02
    momentum: Beta = 0.95
    nesterov: bool = True
    adjust_lr: Literal["match_rms_adamw", "original", "rms_to_rms"] = "match_rms_adamw"
    orthogonalization: Literal["minimax", "polar_express", "quintic"] = "minimax"
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    compute_dtype: Literal["auto", "float32", "bf16", "float64"] = "auto"
    betas: Betas = (0.9, 0.95)
    eps: Small = 1e-8


class NorMuonChoices(MuonChoices):
    """NorMuon: Muon with rows of equal size.

    Args:
        beta2: decay rate of the rows' mean squares, in [0, 1).
    """

    name: Literal["normuon"] = "normuon"  # type: ignore[assignment]
    beta2: Beta = 0.95


class SOAPChoices(OptimizerChoices):
    """SOAP for hidden matrices, AdamW for the rest: Adam in the eigenbasis of a matrix's gradients.

    Args:
        precondition_frequency: steps between two refreshes of a basis.
        max_precond_dim: sides longer than this are not turned.
        one_sided: whether only the shorter side of a matrix is turned: less memory and time.
        kl: whether the two sides' statistics take each other into account.
    """

    name: Literal["soap"] = "soap"
    lr: Rate = 0.01
    betas: Betas = (0.95, 0.95)
    eps: Small = 1e-8
    precondition_frequency: Count = 2
    max_precond_dim: Count = 10000
    one_sided: bool = False
    kl: bool = False


class SOAPMuonChoices(SOAPChoices):
    """SOAP's direction, then made orthogonal as Muon's."""

    name: Literal["soap_muon"] = "soap_muon"  # type: ignore[assignment]
    adjust_lr: Literal["match_rms_adamw", "original", "rms_to_rms"] = "match_rms_adamw"


Optimizers = Annotated[
    AdamWChoices
    | AdamChoices
    | SGDChoices
    | RMSpropChoices
    | AdafactorChoices
    | LionChoices
    | SignumChoices
    | AdEMAMixChoices
    | ADOPTChoices
    | MARSChoices
    | ScheduleFreeChoices
    | ProdigyChoices
    | SophiaChoices
    | MuonChoices
    | NorMuonChoices
    | SOAPChoices
    | SOAPMuonChoices,
    Field(discriminator="name"),
]
