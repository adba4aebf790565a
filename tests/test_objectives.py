"""Objectives on every kind of model: zero at the dense one, curvature, padding, the automatic choice, and bad input."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pathprune as pp
from conftest import randomise
from pathprune.evaluation import fidelity
from pathprune.model.outputs import real_tokens
from pathprune.objectives import targets as objectives
from pathprune.objectives.choose import get_objective, objective_name
from pathprune.objectives.embedding import EmbeddingObjective
from pathprune.objectives.logits import LogitsObjective
from pathprune.objectives.targets import Targets

WORDS = 11
TEXT = {"vocab_size": WORDS, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT: dict[str, Any] = {**TEXT, "intermediate_size": 10, "max_position_embeddings": 16}
VIT = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
VIT |= {"intermediate_size": 10}
LLAMA = {**TEXT, "intermediate_size": 10, "num_key_value_heads": 1, "pad_token_id": 0}
GPT2 = {"vocab_size": WORDS, "n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 16}
T5 = {"vocab_size": WORDS, "d_model": 12, "d_kv": 4, "d_ff": 10, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}
SWIN = {"image_size": 8, "patch_size": 2, "embed_dim": 6, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
CLIP = {
    "text_config": {**BERT, "projection_dim": 6, "eos_token_id": 2},
    "vision_config": {**VIT, "projection_dim": 6},
    "projection_dim": 6,
}
WAVE: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 10}
WAVE |= {"conv_dim": (6, 6), "conv_kernel": (4, 2), "conv_stride": (2, 2), "feat_extract_norm": "layer"}
WAVE |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 2}

# name -> (configuration class, model class, settings, what goes in, what auto chooses)
KINDS: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "bert": ("BertConfig", "BertModel", BERT, "text", "embedding"),
    "vit": ("ViTConfig", "ViTModel", VIT, "image", "embedding"),
    "dinov2": ("Dinov2Config", "Dinov2Model", VIT, "image", "embedding"),
    "swin": ("SwinConfig", "SwinModel", SWIN, "image", "embedding"),
    "clip": ("CLIPConfig", "CLIPModel", CLIP, "image and text", "embedding"),
    "llama base": ("LlamaConfig", "LlamaModel", LLAMA, "text", "hidden"),
    "t5 base": ("T5Config", "T5Model", T5, "text to text", "hidden"),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2Model", WAVE, "audio", "hidden"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA, "text", "logits"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2, "text", "logits"),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5, "text and labels", "logits"),
    "bert classifier": ("BertConfig", "BertForSequenceClassification", {**BERT, "num_labels": 4}, "text", "logits"),
    "vit classifier": ("ViTConfig", "ViTForImageClassification", {**VIT, "num_labels": 4}, "image", "logits"),
    "reranker": ("BertConfig", "BertForSequenceClassification", {**BERT, "num_labels": 1}, "text", "logits"),
}
OBJECTIVES = [(kind, facts[4]) for kind, facts in KINDS.items()] + [("bert", "hidden"), ("dinov2", "hidden")]
TEXTS = [(kind, name) for kind, name in OBJECTIVES if "text" in KINDS[kind][3] and "image" not in KINDS[kind][3]]


def make(kind: str, **more: Any) -> Any:
    config, model, settings, _, _ = KINDS[kind]
    made = getattr(transformers, model)(getattr(transformers, config)(**{**settings, **more}))
    return randomise(made.double().eval())


def inputs(kind: str, *, pad: int = 0) -> dict[str, Tensor]:
    """Two samples; texts of 5 and 3 tokens, and ``pad`` more of padding."""
    generator = torch.Generator().manual_seed(0)
    shape = KINDS[kind][3]
    batch: dict[str, Tensor] = {}
    if "image" in shape:
        batch["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    if "audio" in shape:
        batch["input_values"] = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    if "text" in shape:
        ids = torch.randint(3, WORDS, (2, 5), generator=generator)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        batch["input_ids"] = nn.functional.pad(ids, (0, pad), value=1)
        batch["attention_mask"] = nn.functional.pad(mask, (0, pad))
        if shape == "text to text":
            batch["decoder_input_ids"] = batch["input_ids"].flip(0)
            batch["decoder_attention_mask"] = batch["attention_mask"].flip(0)
        if shape == "text and labels":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100).flip(0)
    return batch


def shaken(model: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return other


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: make(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_auto_chooses_by_what_the_model_returns(kind: str, models: dict[str, Any]) -> None:
    model, batch, expected = models[kind], inputs(kind), KINDS[kind][4]
    assert objective_name(get_objective("auto", model, batch)) == expected
    before = getattr(model.config, "use_cache", None)
    model.config.use_cache = False  # as many checkpoints have it that were trained with gradient checkpointing
    assert objective_name(get_objective("auto", model, batch)) == expected
    assert not model.config.use_cache
    model.config.use_cache = before
    train = "hidden" if kind in ("bert", "vit", "dinov2", "swin") else expected  # to train, every token counts
    assert objective_name(get_objective("auto", model, batch, encoder="hidden")) == train


@pytest.mark.parametrize(("kind", "name"), OBJECTIVES)
def test_zero_at_the_dense_model_and_positive_off_it(kind: str, name: str, models: dict[str, Any]) -> None:
    model, batch = models[kind], inputs(kind)
    objective = get_objective(name, model, batch)
    with torch.no_grad():
        target = objective.target(model(**batch), batch)
        assert abs(float(objective.loss(model(**batch), batch, target))) < 1e-12

        @given(st.integers(0, 2**32 - 1), st.sampled_from([0.03, 0.3]))
        def positive(seed: int, scale: float) -> None:
            assert objective.loss(shaken(model, seed, scale)(**batch), batch, target) > 1e-6

        positive()


@pytest.mark.parametrize(("kind", "name"), TEXTS)
def test_padding_does_not_matter(kind: str, name: str, models: dict[str, Any]) -> None:
    model = models[kind]
    other = shaken(model, 1)

    def numbers(pad: int) -> list[float]:
        batch = inputs(kind, pad=pad)
        objective = get_objective(name, model, batch)
        with torch.no_grad():
            target = objective.target(model(**batch), batch)
            probe = objective.probe(model(**batch), batch, torch.Generator().manual_seed(0))
            return [float(objective.loss(other(**batch), batch, target)), float(probe)]

    assert numbers(pad=4) == pytest.approx(numbers(pad=0), rel=1e-9)


@dataclass
class Gate:
    """Numbers that multiply the input of a linear map: (n,), or (B, n) for each sample's own."""

    model: nn.Module
    layer: Any
    batch: dict[str, Tensor]

    def __call__(self, gate: Tensor, batch: dict[str, Tensor] | None = None) -> Any:
        def scale(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0]
            return (x * (gate if gate.dim() == 1 else gate.reshape(len(gate), *[1] * (x.dim() - 2), -1)),)

        handle = self.layer.register_forward_pre_hook(scale)
        try:
            return self.model(**(batch or self.batch))
        finally:
            handle.remove()


FIELDS = ("logits", "last_hidden_state", "image_embeds", "text_embeds")
CURVATURE = [
    ("bert", "embedding", "encoder.layer.0.output.dense"),
    ("bert", "hidden", "encoder.layer.0.output.dense"),
    ("dinov2", "embedding", "encoder.layer.0.mlp.fc2"),
    ("clip", "embedding", "text_model.encoder.layers.0.mlp.fc2"),
    ("t5 base", "hidden", "decoder.block.0.layer.2.DenseReluDense.wo"),
    ("llama", "logits", "model.layers.0.mlp.down_proj"),
    ("t5", "logits", "encoder.block.0.layer.1.DenseReluDense.wo"),
    ("bert classifier", "logits", "bert.encoder.layer.0.output.dense"),
    ("reranker", "logits", "bert.encoder.layer.0.output.dense"),
]


@pytest.mark.parametrize(("kind", "name", "layer"), CURVATURE)
def test_probes_have_the_gauss_newton_diagonal(kind: str, name: str, layer: str, models: dict[str, Any]) -> None:
    """Against J^T H J, with the Jacobian and the loss's Hessian in the outputs written out."""
    model, batch = models[kind], inputs(kind)
    run = Gate(model, model.get_submodule(layer), batch)
    objective = get_objective(name, model, batch)
    n = run.layer.in_features
    ones = torch.ones(n, dtype=torch.float64)
    dense = run(ones)
    fields = [field for field in FIELDS if getattr(dense, field, None) is not None]
    if kind == "clip":
        fields = fields[-2:]
    shapes = [getattr(dense, field).shape for field in fields]
    encoder = getattr(dense, "encoder_last_hidden_state", None)

    def flat(gate: Tensor) -> Tensor:
        outputs = run(gate)
        return torch.cat([getattr(outputs, field).flatten() for field in fields])

    def loss(outputs: Tensor) -> Tensor:
        parts = outputs.split([shape.numel() for shape in shapes])
        values = {field: part.view(shape) for field, part, shape in zip(fields, parts, shapes, strict=True)}
        return objective.loss(SimpleNamespace(**values, encoder_last_hidden_state=encoder), batch, target)

    with torch.no_grad():
        target = objective.target(dense, batch)
    jacobian = torch.autograd.functional.jacobian(flat, ones)  # (outputs, n)
    hessian = torch.autograd.functional.hessian(loss, flat(ones).detach())
    expected = (jacobian.T @ hessian @ jacobian).diagonal()

    draws = {key: value.repeat(64, *[1] * (value.dim() - 1)) for key, value in batch.items()}
    noise = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(100):
        gates = ones.repeat(128, 1).requires_grad_()
        probe = objective.probe(run(gates, draws), draws, noise)
        squares.append(torch.autograd.grad(probe, gates)[0].square().mean(0))
    assert (expected > 0).double().mean() > 0.5  # the rest are neurons that are off
    torch.testing.assert_close(torch.stack(squares).mean(0), expected, rtol=0.1, atol=1e-12)


def test_the_task_probe_is_each_samples_own_gradient(models: dict[str, Any]) -> None:
    model = models["bert classifier"]
    batch = {**inputs("bert classifier"), "labels": torch.tensor([1, 3])}
    run = Gate(model, model.get_submodule("bert.encoder.layer.0.output.dense"), batch)
    objective = get_objective("task", model, batch)
    gates = torch.ones(2, run.layer.in_features, dtype=torch.float64).requires_grad_()
    both = torch.autograd.grad(objective.probe(run(gates), batch, torch.Generator()), gates)[0]
    for row in (0, 1):
        gate = gates[row].detach().requires_grad_()
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        torch.testing.assert_close(torch.autograd.grad(run(gate, alone).loss, gate)[0], both[row])


def test_task_is_the_models_own_loss_and_needs_labels(models: dict[str, Any]) -> None:
    model = models["gpt2"]
    batch = inputs("gpt2")
    labelled = {**batch, "labels": batch["input_ids"]}
    objective = get_objective("task", model, labelled)
    assert objective.loss(model(**labelled), labelled, torch.empty(0)) == model(**labelled).loss
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    Targets(model, objective)(labelled)
    handle.remove()
    assert not calls  # the dense model has nothing to say
    with pytest.raises(pp.DataError, match=r"needs the model's loss; .*the batch has no labels"):
        objective.loss(model(**batch), batch, torch.empty(0))


def test_a_class_token_is_a_feature_of_its_own(models: dict[str, Any]) -> None:
    for kind, expected in (("dinov2", True), ("vit", True), ("swin", False), ("bert", False)):
        model, batch = models[kind], inputs(kind)
        objective = get_objective("auto", model, batch)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
            found = objective.target(model(**batch), batch)
        if expected:
            torch.testing.assert_close(found, torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1))
        elif kind == "swin":
            torch.testing.assert_close(found, hidden.mean(1))
        else:
            torch.testing.assert_close(found, torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)]))


def test_yes_no_logits_do_not_compete(models: dict[str, Any]) -> None:
    """Adding one number to all logits changes every answer of a multi-label classifier and none of a softmax."""
    model = make("bert classifier", problem_type="multi_label_classification")
    batch = inputs("bert classifier")
    yes_no = get_objective("auto", model, batch)
    logits = torch.randn(2, 4, dtype=torch.float64)
    for objective, moved in ((yes_no, True), (LogitsObjective(), False)):
        target = objective.target(SimpleNamespace(logits=logits), batch)
        assert (objective.loss(SimpleNamespace(logits=logits + 1), batch, target) > 1e-3) == moved
    p, q = logits.sigmoid(), (logits + 1).sigmoid()
    bernoulli = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = yes_no.loss(SimpleNamespace(logits=logits + 1), batch, yes_no.target(SimpleNamespace(logits=logits), batch))
    torch.testing.assert_close(found, bernoulli.mean())


def test_class_maps_are_distributions_over_channels() -> None:
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    logits = torch.randn(2, 5, 3, 3)
    objective = LogitsObjective()
    target = objective.target(SimpleNamespace(logits=logits), batch)
    assert target.shape == (18, 5)
    assert torch.equal(target[4], logits[0, :, 1, 1])


def test_plain_tensors_are_logits_or_embeddings() -> None:
    class Features(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    model, batch = Features(), {"x": torch.randn(4, 3, 8, 8)}
    assert objective_name(get_objective("auto", model, batch)) == "embedding"
    assert EmbeddingObjective().target(model(**batch), batch).shape == (4, 3)
    model.num_classes = 3  # type: ignore[assignment]
    assert objective_name(get_objective("auto", model, batch)) == "logits"


def test_audio_frames_of_padding_do_not_count() -> None:
    mask = torch.zeros(3, 40, dtype=torch.long)
    for row, length in enumerate((40, 21, 2)):
        mask[row, :length] = 1
    batch = {"input_values": torch.zeros(3, 40), "attention_mask": mask}
    assert real_tokens(None, batch, 10).sum(1).tolist() == [10, 5, 1]


def test_half_precision_models_are_compared_in_float32(models: dict[str, Any]) -> None:
    model, batch = copy.deepcopy(models["llama"]).bfloat16(), inputs("llama")
    objective = get_objective("auto", model, batch)
    with torch.no_grad():
        target = objective.target(model(**batch), batch)
        assert target.dtype == torch.float32
        assert objective.loss(model(**batch), batch, target) == 0


def test_large_targets_are_not_kept(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = models["llama"], inputs("llama")
    size = 8 * WORDS * 8  # eight real tokens in float64
    for limit, kept in ((size, 1), (size - 1, 0)):
        monkeypatch.setattr(objectives, "TARGET_BYTES", limit)
        targets = Targets(model, LogitsObjective())
        assert torch.equal(targets(batch), targets(batch))
        assert len(targets.known) == kept
    monkeypatch.setattr(objectives, "TARGET_CACHE_BYTES", 2 * size)
    monkeypatch.setattr(objectives, "TARGET_BYTES", size)
    targets = Targets(model, LogitsObjective())
    for word in range(3, 7):
        targets({**batch, "input_ids": batch["input_ids"].clamp_max(word)})
    assert len(targets.known) == 2


def test_targets_of_other_shapes_are_others(models: dict[str, Any]) -> None:
    """Two batches of the same bytes."""
    ids, targets = torch.arange(3, 11), Targets(models["llama"], LogitsObjective())
    assert [len(targets({"input_ids": ids.view(shape)})) for shape in ((2, 4), (4, 2))] == [8, 8]
    assert len(targets.known) == 2


@pytest.mark.parametrize("kind", ["llama", "bert classifier"])
def test_a_model_with_a_head_goes_all_the_way(kind: str, models: dict[str, Any]) -> None:
    """Search, slice, recover and measure by logits: training brings the output distribution nearer."""
    model = randomise(make(kind).float())
    data = [{**inputs(kind), "input_ids": torch.randint(3, WORDS, (2, 5))} for _ in range(6)]
    path = pp.search(model, data, steps=8, multiple=1, progress=False)
    assert path.config["objective"] == "logits"
    small = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
    recovered = pp.recover(small, teacher=model, data=data, validation=data, steps=60, lr=3e-3, progress=False)
    assert fidelity(model, model, data) == pytest.approx(1, abs=1e-6)
    assert 1 - fidelity(recovered, model, data) < 0.8 * (1 - fidelity(small, model, data))
    labelled = [{**batch, "labels": torch.ones_like(batch["input_ids"][:, 0])} for batch in data]
    if kind == "bert classifier":
        path = pp.search(model, labelled, objective="task", steps=8, multiple=1, progress=False)
        assert path.config["objective"] == "task"
        taught = pp.recover(small, teacher=model, data=labelled, objective="task", steps=60, lr=3e-3, progress=False)
        with torch.no_grad():
            assert taught(**labelled[0]).loss < small(**labelled[0]).loss


def test_what_does_not_fit_is_refused(models: dict[str, Any]) -> None:
    batch = inputs("bert")
    with pytest.raises(pp.DataError, match=r"needs logits; BaseModelOutput.* has none"):
        pp.search(models["bert"], [batch], objective="logits", progress=False)
    with pytest.raises(pp.DataError, match=r"needs a last_hidden_state; CausalLMOutput.* has none"):
        pp.search(models["llama"], [batch], objective="hidden", progress=False)
    with pytest.raises(pp.DataError, match="the batch has no labels"):
        pp.search(models["llama"], [batch], objective="task", progress=False)
    pretraining = transformers.BertForPreTraining(transformers.BertConfig(**BERT)).eval()
    with pytest.raises(pp.DataError, match=r"finds neither .* BertForPreTraining returns \(prediction_logits"):
        get_objective("auto", pretraining, batch)
    with pytest.raises(pp.SettingError, match="objective='magic' is not one of auto, embedding, hidden, logits, task"):
        get_objective("magic", models["bert"], batch)


def test_a_users_own_objective_is_taken_as_it_is(models: dict[str, Any]) -> None:
    class First:
        """The first token alone."""

        def target(self, outputs: Any, batch: Any) -> Tensor:
            return outputs.last_hidden_state[:, 0]

        def loss(self, outputs: Any, batch: Any, target: Tensor) -> Tensor:
            return (self.target(outputs, batch) - target).square().mean()

        def probe(self, outputs: Any, batch: Any, noise: torch.Generator) -> Tensor:
            return self.target(outputs, batch).sum()

    path = pp.search(models["bert"], [inputs("bert")], objective=First(), steps=4, multiple=1, progress=False)
    assert path.config["objective"].endswith("First")
    assert "auto" in inspect.signature(pp.search).parameters["objective"].default
