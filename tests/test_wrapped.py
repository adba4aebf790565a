"""Models inside others, compiled ones, and ones whose maps are not what they seem."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathprune as pp
from helpers import tiny_batches, tiny_bert
from pathprune.data.batches import Batches
from pathprune.evaluation import fidelity
from pathprune.ranking.covariance import gather


def selection(model: nn.Module, keep: float = 0.5) -> pp.Selection:
    pairs = pp.find_pairs(model)
    noise = torch.Generator().manual_seed(0)
    scores = {pair.name: torch.rand(*pair.shape, generator=noise) for pair in pairs}
    return pp.SolutionPath.from_scores(pairs, scores).select(pp.Budget(keep=keep))


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(**tiny_batches(1)[0])[0]


def compile_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compile_a_layer(model: Any) -> Any:
    model.encoder.layer[0].compile(backend="eager")
    return model


def compile_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compile_around(model: Any) -> Any:
    return torch.compile(model, backend="eager")


COMPILED = [compile_in_place, compile_a_layer, compile_forward]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [*COMPILED, compile_around])
def test_masks_reach_a_compiled_model(compiled: Callable[[Any], Any]) -> None:
    model = tiny_bert()
    chosen, dense = selection(model), output(model)
    with pp.masked(model, chosen):
        expected = output(model)
    called = compiled(model)
    assert torch.equal(output(called), dense)
    with pp.masked(model, chosen):
        assert torch.equal(output(called), expected)
    assert torch.equal(output(called), dense)
    assert not torch.allclose(expected, dense, atol=0.1)


def test_what_is_compiled_under_masks_has_none_afterwards() -> None:
    model = tiny_bert()
    dense = output(model)
    with pp.masked(model, selection(model)):
        called = compile_around(model)
        expected = output(called)
        compile_in_place(model)
        assert torch.equal(output(model), expected)
    assert torch.equal(output(called), dense)
    assert torch.equal(output(model), dense)


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_model_is_searched_and_sliced_as_what_it_was_compiled_from(compiled: Callable[[Any], Any]) -> None:
    plain, model = tiny_bert(), compiled(tiny_bert())
    output(model)  # warm
    batches = tiny_batches()
    expected = pp.search(plain, batches, steps=8, progress=False)
    assert expected.covariance
    path = pp.search(model, batches, steps=8, progress=False)
    for part in ("ranking", "fill", "basis", "slope", "covariance"):
        ours, theirs = getattr(path, part), getattr(expected, part)
        assert all((ours[name] == theirs[name]).all() for name in theirs), part
    budget = pp.Budget(keep=0.5)
    small = pp.slice_model(model, path.select(budget))
    assert torch.equal(output(small), output(pp.slice_model(plain, expected.select(budget))))
    ordered, _ = pp.sort_units(model, path)
    assert torch.allclose(output(ordered), output(plain), atol=1e-5)
    assert not any(hasattr(value, "_torchdynamo_orig_callable") for m in small.modules() for value in vars(m).values())


def test_moments_are_of_a_compiled_model_too() -> None:
    model = tiny_bert()
    pairs, batches = pp.find_pairs(model), Batches(model, tiny_batches())
    expected = gather(model, pairs, batches, {}, count=3, progress=False)[0]
    output(compile_in_place(model))
    found = gather(model, pairs, batches, {}, count=3, progress=False)[0]
    assert found
    assert all((found[name] == expected[name]).all() for name in expected)


def test_a_slice_does_not_call_what_generate_compiled_of_the_dense_model() -> None:
    model = tiny_bert()
    model._compiled_call = torch.compile(model.__call__, backend="eager")  # as transformers does on a GPU
    assert not hasattr(pp.slice_model(model, selection(model)), "_compiled_call")
    assert hasattr(model, "_compiled_call")


def of_peft(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"]))


class SentenceTransformer(nn.Sequential):
    """By this name."""


class Pipeline:
    """Of transformers, for one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


def traced(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.config.return_dict = False
        return torch.jit.trace(model, tiny_batches(1)[0]["input_ids"])


def with_a_traced_map(model: Any) -> Any:
    dense = model.encoder.layer[1].output
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense.dense = torch.jit.trace(dense.dense, torch.zeros(1, 48))
    return model


def with_a_wrapped_layer(model: Any) -> Any:
    model.encoder.layer[0] = torch.compile(model.encoder.layer[0])
    return model


def made_for_inference(model: Any) -> Any:
    with torch.inference_mode():
        return tiny_bert()


def of_nothing(model: Any) -> Any:
    return nn.Identity()


REFUSED: list[tuple[Callable[[Any], Any], str]] = [
    (of_peft, r"a PeftModel holds a model .* pass model\.merge_and_unload\(\)"),
    (lambda model: of_peft(model).get_base_model(), r"query is a Linear, an adapter of PEFT .* merge_and_unload\(\)"),
    (nn.DataParallel, r"a DataParallel holds a model .* pass model\.module"),
    (compile_around, r"a OptimizedModule holds a model .* pass model\._orig_mod"),
    (SentenceTransformer, r"a SentenceTransformer holds a model .* pass model\[0\]\.auto_model"),
    (Pipeline, r"a Pipeline is not a torch\.nn\.Module; pass the model that it holds, its \.model"),
    (traced, r"the model is a \w+, scripted or traced, which no hook reaches; pass the original model"),
    (with_a_traced_map, r"encoder\.layer\.1\.output\.dense is a \w+, scripted or traced"),
    (with_a_wrapped_layer, r"encoder\.layer\.0 is a OptimizedModule, made by torch\.compile; .* by \.compile\(\)"),
    (of_nothing, "the Identity has no parameters"),
    (made_for_inference, r"built under torch\.inference_mode\(\).* copy\.deepcopy\(model\)"),
]


@pytest.mark.parametrize(("wrap", "message"), REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_what_holds_a_model_is_refused_with_the_remedy(wrap: Callable[[Any], Any], message: str) -> None:
    chosen = selection(tiny_bert())
    path = pp.SolutionPath.from_scores(chosen.pairs, {pair.name: torch.ones(*pair.shape) for pair in chosen.pairs})
    model, batches = wrap(tiny_bert()), tiny_batches(2)
    attempts: list[Callable[[], Any]] = [
        lambda: pp.find_pairs(model),
        lambda: pp.search(model, batches, steps=3),
        lambda: pp.slice_model(model, chosen),
        lambda: pp.masked(model, chosen).__enter__(),
        lambda: pp.sort_units(model, path),
        lambda: pp.compensate(model, path, batches),
        lambda: pp.elastic(model, path, data=batches, steps=1),
    ]
    for attempt in attempts:
        with pytest.raises(pp.UnsupportedModelError, match=message):
            attempt()


def test_a_copy_of_a_model_made_for_inference_is_as_good_as_any() -> None:
    model = copy.deepcopy(made_for_inference(None))
    assert pp.find_pairs(model)


def test_a_wrapped_model_is_measured_as_what_it_holds() -> None:
    model, batches = tiny_bert(), tiny_batches(2)
    for wrapped in (of_peft(tiny_bert()), nn.DataParallel(tiny_bert()), compile_around(tiny_bert())):
        assert fidelity(wrapped, model, batches) == pytest.approx(1, abs=1e-5)


class Rounded(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.shape[1] < 100 else super().forward(input).round()


class Named(nn.Linear):
    """A forward of Linear's."""


def halved(self: nn.Linear, input: Tensor) -> Tensor:
    return nn.functional.linear(input / 2, self.weight, self.bias)


def test_a_map_with_a_forward_of_its_own_is_no_map() -> None:
    model: Any = tiny_bert()
    first, second = (layer.attention.self for layer in model.encoder.layer)
    first.query.__class__ = Rounded
    second.key.forward = MethodType(halved, second.key)
    model.encoder.layer[0].intermediate.dense.__class__ = Named
    pairs = pp.find_pairs(model)
    assert [pair.name for pair in pairs] == ["encoder.layer.0.mlp", "encoder.layer.1.mlp"]
    own = "with a forward of its own, which slicing would lose"
    assert pairs.refused == {
        "encoder.layer.0.attention": f"encoder.layer.0.attention.self.query is a Rounded {own}",
        "encoder.layer.1.attention": f"encoder.layer.1.attention.self.key is a Linear {own}",
    }
