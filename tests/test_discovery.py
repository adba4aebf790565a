"""Pairs are found by structure, proved on a tiny input, and refused with a reason where the proof fails."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention

from conftest import COMMON, Subject, randomise, run_model, snapshot, tiny_inputs
from helpers import tiny_batches, tiny_bert
from pathprune.discovery.discover import find_pairs
from pathprune.errors import MismatchError, UnsupportedModelError
from pathprune.family.budget import Budget
from pathprune.family.pair_list import PairList
from pathprune.family.pairs import Pair
from pathprune.family.path import SolutionPath
from pathprune.model.identity import check_base
from pathprune.transform.masks import masked
from pathprune.transform.slicing import slice_model
from strategies import selection_of


def tiny(family: str, model: str = "Model", **settings: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**COMMON, "num_attention_heads": 4, **settings})
    return randomise(getattr(transformers, family + model)(config).double().eval())


def by_name(pairs: PairList) -> dict[str, Pair]:
    return {pair.name: pair for pair in pairs}


@pytest.mark.parametrize(
    ("family", "prefix", "groups", "repeat", "width", "rotary", "maps", "biases"),
    [
        ("bert", "bert.encoder.layer.1.attention", 3, 1, 8, False, ["query", "key", "value", "dense"], "bbbb"),
        ("llama", "model.layers.1.self_attn", 2, 4, 8, True, ["q_proj", "k_proj", "v_proj", "o_proj"], "...."),
        ("qwen2", "layers.1.self_attn", 2, 2, 6, True, ["q_proj", "k_proj", "v_proj", "o_proj"], "bbb."),
    ],
)
def test_attention_pairs_are_as_expected(
    subjects: dict[str, Subject],
    family: str,
    prefix: str,
    groups: int,
    repeat: int,
    width: int,
    rotary: bool,
    maps: list[str],
    biases: str,
) -> None:
    pairs = by_name(subjects[family].pairs)
    qk, vo = pairs[f"{prefix}.qk"], pairs[f"{prefix}.vo"]
    assert (qk.kind, vo.kind) == ("qk", "vo")
    assert qk.block == vo.block == prefix
    assert qk.groups == vo.groups == groups
    assert qk.width == vo.width == width
    assert (qk.rotary, vo.rotary) == ("halves" if rotary else "", "")
    assert (qk.units, vo.units) == (width // (2 if rotary else 1), width)
    slots = (*qk.slots, *vo.slots)
    assert [slot.module.rpartition(".")[2] for slot in slots] == maps
    assert [slot.side for slot in slots] == ["out", "out", "out", "in"]
    assert [slot.repeat for slot in slots] == [repeat, 1, 1, repeat]
    assert [slot.bias for slot in slots] == [mark == "b" for mark in biases]
    assert {slot.size for slot in slots} == {COMMON["hidden_size"]}
    assert qk.rotatable is not rotary
    assert vo.rotatable
    assert vo.fillable
    assert not qk.fillable


@pytest.mark.parametrize(
    ("family", "name", "maps", "bias"),
    [
        ("bert", "bert.encoder.layer.0.mlp", ["intermediate.dense", "output.dense"], True),
        ("llama", "model.layers.0.mlp", ["mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"], False),
        ("qwen2", "layers.0.mlp", ["mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"], False),
    ],
)
def test_mlp_pairs_are_as_expected(
    subjects: dict[str, Subject], family: str, name: str, maps: list[str], bias: bool
) -> None:
    pair = by_name(subjects[family].pairs)[name]
    assert (pair.kind, pair.groups, pair.width, pair.units) == ("mlp", 1, 20, 20)
    assert [".".join(slot.module.split(".")[-2:]) for slot in pair.slots] == maps
    assert [slot.side for slot in pair.slots] == ["out"] * (len(maps) - 1) + ["in"]
    assert pair.fillable
    assert not pair.rotatable


def test_every_layer_offers_three_pairs_and_nothing_is_refused(subject: Subject) -> None:
    assert len(subject.pairs) == 3 * COMMON["num_hidden_layers"]
    assert subject.pairs.refused == {}
    assert subject.pairs.base.params == sum(parameter.numel() for parameter in subject.model.parameters())
    assert subject.pairs.prunable_params == sum(
        subject.model.get_submodule(slot.module).weight.numel()
        + (slot.side == "out" and slot.bias and subject.model.get_submodule(slot.module).bias.numel())
        for pair in subject.pairs
        for slot in pair.slots
    )


def test_pairs_stand_in_forward_order(subject: Subject) -> None:
    called: list[str] = []
    names = {pair.slots[0].module: pair.name for pair in subject.pairs}
    handles = [
        subject.model.get_submodule(module).register_forward_hook(lambda *_, name=name: called.append(name))
        for module, name in names.items()
    ]
    subject.output()
    for handle in handles:
        handle.remove()
    assert [pair.block for pair in subject.pairs] == [by_name(subject.pairs)[name].block for name in called]


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(subject: Subject, training: bool) -> None:
    model = copy.deepcopy(subject.model).train(training)
    for i, (parameter, module) in enumerate(zip(model.parameters(), model.modules(), strict=False)):
        parameter.requires_grad_(i % 2 == 0)
        module.training = i % 3 == 0
    before = snapshot(model)
    found = find_pairs(model)
    assert snapshot(model) == before
    assert list(found) == list(subject.pairs)


def test_pairs_of_a_low_precision_model_are_proved_all_the_same(subject: Subject) -> None:
    assert list(find_pairs(copy.deepcopy(subject.model).bfloat16())) == list(subject.pairs)


Forward = Callable[..., Any]


def leaky(forward: Forward) -> Forward:
    """An attention that also reads the length of each query, which a sliced one cannot know."""

    def patched(self: BertSelfAttention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        context, *rest = forward(self, hidden_states, *args, **kwargs)
        return (context + self.query(hidden_states).abs().sum(-1, keepdim=True), *rest)

    return patched


def in_place(pairs: PairList, block: str) -> bool:
    """Whether the block's attention keeps its dimensions in their places, masked at every map."""
    qk = by_name(pairs)[f"{block}.qk"]
    return qk.mixing and not qk.narrow


def test_an_attention_that_slicing_would_change_is_sliced_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Bert")
    monkeypatch.setattr(BertSelfAttention, "forward", leaky(BertSelfAttention.forward))
    pairs = find_pairs(model)
    assert set(pairs.refused) == {f"encoder.layer.{i}.attention.vo" for i in range(2)}
    assert all("outputs differ by" in reason for reason in pairs.refused.values())
    assert all(in_place(pairs, f"encoder.layer.{i}.attention") for i in range(2))


def test_an_attention_that_reads_its_maps_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing at a map's boundary can stand for what is missing inside it."""

    def patched(self: BertSelfAttention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs = BertSelfAttention.forward(self, hidden_states, *args, **kwargs)
        return (outputs[0] + self.query.weight.sum(), *outputs[1:])

    model = tiny("Bert")
    for layer in model.encoder.layer:
        layer.attention.self.forward = types.MethodType(patched, layer.attention.self)
    pairs = find_pairs(model)
    assert set(pairs.refused) == {f"encoder.layer.{i}.attention.{kind}" for i in range(2) for kind in ("qk", "vo")}
    assert all("outputs differ by" in reason for reason in pairs.refused.values())
    assert {pair.kind for pair in pairs} == {"mlp"}


def test_one_layer_that_is_not_like_the_others_has_a_proof_of_its_own(subjects: dict[str, Subject]) -> None:
    model = copy.deepcopy(subjects["bert"].model)
    odd = model.bert.encoder.layer[1].attention.self
    odd.forward = types.MethodType(leaky(BertSelfAttention.forward), odd)
    pairs = find_pairs(model)
    assert [in_place(pairs, f"bert.encoder.layer.{i}.attention") for i in range(2)] == [False, True]


def test_a_hook_of_the_user_s_is_part_of_the_layer(subjects: dict[str, Subject]) -> None:
    model = copy.deepcopy(subjects["bert"].model)
    odd = model.bert.encoder.layer[1].attention.self

    def leak(module: BertSelfAttention, args: tuple[Tensor, ...], output: Any) -> Any:
        return (output[0] + module.query(args[0]).abs().sum(-1, keepdim=True), *output[1:])

    odd.register_forward_hook(leak)
    pairs = find_pairs(model)
    assert [in_place(pairs, f"bert.encoder.layer.{i}.attention") for i in range(2)] == [False, True]


def test_a_model_that_runs_in_single_precision_only_is_proved_in_double() -> None:
    """XGLM makes the least number of its activations' precision in the default one."""
    config = transformers.XGLMConfig(vocab_size=40, d_model=24, ffn_dim=20, num_layers=1, attention_heads=3)
    pairs = find_pairs(transformers.XGLMModel(config).eval())
    assert {pair.kind for pair in pairs} == {"qk", "vo", "mlp"}
    assert torch.get_default_dtype() == torch.float32


class TwoDecoders(nn.Module):
    """The second one attends to what the first one saw, through its cache."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (tiny("Llama", num_key_value_heads=2) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        cache = self.first(input_ids, use_cache=True).past_key_values
        output: Tensor = self.second(input_ids, past_key_values=cache).last_hidden_state
        return output


@pytest.mark.parametrize("constants", [False, True])
def test_what_an_attention_leaves_in_a_cache_is_part_of_what_it_gives(constants: bool) -> None:
    model = TwoDecoders()
    inputs = {"input_ids": tiny_inputs()["input_ids"]}
    pairs = find_pairs(model, inputs)
    assert {"first.layers.0.self_attn.qk", "first.layers.0.self_attn.vo"} <= set(by_name(pairs))
    for case in ("uneven", "fewer heads"):
        selection = selection_of(pairs, case, constants=constants)
        with torch.no_grad(), masked(model, selection):
            expected = model(**inputs)
        with torch.no_grad():
            torch.testing.assert_close(slice_model(model, selection)(**inputs), expected, rtol=0, atol=1e-9)


def test_a_cache_that_no_other_layer_reads_changes_no_pair() -> None:
    model, inputs = tiny("Llama", num_key_value_heads=2), tiny_inputs()
    assert find_pairs(model, {**inputs, "use_cache": True}) == find_pairs(model, {**inputs, "use_cache": False})


def test_neurons_that_are_zero_prove_nothing() -> None:
    with pytest.raises(UnsupportedModelError, match="masking its units does not change its output"):
        find_pairs(Lone(bias=False), {"input_ids": torch.zeros(3, 4)})


def test_tied_maps_are_refused(subjects: dict[str, Subject]) -> None:
    model = copy.deepcopy(subjects["llama"].model)
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    refused = find_pairs(model).refused
    assert refused == {
        f"model.layers.{i}.mlp": f"model.layers.{i}.mlp.up_proj shares its weight with another module" for i in range(2)
    }


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    return transformers.ResNetModel(config)


def sliced() -> nn.Module:
    model = tiny("Bert")
    return slice_model(model, selection_of(find_pairs(model), "uneven"))


class Lone(nn.Module):
    """Looks like an MLP, but is no model of transformers."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(4, 8, bias), nn.Linear(8, 4, bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(input_ids))


def test_a_model_of_another_library_is_searched_on_its_own_inputs() -> None:
    model = Lone().double()
    inputs = {"input_ids": torch.randn(3, 4, dtype=torch.float64)}
    (pair,) = find_pairs(model, inputs)
    assert (pair.name, pair.kind, pair.shape) == ("mlp", "mlp", (1, 8))
    with pytest.raises(UnsupportedModelError, match=r"Sequential: no attention or MLP .* among its 2 linear maps"):
        find_pairs(sequential(), {"input": torch.randn(3, 4)})
    with pytest.raises(UnsupportedModelError, match="Lone did not run on the input, so nothing could be proved"):
        find_pairs(model, {"input_ids": torch.randn(3, 5)})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (sequential, r"Sequential does not run on a tiny input .* pass inputs="),
        (resnet, r"ResNetModel: no attention or MLP in a known layout among its 0 linear maps"),
        (sliced, r"BertModel is quantised or already sliced; search the dense, unquantised model"),
        (Lone, r"Lone does not run on a tiny input .* pass inputs="),
        (nn.Identity, r"the Identity has no parameters; nothing of it can be pruned"),
    ],
)
def test_unsupported_models_are_refused_with_what_was_found(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_pairs(build())


@pytest.mark.parametrize(
    ("family", "model", "settings"),
    [
        ("Bert", "ForSequenceClassification", {}),
        ("Albert", "Model", {"embedding_size": 8}),
        ("Roberta", "Model", {"max_position_embeddings": 40}),
        ("Llama", "ForCausalLM", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
        ("Mistral", "ForCausalLM", {"num_key_value_heads": 2, "sliding_window": 5}),
        ("Gemma2", "ForCausalLM", {"num_key_value_heads": 2, "head_dim": 6, "sliding_window": 5, "pad_token_id": 0}),
    ],
)
@pytest.mark.parametrize("case", ["uneven", "fewer heads", "no attention"])
def test_what_was_proved_by_block_holds_for_the_model(
    family: str, model: str, settings: dict[str, Any], case: str
) -> None:
    dense, inputs = tiny(family, model, **settings), tiny_inputs()
    pairs = find_pairs(dense)
    assert {pair.kind for pair in pairs} == {"qk", "vo", "mlp"}
    selection = selection_of(pairs, case)
    with masked(dense, selection):
        expected = run_model(dense, inputs)
    got = run_model(slice_model(dense, selection), inputs)
    assert (got - expected).abs().max() < 1e-9 * expected.abs().max()


def test_vision_models_are_searched_on_pixels() -> None:
    model = tiny("ViT", num_attention_heads=3, image_size=8, patch_size=4)
    pairs = find_pairs(model)
    assert {pair.kind for pair in pairs} == {"qk", "vo", "mlp"}
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    selection = selection_of(pairs, "fewer heads")
    with torch.no_grad(), masked(model, selection):
        expected = model(pixel_values=pixels)[0]
    with torch.no_grad():
        torch.testing.assert_close(slice_model(model, selection)(pixel_values=pixels)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_model_is_known_again_after_saving_and_loading(subject: Subject, tmp_path: Any, dtype: torch.dtype) -> None:
    single = copy.deepcopy(subject.model).float()
    pairs = find_pairs(single)
    single.save_pretrained(tmp_path)
    for implementation in ("sdpa", "eager"):
        again = type(single).from_pretrained(tmp_path, dtype=dtype, attn_implementation=implementation)
        check_base(again, pairs)


def test_a_change_of_weights_or_configuration_is_noticed(subject: Subject) -> None:
    model = copy.deepcopy(subject.model)
    check_base(model, subject.pairs)
    model.config.initializer_range = 0.5
    with pytest.raises(MismatchError, match="configuration was"):
        check_base(model, subject.pairs)
    model = copy.deepcopy(subject.model)
    next(model.parameters()).data.mul_(1.1)
    with pytest.raises(MismatchError, match="weights was"):
        check_base(model, subject.pairs)


def test_a_model_whose_weights_are_elsewhere_is_refused(subject: Subject) -> None:
    with pytest.raises(UnsupportedModelError, match=r"on the meta device .* load it whole, on one device"):
        find_pairs(copy.deepcopy(subject.model).to("meta"), subject.inputs)
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        check_base(copy.deepcopy(subject.model).to("meta"), subject.pairs)


def test_pairs_of_modules_that_are_not_there_are_refused(subject: Subject) -> None:
    first = subject.pairs[0]
    slots = (replace(first.slots[0], module="encoder.absent"), *first.slots[1:])
    altered = PairList([replace(first, slots=slots), *subject.pairs[1:]], subject.pairs.base)
    with pytest.raises(MismatchError, match=r"names encoder\.absent, which the model has not"):
        check_base(subject.model, altered)


def test_sequences_are_not_counted_by_positions_that_all_share() -> None:
    model, batch = tiny_bert(), tiny_batches(1)[0]
    expected = find_pairs(model, batch).base
    assert expected.macs_per_sequence == 32 * 32  # the pooler's
    assert find_pairs(model, {"position_ids": torch.arange(7)[None], **batch}).base == expected


@pytest.mark.parametrize("part", ["intermediate", "intermediate.dense", "attention.self", "attention.self.query"])
def test_a_map_of_two_sublayers_is_refused(part: str) -> None:
    model = tiny_bert()
    first, second = model.encoder.layer
    holder, _, child = part.rpartition(".")
    setattr(second.get_submodule(holder), child, first.get_submodule(part))
    pairs = find_pairs(model)
    kind = "mlp" if part.startswith("intermediate") else "qk"
    assert pairs
    assert not [pair.name for pair in pairs if pair.kind == kind]
    assert any(reason.endswith("is called from outside of it, too") for reason in pairs.refused.values())
    scores = {pair.name: torch.rand(*pair.shape) for pair in pairs}
    selection = SolutionPath.from_scores(pairs, scores).select(Budget(keep=0.5))
    small, batch = slice_model(model, selection), tiny_batches(1)[0]
    with torch.no_grad(), masked(model, selection):
        assert torch.allclose(small(**batch)[0], model(**batch)[0], atol=1e-4)


def test_a_whole_attention_may_be_held_twice() -> None:
    model = tiny_bert()
    model.encoder.layer[1].attention = model.encoder.layer[0].attention
    assert [pair.calls for pair in find_pairs(model) if pair.kind != "mlp"] == [2, 2]
