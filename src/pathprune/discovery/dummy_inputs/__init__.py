"""A tiny valid input for any model, from its configuration and the signature of its ``forward``.

What a model reads is told by the names of its parameters: ``input_ids``, ``pixel_values``, ``input_features``
and so on. Where the names leave the layout open (is a picture four- or five-dimensional?), the likely layouts
are tried one after the other, those that exercise most of the model first.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.discovery.dummy_inputs.audio import RECORDINGS, frequencies
from pathprune.discovery.dummy_inputs.builder import SIDE, WORDS, DoesNotApply, InputBuilder, Inputs, parameters, two
from pathprune.discovery.dummy_inputs.images import PICTURES
from pathprune.discovery.dummy_inputs.others import ALWAYS, NEEDED, OTHERS, embedded, remembered
from pathprune.errors import UnsupportedModelError
from pathprune.model.contexts import evaluating


def example_inputs(model: nn.Module, *, batch: int = 2) -> Inputs:
    """A tiny input on which the model runs.

    Args:
        batch: number of texts, pictures or recordings. The second text of a text-only model ends in padding.

    Returns:
        Keyword arguments of ``model.forward``: tensors on the model's device, floating ones in its precision,
        and ``use_cache=False`` where the model has a cache.

    Raises:
        UnsupportedModelError: no input of a known kind runs; the message has the model's error.
    """
    first: Exception | None = None
    with evaluating(model):
        tried = set()
        builder = InputBuilder(model, batch)
        for inputs in _candidates(builder):
            shapes = tuple(
                (name, value.shape if isinstance(value, Tensor) else value) for name, value in inputs.items()
            )
            if shapes in tried:
                continue
            tried.add(shapes)
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    model(**inputs)
            except Exception as error:
                first = first or error
                builder.learn_from(error)
                continue
            return inputs
    names = ", ".join(parameters(model))
    reason = f"{type(first).__name__}: {first}" if first else "no parameter of a known kind"
    raise UnsupportedModelError(
        f"{type(model).__name__} does not run on a tiny input made from its configuration ({reason}); "
        f"pass inputs=..., keyword arguments of its forward({names})"
    ) from first


def _candidates(builder: InputBuilder) -> Iterator[Inputs]:
    """Inputs to try, the fullest first."""
    if builder.config is None or not hasattr(builder.config, "to_dict"):
        yield from _plain_vision(builder, builder.model)
        return
    if isinstance(wrapped := getattr(builder.model, "timm_model", None), nn.Module):  # its configuration has no sizes
        yield from _plain_vision(builder, wrapped)
        return
    pictures: list[Any] = PICTURES if builder.picture_name() else []
    recordings: list[Any] = RECORDINGS if {"input_features", "input_values"} & builder.parameters.keys() else []
    # Everything that the model can read; then without one kind of it; then text alone.
    stages: list[list[tuple[Any, Any]]] = [list(product(pictures or [None], recordings or [None]))]
    if pictures and recordings:
        stages.append([(picture, None) for picture in pictures] + [(None, recording) for recording in recordings])
    if (pictures or recordings) and "input_ids" in builder.parameters:
        stages.append([(None, None)])
    main = getattr(builder.model, "main_input_name", "input_ids")
    texts = (True, False) if main != "input_ids" and "input_ids" not in builder.required else (True,)
    masks, bins = ((True, False), frequencies(builder)) if recordings else ((True,), [0])
    words = [None] + (["last", "batch"] if builder.books() else [])
    extra = [None, *(name for name in ("encoder_hidden_states", "inputs_embeds") if name in builder.parameters)]
    for stage, builder.with_text, builder.extra, builder.codebooks in product(stages, texts, extra, words):
        for (builder.side, builder.words), builder.masked, builder.bins in product(
            ((SIDE, WORDS), (224, 64)), masks, bins
        ):
            for picture, recording in stage:
                try:
                    inputs = _build(builder, picture, recording)
                except DoesNotApply:
                    continue
                yield inputs
                if builder.stated:
                    yield _build(builder, picture, recording)
                    builder.stated = {}


def _plain_vision(builder: InputBuilder, model: nn.Module) -> Iterator[Inputs]:
    """Pictures for a model without a configuration of ``transformers``."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = dict(cfg).get("input_size", (3, 224, 224))
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    name = next(iter(builder.parameters))
    if size is not None:
        yield {name: builder.noise(builder.batch, shape[0], *two(size))}
    for side in (shape[-1], SIDE):
        yield {name: builder.noise(builder.batch, shape[0], side, side)}


def _build(builder: InputBuilder, picture: Any, recording: Any) -> Inputs:
    names = builder.parameters
    inputs: Inputs = {}
    if picture is not None:
        inputs |= picture(builder)
    if recording is not None:
        inputs |= recording(builder)
    for name, other in OTHERS.items():
        if name in names:
            inputs |= {key: value for key, value in other(builder).items() if key in names}
    if "input_ids" in names and (builder.with_text or not inputs):
        inputs |= builder.text(inputs)
    if "decoder_input_ids" in names:
        near = "decoder text generator"
        inputs["decoder_input_ids"] = builder.ids(builder.words, builder.vocabulary(near), builder.codebooks)
    for name in builder.parameters:
        needed = name in builder.required or (name == "lang_ids" and builder.entry("languages"))
        build = ALWAYS.get(name) or (NEEDED.get(name) if needed else None)
        if build is not None and name not in inputs:
            value = build(builder, inputs)
            inputs |= {} if value is None else {name: value}
    if builder.extra == "encoder_hidden_states" and builder.extra not in inputs:
        inputs[builder.extra] = remembered(builder, inputs)
    if builder.extra == "inputs_embeds" and inputs.pop("input_ids", None) is not None:
        inputs[builder.extra] = embedded(builder, inputs)
    if "use_cache" in names or hasattr(builder.config, "use_cache"):
        inputs["use_cache"] = False
    return inputs
