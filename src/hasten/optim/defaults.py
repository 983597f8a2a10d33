"""Settings for a horizon: what the field measured for runs of this length, with the source of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Tokens per parameter up to which a run counts as short: about Chinchilla's 20 (Hoffmann et al., arXiv:2203.15556).
SHORT = 20.0
# Optimizer steps of such a run in the benchmark (2.1B tokens of 131k), for when tokens are not known.
SHORT_STEPS = 16_000
# Optimizer steps above which the slowest averages should be slower still (section 4 of the benchmark).
LONG_STEPS = 32_000

# Learning rates tuned at 124M parameters and 131k tokens a step; other sizes need their own (smaller models larger
# ones).
RATES: dict[str, float] = {
    "adamw": 1e-3,
    "adam": 1e-3,
    "ademamix": 1e-3,
    "adopt": 1e-3,
    "adafactor": 1e-2,
    "lion": 1e-3,
    "mars": 3e-3,
    "muon": 1e-3,
    "normuon": 1e-3,
    "prodigy": 1.0,
    "rmsprop": 1e-3,
    "schedule_free_adamw": 1e-3,
    "sgd": 1e-1,
    "signum": 1e-3,
    "soap": 1e-3,
    "soap_muon": 1e-3,
    "sophia": 1e-3,
}
_LONG_WARMUP = ("lion", "schedule_free_adamw", "signum", "sophia")
_NO_STRONG_DECAY = ("mars", "prodigy", "sophia")
_COUPLED = ("adam", "rmsprop", "sgd")


@dataclass(frozen=True)
class Defaults:
    """What to use where nothing was chosen.

    Args:
        settings: of the optimizer.
        warmup: share of the run.
        floor: learning rate at the end, as a factor of the peak.
        max_norm: global gradient norm to clip to.
        reasons: for each of them, why, with the source.
    """

    settings: Mapping[str, Any]
    warmup: float
    floor: float
    max_norm: float
    reasons: Mapping[str, str] = field(default_factory=dict)


def defaults(
    name: str,
    *,
    total_steps: int | None = None,
    tokens_per_step: int | None = None,
    parameters: int | None = None,
) -> Defaults:
    """Return settings for a run of this length, each with its source in ``reasons``.

    All figures are from "Benchmarking Optimizers for Large Language Model Pretraining" (arXiv:2509.01440; 124M to 720M
    parameters, 1B to 48B tokens) unless a reason names another source:

    - weight decay 0.5 on runs up to about 20 tokens a parameter, 0.1 beyond (section 4; not MARS, Prodigy, Sophia:
      0.1); coupled rules (Adam, SGD, RMSprop) none;
    - beta2 0.95 up to 2,000 steps, 0.99 up to 16,000, 0.999 beyond: it grows with the horizon;
    - AdEMAMix's slow rate 0.9999 above 32,000 steps and 0.999 below, carried on to 0.99 below 3,200 (our reading: it
      should remember the same share of the run); both warm-ups over the whole run;
    - SOAP's bases refreshed every 2 steps up to 2,000 steps, every 10 beyond (the first is ours, measured);
    - warm-up 2 % of the run, 10 % for Lion, Signum, Sophia, Schedule-Free (6 to 25 % were best);
    - floor 0.01: ending at 0.1 of the peak was much the worst of everything tried;
    - clip 0.5 up to 210M parameters, 0.1 at 720M.

    Args:
        name: of the optimizer.
        total_steps: optimizer steps of the run; None where it is not known.
        tokens_per_step: of one optimizer step.
        parameters: of the model.
    """
    steps = total_steps or 0
    is_short = _is_short(total_steps, tokens_per_step, parameters)
    reasons: dict[str, str] = {}
    settings: dict[str, Any] = {"lr": RATES[name]}
    reasons["lr"] = "tuned at 124M parameters (arXiv:2509.01440); tune it for your size"

    if name in _COUPLED:
        settings["weight_decay"], reasons["weight_decay"] = 0.0, "the decay of this rule is part of the gradient"
    elif is_short and name not in _NO_STRONG_DECAY:
        settings["weight_decay"] = 0.5
        reasons["weight_decay"] = "0.5 beats 0.1 on runs of up to about 20 tokens a parameter (arXiv:2509.01440)"
    else:
        settings["weight_decay"] = 0.1
        reasons["weight_decay"] = "0.1 is right for long runs and where the length is not known (arXiv:2509.01440)"

    beta2 = 0.95 if steps <= 2_000 else 0.99 if steps <= SHORT_STEPS else 0.999
    if name in ("adamw", "adam", "muon", "normuon", "soap", "soap_muon"):
        settings["betas"] = (0.95 if name.startswith("soap") else 0.9, beta2)
        reasons["betas"] = f"beta2 grows with the horizon; {beta2} for {steps or 'an unknown number of'} steps"
    elif name == "ademamix":
        slow = 0.9999 if steps > LONG_STEPS else 0.999 if steps > LONG_STEPS / 10 or not steps else 0.99
        settings["betas"] = (0.9, beta2 if steps else 0.999, slow)
        reasons["betas"] = (
            f"the slow rate is {slow} for {steps or 'an unknown number of'} steps: 0.9999 above 32,000 steps, and the "
            "same share of the run below (0.999 in a run of 400 steps ended 0.2 nats higher: docs/LOG.md)"
        )
        if total_steps:
            settings |= {"total_steps": total_steps, "alpha_warmup": 1.0, "beta3_warmup": 1.0}
            reasons["alpha_warmup"] = reasons["beta3_warmup"] = "both warm-ups over the whole run (arXiv:2409.03137)"
    elif name == "schedule_free_adamw":
        settings["betas"] = (0.9, 0.9999 if steps > SHORT_STEPS else 0.999)
        reasons["betas"] = "beta2 0.9999 on long runs (arXiv:2509.01440)"
    if name.startswith("soap") and 0 < steps <= 2_000:
        settings["precondition_frequency"] = 2
        reasons["precondition_frequency"] = (
            "few steps are few refreshes: in a run of 300 steps every 2 steps ended 0.16 nats lower than every 10 "
            "(docs/how-to-choose.md)"
        )
    if name == "prodigy":
        settings["use_bias_correction"] = True
        reasons["use_bias_correction"] = "needed for small batches (arXiv:2509.01440)"
    if name == "sophia" and tokens_per_step:
        settings["batch_tokens"] = tokens_per_step
        reasons["batch_tokens"] = "the tokens that its extra pass averages over"

    warmup = 0.1 if name in _LONG_WARMUP else 0.02
    reasons["warmup"] = "Lion, Signum, Sophia and Schedule-Free want 6 to 25 % of the run, the others about 2 %"
    reasons["floor"] = "0.1 of the peak was much the worst end; below 0.01 little changes"
    max_norm = 0.1 if (parameters or 0) > 500_000_000 else 0.5
    reasons["max_norm"] = "0.5 up to 210M parameters, 0.1 at 720M"
    return Defaults(settings, warmup, 0.01, max_norm, reasons)


def _is_short(total_steps: int | None, tokens_per_step: int | None, parameters: int | None) -> bool:
    if total_steps is None:
        return False
    if tokens_per_step and parameters:
        return total_steps * tokens_per_step <= SHORT * parameters
    return total_steps <= SHORT_STEPS
