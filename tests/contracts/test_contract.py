"""What every architecture of the table can do, before and after it is sliced."""

from __future__ import annotations

import copy
import fnmatch
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.hooks import RemovableHandle

import pathprune
from building import (
    NEW_TOKENS,
    Subject,
    build,
    gap,
    generate,
    gradients,
    outputs,
    prompt,
    run,
    subject_of,
    tensors,
    with_attention,
    without_cache,
)
from pathprune.checkpoint.load_slice import load_slice
from pathprune.family.budget import Budget
from pathprune.family.order import UNITS, Unit
from pathprune.family.pairs import Pair, Slot
from pathprune.family.path import SolutionPath
from pathprune.family.selection import Selection
from pathprune.model.contexts import mixed
from pathprune.recovery.training import trainable
from pathprune.transform.masks import attach_masks, masked
from pathprune.transform.reconstruction import compensators
from pathprune.transform.slicing import slice_model
from pathprune.transform.sorting import rebased, sort_units
from pathprune.types import Floats
from strategies import EXTREMES, selection_of
from subjects import ROWS, Inputs, Row, padding

VISIBLE = 1e-3
EXACT = 1e-9
SINGLE = 1e-4  # where something is computed in float32: eager softmax mostly

RECTANGLES = ("uneven", "fewer heads", "no attention", "no mlp", "nothing left", *EXTREMES)
WHOLE_LAYERS = ("uneven", "fewer heads", "no attention", "nothing left")


@pytest.fixture(params=[row.name for row in ROWS])
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(request.param)


def by_scores(subject: Subject, unit: Unit, keep: float, seed: int) -> Selection:
    rng = np.random.default_rng(seed)
    scores = {pair.name: rng.random(pair.shape) for pair in subject.pairs}
    return SolutionPath.from_scores(subject.pairs, scores, unit=unit).select(Budget(keep=keep))


def sliced(subject: Subject, case: str, **settings: Any) -> Any:
    return slice_model(subject.model, selection_of(subject.pairs, case, **settings))


def assert_masked(
    dense: Any, small: Any, selection: Selection, inputs: Inputs, row: Row, name: str, rounds: Any = None
) -> Any:
    """The masked model's outputs, which must be the sliced one's; exactly, but for what is rounded inside.

    Many a norm is computed in float32: a difference in the last place may then be one in the ninth.
    """

    def compared(rounded: bool) -> tuple[float, Any]:
        with masked(dense, selection):
            expected = run(dense, inputs, rounded=rounded)
        return gap(run(small, inputs, rounded=rounded), expected), expected

    apart, expected = compared(rounded=True)
    assert apart < SINGLE, name
    if apart >= EXACT or (row.rounds if rounds is None else rounds):
        apart, _ = compared(rounded=False)
        assert apart < EXACT, f"{name}, in float64 all through"
    return expected


def tolerance(subject: Subject) -> float:
    """Of the same model, computed in another way."""
    return SINGLE if subject.row.rounds else EXACT


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_dense_model_is_a_fair_subject(row: Row) -> None:
    """Finite, far from saturation, and different for every sample and every token."""
    model, inputs = build(row.name)[1], row.inputs()
    assert all((parameter != 0).all() for parameter in model.parameters())
    for name, tensor in run(model, inputs).items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.abs().max() < 100, name
        assert tensor.std() > 0.01 * tensor.abs().max(), name
        assert (tensor[0] - tensor[1]).abs().max() > 0.01 * tensor.abs().max(), name


def test_pairs_are_those_of_the_table(subject: Subject, record_property: Any) -> None:
    row, pairs = subject.row, subject.pairs
    share = pairs.prunable_params / pairs.base.params
    record_property("architecture", row.model)
    record_property("share of the parameters in pairs", round(share, 3))
    print(f"{row.name} ({row.model}): {share:.1%} of the parameters are in pairs")
    assert {kind: sum(pair.kind == kind for pair in pairs) for kind in ("qk", "vo", "mlp")} == row.pairs
    assert pairs.base.params == sum(parameter.numel() for parameter in subject.model.parameters())
    assert share > row.share
    for block, reason in pairs.refused.items():
        expected = [piece for pattern, piece in row.refused.items() if fnmatch.fnmatch(block, pattern)]
        assert expected, f"{block} is refused: {reason}"
        assert expected[0] in reason
    for pattern in row.refused:
        assert fnmatch.filter(pairs.refused, pattern), f"nothing like {pattern} is refused"


def test_sliced_is_masked(subject: Subject) -> None:
    dense = run(subject.model, subject.inputs)
    sizes = itertools.product(UNITS, (0.7, 0.35))
    selections = {f"{keep} by {unit}": by_scores(subject, unit, keep, seed) for seed, (unit, keep) in enumerate(sizes)}
    for case, constants in itertools.product(RECTANGLES, (False, True)):
        seed = len(selections)
        selections[f"{case}, {constants=}"] = selection_of(subject.pairs, case, seed=seed, constants=constants)
    for name, selection in selections.items():
        small = slice_model(subject.model, selection)
        expected = assert_masked(subject.model, small, selection, subject.inputs, subject.row, name)
        assert gap(expected, dense) > VISIBLE, name
        assert sum(parameter.numel() for parameter in small.parameters()) == selection.params, name


def test_masks_work_in_mixed_precision(subject: Subject) -> None:
    """As a search or a recovery with ``bf16`` runs it."""
    model = copy.deepcopy(subject.model).float()
    inputs = {name: part.float() if part.is_floating_point() else part for name, part in subject.inputs.items()}
    selection = selection_of(subject.pairs, "uneven", constants=True)
    with masked(subject.model, selection):
        exact = run(subject.model, subject.inputs)
    masks = {pair.name: torch.from_numpy(selection.mask(pair)) for pair in subject.pairs}
    fill = {name: torch.from_numpy(array) for name, array in selection.fill.items()}
    cpu = torch.device("cpu")
    told = compensators(selection.centre, selection.covariance, cpu)
    outputs = {name: torch.from_numpy(array) for name, array in selection.output.items() if not masks[name].all()}
    with attach_masks(model, subject.pairs, masks, fill, selection.basis, told, outputs), mixed(model, True):
        rough = {name: tensor.double() for name, tensor in run(model, inputs).items()}
    print(f"{subject.row.name}: {gap(rough, exact):.3f}")
    assert gap(rough, exact) < 0.1


def test_sorting_units_changes_neither_the_model_nor_a_size(subject: Subject, tmp_path: Path) -> None:
    """And a size of the sorted model, saved whole, can be loaded alone, with what elastic training would have added."""
    some = selection_of(subject.pairs, "full")  # for its rotations, fills, compensation and outputs
    scores: dict[str, Floats] = {pair.name: np.random.default_rng(0).random(pair.shape) for pair in subject.pairs}
    parts: dict[str, Any] = {
        part: dict(getattr(some, part)) for part in ("fill", "basis", "output", "centre", "covariance")
    }
    path = SolutionPath(subject.pairs, scores, **parts)
    ordered, again = sort_units(subject.model, path)
    expected = run(subject.model, subject.inputs, rounded=False)
    assert gap(run(ordered, subject.inputs, rounded=False), expected) < EXACT
    half = Budget(keep=0.5)
    small, theirs = (slice_model(*of) for of in ((ordered, again.select(half)), (subject.model, path.select(half))))
    expected = run(theirs, subject.inputs, rounded=False)
    assert gap(run(small, subject.inputs, rounded=False), expected) < EXACT

    again = rebased(replace(again, delta=deltas(ordered)), ordered)
    small = slice_model(ordered, again.select(half))
    moved = assert_masked(ordered, small, again.select(half), subject.inputs, subject.row, "with deltas")
    assert gap(run(theirs, subject.inputs), moved) > VISIBLE, "a delta that changes nothing"
    assert gap(run(ordered, subject.inputs, rounded=False), run(subject.model, subject.inputs, rounded=False)) < EXACT

    ordered.save_pretrained(tmp_path)
    again.save(tmp_path)
    options = {"experts_implementation": subject.row.experts} if subject.row.experts else {}
    loaded = dict(load_slice(tmp_path, half, **options).named_parameters())
    assert loaded.keys() == dict(small.named_parameters()).keys()
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(loaded[name], parameter, rtol=1e-12, atol=1e-12, msg=partial("{}: {}".format, name))


def deltas(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """For all parameters that are trained."""
    rng, trained = np.random.default_rng(1), {id(parameter) for parameter in trainable(model)}
    return {name: 0.1 * rng.normal(size=p.shape) for name, p in model.named_parameters() if id(p) in trained}


def test_values_and_outputs_of_a_pair_belong_together(subject: Subject) -> None:
    """Without a unit's value, its place in the output projection reads nothing: the two are one unit for real."""
    rng = np.random.default_rng(0)
    for pair in subject.pairs:
        if pair.kind != "vo":
            continue
        keep = rng.random(pair.shape) < 0.5
        values, both = (zeroed(subject, pair, pair.slots[:end], keep) for end in (-1, None))
        assert gap(values, both) < tolerance(subject), pair.name


def zeroed(subject: Subject, pair: Pair, slots: Sequence[Slot], keep: np.ndarray) -> dict[str, torch.Tensor]:
    """Outputs with nothing at a pair's removed places in some of its maps."""

    def hook(slot: Slot) -> RemovableHandle:
        module, gone = subject.model.get_submodule(slot.module), torch.from_numpy(pair.positions(slot, ~keep))
        if slot.side == "out":
            return module.register_forward_hook(lambda module, args, output: output.index_fill(-1, gone, 0))
        return module.register_forward_pre_hook(lambda module, args: (args[0].index_fill(-1, gone, 0), *args[1:]))

    handles = [hook(slot) for slot in slots]
    found = run(subject.model, subject.inputs)
    for handle in handles:
        handle.remove()
    return found


def test_any_one_sublayer_may_go(subject: Subject) -> None:
    """Layers may depend on one another: on a bias that the first one makes, or a cache that it measures."""
    dense = run(subject.model, subject.inputs)
    reached = [name for name, gradient in gradients(subject.model, subject.inputs).items() if gradient is not None]
    for gone in dict.fromkeys((pair.block, pair.kind == "mlp") for pair in subject.pairs):
        keep = {
            pair.name: np.full(pair.shape, (pair.block, pair.kind == "mlp") != gone, dtype=bool)
            for pair in subject.pairs
        }
        selection = Selection(subject.pairs, keep)
        small = slice_model(subject.model, selection)
        expected = assert_masked(subject.model, small, selection, subject.inputs, subject.row, gone[0])
        if any(name.startswith(f"{gone[0]}.") for name in reached):  # LLaVA reads the last layer but one
            assert gap(expected, dense) > VISIBLE, gone[0]


def test_query_key_and_value_widths_are_free_of_each_other(subject: Subject) -> None:
    widths: dict[tuple[str, int], dict[str, int]] = {}
    for seed, pair in itertools.product(range(3), subject.pairs):
        if pair.kind != "mlp":
            width = selection_of(subject.pairs, "uneven", seed=seed).widths(pair)[1]
            widths.setdefault((pair.block, seed), {})[pair.kind] = width
    both = [found for found in widths.values() if len(found) == 2]
    assert any(found["qk"] != found["vo"] for found in both) or not both


def test_gradients_reach_what_they_reach_in_the_dense_model(subject: Subject) -> None:
    dense = gradients(subject.model, subject.inputs)
    for case in ("uneven", "no attention"):
        small = sliced(subject, case)
        for name, gradient in gradients(small, subject.inputs).items():
            before = dense.get(name, dense.get(f"{name.removesuffix('.bias')}.weight"))  # a bias may be new
            if before is None:
                continue
            parameter = small.get_parameter(name)
            assert gradient is not None or not parameter.numel(), f"{case}: {name}"
            if gradient is not None and parameter.numel() and case == "uneven":
                assert gradient.shape == parameter.shape
                assert torch.isfinite(gradient).all(), name
                assert bool(gradient.any()) == bool(before.any()), name


def test_training_with_dropout_and_checkpointing(subject: Subject) -> None:
    """Checkpointing gives the same gradients, with the same dropout, and really computes twice."""
    small = sliced(subject, "uneven").train()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    small.get_submodule(subject.pairs[0].slots[0].module).register_forward_hook(count)
    torch.manual_seed(0)
    expected = gradients(small, subject.inputs)
    once = calls
    if not small.supports_gradient_checkpointing:
        assert not subject.model.supports_gradient_checkpointing
        return
    small.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    got = gradients(small, subject.inputs)
    assert calls > 2 * once
    top = max(
        float(gradient.abs().max()) for gradient in expected.values() if gradient is not None and gradient.numel()
    )
    for name, gradient in expected.items():
        other = got[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None and gradient.numel():
            assert (gradient - other).abs().max() < 1e-6 * top, name


@pytest.mark.parametrize("row", [row for row in ROWS if row.generates], ids=lambda row: row.name)
def test_generation(row: Row) -> None:
    """With and without cache, with a static cache, and as the masked model."""
    subject = subject_of(row.name)
    for case in WHOLE_LAYERS:
        selection = selection_of(subject.pairs, case)
        dense, inputs = subject.model, prompt(row, subject.inputs)
        small, limit = slice_model(dense, selection), 1e-6  # generate() returns logits in float32
        if not dense._supports_sdpa:  # eager attention over padding alone is not finite in float64
            small, limit = small.float(), 1e-3
            inputs = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
            dense = copy.deepcopy(dense).float()
        tokens, logits = generate(small, inputs, use_cache=False)
        assert torch.isfinite(logits).all()
        assert len(logits) == NEW_TOKENS
        runs = {"cache": generate(small, inputs, use_cache=True)}
        if "static cache" not in row.cannot:
            runs["static cache"] = generate(small, inputs, cache_implementation="static")
        with masked(subject.model if dense is subject.model else dense, selection):
            runs["masked"] = generate(dense, inputs, use_cache=True)
        for name, (same, close) in runs.items():
            assert torch.equal(same, tokens), f"{case}: {name}"
            assert (close - logits).abs().max() < limit * logits.abs().max(), f"{case}: {name}"


@pytest.mark.parametrize("row", [row for row in ROWS if "static cache" in row.cannot], ids=lambda row: row.name)
def test_no_static_cache_in_the_dense_model_either(row: Row) -> None:
    dense = build(row.name)[1]
    inputs = prompt(row, row.inputs())
    if row.cannot["static cache"] == "differs":
        expected, got = (generate(dense, inputs, **how)[1] for how in ({}, {"cache_implementation": "static"}))
        assert (expected - got).abs().max() > 0.01
    else:
        with pytest.raises(Exception, match=row.cannot["static cache"]):
            generate(dense, inputs, cache_implementation="static")


def test_attention_implementations_agree(subject: Subject) -> None:
    implementations = ["eager", "sdpa"] if subject.model._supports_sdpa else ["eager"]
    for case in ("uneven", "fewer heads", "no attention"):
        selection, found = selection_of(subject.pairs, case), []
        small = slice_model(subject.model, selection)
        for implementation in implementations:
            dense = with_attention(subject.model, implementation)
            small.set_attn_implementation(implementation)
            rounds = subject.row.rounds or implementation == "eager"  # many an eager softmax is in float32
            assert_masked(dense, small, selection, subject.inputs, subject.row, f"{case}: {implementation}", rounds)
            found.append(run(small, subject.inputs))
        assert gap(found[0], found[-1]) < SINGLE, case


@pytest.mark.slow
def test_torch_compile(subject: Subject) -> None:
    small = sliced(subject, "fewer heads")
    graphs = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()  # or its limit of recompilations is reached, by other rows
    with torch.no_grad():
        got = outputs(torch.compile(small, backend=backend), subject.inputs)  # type: ignore[arg-type]
    assert graphs
    assert gap(got, run(small, subject.inputs)) < tolerance(subject)


def test_torch_export(subject: Subject) -> None:
    def exported(model: Any) -> Any:
        inputs = without_cache(model, subject.inputs)
        with torch.no_grad():
            return tensors(torch.export.export(model, (), kwargs=inputs).module()(**inputs))

    if reason := subject.row.cannot.get("export"):
        with pytest.raises(Exception, match=reason):
            exported(subject.model)
        return
    for case in ("fewer heads", "no attention"):
        small = sliced(subject, case)
        with torch.no_grad():
            expected = tensors(small(**subject.inputs))
        assert gap(exported(small), expected) < tolerance(subject), case


@pytest.fixture(scope="module")
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes of every row that is to be tested, loaded and run in one fresh process."""
    folder = tmp_path_factory.mktemp("sliced")
    items = [item for item in request.session.items if getattr(item, "function", None) is test_a_fresh_process_loads_it]
    for name in {item.callspec.params["subject"] for item in items}:  # type: ignore[attr-defined]
        try:
            subject = subject_of(name)
        except pathprune.UnsupportedModelError:
            continue  # its tests say so
        for case in LOADED:
            small, place = sliced(subject, case), folder / f"{name} {case}"
            small.save_pretrained(place / "model", max_shard_size="30KB")
            options = {"experts_implementation": subject.row.experts} if subject.row.experts else {}
            (place / "facts.json").write_text(json.dumps({"class": subject.row.model, "options": options}))
            torch.save(subject.inputs, place / "inputs.pt")
    environment = {**os.environ, "PYTHONPATH": str(Path(pathprune.__file__).parents[1])}
    command = [sys.executable, str(Path(__file__).with_name("loading.py")), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


LOADED = ("uneven", "no attention")


def test_a_fresh_process_loads_it(subject: Subject, loaded: Path) -> None:
    for case in LOADED:
        small, place = sliced(subject, case), loaded / f"{subject.row.name} {case}"
        error = place / "error.txt"
        assert not error.exists(), error.read_text()
        with torch.no_grad():
            expected = {name: value for name, value in tensors(small(**subject.inputs)).items() if "." not in name}
        got = torch.load(place / "outputs.pt")
        assert gap({name: got[name] for name in expected}, expected) < tolerance(subject), case

        half = torch.load(place / "half.pt")
        for name, tensor in expected.items():
            assert half[name].dtype == torch.bfloat16
            alike = torch.nn.functional.cosine_similarity(half[name].double().flatten(), tensor.flatten(), dim=0)
            assert alike > 0.95, f"{case}: {name} in bfloat16"

        one, two = (json.loads((place / name / "config.json").read_text()) for name in ("model", "again"))
        assert one.pop("dtype") == two.pop("dtype") == "float64"
        assert one == two
        values = {}
        for file in (place / "again").glob("*.safetensors"):
            values.update(load_file(file))
        state = small.state_dict()
        assert len(values) > 5
        for name, tensor in values.items():
            if name in state:
                assert torch.equal(tensor, state[name]), name


def test_other_inputs_than_the_proof_s(subject: Subject) -> None:
    """Other batch sizes, and where there is text other lengths, padding on the left and none."""
    selection = selection_of(subject.pairs, "uneven", seed=7)
    small = slice_model(subject.model, selection)
    given = subject.inputs
    variants = {"one sample": one_sample(given)}
    if "input_ids" in given and "pixel_values" not in given:
        ids = given["input_ids"]
        rest = {name: tensor for name, tensor in given.items() if name != "attention_mask"}
        longer = torch.cat([ids, ids.flip(1), ids], dim=1)
        variants |= {
            "no mask": rest,
            "one token": {**rest, "input_ids": ids[:, :1]},
            "longer": {**rest, "input_ids": longer},
            "a gap in the mask": {**rest, "input_ids": longer, "attention_mask": (longer % 5 > 0).long()},
        }
        variants["a gap in the mask"]["attention_mask"][:, [0, 4, 8, 12, 16, 20, 24]] = 1
        if subject.model._supports_sdpa:  # eager attention over padding alone is not finite in float64
            variants["padding on the left"] = {**given, "attention_mask": padding(ids, left=True)}
    for name, inputs in variants.items():
        assert_masked(subject.model, small, selection, inputs, subject.row, name)


def one_sample(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    samples = len(inputs.get("input_ids", next(iter(inputs.values()))))
    return {name: tensor[: len(tensor) // samples] for name, tensor in inputs.items()}
