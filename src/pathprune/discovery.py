"""Find the pairs of a model by structure, and prove each before it is offered.

Candidates are read off the roles of child ``nn.Linear`` modules and how their shapes meet. A
candidate counts only when the sublayer, sliced at random, computes what the masked sublayer
computes, in float64, on inputs captured from a real forward pass of a tiny input. What cannot
be proved is refused with its reason; nothing is guessed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathprune.budget import Selection
from pathprune.errors import MismatchError, UnsupportedModelError
from pathprune.masks import attach_masks
from pathprune.pairs import BaseModel, Pair, PairList, Slot
from pathprune.slicing import HEAD_DIM_ATTRIBUTES, head_width, slice_modules

# Roles of child modules, as dotted names below the module that holds the role "query" or "up".
QUERY = ("q_proj", "query")
KEY = ("k_proj", "key")
VALUE = ("v_proj", "value")
OUTPUT = ("o_proj", "out_proj", "../output.dense")
UP = ("up_proj", "fc1", "intermediate.dense")
GATE = ("gate_proj",)
DOWN = ("down_proj", "fc2", "output.dense")

TOLERANCE = 1e-9

# Configuration entries that say how a model was loaded or saved, not what it computes.
VOLATILE = frozenset(
    [
        "_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "_attn_implementation",
        "attn_implementation",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
        "quantization_config",
    ]
)


def find_pairs(model: nn.Module) -> PairList:
    """All prunable pairs of a ``transformers`` model, each proved on a tiny input.

    Returns:
        The pairs in forward order; ``.base`` identifies the model, ``.refused`` names the
        sublayers that looked prunable but could not be proved, with the reason.

    Raises:
        UnsupportedModelError: no pair was found or proved; the message says what was found.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantised or already sliced; search the dense, unquantised model"
        )
    candidates, refused = _candidates(model)
    if not candidates:
        linears = sum(isinstance(module, nn.Linear) for module in model.modules())
        raise UnsupportedModelError(
            f"{type(model).__name__}: no attention or MLP in a known layout among its {linears} linear maps. "
            f"{_reasons(refused)}Looked for query/key/value/output and up/(gate/)down children; "
            "see docs/architectures.md for what is supported"
        )
    calls, order, macs = _observe(model, {members[0].block for members in candidates})
    candidates.sort(key=lambda members: order.get(members[0].slots[0].module, len(order)))
    pairs: list[Pair] = []
    proved: dict[Any, str | None] = {}
    for members in candidates:
        block = members[0].block
        if block not in calls:
            refused[block] = "the tiny input's forward pass never called it"
            continue
        args, kwargs = calls[block]
        if _rotary(kwargs, members):
            members = [replace(pair, rotary=pair.kind == "qk") for pair in members]
        scope = model.get_submodule(block)
        # Layers that differ in nothing but their weights need one proof.
        signature = (_facts(scope), tuple(replace(_inside(pair), name="", block="") for pair in members))
        if signature not in proved:
            proved[signature] = _disprove(scope, [_inside(pair) for pair in members], args, kwargs)
        if reason := proved[signature]:
            refused[block] = reason
        else:
            pairs.extend(members)
    if not pairs:
        raise UnsupportedModelError(
            f"{type(model).__name__}: found {len(candidates)} sublayers, none could be proved. {_reasons(refused)}"
        )
    return PairList(pairs, identify(model, *macs), refused)


def _facts(scope: nn.Module) -> tuple[Any, ...]:
    """What a block computes with beside its weights: types, plain attributes, functions of its own, hooks."""
    facts: list[Any] = []
    for name, module in scope.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("layer_idx", "training")}
        plain = {key: value for key, value in own.items() if isinstance(value, bool | int | float | str | None)}
        functions = {key: id(value) for key, value in own.items() if callable(value)}
        hooks = [id(hook) for key in ("_forward_hooks", "_forward_pre_hooks") for hook in own[key].values()]
        facts.append((name, type(module), repr(plain), repr(functions), tuple(hooks)))
    return tuple(facts)


def identify(model: nn.Module, macs_per_token: int, macs_per_sequence: int) -> BaseModel:
    """Hash a model's configuration, and a sample of its weights (rounded to bfloat16, so that it
    does not depend on the precision they were loaded in).
    """
    config = getattr(model, "config", None)
    facts = config.to_diff_dict() if config is not None else {}
    facts = {key: value for key, value in facts.items() if key not in VOLATILE and not key.endswith("_token_id")}
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 16)][:17].to("cpu", torch.bfloat16)
        weights.update(sample.view(torch.int16).numpy().tobytes())
    return BaseModel(
        architecture=type(model).__name__,
        config_hash=hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest(),
        fingerprint=weights.hexdigest(),
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs_per_token=macs_per_token,
        macs_per_sequence=macs_per_sequence,
    )


def check_base(model: nn.Module, pairs: PairList) -> None:
    """Check that ``pairs`` were found in this very model.

    Raises:
        MismatchError: architecture, configuration or weights differ.
    """
    base, here = pairs.base, identify(model, pairs.base.macs_per_token, pairs.base.macs_per_sequence)
    for what, theirs, ours in (
        ("architecture", base.architecture, here.architecture),
        ("size", f"{base.params:,} parameters", f"{here.params:,} parameters"),
        ("configuration", base.config_hash[:12], here.config_hash[:12]),
        ("weights", base.fingerprint[:12], here.fingerprint[:12]),
    ):
        if theirs != ours:
            raise MismatchError(
                f"this path belongs to another model: {what} was {theirs}, here it is {ours}. "
                "Load the model that was searched, or search this one"
            )


def _reasons(refused: Mapping[str, str]) -> str:
    return "".join(f"{name}: {reason}. " for name, reason in list(refused.items())[:5])


def _candidates(model: nn.Module) -> tuple[list[list[Pair]], dict[str, str]]:
    """Sublayers whose linear maps have the roles and shapes of an attention or an MLP."""
    found: list[list[Pair]] = []
    refused: dict[str, str] = {}
    shared = _shared_parameters(model)
    for name, module in model.named_modules():
        query, up = _role(model, name, QUERY), _role(model, name, UP)
        if query:
            maps = [query, *(_role(model, name, role) for role in (KEY, VALUE, OUTPUT))]
            block, members = _attention(model, name, module, maps)
        elif up:
            maps = [up, *filter(None, [_role(model, name, GATE)]), _role(model, name, DOWN)]
            block, members = _mlp(model, name, maps)
        else:
            continue
        if isinstance(members, str):
            refused[block] = members
        elif tied := [m for m in maps if m and any(id(p) in shared for p in model.get_submodule(m).parameters())]:
            refused[block] = f"{tied[0]} shares its weight with another module"
        else:
            found.append(members)
    return found, refused


def _attention(model: nn.Module, name: str, module: nn.Module, maps: list[str | None]) -> tuple[str, list[Pair] | str]:
    missing = [role for role, m in zip(("query", "key", "value", "output"), maps, strict=True) if not m]
    if missing:
        return name, f"no linear map for {', '.join(missing)}"
    names = [m for m in maps if m]
    block = _common(names)
    q, k, v, o = (_linear(model, m) for m in names)
    width = head_width(module)
    if not isinstance(width, int) or width < 1:
        return block, f"no head width: none of {', '.join(HEAD_DIM_ATTRIBUTES)}"
    groups, repeat = k.out_features // width, q.out_features // max(k.out_features, 1)
    if (
        k.out_features != groups * width
        or v.out_features != k.out_features
        or q.out_features != repeat * k.out_features
        or o.in_features != q.out_features
    ):
        return block, (
            f"widths do not meet: query {q.out_features}, key {k.out_features}, value {v.out_features}, "
            f"output {o.in_features}, head {width}"
        )
    nq, nk, nv, no = names
    return block, [
        Pair(
            f"{block}.qk",
            "qk",
            block,
            groups,
            width,
            (
                Slot(nq, "out", q.in_features, repeat, q.bias is not None),
                Slot(nk, "out", k.in_features, 1, k.bias is not None),
            ),
        ),
        Pair(
            f"{block}.vo",
            "vo",
            block,
            groups,
            width,
            (
                Slot(nv, "out", v.in_features, 1, v.bias is not None),
                Slot(no, "in", o.out_features, repeat, o.bias is not None),
            ),
        ),
    ]


def _mlp(model: nn.Module, name: str, maps: list[str | None]) -> tuple[str, list[Pair] | str]:
    names = [m for m in maps if m]
    block = _common(names) if len(names) > 1 else name
    if maps[-1] is None:
        return block, "no linear map for down"
    *ins, out = (_linear(model, m) for m in names)
    if any(linear.out_features != out.in_features for linear in ins):
        return block, f"widths do not meet: up {[m.out_features for m in ins]}, down {out.in_features}"
    slots = [Slot(m, "out", up.in_features, 1, up.bias is not None) for m, up in zip(names, ins, strict=False)]
    slots.append(Slot(names[-1], "in", out.out_features, 1, out.bias is not None))
    label = block if block.endswith("mlp") else f"{block}.mlp"
    return block, [Pair(label, "mlp", block, 1, out.in_features, tuple(slots))]


def _role(model: nn.Module, name: str, candidates: tuple[str, ...]) -> str | None:
    """Full name of the first candidate that is a linear map; ``../`` looks beside the module."""
    for candidate in candidates:
        base, child = name, candidate
        if candidate.startswith("../"):
            base, child = name.rpartition(".")[0], candidate[3:]
        full = f"{base}.{child}" if base else child
        try:
            if isinstance(model.get_submodule(full), nn.Linear):
                return full
        except AttributeError:
            continue
    return None


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _common(names: list[str]) -> str:
    """Deepest module that holds all of ``names``."""
    parts = []
    for step in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(step)) > 1:
            break
        parts.append(step[0])
    return ".".join(parts)


def _shared_parameters(model: nn.Module) -> set[int]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off; the training flags come back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _observe(model: nn.Module, blocks: set[str]) -> tuple[dict[str, Call], dict[str, int], tuple[int, int]]:
    """One forward pass of a tiny input.

    Returns:
        The arguments of each block, the order in which linear maps are called, and MACs per
        position and per sequence.
    """
    calls: dict[str, Call] = {}
    order: dict[str, int] = {}
    macs: list[tuple[int, int]] = []  # of each call: positions, MACs

    def remember(block: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(block, (args, kwargs))

        return hook

    def count(name: str) -> Any:
        def hook(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            order.setdefault(name, len(order))
            macs.append((output.numel() // module.out_features, output.numel() * module.in_features))

        return hook

    handles = [model.get_submodule(b).register_forward_pre_hook(remember(b), with_kwargs=True) for b in blocks]
    handles += [m.register_forward_hook(count(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    try:
        with evaluating(model), torch.no_grad():
            batch = _tiny_input(model)
            model(**batch)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} did not run on a tiny input, so nothing could be proved: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    tokens = max((positions for positions, _ in macs), default=1)
    sequences = len(next(iter(batch.values())))
    everywhere = sum(count for positions, count in macs if positions == tokens)
    once = sum(count for positions, count in macs if positions != tokens)
    return calls, order, (everywhere // tokens, once // sequences)


def _tiny_input(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    first = next(model.parameters())
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, getattr(config, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": pixels.to(first.device, first.dtype)}
    if name != "input_ids":
        raise UnsupportedModelError(f"no tiny input is known for a model that reads {name}")
    # Ids near the end of the vocabulary are ordinary words; special tokens live at the start.
    ids = torch.arange(16, device=first.device).reshape(2, 8) % 7 + max(0, config.vocab_size - 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if hasattr(config, "use_cache"):
        batch["use_cache"] = False
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch


def _rotary(kwargs: Mapping[str, Any], members: list[Pair]) -> bool:
    """Whether the attention is handed cos and sin for the whole head."""
    cos_sin = kwargs.get("position_embeddings")
    return (
        members[0].kind == "qk"
        and isinstance(cos_sin, tuple)
        and all(isinstance(t, Tensor) and t.shape[-1] == members[0].width for t in cos_sin)
    )


def _inside(pair: Pair) -> Pair:
    """The same pair, seen from its block."""
    cut = len(pair.block) + 1 if pair.block else 0
    return replace(pair, slots=tuple(replace(slot, module=slot.module[cut:]) for slot in pair.slots))


def _disprove(scope: nn.Module, members: list[Pair], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Slice a copy of the block at random and compare with the masked block; a reason if they differ."""
    rng = np.random.default_rng(0)
    base = BaseModel("", "", "", 0, 0)
    args, kwargs = pytree.tree_map(lambda x: x.double() if _floating(x) else x, (args, kwargs))
    with evaluating(scope):
        dense = copy.deepcopy(scope).double()
    for trial in range(3):
        keep = _random_keep(rng, members, empty=trial == 2)
        fill = {p.name: rng.normal(size=(p.groups, p.width)) for p in members if p.fillable}
        basis = {}
        if trial == 1:
            basis = {p.name: rng.normal(size=(p.groups, p.width, p.width)) for p in members if p.rotatable}
        selection = Selection(PairList(members, base), keep, fill=fill, basis=basis)
        masks = {name: torch.from_numpy(mask) for name, mask in keep.items()}
        try:
            with torch.no_grad():
                before = dense(*args, **kwargs)
                constants = {name: torch.from_numpy(array) for name, array in fill.items()}
                with attach_masks(dense, members, masks, constants, basis):
                    expected = dense(*args, **kwargs)
                sliced, _ = slice_modules(dense, selection)
                got = sliced(*args, **kwargs)
        except Exception as error:
            return f"sliced, it does not run: {type(error).__name__}: {error}"
        gap, effect = _distance(expected, got), _distance(before, expected)
        if not gap <= TOLERANCE:
            return f"sliced and masked outputs differ by {gap:.1e} (relative; at most {TOLERANCE:.0e})"
        if not effect > TOLERANCE:
            return "masking its units does not change its output"
    return None


def _random_keep(rng: np.random.Generator, members: list[Pair], empty: bool) -> dict[str, np.ndarray[Any, Any]]:
    """Rectangles with unequal widths and, where there are several, a head gone."""
    keep = {}
    alive = np.ones(members[0].groups, dtype=bool)
    if len(alive) > 1:
        alive[rng.integers(len(alive))] = False
    for i, pair in enumerate(members):
        count = max(1, pair.units * (2 - i) // 3)
        mask = np.zeros(pair.shape, dtype=bool)
        common = rng.permutation(pair.units)[:count]
        for head in np.flatnonzero(alive):
            mask[head, common if pair.rotary else rng.permutation(pair.units)[:count]] = True
        keep[pair.name] = mask & (not empty)
    return keep


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _distance(a: Any, b: Any) -> float:
    """Largest relative difference of two outputs' first tensors (what follows are attention weights, by head)."""
    x, y = (next(filter(_floating, pytree.tree_leaves(output))) for output in (a, b))
    return float("inf") if x.shape != y.shape else float((x - y).abs().max() / x.abs().max().clamp_min(1e-30))
