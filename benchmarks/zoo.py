"""Small random models of every architecture that the installed ``transformers`` has.

A configuration is shrunk by the names and values of its entries, sub-configurations included; what the names
do not tell is in ``OVERRIDES``. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import pkgutil
import re
import tempfile
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 160
ORDINARY = 96  # ids below are ordinary words, special tokens are put between this and the vocabulary's end
MAX_PARAMETERS = 40_000_000

# Heads an attention cannot spread evenly, and widths that do not meet, show up as errors; so every width that
# must meet another is one of these.
WIDTH, HEADS, KEY_VALUE_HEADS, HEAD_WIDTH, NEURONS, LAYERS = 64, 4, 2, 16, 96, 2

# Entry name -> value; the first pattern that matches the whole name counts, None leaves the entry alone.
# A value is never raised: the smaller of the two is taken.
RULES: list[tuple[str, int | None]] = [
    (r".*vocab_size.*|num_embeddings|.*_hash_byte_group_vocab|num_(bpe|wordpiece|character)_labels", VOCABULARY),
    (r".*max_(\w*_)?position(_embedding)?s|n_positions|max_sequence_length|n_ctx|max_seq_len|.*max_length", 512),
    (r"max_(source|target|speech|text)_positions|pos_emb_(height|width)|position_embedding_size", 64),
    (r"num_(local_|routed_|total_)?experts|(n|moe)_(num_|routed_)*experts|num_experts|zero_expert_num", 4),
    (r"(moe_)?(num_experts_per_tok(en)?|top_?k|k|topk)|moe_topk", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"num_(key_value|kv)_heads|\w+_num_key_value_heads|num_key_value_attention_heads", KEY_VALUE_HEADS),
    (r"conv_dim|num_feat_extract_layers|num_attention_heads_per_layer|patch_embed_hidden_size", None),
    (r"mm_tokens_per_image|latent_query_num", 4),
    (r"num_queries|two_stage_num_proposals|num_latents|num_denoising", 8),
    (r"attention_hidden_size|hidden_size_global_x", 2 * WIDTH),
    (r"n_groups|mamba_n_?groups", 2),
    (r"(mamba_)?chunk_size", 8),
    (r"num_filters", 8),
    (r"base_channels", 32),
    (r"upsample_initial_channel", 64),
    (
        r"n_heads?|num_heads|.*num_attention_heads|(\w+_)?attention_heads|num_head|encoder_heads|decoder_heads"
        r"|num_\w+_attention_heads|\w+_num_heads",
        HEADS,
    ),
    (r"qk_head_dim", 2 * HEAD_WIDTH),
    (
        r"(\w+_)?head_dim|d_kv|d_head|attention_head_size|kv_channels|\w+_head_size|dim_head|attention_head_dim|rotary_dim",
        HEAD_WIDTH,
    ),
    (r"(kv|q|o)_lora_rank", 32),
    (
        r"(\w+_)?num_hidden_layers|(\w+_)?n?_?layers?|depth|(\w+_)?depth|num_\w*blocks|num_feature_levels_x",
        LAYERS,
    ),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (
        r".*(intermediate|ffn|feed_?forward).*(size|dim|hidden)?|mlp_dim|d_ff|dff|dim_ff|dim_feedforward|d_inner"
        r"|\w+ff_dim|ffn_dim|ffn_hidden_size|intermediate_dim",
        NEURONS,
    ),
    (
        r"hidden_size|d_model|n_embd|embed_dim|(\w+_)?hidden_(size|dim)|dim|emb_dim|embedding_(size|dim)"
        r"|(\w+_)?proj(ection)?_(size|dim)|hidden_size_global|output_channels|adapter_(in|out|input)_(dim|size)|upsample_groups"
        r"|condition_dim|vector_quantization_hidden_dimension|codebook_dim|(\w+_)?output_(dim|size)|hidden_dim|(\w+_)?embed_dim|word_embed_proj_dim"
        r"|(\w+_)?embedding_size|codevector_dim|classifier_proj_size|\w+_embed_size|project_dim|d_latents",
        WIDTH,
    ),
]
# Rules that follow ``mlp_ratio`` and the like must not read "intermediate_..." switches as sizes.
NOT_SIZES = re.compile(
    r".*(ratio|factor|dropout|prob|act|kernel|stride|rate|indices|_layer_ids|multiplier|mult|_freq.*|_epoch|dilation)$"
)


# Entries that the rules get wrong: model type -> entry -> value. A dict goes to the sub-configuration of that name.
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "out_indices": [1, 2, 3, 4],
}
ON_RESNET = {"backbone_config": RESNET}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
MAPS = [[16, 16], [8, 8], [4, 4]]
SWIN = {"window_size": 2, "embed_dim": 32, "num_heads": (2, 4, 8, 16)}
TOWERS: dict[str, Any] = {"vision_config": {}, "audio_config": {}}  # left out by default
FORECAST = {"prediction_length": 8, "context_length": 16}
OVERRIDES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **EXPERTS},
    "autoformer": FORECAST,
    "informer": FORECAST,
    "time_series_transformer": FORECAST,
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], **EXPERTS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
    },
    "swin2sr": {"window_size": 2, "embed_dim": 48, "image_size": 16},
    "clap_audio_model": {"patch_embeds_hidden_size": 32, "num_attention_heads": (2, 4, 8, 16), "hidden_size": 256},
    "mgp-str": {"image_size": [16, 64]},
    "dac": {"encoder_hidden_size": 8},
    "shieldgemma2": {"yes_token_index": 100, "no_token_index": 101},
    "superglue": {"hidden_size": 256, "gnn_layers_types": ["self", "cross"]},
    "pp_formulanet_vision": {"post_conv_in_channels": 64},
    "slanext": {"post_conv_in_channels": 64},
    "seggpt": {
        "num_hidden_layers": 4,
        "merge_index": 0,
        "intermediate_hidden_state_indices": (1, 2, 3),
        "image_size": (128, 64),
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64]},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [64, 64]},
    "voxtral_encoder": {"intermediate_size": 256},
    "mllama_vision_model": {"vision_output_dim": 128},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "gemma4": TOWERS,
    "gemma4_unified": TOWERS,
    "align": {"projection_dim": 80},
    "emu3_vqgan": {"hidden_size": 128, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    "tvp": {
        "backbone_config": {**RESNET, "out_indices": [4]},
        "max_img_size": 64,
        "visual_prompt_size": 8,
        "num_frames": 2,
    },
    "sam_vision_model": {"num_pos_feats": 32},
    "sam_hq_vision_model": {"num_pos_feats": 32},
    "sam_hq_mask_decoder": {"vit_dim": 64},
    "sam2_vision_model": {"backbone_feature_sizes": MAPS},
    "sam3_vision_model": {"backbone_feature_sizes": MAPS},
    "zoedepth": {"bottleneck_features": 64},
    "cvt": {"depth": (1, 2, 3)},
    "sam2_hiera_det_model": {"global_attention_blocks": [4, 6]},
    "glmasr_encoder": {"intermediate_size": 256},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "layoutlmv2": {"coordinate_size": 8, "shape_size": 16},
    "mistral4": {"head_dim": 32},
    "zamba2": {"attention_head_dim": 32},
    "zamba": {
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_dt_rank": 8,
    },
    "clvp_encoder": {"num_attention_heads": 2},
    "lilt": {"hidden_size": 96},
    "llama4_vision_model": {
        "intermediate_size": 256,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    },
    "vitmatte": {"convstream_hidden_sizes": [48, 96, 192], "fusion_hidden_sizes": [256, 128, 64, 32]},
    "step3p5": {"sliding_window": 4},
    "emu3": {"vocabulary_map": {"<image>": 100}, "image_token_id": 100},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151, "vision_end_token_id": 152},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151, "vision_end_token_id": 152},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 48},
    "deepseek_v2": EXPERTS,
    "depth_pro": {"patch_size": 16, "intermediate_hook_ids": [1, 0]},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "florence_vision": {
        "projection_dim": 64,
        "embed_dim": (16, 32, 64, 128),
        "num_heads": (1, 2, 4, 8),
        "num_groups": (1, 2, 4, 8),
    },
    "muse_spark_audio": {"hidden_sizes": (16, 32, 48, 64), "out_hidden_size": 64},
    "pp_ocrv5_server_det": {"kernel_list": [3, 2, 2]},
    "pp_ocrv6_medium_det": {"kernel_list": [3, 2, 2]},
    "chameleon": {"vocabulary_map": {"<image>": 100}, "image_token_id": 100},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2", "spatial_target_layers": [1]},
    **dict.fromkeys(
        ("detr", "conditional_detr", "dab-detr", "table-transformer", "deformable_detr", "omdet-turbo", "upernet"),
        ON_RESNET,
    ),
    **dict.fromkeys(("swin", "donut-swin", "swinv2", "maskformer-swin"), SWIN),
}


def model_types() -> list[str]:
    """Every configuration type that ``transformers`` registers."""
    return list(CONFIG_MAPPING.keys())


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class to build: what generates if there is one, else the base model, else whatever reads the configuration.

    Raises:
        LookupError: no class of the package reads this configuration.
        ImportError: the modelling code needs a package that is not installed.
    """
    named = {
        name[: -len("_MAPPING_NAMES")]: mapping
        for name, mapping in vars(modeling_auto).items()
        if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", name)
    }
    base = named.pop("MODEL")
    order = [named["MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM"]]
    if model_type not in named["MODEL_FOR_MASKED_LM"]:  # encoders have a causal class too, which generates nothing
        order += [
            named[f"MODEL_FOR_{task}"]
            for task in ("SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM")
        ]
    order += [base, named["MODEL_FOR_PRETRAINING"], *named.values()]
    config_class = CONFIG_MAPPING[model_type]
    named_classes: list[Any] = []
    for mapping in order:
        found = mapping.get(model_type)
        for name in (found,) if isinstance(found, str) else found or ():
            named_classes.append(getattr(transformers, name, None))
    named_classes = [cls for cls in named_classes if cls is not None and cls.forward is not nn.Module.forward]
    # Some types are named for a class that reads a part of their configuration only.
    whole = [cls for cls in named_classes if issubclass(config_class, cls.config_class or PretrainedConfig)]
    if whole:
        return whole[0]
    package = importlib.import_module(config_class.__module__.rpartition(".")[0])
    fitting: list[Any] = []
    for entry in pkgutil.iter_modules(package.__path__):
        if entry.name.startswith("modeling_"):
            module = importlib.import_module(f"{package.__name__}.{entry.name}")
            fitting += [
                cls
                for cls in vars(module).values()
                if inspect.isclass(cls)
                and issubclass(cls, PreTrainedModel)
                and cls.__module__ == module.__name__
                and cls.config_class is config_class
                and cls.forward is not nn.Module.forward
            ]
    fitting = fitting or named_classes[:1]
    if not fitting:
        raise LookupError(f"no class reads a {config_class.__name__} by itself")
    return next((cls for cls in fitting if cls.__name__.endswith("Model")), fitting[-1])


def small_config(model_type: str, *, widths: bool = True) -> PretrainedConfig:
    """A small configuration; with ``widths=False`` only depths, vocabularies and pictures shrink."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**shrunk(config_class(), {}, widths, {}))


def shrunk(
    config: PretrainedConfig, special: dict[int, int], widths: bool, overrides: dict[str, Any]
) -> dict[str, Any]:
    """The entries of a configuration that change.

    Args:
        special: special tokens seen so far, old id -> new; kept over sub-configurations so that they agree.
        widths: whether widths, heads and neurons shrink too, or depths, vocabularies and pictures only.
    """
    entries = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    own = OVERRIDES.get(config.model_type, {}) | overrides
    small: dict[str, Any] = {}
    # A pyramid's widths, heads and windows hang together stage by stage: only its depths shrink.
    pyramid = any(isinstance(entries.get(key), list | tuple) for key in PYRAMIDS)
    for key, value in entries.items():
        small[key] = value
        if isinstance(value, PretrainedConfig):
            inner = own.get(key)
            small[key] = shrunk(value, special, widths, inner if isinstance(inner, dict) else {})
            small[key]["model_type"] = value.model_type
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            small[key] = _shrunk_entry(key, value, special, widths and not pyramid)
        elif isinstance(value, list | tuple) and all(isinstance(v, int) for v in value):
            if key.endswith(TOKENS):
                small[key] = [_special(v, special) for v in value]
            elif key in STAGE_DEPTHS:
                small[key] = type(value)(min(v, LAYERS) for v in value)
            elif key == "decoder_in_channels" and widths:
                small[key] = type(value)(WIDTH for _ in value)
        elif value is None and key in PLACEHOLDERS:
            small[key] = PLACEHOLDERS[key]
        elif key in COEFFICIENTS:
            small[key] = min(value, COEFFICIENTS[key])
    heads = entries.get("num_attention_heads")
    if widths and isinstance(heads, int) and "num_key_value_heads" in entries:
        if entries["num_key_value_heads"] in (heads, None):
            small["num_key_value_heads"] = small["num_attention_heads"]
        if "head_dim" in entries and entries["head_dim"] is None:
            small["head_dim"] = HEAD_WIDTH
    small |= _by_layer(entries, small)
    small |= _outputs(config, small, pyramid)
    small |= _pictures(entries)
    small |= _tiles(config)
    if widths:
        small |= _rotary(config, entries)
    # What the class sets by itself is left to it: it may follow from other entries.
    default = vars(type(config)())
    small = {
        key: value
        for key, value in small.items()
        if value != default.get(key, MISSING) and not (key in DERIVED or value == entries.get(key) == default.get(key))
    }
    for key, sub_class in type(config).sub_configs.items():
        if entries.get(key) is None and own.get(key) == {}:
            own = own | {key: shrunk(sub_class(), special, widths, {}) | {"model_type": sub_class.model_type}}
    for key, value in own.items():
        if not (
            isinstance(entries.get(key), PretrainedConfig) and isinstance(value, dict) and "model_type" not in value
        ):
            small[key] = value
    return small


MISSING = object()
TOKENS = ("_token_id", "_token_ids", "_tokens", "_token_index")
DERIVED = ("num_labels", "id2label", "label2id", "model_type", "transformers_version", "stage_names", "dtype")
# Placeholder tokens that a configuration leaves open.
PLACEHOLDERS = {
    f"{kind}_token_{name}": VOCABULARY - 8 + i
    for i, kind in enumerate(("image", "video", "audio"))
    for name in ("id", "index")
}
STAGE_DEPTHS = ("depths", "depth", "blocks_per_stage", "num_block_repeats")
COEFFICIENTS = {"width_coefficient": 0.25, "depth_coefficient": 0.1}
PYRAMIDS = (
    "depths",
    "num_heads",
    "depth",
    "embed_dims",
    "hidden_sizes",
    "num_block_repeats",
    "blocks_per_stage",
    "num_attention_heads",
)
INDICES = re.compile(
    r".*(ind(ices|exes)|_layer_ids|_idxs|attention_layers|attention_blocks|moe_layers|_layers_block_ids|scaling_layers)$"
)


def _outputs(config: PretrainedConfig, small: dict[str, Any], pyramid: bool) -> dict[str, Any]:
    """Layers that are named by their number: those a backbone hands out, those with global attention and the like."""
    depth = next((key for key in DEPTHS if isinstance(getattr(config, key, None), int)), None)
    out = getattr(config, "_out_indices", None)
    changed: dict[str, Any] = {}
    if out and (pyramid or depth is None):
        changed["out_indices"] = list(out)
    elif out and depth is not None:
        layers = max(LAYERS, len(out))
        changed[depth] = layers
        changed["out_indices"] = list(range(layers - len(out) + 1, layers + 1))
    if depth is not None and not pyramid:
        layers = changed.get(depth, small.get(depth, LAYERS))
        for key, value in vars(config).items():
            named = INDICES.fullmatch(key) and not key.startswith("_") and isinstance(value, list | tuple)
            if named and value and key not in changed and all(isinstance(v, int) and v >= 0 for v in value):
                changed[key] = type(value)([v for v in value if v < layers] or [layers - 1])
    return changed


def _shrunk_entry(key: str, value: int, special: dict[int, int], widths: bool) -> int:
    if re.fullmatch(
        r".*(token_id|token_index|_tok_id|(eos|bos|pad|start|end|mask|unk|cls|sep)_(id|index|idx)|_patch_id)", key
    ):
        return _special(value, special)
    if NOT_SIZES.fullmatch(key) or value <= 0:
        return value
    for pattern, limit in RULES:
        if re.fullmatch(pattern, key):
            keeps = limit in (WIDTH, HEADS, KEY_VALUE_HEADS, HEAD_WIDTH, NEURONS, 32) and not widths
            return value if limit is None or keeps else min(value, limit)
    return value


def _special(value: int, special: dict[int, int]) -> int:
    """The new id of a special token; ids that fit the small vocabulary stay."""
    if value < ORDINARY:
        return value
    return special.setdefault(value, ORDINARY + len(special) % (VOCABULARY - ORDINARY))


DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "layers")


def _by_layer(entries: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Entries with one value a layer: as few layers as have one of each sort."""
    depth = next((key for key in DEPTHS if isinstance(entries.get(key), int)), None)
    if depth is None:
        return {}
    total = entries[depth]
    lists = {
        key: value
        for key, value in entries.items()
        if isinstance(value, list | tuple) and len(value) == total and total > 2
    }
    sorts = list(zip(*lists.values(), strict=True)) or [()] * total
    chosen: list[int] = []
    for layer, sort in enumerate(sorts):
        if str(sort) not in [str(sorts[other]) for other in chosen] and len(chosen) < 6:
            chosen.append(layer)
    for layer in range(total):
        if len(chosen) < LAYERS and layer not in chosen:
            chosen.append(layer)
    chosen.sort()
    if not lists:
        return {}
    return {depth: len(chosen), **{key: type(value)(value[i] for i in chosen) for key, value in lists.items()}}


def _tiles(config: PretrainedConfig) -> dict[str, Any]:
    """Resolutions that a picture may be cut to: one by two and two by one times the small picture."""
    vision = getattr(config, "vision_config", None)
    if not hasattr(config, "image_grid_pinpoints") or vision is None:
        return {}
    side = _pictures(vars(vision)).get("image_size", 64)
    return {"image_grid_pinpoints": [[side, 2 * side], [2 * side, side]]}


def _pictures(entries: dict[str, Any]) -> dict[str, Any]:
    """Pictures of four by four patches, or of 64 pixels where patches are small."""
    patch, size = entries.get("patch_size"), entries.get("image_size")
    if not isinstance(size, int | list | tuple) or not size:
        return {}
    side = patch if isinstance(patch, int) else max(patch) if isinstance(patch, list | tuple) and patch else 1
    new = 4 * side if side >= 8 else 64
    return {"image_size": new if isinstance(size, int) else type(size)(new * (v // min(size)) for v in size)}


def _rotary(config: PretrainedConfig, entries: dict[str, Any]) -> dict[str, Any]:
    """Sections of a rotary embedding over several axes, for the small head."""
    changed = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = entries.get(key)
        if isinstance(value, dict):
            changed[key] = {k: _sections(k, v) for k, v in value.items()}
            if "rope_theta" in value and "mrope_section" not in value and _has_sections(type(config)):
                partial = value.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1
                changed[key]["mrope_section"] = [3, 3, 2] if partial == 1 else [1, 1, 2]
    return changed


def _has_sections(config_class: type[PretrainedConfig]) -> bool:
    """Whether the modelling code falls back to sections of its own, which fit its large heads only."""
    name = config_class.__module__.replace("configuration_", "modeling_")
    return importlib.util.find_spec(name) is not None and "mrope_section" in inspect.getsource(
        importlib.import_module(name)
    )


def _sections(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _sections(k, v) for k, v in value.items()}
    if key == "mrope_section":
        return [3, 3, 2]  # sums to half a head
    if key in ("short_factor", "long_factor"):
        return value[: HEAD_WIDTH // 2]
    return value


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from zero and from any symmetry, maps at about unit gain so that outputs stay finite."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.dim() > 1:
            noise /= math.sqrt(max(1, math.prod(parameter.shape[1:])))
        elif re.search(r"(weight|gamma|scale|lambda\w*)$", name):
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.3
        parameter.data.copy_(noise)
    return model


def build(cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype = torch.float64) -> Any:
    """A random model in evaluation mode.

    Raises:
        ValueError: it has more than ``MAX_PARAMETERS``.
    """
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{count:,} parameters; at most {MAX_PARAMETERS:,} are built")
    torch.manual_seed(0)
    model: Any = cls(type(config).from_dict(config.to_dict()))
    model = randomise(model.to(dtype).eval())
    if dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped kernels take no float64
    return model


def reloaded(model: Any) -> Any:
    """The model saved and loaded: what ``transformers`` does not save, it has computed anew."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=model.dtype).eval()
    if model.dtype == torch.float64 and again._can_set_experts_implementation():
        again.set_experts_implementation("eager")
    return again
