"""What kind of thing each parameter of a model is, read off its modules and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from hasten.optim.fusion import Projection, fused_parts

KINDS = ("matrices", "experts", "convolutions", "head", "embeddings", "gates", "vectors")

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.RMSNorm)  # torch's own that can have weights of two dimensions
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
EPSILONS = ("eps", "epsilon", "variance_epsilon", "norm_eps")
ROWS, COLUMNS = -2, -1
# A head may be padded to a rounder number than the vocabulary (50257 to 50304), by at most this share.
PADDING = 0.01


@dataclass(frozen=True)
class Kind:
    """What a parameter is, and how its matrices come apart.

    Args:
        name: one of `KINDS`.
        split_sizes: widths of the matrices that were fused into one along `split_dim`; None for one matrix.
        split_dim: the output dimension of the matrix: -2 for rows (``nn.Linear``), -1 for columns (``Conv1D`` of
            transformers).
        as_matrix: ``"flatten"`` where the first dimension and all the others are the matrix (convolutions); None where
            the last two dimensions are.
    """

    name: str
    split_sizes: tuple[int, ...] | None = None
    split_dim: int = ROWS
    as_matrix: str | None = None


def kinds_of(model: nn.Module) -> dict[nn.Parameter, Kind]:
    """Return the kind of every parameter, trained or frozen, in the order of ``model.named_parameters()``.

    embeddings
        the weight of an embedding, tied to a head or not; tables with a leading dimension of 1 (positions to be added).
    vectors
        fewer than two dimensions above 1 (biases, gains), norms of any shape, one bias per expert, rates of a state
        space (a row for each channel of the depthwise convolution beside them), and what carries mamba's mark
        ``_no_weight_decay``.
    head
        the projection from outside any block whose outputs are as many as the rows of an embedding, up to 1 % of
        padding; where the embedding is tied, that is the head. Of several, the nearest to the root.
    convolutions
        weights of `torch.nn` convolutions; grouped ones come apart by group.
    experts
        stacks of three dimensions or more, each of them a matrix in its last two.
    gates
        matrices with a dimension of 1, depthwise convolutions, and routers: a projection to as many outputs as there
        are experts beside it, in a stack or a ``ModuleList``.
    matrices
        every other matrix.

    Nothing depends on the names of parameters. A fused query-key-value or gate-up projection is told by the sizes of
    its neighbours (see `hasten.optim.fusion.fused_parts`) and gets `Kind.split_sizes`.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> [kind.name for kind in kinds_of(model).values()]
        ['embeddings', 'matrices', 'vectors', 'head', 'vectors']
    """
    places = list(_walk(model, None, depth=0, in_block=False, seen=set()))
    kinds: dict[nn.Parameter, Kind] = dict.fromkeys(model.parameters(), Kind("vectors"))
    known: set[nn.Parameter] = set()
    for place in places:
        for parameter in _own(place.module):
            kind = _by_itself(place.module, parameter)
            if parameter not in known or kind.name == "embeddings":  # a tied head is an embedding
                kinds[parameter] = kind
                known.add(parameter)
    for parameter in _heads(places, kinds):
        kinds[parameter] = Kind("head", split_dim=kinds[parameter].split_dim)
    for place in places:
        for parameter, kind in _among_neighbours(place.module).items():
            if kinds[parameter].name in ("matrices", "experts"):
                kinds[parameter] = kind
    return kinds


@dataclass(frozen=True)
class _Place:
    module: nn.Module
    parent: nn.Module | None
    depth: int  # levels below the root, containers not counted
    in_block: bool


def _walk(
    module: nn.Module, parent: nn.Module | None, *, depth: int, in_block: bool, seen: set[nn.Module]
) -> Iterator[_Place]:
    """Yield every module once, parents first."""
    if module in seen:
        return
    seen.add(module)
    yield _Place(module, parent, depth, in_block)
    children = list(module.children())
    for child in children:
        is_repeated = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and sum(type(other) is type(child) for other in children) > 1
        )
        is_block = is_repeated and any(True for _ in child.children())
        below = depth + (not isinstance(child, CONTAINERS))
        yield from _walk(child, module, depth=below, in_block=in_block or is_block, seen=seen)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _by_itself(module: nn.Module, parameter: nn.Parameter) -> Kind:
    """Return the kind as far as a parameter and its module tell."""
    shape = tuple(parameter.shape)
    if isinstance(module, EMBEDDINGS):
        return Kind("embeddings")
    is_exempt = vars(parameter).get("_no_weight_decay", False)
    is_flat = len(shape) < 2 or (len(shape) > 2 and sum(size != 1 for size in shape) < 2)
    if is_flat or is_exempt or _is_norm(module):
        return Kind("vectors")
    if isinstance(module, _ConvNd):
        is_depthwise = module.groups > 1 and shape[1] == 1
        if is_depthwise or shape[0] == 1 or parameter.numel() == shape[0]:
            return Kind("gates", as_matrix="flatten")
        parts = (shape[0] // module.groups,) * module.groups if module.groups > 1 else None
        return Kind("convolutions", parts, as_matrix="flatten")
    if len(shape) > 2 and shape[0] == 1:
        return Kind("embeddings")
    if 1 in shape[-2:]:
        return Kind("gates")
    if len(shape) > 2:
        return Kind("experts", split_dim=COLUMNS if vars(module).get("is_transposed", False) else ROWS)
    if isinstance(module, nn.RNNBase) and shape[0] > module.hidden_size and shape[0] % module.hidden_size == 0:
        return Kind("matrices", (module.hidden_size,) * (shape[0] // module.hidden_size))
    return Kind("matrices", split_dim=_output_dim(module, parameter))


def _is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm: one of torch's, or a leaf that has an epsilon and parameters of one shape only."""
    has_epsilon = any(isinstance(vars(module).get(name), float) for name in EPSILONS)
    is_other = isinstance(module, (nn.Linear, _ConvNd)) or any(True for _ in module.children())
    return isinstance(module, NORMS) or (has_epsilon and not is_other and len({p.shape for p in _own(module)}) == 1)


def _output_dim(module: nn.Module, parameter: nn.Parameter) -> int:
    """Return columns for what multiplies from the right, as ``Conv1D`` of transformers, which has ``nf``; else rows."""
    return COLUMNS if vars(module).get("nf") == parameter.shape[1] else ROWS


def _projection(module: nn.Module) -> Projection | None:
    """Return the matrix of a module that has one, no children and no other job."""
    matrices = [parameter for parameter in _own(module) if parameter.ndim == 2]
    is_leaf = not any(True for _ in module.children())
    if len(matrices) != 1 or not is_leaf or isinstance(module, (*EMBEDDINGS, _ConvNd)) or _is_norm(module):
        return None
    return Projection(matrices[0], _output_dim(module, matrices[0]))


def _only_projection(module: nn.Module) -> Projection | None:
    """Return the projection that `module` is or, for a Sequential (of it and a dropout, say), the one that it has."""
    if not isinstance(module, nn.Sequential):
        return _projection(module)
    found = [projection for child in module if (projection := _projection(child))]
    return found[0] if len(found) == 1 == sum(p.ndim > 1 for p in module.parameters()) else None


def _heads(places: list[_Place], kinds: dict[nn.Parameter, Kind]) -> list[nn.Parameter]:
    tables = {p: p.shape[0] for place in places if isinstance(place.module, EMBEDDINGS) for p in _own(place.module)}
    projections = [(place, projection) for place in places if (projection := _projection(place.module))]
    if any(projection.weight in tables for _, projection in projections):
        return []
    free = [(place, p) for place, p in projections if not place.in_block and kinds[p.weight].name == "matrices"]
    # Token embeddings are larger than those of positions or token types, so a match with the largest decides.
    for rows in sorted(set(tables.values()), reverse=True):
        found = [(place, p) for place, p in free if abs(p.outputs - rows) <= PADDING * rows]
        nearest = [(place, p) for place, p in found if place.depth == min(place.depth for place, _ in found)]
        if nearest:
            # What comes later in a Sequential reads what comes earlier, so only the last can be the head.
            heads = {
                id(place.parent if isinstance(place.parent, nn.Sequential) else place.module): p for place, p in nearest
            }
            return [projection.weight for projection in heads.values()]
    return []


def _among_neighbours(module: nn.Module) -> dict[nn.Parameter, Kind]:
    """Return what only the other parameters of `module` and of its children tell: routers, bias stacks, fused parts."""
    children = list(module.children())
    own = _own(module)
    found: dict[nn.Parameter, Kind] = {}
    if children and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raw = (
            []
            if isinstance(module, nn.RNNBase)
            else [Projection(p, ROWS) for p in own if p.ndim == 2 and 1 not in p.shape]
        )
        projections = raw + [projection for child in children if (projection := _only_projection(child))]
        for weight, sizes, dim in fused_parts(module, projections):
            found[weight] = Kind("matrices", sizes, dim)
    channels = {child.out_channels for child in children if isinstance(child, _ConvNd) and child.groups > 1}
    found |= {p: Kind("vectors") for p in own if p.ndim == 2 and p.shape[0] in channels}
    stacks = [p for owner in (module, *children) if not isinstance(owner, _ConvNd) for p in _own(owner) if _is_stack(p)]
    found |= _fused_stacks(module, stacks)
    numbers = {p.shape[0] for p in stacks} | {len(c) for c in children if isinstance(c, nn.ModuleList) and _alike(c)}
    routers = [(child, only) for child in children if (only := _only_matrix(child)) is not None]
    for child, parameter in [*((module, p) for p in own if p.ndim == 2), *routers]:
        if parameter.shape[_output_dim(child, parameter)] in numbers:
            found[parameter] = Kind("gates")
    beside = [p for p in own if p.ndim == 2 and any(p.shape[0] == stack.shape[0] for stack in stacks)]
    if len(beside) >= max(2, sum(_is_stack(p) for p in own)):  # one bias for each of the expert stacks
        found |= dict.fromkeys(beside, Kind("vectors"))
    return found


def _is_stack(parameter: nn.Parameter) -> bool:
    return parameter.ndim == 3 and 1 not in parameter.shape


def _alike(modules: nn.ModuleList) -> bool:
    """Whether these can be experts: two or more of one class, each with matrices."""
    has_matrices = all(any(p.ndim > 1 for p in module.parameters()) for module in modules)
    return len(modules) > 1 and len({type(module) for module in modules}) == 1 and has_matrices


def _only_matrix(module: nn.Module) -> nn.Parameter | None:
    """Return the matrix of a module that has just one, its descendants included."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    is_other = isinstance(module, (*EMBEDDINGS, _ConvNd, *CONTAINERS)) or _is_norm(module)
    return matrices[0] if len(matrices) == 1 and matrices[0].ndim == 2 and not is_other else None


def _fused_stacks(module: nn.Module, stacks: list[nn.Parameter]) -> dict[nn.Parameter, Kind]:
    """Return gate and up projections of experts in one stack (out, in), or with both of the pair transposed."""
    found: dict[nn.Parameter, Kind] = {}
    # transformers says so where gate and up alternate instead of following each other.
    is_alternating = not all(vars(owner).get("is_concatenated", True) for owner in (module, *module.children()))
    for up in stacks:
        for down in stacks:
            if up is down or up.shape[0] != down.shape[0]:
                continue
            for dim, other in ((ROWS, COLUMNS), (COLUMNS, ROWS)):
                width = up.shape[dim]
                if width == 2 * down.shape[other] and up.shape[other] == down.shape[dim]:
                    halves = Kind("experts", None if is_alternating else (width // 2, width // 2), dim)
                    found |= {up: halves, down: replace(halves, split_sizes=None)}
    return found
