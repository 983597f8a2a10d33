"""Every optimizer: settings in the groups, exact resume, untouched gradients, refusals by name, one interface."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.errors import RecipeError
from hasten.optim import OPTIMIZERS, RULES, AdamW, AdEMAMix, Lion, Muon, RuledOptimizer, ScheduleFreeAdamW, optimizer
from hasten.schedules import as_lr_scheduler, cosine, warmup

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
# What a run of 14 steps passes through: warm-ups end at step 6, a basis is renewed every 4 steps.
SETTINGS = {
    "ademamix": {"alpha_warmup": 6, "beta3_warmup": 6},
    "schedule_free_adamw": {"warmup_steps": 6},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "rmsprop": {"momentum": 0.9, "centered": True},
    "soap": {"precondition_frequency": 4},
    "soap_muon": {"precondition_frequency": 4},
    "sophia": {"estimate_every": 3},
}
STEPS = 14


def build(name: str, params, **more) -> RuledOptimizer:
    return OPTIMIZERS[name](params, **{"lr": 1e-2, **SETTINGS.get(name, {}), **more})


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 72), (12, 6), (9,)]
    return [nn.Parameter(torch.randn(shape, generator=generator).mul_(0.1).to(dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for number, p in enumerate(params):
        noise = torch.randn(p.shape, generator=generator)
        # The vector rests now and then: counts of updates then differ between parameters.
        p.grad = None if number == 2 and step % 5 == 3 else (p.detach().float() + 0.5 * noise).to(p.dtype)


def train(params: list[nn.Parameter], stepper: RuledOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(params, step)
        stepper.step()
        if stepper.estimate_every and (step + 1) % stepper.estimate_every == 0:
            stepper.estimate()


def as_saved(stepper: RuledOptimizer) -> dict:
    buffer = io.BytesIO()
    torch.save(stepper.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# --- saving -----------------------------------------------------------------------------------------------------------

FORMATS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16 stochastic": (torch.bfloat16, {"rounding": "stochastic", "seed": 3}),
    "bfloat16 kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "8bit": (torch.float32, {"state_format": "8bit"}),
}


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in OPTIMIZERS for form in FORMATS if form != "8bit" or RULES[name].has_8bit],
)
def test_going_on_from_a_saved_state_is_exact_wherever_it_was_saved(name, form):
    dtype, more = FORMATS[form]
    whole = weights(dtype)
    stepper = build(name, whole, **more)
    saved = []
    for step in range(STEPS):
        saved.append((copy.deepcopy(whole), as_saved(stepper)))
        train(whole, stepper, step, step + 1)
    for step, (params, state) in enumerate(saved):
        resumed = build(name, params, **more)
        resumed.load_state_dict(state)
        train(params, resumed, step, STEPS)
        assert all(torch.equal(a, b) for a, b in zip(params, whole, strict=True)), f"saved before step {step}"


@every_optimizer
def test_float32_state_of_bfloat16_weights_stays_float32_when_it_is_loaded(name):
    params = weights(torch.bfloat16)
    stepper = build(name, params)
    train(params, stepper, 0, 3)
    formats = {key: value.dtype for key, value in stepper.state[params[0]].items()}
    assert torch.bfloat16 not in formats.values()
    resumed = build(name, params)
    resumed.load_state_dict(as_saved(stepper))
    assert {key: value.dtype for key, value in resumed.state[params[0]].items()} == formats


@every_optimizer
def test_a_loaded_state_is_a_copy(name):
    params = weights()
    stepper = build(name, params)
    train(params, stepper, 0, 3)
    state = stepper.state_dict()
    before = copy.deepcopy(state)
    resumed = build(name, copy.deepcopy(params))
    resumed.load_state_dict(state)
    train([p for group in resumed.param_groups for p in group["params"]], resumed, 3, 5)
    for key, values in before["state"].items():
        assert all(torch.equal(value, state["state"][key][kind]) for kind, value in values.items())


def test_state_of_torchs_adamw_is_taken_over():
    ours, theirs = weights(), weights()
    peer = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    for step in range(4):
        give_gradients(theirs, 2 * step + 5)  # never a step at which the vector rests
        peer.step()
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    stepper = AdamW(ours, lr=0.5)
    stepper.load_state_dict(peer.state_dict())
    assert stepper.param_groups[0]["lr"] == 1e-2
    for params, each in ((ours, stepper), (theirs, peer)):
        give_gradients(params, 4)
        each.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_state_of_another_rule_or_format_is_refused():
    params = weights()
    with pytest.raises(RecipeError, match="rule='lion'"):
        AdamW(params).load_state_dict(Lion(params).state_dict())
    with pytest.raises(RecipeError, match="state_format='8bit'"):
        Lion(params).load_state_dict(Lion(params, state_format="8bit").state_dict())


@every_optimizer
def test_an_optimizer_can_be_copied(name):
    params = weights()
    stepper = build(name, params)
    train(params, stepper, 0, 4)
    pair = copy.deepcopy((params, stepper))
    train(params, stepper, 4, 8)
    train(*pair, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(params, pair[0], strict=True))


# --- stepping ---------------------------------------------------------------------------------------------------------


@every_optimizer
def test_a_step_changes_weights_and_never_gradients(name):
    params = weights()
    stepper = build(name, params)
    before = [p.detach().clone() for p in params]
    for step in range(3):
        give_gradients(params, step)
        kept = [p.grad.clone() for p in params]
        stepper.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@every_optimizer
def test_a_parameter_without_a_gradient_stays_as_it_is(name):
    params = weights()
    stepper = build(name, params)
    before = params[1].detach().clone()
    for step in range(3):
        give_gradients(params, step)
        params[1].grad = None
        stepper.step()
    assert torch.equal(params[1], before)
    assert params[1] not in stepper.state


@every_optimizer
def test_a_closure_is_called_with_gradients_on(name):
    params = weights()
    stepper = build(name, params)

    def closure() -> Tensor:
        stepper.zero_grad()
        loss = sum((p.square().sum() for p in params), torch.zeros(()))
        loss.backward()
        return loss

    first = stepper.step(closure)
    for _ in range(30):
        last = stepper.step(closure)
    assert last < first


@every_optimizer
def test_a_schedule_of_hasten_and_one_of_torch_drive_it(name):
    for make in (
        lambda o: as_lr_scheduler(o, warmup(0.2) | cosine(), total_steps=10),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    ):
        params = weights()
        stepper = build(name, params)
        scheduler = make(stepper)
        for step in range(10):
            give_gradients(params, step)
            stepper.step()
            scheduler.step()
        assert all(torch.isfinite(p).all() for p in params)
        assert stepper.param_groups[0]["lr"] < 1e-3


@every_optimizer
def test_grad_scaler_skips_a_step_that_overflowed(name):
    params = weights()
    stepper = build(name, params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = sum((p.square().sum() for p in params), torch.zeros(()))
    scaler.scale(loss).backward()
    params[0].grad[0, 0] = float("inf")
    before = [p.detach().clone() for p in params]
    scaler.step(stepper)
    scaler.update()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert scaler.get_scale() == 2.0


@every_optimizer
def test_a_rate_of_zero_moves_nothing(name):
    """torch.distributed.checkpoint makes the state of an optimizer by a step at rate zero."""
    params = weights()
    stepper = build(name, params)
    before = [p.detach().clone() for p in params]
    for group in stepper.param_groups:
        group["lr"] = 0.0
    for step in range(2):
        give_gradients(params, step)
        stepper.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_a_rate_may_be_a_tensor():
    params, same = weights(), weights()
    train(params, Lion(params, lr=torch.tensor(1e-2)), 0, 3)
    train(same, Lion(same, lr=torch.tensor(1e-2).item()), 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(params, same, strict=True))


def test_decay_can_stay_at_the_peak_while_the_rate_falls():
    params, other = weights(), weights()
    for each, follows in ((params, True), (other, False)):
        stepper = AdamW(each, lr=0.1, weight_decay=0.5, decay_follows_lr=follows)
        for group in stepper.param_groups:
            group["initial_lr"], group["lr"] = 0.1, 1e-12
        give_gradients(each, 0)
        stepper.step()
    start = weights()
    torch.testing.assert_close(params[0], start[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(other[0], start[0] * (1 - 0.1 * 0.5), rtol=1e-6, atol=1e-9)


# --- what is evaluated ------------------------------------------------------------------------------------------------


@every_optimizer
def test_evaluating_in_between_changes_nothing(name):
    params, same = weights(), weights()
    stepper, other = build(name, params), build(name, same)
    for step in range(6):
        train(params, stepper, step, step + 1)
        train(same, other, step, step + 1)
        trained = [p.detach().clone() for p in params]
        stepper.eval()
        stepper.eval()
        changed = not all(torch.equal(a, b) for a, b in zip(params, trained, strict=True))
        stepper.train()
    assert changed == stepper.averages
    assert all(torch.equal(a, b) for a, b in zip(params, same, strict=True))


def test_a_step_in_evaluation_mode_is_refused():
    stepper = ScheduleFreeAdamW(weights())
    stepper.eval()
    with pytest.raises(RecipeError, match=r"optimizer\.train\(\)"):
        stepper.step()


def test_state_saved_in_evaluation_mode_goes_on_from_the_trained_weights():
    params = weights()
    stepper = build("schedule_free_adamw", params)
    train(params, stepper, 0, 4)
    stepper.eval()
    held, state = copy.deepcopy(params), as_saved(stepper)
    resumed = build("schedule_free_adamw", held)
    resumed.load_state_dict(state)
    resumed.train()
    stepper.train()
    train(params, stepper, 4, 8)
    train(held, resumed, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(params, held, strict=True))


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_matrix_rule_leaves_vectors_to_adamw_in_one_object():
    params = weights()
    stepper = Muon(params, lr=1e-3, betas=(0.8, 0.9))
    assert [(group["rule"], len(group["params"])) for group in stepper.param_groups] == [("muon", 2), ("adamw", 1)]
    assert stepper.param_groups[1]["betas"] == (0.8, 0.9)
    assert "momentum" not in stepper.param_groups[1]
    give_gradients(params, 0)
    stepper.step()
    assert set(stepper.state_dict()["state"]) == {0, 1, 2}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "prodigy"])  # whose groups share one estimate
def test_groups_are_updated_as_by_optimizers_of_their_own(name: str, rounding: str) -> None:
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    together, alone = ([weights(dtype), weights(dtype)] for _ in range(2))
    settings = ({"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-3, "weight_decay": 0.0})
    groups = [{"params": params, **own} for params, own in zip(together, settings, strict=True)]
    joint = OPTIMIZERS[name](groups, **SETTINGS.get(name, {}), rounding=rounding)
    own = [build(name, params, **its, rounding=rounding) for params, its in zip(alone, settings, strict=True)]
    for step in range(STEPS):
        for params in (*together, *alone):
            give_gradients(params, step)
        joint.step()
        for each in own:
            each.step()
    for mine, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(*together, strict=True))


def test_groups_can_have_rules_of_their_own():
    params = weights()
    stepper = Lion([{"params": params[:1], "rule": "muon"}, {"params": params[1:], "lr": 1e-3}], lr=1e-2)
    assert [(group["rule"], group["lr"]) for group in stepper.param_groups] == [("muon", 1e-2), ("lion", 1e-3)]
    train(params, stepper, 0, 3)
    assert "momentum_buffer" in stepper.state[params[0]]
    assert "exp_avg" in stepper.state[params[1]]


def test_named_parameters_are_taken():
    model = nn.Linear(3, 2)
    stepper = AdamW(model.named_parameters(), lr=1e-3)
    assert stepper.param_groups[0]["param_names"] == ["weight", "bias"]
    assert "weight" in str(stepper.plan())


def test_the_plan_shows_every_parameter_and_its_state():
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40))
    stepper = optimizer(model, "muon", lr=1e-3)
    plan = stepper.plan()
    text = str(plan)
    assert all(name in text for name, _ in model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    stepper.step()
    held = sum(
        value.numel() * value.element_size()
        for state in stepper.state.values()
        for key, value in state.items()
        if key != "step"
    )
    assert plan.state_bytes == held


@pytest.mark.parametrize(("name", "most"), [("lion", 1.1), ("adamw", 2.1), ("ademamix", 3.2)])
def test_8bit_state_is_as_small_as_promised(name, most):
    params = [nn.Parameter(torch.zeros(384, 1536)), nn.Parameter(torch.zeros(1152, 384))]
    stepper = OPTIMIZERS[name](params, state_format="8bit")
    assert stepper.plan().state_bytes / sum(p.numel() for p in params) <= most


# --- defaults for a horizon -------------------------------------------------------------------------------------------


def test_settings_follow_the_horizon():
    model = nn.Linear(64, 64)
    short, long = (optimizer(model, "adamw", lr=1e-3, total_steps=steps) for steps in (1_000, 100_000))
    assert (short.param_groups[0]["weight_decay"], short.param_groups[0]["betas"]) == (0.5, (0.9, 0.95))
    assert (long.param_groups[0]["weight_decay"], long.param_groups[0]["betas"]) == (0.1, (0.9, 0.999))
    mixed = optimizer(model, "ademamix", lr=1e-3, total_steps=50_000).param_groups[0]
    assert (mixed["betas"][2], mixed["alpha_warmup"], mixed["total_steps"]) == (0.9999, 1.0, 50_000)
    constant = optimizer(model, "ademamix", lr=1e-3).param_groups[0]
    assert (constant["alpha_warmup"], constant["beta3_warmup"]) == (None, None)


def test_what_was_given_wins_over_the_horizon():
    group = optimizer(nn.Linear(4, 4), lr=1e-3, weight_decay=0.0, betas=(0.5, 0.6), total_steps=10).param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.0, (0.5, 0.6))


def test_every_default_has_its_reason():
    for name in OPTIMIZERS:
        found = hasten.optim.defaults(name, total_steps=1000, tokens_per_step=1000, parameters=1_000_000)
        wanted = {*found.settings, "warmup", "floor", "max_norm"} - {"total_steps"}
        assert wanted <= set(found.reasons), name


def test_a_new_horizon_reaches_the_warmups():
    params, same = weights(), weights()
    one = AdEMAMix(params, lr=1e-2, alpha_warmup=1.0, beta3_warmup=0.5, total_steps=1000)
    one.set_horizon(20)
    train(params, one, 0, 10)
    train(same, AdEMAMix(same, lr=1e-2, alpha_warmup=20, beta3_warmup=10), 0, 10)
    assert all(torch.equal(a, b) for a, b in zip(params, same, strict=True))


# --- refusals ---------------------------------------------------------------------------------------------------------


WRONG = (
    ("lr", -1e-3),
    ("lr", float("nan")),
    ("weight_decay", -0.1),
    ("weight_decay", float("inf")),
    ("betas", (0.9, 1.0)),
    ("betas", (-0.1, 0.9)),
    ("betas", 0.9),
    ("eps", -1e-8),
    ("momentum", 1.0),
    ("beta2", -0.5),
    ("rho", 0.0),
    ("d0", 0.0),
    ("gamma", -1.0),
    ("alpha", -1.0),
    ("batch_tokens", 0),
    ("warmup_steps", -1),
    ("precondition_frequency", 0),
    ("rounding", "down"),
    ("state_format", "4bit"),
    ("ema", 1.0),
)


def known_settings(name: str) -> set[str]:
    rule = RULES[name]
    return {
        *rule.settings,
        "rounding",
        "state_format",
        "ema",
        *(RULES[rule.rest].settings if rule.only_matrices else ()),
    }


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [(name, setting, value) for name in OPTIMIZERS for setting, value in WRONG if setting in known_settings(name)],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_by_name(name, setting, value):
    with pytest.raises(RecipeError, match=setting):
        OPTIMIZERS[name](weights(), **{setting: value})


@every_optimizer
def test_unknown_settings_are_refused_with_the_nearest(name):
    with pytest.raises(RecipeError, match="did you mean 'weight_decay'"):
        OPTIMIZERS[name](weights(), wieght_decay=0.1)
    with pytest.raises(RecipeError, match="did you mean 'weight_decay'"):
        OPTIMIZERS[name]([{"params": weights(), "wieght_decay": 0.1}])


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ([], "no parameters"),
        ([{"params": []}], "has no parameters"),
        ([{"params": [], "name": "head"}], "'head' has no parameters"),
        (torch.zeros(2), "was given a Tensor"),
        ([torch.zeros(2, dtype=torch.complex64)], "complex"),
        ([torch.zeros(2, dtype=torch.int64)], "int64"),
        (["weight"], "is a str"),
        ([{"params": [torch.zeros(2)], "rule": "lyon"}], "did you mean 'lion'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parameters_that_cannot_be_trained_are_refused(params, says):
    with pytest.raises(RecipeError, match=says):
        Lion(params)


def test_overlapping_groups_are_refused_by_name():
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(RecipeError, match="number 0 is in two groups"):
        Lion([{"params": [p]}, {"params": [p]}])
    with pytest.raises(RecipeError, match="bias is in two groups"):
        Lion([{"params": [("weight", p)]}, {"params": [("bias", p)]}])
    with pytest.raises(RecipeError, match="number 1 is in two groups"):
        Lion([p, p])


def test_a_warmup_that_needs_the_length_of_the_run_asks_for_it():
    with pytest.raises(RecipeError, match=r"alpha_warmup=1\.0 is a share of the run.*give total_steps"):
        AdEMAMix(weights(), alpha_warmup=1.0)
    with pytest.raises(RecipeError, match="beta3_warmup=0 is no warm-up"):
        AdEMAMix(weights(), beta3_warmup=0)
    with pytest.raises(RecipeError, match="total_steps=0"):
        optimizer(nn.Linear(2, 2), "ademamix", total_steps=0)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RecipeError, match="sparse=False"):
        AdamW(embedding.parameters()).step()


def test_the_parts_are_there_after_nothing_but_importing_hasten():
    says = "import hasten; print(hasten.optim.Lion.__name__, hasten.schedules.cosine(0.5)(1.0), hasten.clip.NoClip())"
    done = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, check=True)
    assert done.stdout == "Lion 0.5 NoClip()\n"


def test_public_classes_are_torch_optimizers():
    for name, kind in OPTIMIZERS.items():
        assert issubclass(kind, torch.optim.Optimizer)
        assert getattr(hasten.optim, kind.__name__) is kind
        assert "Source" in (kind.__doc__ or ""), name
        assert RULES[name].name == name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")
@every_optimizer
def test_a_gpu_gives_the_numbers_of_the_cpu(name):
    here, there = weights(), [nn.Parameter(p.detach().cuda()) for p in weights()]
    more = {"compute_dtype": "float32"} if "compute_dtype" in RULES[name].settings else {}
    one, other = build(name, here, **more), build(name, there, **more)
    for step in range(6):
        give_gradients(here, step)
        for p, q in zip(here, there, strict=True):
            q.grad = None if p.grad is None else p.grad.cuda()
        one.step()
        other.step()
    for p, q, start in zip(here, there, weights(), strict=True):
        assert (p - q.cpu()).norm() <= 1e-3 * (p - start).norm()
