"""The one `torch.optim.Optimizer`: groups, each under a rule of its own, stepped, saved and loaded together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RecipeError, nearest
from hasten.optim.modifiers import is_modified, modified_update
from hasten.optim.plan import Plan
from hasten.optim.plan import plan as make_plan
from hasten.optim.rule import Group, Rule, Work
from hasten.optim.settings import COMMON, NOTES, check_settings
from hasten.sharding import local

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Group]


def _as_written(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of torch's optimizer without its wrapper, which imports torch's compiler at the first call.

    That import takes 2.3 CPU-seconds of every process, and all that the wrapper does is to keep a compiler out.
    """
    return getattr(method, "__wrapped__", method)


_add_param_group = _as_written(torch.optim.Optimizer.add_param_group)
_load_state_dict = _as_written(torch.optim.Optimizer.load_state_dict)


class RuledOptimizer(torch.optim.Optimizer):
    """Groups of parameters, each with a rule (``group["rule"]``) and all of its settings in the group.

    Every optimizer of hasten is one of these; mixed rules (Muon for matrices, AdamW for the rest) are one object with
    one `state_dict`. ``step()`` never changes gradients. State is float32 also for bfloat16 weights, and stays so when
    it is loaded. Not for complex or sparse tensors.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of them. A group may name its own ``rule``; without
            one it has the main rule, and parameters that this one cannot take (vectors, for a matrix rule) go to a
            second group under the rule's rest.
        rule: the main rule.
        **settings: of the main rule and, where its rest has them too, of the rest; or common to all:
            ``rounding`` of bfloat16 weights (``nearest``; ``stochastic`` with ``seed``; ``kahan`` keeps what is cut off
            in a second bfloat16), ``state_format`` (``float32`` or ``8bit``), ``decay_follows_lr`` (False: the decay
            stays at ``initial_lr * weight_decay`` whatever the schedule), ``cautious``, ``cautious_decay``,
            ``hyperball``, ``ema`` and ``ema_share`` (see `hasten.optim.modifiers`).

    Raises:
        RecipeError: a setting is unknown or out of range, a group is empty, or a parameter is in two groups.
    """

    def __init__(self, params: Params, rule: Rule, **settings: Any) -> None:
        self._main = rule.name
        self._settings = {"lr": rule.settings["lr"], "weight_decay": rule.settings["weight_decay"], **settings}
        self._evaluating = False
        groups = self._as_groups(params)
        self._refuse_unknown(groups)
        torch._C._log_api_usage_once("hasten.optim")
        super().__init__(groups, {"lr": self._settings["lr"], "weight_decay": self._settings["weight_decay"]})

    # --- groups -----------------------------------------------------------------------------------------------------

    def _as_groups(self, params: Params) -> list[Group]:
        if isinstance(params, (Tensor, str)) or not isinstance(params, Iterable):
            raise RecipeError(f"The optimizer was given a {type(params).__name__}; give model.parameters() or groups.")
        given = list(params)
        if not given:
            raise RecipeError("The optimizer was given no parameters; give model.parameters(), which can be read once.")
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        return [part for group in groups for part in self._split(dict(group))]

    def _split(self, group: Group) -> Iterator[Group]:
        """Yield `group` with a rule, and what the main rule cannot take as a group under its rest."""
        members = group["params"]
        group["params"] = members = [members] if isinstance(members, Tensor) else list(members)
        label = repr(group["name"]) if "name" in group else "with no name"
        if not members:
            raise RecipeError(f"The group {label} has no parameters; leave it out, or put parameters into it.")
        main = _rule(self._main)
        if "rule" in group or not main.only_matrices:
            yield {"rule": self._main, **group}
            return
        for is_matrix, rule in ((True, main.name), (False, main.rest)):
            part = [m for m in members if ((m[1] if isinstance(m, tuple) else m).ndim >= 2) == is_matrix]
            if part:
                name = (
                    {"name": f"{group['name']} ({'matrices' if is_matrix else 'vectors'})"} if "name" in group else {}
                )
                yield {**group, **name, "rule": rule, "params": part}

    def _refuse_unknown(self, groups: list[Group]) -> None:
        main = _rule(self._main)
        known = set(COMMON).union(main.settings, *(_rule(group["rule"]).settings for group in groups))
        if main.only_matrices:
            known.update(_rule(main.rest).settings)
        for setting in self._settings:
            if setting not in known:
                raise RecipeError(
                    f"optimizer.{setting} is no setting of {self._main}{nearest(setting, known)}; it has "
                    f"{', '.join(sorted(known))}."
                )

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; what it does not say is filled in from its rule and from the settings of the whole.

        Raises:
            RecipeError: as for the class.
        """
        for group in self._split(dict(param_group)):
            rule, main = _rule(group["rule"]), _rule(self._main)
            known = {*rule.settings, *COMMON, *NOTES}
            if unknown := next((key for key in group if key not in known), None):
                raise RecipeError(
                    f"{unknown} is no setting of {rule.name}{nearest(unknown, known)}; it has "
                    f"{', '.join(sorted({*rule.settings, *COMMON}))}."
                )
            inherited = self._settings if rule.name == main.name else self._for_the_rest(rule, main)
            for key, default in {**rule.settings, **COMMON}.items():
                group.setdefault(key, inherited.get(key, default))
            check_settings(group, rule)
            self._refuse_parameters(group)
            _add_param_group(self, group)

    def _for_the_rest(self, rule: Rule, main: Rule) -> dict[str, Any]:
        settings = dict(main.rest_settings) if rule.name == main.rest else {}
        return {**{k: v for k, v in self._settings.items() if k not in settings}, **settings}

    def _refuse_parameters(self, group: Group) -> None:
        seen = {p for other in self.param_groups for p in other["params"]}
        for place, member in enumerate(group["params"]):
            name, parameter = member if isinstance(member, tuple) else (None, member)
            if name is None:
                names = group.get("parameter_names") or ()
                name = names[place] if place < len(names) else f"number {place}"
            if not isinstance(parameter, Tensor):
                raise RecipeError(f"An optimizer takes parameters; {name} is a {type(parameter).__name__}.")
            if not parameter.is_floating_point():
                raise RecipeError(
                    f"Parameter {name} is {parameter.dtype}; only real floating-point ones can be trained."
                )
            if not parameter.is_leaf and not parameter.retains_grad:
                raise RecipeError(f"Parameter {name} is computed from others; give the nn.Parameter itself.")
            if parameter in seen:
                raise RecipeError(f"Parameter {name} is in two groups; each step would update it twice.")
            seen.add(parameter)

    # --- stepping ---------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; gradients stay as they are.

        Args:
            closure: computes and returns the loss anew, as in torch.

        Returns:
            What `closure` returned; None without one.

        Raises:
            RecipeError: in evaluation mode, or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._evaluating:
            raise RecipeError("The optimizer holds its evaluation weights; call optimizer.train() before step().")
        # As torch.no_grad() does it; the context manager alone would be a tenth of a step of few small tensors.
        had_grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            self._update()
        finally:
            torch._C._set_grad_enabled(had_grad)
        return loss

    def _update(self) -> None:
        """Let every rule update what it has."""
        works = self._works()
        for name in dict.fromkeys([group["rule"] for group in self.param_groups]):
            rule = _rule(name)
            if rule.before is not None:
                rule.before([group for group in self.param_groups if group["rule"] == name])
            plain: list[Work] = []
            modified: list[Work] = []
            for work in works:
                if work.group["rule"] == name:
                    (modified if is_modified(work.group, rule) else plain).append(work)
            if plain:
                rule.update(plain)
            if modified:
                modified_update(rule, modified)
        for work in works:
            # Through numpy, as in `_works`: by torch it would be a tenth of a step of few small tensors.
            count = work.states[0]["step"].numpy()
            count += 1.0

    def _works(self) -> list[Work]:
        """Return what there is to update, by group and by how often it was updated; new parameters get their state.

        Parameters that were always updated together share one ``step`` tensor, which is counted up once.
        """
        works: list[Work] = []
        states = self.state
        for group in self.param_groups:
            by_step: dict[int, Work] = {}
            fresh: Tensor | None = None
            idle: list[dict[str, Tensor]] = []
            for parameter in group["params"]:
                grad = parameter.grad
                state = states.get(parameter)
                if grad is None:
                    if state:
                        idle.append(state)
                    continue
                if not state:
                    fresh = torch.zeros(()) if fresh is None else fresh
                    state = self.state[parameter] = self._first_state(parameter, group, fresh)
                step = state["step"]
                work = by_step.get(id(step))
                if work is None:
                    # Through numpy, because it is a tensor of the CPU: nothing waits for a device.
                    work = by_step[id(step)] = Work(group, [], [], [], int(step.numpy()) + 1)
                    works.append(work)
                work.params.append(parameter)
                work.grads.append(grad)
                work.states.append(state)
            for state in idle:
                if id(state["step"]) in by_step:
                    state["step"] = state["step"].clone()
        return works

    def _first_state(self, parameter: Tensor, group: Group, step: Tensor) -> dict[str, Tensor]:
        if parameter.grad.is_sparse:
            raise RecipeError("A gradient is sparse; build the nn.Embedding with sparse=False.")
        state = {"step": step, **_rule(group["rule"]).init(parameter, group)}
        if group["ema"] > 0:
            state["ema"] = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        return state

    def state_like(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return tensors of the shapes, formats and placements that the state of a parameter has."""
        group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
        return {"ema": parameter, "trained": parameter, **_rule(group["rule"]).init(parameter, group)}

    # --- what an optimizer may ask of the loop ----------------------------------------------------------------------

    @property
    def estimate_every(self) -> int:
        """Steps between two extra passes over sampled labels; 0 where no group wants one."""
        wishes = [g["estimate_every"] for g in self.param_groups if _rule(g["rule"]).estimate is not None]
        return min(wishes, default=0)

    @torch.no_grad()
    def estimate(self) -> None:
        """Take the present gradients, of a mean loss over labels that the model itself sampled, into the state."""
        works = self._works()
        for name in dict.fromkeys(work.group["rule"] for work in works):
            if (take := _rule(name).estimate) is not None:
                take([work for work in works if work.group["rule"] == name])

    def set_horizon(self, total_steps: int) -> None:
        """Tell the optimizer how many steps the whole run has; settings given as a share of it follow."""
        for group in self.param_groups:
            if "total_steps" in group:
                group["total_steps"] = total_steps

    @property
    def averages(self) -> bool:
        """Whether `eval` changes the weights: they are then trained as one thing and evaluated as another."""
        return any(_rule(group["rule"]).averaged is not None or group["ema"] > 0 for group in self.param_groups)

    @torch.no_grad()
    def eval(self) -> None:
        """Put the weights to evaluate and export with into the parameters; no change for most optimizers.

        `train` brings the trained weights back bit for bit.
        """
        if self._evaluating:
            return
        self._evaluating = True
        for group in self.param_groups:
            averaged = _rule(group["rule"]).averaged
            if averaged is None and not group["ema"]:
                continue
            params = [p for p in group["params"] if self.state.get(p)]
            states = [self.state[p] for p in params]
            for parameter, state in zip(params, states, strict=True):
                state["trained"] = parameter.detach().clone()
            if averaged is not None:
                averaged(Work(group, params, [], states, 0))
            else:
                for parameter, state in zip(params, states, strict=True):
                    local(parameter).copy_(
                        torch.lerp(local(parameter).to(state["ema"].dtype), local(state["ema"]), group["ema_share"])
                    )

    @torch.no_grad()
    def train(self) -> None:
        """Put the trained weights back after `eval`; no change otherwise."""
        if not self._evaluating:
            return
        self._evaluating = False
        for parameter, state in self.state.items():
            if "trained" in state:
                local(parameter).copy_(local(state.pop("trained")))

    zero_grad = _as_written(torch.optim.Optimizer.zero_grad)

    # --- saving and loading -----------------------------------------------------------------------------------------

    state_dict = _as_written(torch.optim.Optimizer.state_dict)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take state and settings over; tensors are copied and keep their own number format.

        A state of torch.optim with the same names (AdamW, Adam, SGD, RMSprop) is taken as well.

        Raises:
            RecipeError: it is the state of another rule or another state format.
        """
        now = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        for mine, theirs in zip(now, state_dict["param_groups"], strict=False):
            for key in ("rule", "state_format"):
                if theirs.get(key, mine[key]) != mine[key]:
                    raise RecipeError(
                        f"The state to load was saved with {key}={theirs[key]!r}, and this optimizer has "
                        f"{key}={mine[key]!r}; build it as the saved one was."
                    )
        _load_state_dict(self, dict(state_dict))
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        order = [(p, number) for number, group in enumerate(self.param_groups) for p in group["params"]]
        shared: dict[tuple[int, float], Tensor] = {}
        for (parameter, number), key in zip(order, saved, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name == "step":
                    done = float(value)
                    step = shared.setdefault((number, done), torch.tensor(done))
                    self.state[parameter][name] = step
                elif isinstance(value, Tensor):
                    # torch casts to the parameter's format, which would cut float32 state of bfloat16 weights.
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)
        for group, before in zip(self.param_groups, now, strict=True):
            for key, value in before.items():
                group.setdefault(key, value)
        self._evaluating = any("trained" in state for state in self.state.values())

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_main": self._main,
            "_settings": self._settings,
            "_evaluating": self._evaluating,
        }

    # --- for people -------------------------------------------------------------------------------------------------

    def plan(self, *, tokens_per_step: int | None = None) -> Plan:
        """Return a table to print: every parameter, its group, rule, decay, lr scale and bytes of state.

        Args:
            tokens_per_step: tokens of an optimizer step; with it, rules that would cost much beside it are named.
        """
        names: dict[Tensor, str] = {}
        for number, group in enumerate(self.param_groups):
            listed = group.get("parameter_names") or group.get("param_names")
            for place, parameter in enumerate(group["params"]):
                names[parameter] = listed[place] if listed else f"group {number}, parameter {place}"
        return make_plan(self.param_groups, names, _state_bytes, tokens_per_step=tokens_per_step)


@functools.cache
def _rule(name: str) -> Rule:
    from hasten.optim import RULES  # The table stands beside the classes, which stand on this file.

    if name not in RULES:
        raise RecipeError(f"rule={name!r} is unknown{nearest(name, RULES)}; give {', '.join(RULES)}.")
    return RULES[name]


def _state_bytes(parameter: Tensor, group: Group) -> int:
    bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    state = _rule(group["rule"]).init(bare, group)
    ema = parameter.numel() * 4 if group["ema"] else 0
    return ema + sum(tensor.numel() * tensor.element_size() for tensor in state.values())
