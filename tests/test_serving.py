"""What search, recovery and evaluation are fed is what a user's own pipeline feeds, for each kind of model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.image_utils import load_image

import pathprune as pp
from pathprune.cli.inputs import DataOptions, make_batches, read_data
from pathprune.cli.models import load_dense
from pathprune.data.images import Images
from pathprune.data.text import first_tokens, packed, tokenized
from pathprune.model.outputs import real_tokens
from pathprune.objectives.choose import get_objective, objective_name
from pathprune.objectives.embedding import EmbeddingObjective
from pathprune.reading import read_file
from pathprune.serving import served

WORDS = (
    "[PAD]",
    "[UNK]",
    "<s>",
    "</s>",
    "[CLS]",
    "[SEP]",
    "<user>",
    "<model>",
    *(f"w{i}" for i in range(30)),
    "query:",
)
TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w8", "w9 w10 w11", "w12 w13 w14 w15 w16"]
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}, {"role": "user", "content": "w4"}]
TEMPLATE = (
    "<s>{% for m in messages %}{{ ' <user> ' if m.role == 'user' else ' <model> ' }}{{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %} <model>{% endif %}"
)
TEMPLATES = {  # what stands around a text, as in the tokenizers of these models
    "qwen2, smollm2": "$A",
    "llama, gemma, mistral": "<s> $A",
    "opt": "</s> $A",
    "t5": "$A </s>",
    "bart, roberta": "<s> $A </s>",
    "bert, vit text towers": "[CLS] $A [SEP]",
}
BERT: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 12, "max_position_embeddings": 32}


def tokenizer(template: str = "$A", **options: Any) -> Any:
    ids = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, ids[word]) for word in WORDS[:8]]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **(names | options))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_windows_begin_as_the_tokenizer_begins_a_text(template: str) -> None:
    ours = tokenizer(template)
    begin = ours(TEXTS[0])["input_ids"][: template.split().index("$A")]
    assert first_tokens(ours) == begin
    windows = packed(TEXTS * 3, ours, length=5)[0]["input_ids"].tolist()
    assert len(windows) > 6
    assert all(window[: len(begin)] == begin for window in windows)
    assert windows[0] == ours(TEXTS[0])["input_ids"][:5]


def test_a_text_that_begins_with_the_first_token_itself() -> None:
    """As texts do that a chat template wrote: the tokenizer puts another before it, and so it is in the windows."""
    ours = tokenizer("<s> $A")
    window = packed(["<s> w1 w2 w3 w4 w5"], ours, length=4)[0]["input_ids"]
    assert ours.batch_decode(window) == ["<s> <s> w1 w2", "<s> w3 w4 w5"]


def test_conversations_are_written_by_the_chat_template() -> None:
    ours = tokenizer("<s> $A", chat_template=TEMPLATE)
    asked = ours.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    closed = ours.apply_chat_template(CHAT[:2], return_dict=True)["input_ids"]
    assert ours.decode(asked) == "<s> <user> w1 w2 </s> <model> w3 </s> <user> w4 </s> <model>"
    batch = tokenized([CHAT, CHAT[:2]], ours)[0]
    assert batch["input_ids"][batch["attention_mask"].bool()].tolist() == asked + closed
    assert packed([CHAT, CHAT[:2]], ours, length=len(asked))[0]["input_ids"][0].tolist() == asked
    assert packed([CHAT[:2]] * 2, ours, length=2 * len(closed))[0]["input_ids"][0].tolist() == closed * 2
    middle = packed([CHAT, CHAT], ours, length=8)[0]["input_ids"]
    assert (middle[:, 0] == ours.bos_token_id).all()
    with pytest.raises(pp.DataError, match=r"conversations need a chat template, and the .* has none; pass texts"):
        packed([CHAT], tokenizer(), length=4)
    with pytest.raises(pp.DataError, match="a conversation is a list of messages"):
        tokenized([[{"role": "user"}]], ours)


def test_conversations_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": part}) for part in (CHAT, [], CHAT[:2])))
    found = read_file(file, "messages")
    assert found.texts == [CHAT, CHAT[:2]]
    assert found.summary.startswith("read 2 conversations from chats.jsonl, field 'messages' (1 empty one left out)")
    for rows, message in (
        (
            [[{"role": "user"}]],
            "is a list and not a string, nor a conversation: a list of messages with role and content",
        ),
        ([CHAT, "w1"], "holds texts and conversations; put them into two files"),
    ):
        file.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
        with pytest.raises(pp.DataError, match=message):
            read_file(file, "messages")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_padded_texts_are_as_the_tokenizer_pads_them(template: str, side: str) -> None:
    ours = tokenizer(template, padding_side=side, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    theirs = ours(
        ["query: " + text for text in TEXTS], padding=True, truncation=True, max_length=6, return_tensors="pt"
    )
    batch = tokenized(TEXTS, ours, max_length=6, prefix="query: ")[0]
    assert batch.keys() == theirs.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    assert all(torch.equal(batch[key], theirs[key]) for key in theirs)


def batches(model: Any, folder: Path, texts: list[str], prefix: str | None = None) -> list[dict[str, Any]]:
    """What the command line feeds."""
    (folder / "texts.txt").write_text("\n".join(texts))
    options = DataOptions(folder / "texts.txt", prefix=prefix)
    return list(make_batches(model, str(folder), options, read_data(options)))


@pytest.mark.parametrize(("kind", "template"), [("T5", "$A </s>"), ("Bart", "<s> $A </s>")])
def test_an_encoder_decoder_writes_each_text_from_its_own_first_token(kind: str, template: str, tmp_path: Path) -> None:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 12, "num_layers": 1, "num_heads": 2, "encoder_layers": 1}
    shape |= {"decoder_layers": 1, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0 if kind == "T5" else 3}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(WORDS), encoder_attention_heads=2, **shape, **ids)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    ours = tokenizer(template)
    ours.save_pretrained(tmp_path)
    batch = batches(model, tmp_path, TEXTS)[0]
    theirs = ours(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], theirs["input_ids"])
    assert torch.equal(batch["attention_mask"], theirs["attention_mask"])
    assert torch.equal(batch["labels"], torch.where(theirs["attention_mask"] == 1, theirs["input_ids"], -100))
    decoder = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    assert (decoder[:, 0] == ids["decoder_start_token_id"]).all()
    with torch.no_grad():
        implied, told = model(**batch), model(**theirs, decoder_input_ids=decoder)
    torch.testing.assert_close(implied.logits, told.logits)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_masked_models_and_classifiers_get_whole_sequences(head: str, tmp_path: Path) -> None:
    model = getattr(transformers, head)(BertConfig(**BERT)).eval()
    ours = tokenizer("[CLS] $A [SEP]", model_max_length=6)
    ours.save_pretrained(tmp_path)
    batch = batches(model, tmp_path, TEXTS)[0]
    theirs = ours(TEXTS, padding=True, truncation=True, return_tensors="pt")  # as the pipelines call it
    assert all(torch.equal(batch[key], theirs[key]) for key in theirs)
    last = batch["attention_mask"].sum(1) - 1
    assert (batch["input_ids"][torch.arange(4), last] == WORDS.index("[SEP]")).all()  # also where it was cut


IMAGES = ["ViTImageProcessorPil", "BitImageProcessorPil", "CLIPImageProcessorPil", "DeiTImageProcessorPil"]


@pytest.mark.parametrize("kind", IMAGES)  # ViT and Swin; DINOv2; CLIP; DeiT
def test_images_are_upright_and_as_the_models_own_processor_makes_them(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for i, mode in enumerate(("RGB", "L", "RGBA", "RGB")):
        shape = (20, 14) if mode == "L" else (20, 14, len(mode))
        exif = Image.Exif()
        exif[0x0112] = (1, 3, 6, 8)[i]  # how the camera was held
        picture = Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8), mode)
        picture.save(tmp_path / f"{i}.png", exif=exif)
    size = {"shortest_edge": 10} if kind.startswith(("Bit", "CLIP")) else {"height": 10, "width": 10}
    ours = getattr(transformers, kind)(size=size, crop_size={"height": 8, "width": 8})
    data = Images(tmp_path, ours)
    theirs = ours([load_image(str(file)) for file in data.files], return_tensors="pt")
    found = next(iter(data))
    assert found.keys() == theirs.keys()
    assert torch.equal(found["pixel_values"], theirs["pixel_values"])
    flat = ours([Image.open(file).convert("RGB") for file in data.files], return_tensors="pt")
    assert not torch.equal(found["pixel_values"], flat["pixel_values"])  # the turn is not without effect


@pytest.mark.parametrize("kind", ["CLIP", "Blip"])
def test_two_towers_are_compared_where_their_users_read_them(kind: str) -> None:
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    text = {**BERT, "eos_token_id": WORDS.index("</s>"), "encoder_hidden_size": 16}
    towers = {"text_config": text, "vision_config": {**tower, "image_size": 8, "patch_size": 4}, "projection_dim": 6}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**towers)).eval()
    size = {"height": 8, "width": 8}
    images = getattr(transformers, f"{kind}ImageProcessorPil")(size=size, crop_size=size)
    words = tokenizer("<s> $A </s>" if kind == "CLIP" else "[CLS] $A [SEP]")
    pictures = [Image.new("RGB", (9, 12), (60 * i, 20, 90)) for i in range(len(TEXTS))]
    read = {**words(TEXTS, padding=True, return_tensors="pt"), **images(pictures, return_tensors="pt")}
    path = pp.search(model, [read], steps=20, multiple=1, progress=False)
    assert path.config["objective"] == "embedding"
    with torch.no_grad():
        found = EmbeddingObjective().target(model(**read), read)
        seen = model.get_image_features(read["pixel_values"]).pooler_output
        told = model.get_text_features(read["input_ids"], read["attention_mask"]).pooler_output
    rows = torch.nn.functional.normalize(torch.cat([seen, told]))
    assert torch.cosine_similarity(found, rows).min() == pytest.approx(1, abs=1e-5)


def test_sound_of_30_seconds_and_of_its_own_length() -> None:
    """Whisper sees windows of one length and the decoder's prompt; others a mask over samples."""
    generator = np.random.default_rng(0)
    sounds = [generator.standard_normal(seconds * 800).astype(np.float32) for seconds in (5, 12, 20)]
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    shape: dict[str, Any] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    shape |= {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20, "num_mel_bins": 8}
    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(max_source_positions=50, max_target_positions=8, **shape, **tokens)
    torch.manual_seed(0)
    whisper = WhisperForConditionalGeneration(config).eval()
    features = extractor(sounds, sampling_rate=16000, return_tensors="pt")
    assert features["input_features"].shape == (3, 8, 100)  # every one padded to the window
    prompt = torch.tensor([[3, 5, 6, 7]]).expand(3, -1)  # start, language, task, no time stamps
    batch = {**features, "decoder_input_ids": prompt}
    path = pp.search(whisper, [batch], steps=20, multiple=1, progress=False)
    assert path.config["objective"] == "logits"
    with torch.no_grad():
        assert real_tokens(whisper(**batch), batch, 4).all()

    wave = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    batch = dict(wave(sounds, sampling_rate=16000, padding=True, return_tensors="pt"))
    convolutions: dict[str, Any] = {"conv_dim": (6, 6), "conv_kernel": (4, 2), "conv_stride": (2, 2)}
    convolutions |= {"num_feat_extract_layers": 2}
    shape = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 10}
    model = transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(**shape, **convolutions, num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=2)
    ).eval()
    with torch.no_grad():
        outputs = model(**batch)
    frames = real_tokens(outputs, batch, outputs.last_hidden_state.shape[1]).sum(1)
    theirs = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(1))
    assert (frames - theirs).abs().max() <= 1


def encoder(folder: Path, decoder: bool, template: str, files: dict[str, Any]) -> Any:
    """A tiny sentence encoder with what sentence-transformers writes beside it."""
    torch.manual_seed(0)
    kinds: dict[bool, Callable[[], Any]] = {
        False: lambda: BertModel(BertConfig(**BERT, initializer_range=0.5)),
        True: lambda: LlamaForCausalLM(LlamaConfig(**BERT, initializer_range=0.5)),  # some are saved with a head
    }
    kinds[decoder]().save_pretrained(folder)
    tokenizer(template, padding_side="left" if decoder else "right").save_pretrained(folder)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return load_dense(str(folder), "cpu")


def modules(*names: str) -> list[dict[str, Any]]:
    return [
        {
            "idx": i,
            "name": str(i),
            "path": "" if not i else f"{i}_{name}",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]


OLD = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
SERVED = {  # whether it is a decoder, template, pooling, what auto chooses
    "minilm, e5": (False, "[CLS] $A [SEP]", {**OLD, "pooling_mode_mean_tokens": True}, "embedding"),
    "bge, gte": (False, "[CLS] $A [SEP]", {**OLD, "pooling_mode_cls_token": True}, "embedding-class"),
    "qwen3-embedding": (True, "$A </s>", {**OLD, "pooling_mode_lasttoken": True}, "embedding-last"),
    "newer files": (False, "[CLS] $A [SEP]", {"embedding_dimension": 16, "pooling_mode": "cls"}, "embedding-class"),
}


@pytest.mark.parametrize("kind", SERVED)
def test_sentence_encoders_are_searched_as_sentence_transformers_serves_them(kind: str, tmp_path: Path) -> None:
    decoder, template, pooling, chosen = SERVED[kind]
    use = {"prompts": {"query": "query: ", "passage": "w0 "}, "default_prompt_name": "query"}
    files = {
        "modules.json": modules("Transformer", "Pooling", "Normalize"),
        "1_Pooling/config.json": pooling,
        "config_sentence_transformers.json": use,
        "sentence_bert_config.json": {"max_seq_length": 6, "do_lower_case": True},
    }
    model = encoder(tmp_path, decoder, template, files)
    texts = ["W1 w2 w3 w4 w5 w6 w7", *TEXTS[1:]]
    batch = batches(model, tmp_path, texts)[0]
    objective = get_objective("auto", model, batch)
    assert objective_name(objective) == chosen
    assert objective_name(get_objective("auto", model, batch, encoder="hidden")) == chosen.replace(
        "embedding", "hidden"
    )
    with torch.no_grad():
        ours = objective.target(model(**batch), batch)
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].bool()
    by_hand = {"": lambda row: row.mean(0), "class": lambda row: row[0], "last": lambda row: row[-1]}
    expected = [by_hand[chosen.partition("-")[2]](row[real]) for row, real in zip(hidden, mask, strict=True)]
    torch.testing.assert_close(ours, torch.stack(expected))
    assert batch["input_ids"].shape[1] == 6
    assert (batch["input_ids"] == WORDS.index("query:")).any(1).all()
    assert not (batch["input_ids"] == WORDS.index("[UNK]")).any()  # W1 in small letters

    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer

    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    for prefix, name in ((None, "query"), ("w0 ", "passage")):
        batch = batches(model, tmp_path, texts, prefix)[0]
        with torch.no_grad():
            ours = torch.nn.functional.normalize(objective.target(model(**batch), batch))
        torch.testing.assert_close(ours, theirs.encode(texts, prompt_name=name, convert_to_tensor=True))


def test_the_folder_is_read_by_the_library_and_can_be_overruled(tmp_path: Path) -> None:
    files = {"modules.json": modules("Transformer", "Pooling"), "1_Pooling/config.json": {"pooling_mode": "max"}}
    model = encoder(tmp_path, False, "[CLS] $A [SEP]", files)
    batch = tokenized(TEXTS, tokenizer("[CLS] $A [SEP]"))[0]
    with pytest.raises(
        pp.DataError, match=r"pools by 'max', which is not known here; choose objective='embedding-mean'"
    ):
        pp.search(model, [batch], steps=20, progress=False)
    assert objective_name(get_objective("embedding-mean", model, batch)) == "embedding"
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": ["cls"]}))
    path = pp.search(model, [batch], steps=20, multiple=1, progress=False)
    assert path.config["objective"] == "embedding-class"
    path = pp.search(model, [batch], steps=20, multiple=1, progress=False, objective="embedding-last")
    assert path.config["objective"] == "embedding-last"
    with pytest.raises(pp.errors.SettingError, match="pooling='cls' is not one of mean, class, last"):
        EmbeddingObjective(pooling="cls")
    for name in ("logits-mean", "embedding-max", "embedding-"):
        with pytest.raises(pp.SettingError, match="is not one of auto, embedding"):
            get_objective(name, model, batch)


def test_what_a_folder_says_of_its_use(tmp_path: Path) -> None:
    assert served(tmp_path) is None
    assert served("no/such-model") is served("no/such-model", fetch=True) is None
    assert served(tmp_path / "absent") is None

    def write(name: str, content: Any) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    write("modules.json", modules("Transformer"))
    assert served(tmp_path) is None
    write("modules.json", modules("Transformer", "Pooling"))
    use = served(tmp_path)
    assert use is not None
    assert (use.pooling, use.prefix, use.prompts, use.max_length, use.lower_case) == ("mean", "", {}, None, False)
    write("1_Pooling/config.json", {**OLD, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True})
    assert served(tmp_path).pooling == "cls+max"  # type: ignore[union-attr]
    for name, content in (
        ("1_Pooling/config.json", "[1]"),
        ("1_Pooling/config.json", "{"),
        ("modules.json", [{"idx": 0}]),
        ("modules.json", "{"),
    ):
        write(name, content)
        with pytest.raises(pp.ArtifactError, match=r"cannot be read as JSON|is not as sentence-transformers writes it"):
            served(tmp_path)


def test_the_last_token_is_the_last_real_one_on_either_side() -> None:
    hidden = torch.arange(10.0).view(2, 5, 1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    outputs = SimpleNamespace(last_hidden_state=hidden)
    found = {
        pooling: EmbeddingObjective(pooling=pooling).target(outputs, {"attention_mask": mask}).flatten().tolist()
        for pooling in ("mean", "class", "last")
    }
    assert found == {"mean": [1, 8], "class": [0, 7], "last": [2, 9]}
