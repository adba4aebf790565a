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
from pathprune.discovery.dummy_inputs.builder import SIDE, WORDS, DoesNotApply, Inputs, Maker, parameters, two
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
        maker = Maker(model, batch)
        for inputs in _candidates(maker):
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
                maker.heed(error)
                continue
            return inputs
    names = ", ".join(parameters(model))
    reason = f"{type(first).__name__}: {first}" if first else "no parameter of a known kind"
    raise UnsupportedModelError(
        f"{type(model).__name__} does not run on a tiny input made from its configuration ({reason}); "
        f"pass inputs=..., keyword arguments of its forward({names})"
    ) from first


def _candidates(maker: Maker) -> Iterator[Inputs]:
    """Inputs to try, the fullest first."""
    if maker.config is None or not hasattr(maker.config, "to_dict"):
        yield from _plain_vision(maker, maker.model)
        return
    if isinstance(wrapped := getattr(maker.model, "timm_model", None), nn.Module):  # its configuration has no sizes
        yield from _plain_vision(maker, wrapped)
        return
    pictures: list[Any] = PICTURES if maker.picture_name() else []
    recordings: list[Any] = RECORDINGS if {"input_features", "input_values"} & maker.parameters.keys() else []
    # Everything that the model can read; then without one kind of it; then text alone.
    stages: list[list[tuple[Any, Any]]] = [list(product(pictures or [None], recordings or [None]))]
    if pictures and recordings:
        stages.append([(picture, None) for picture in pictures] + [(None, recording) for recording in recordings])
    if (pictures or recordings) and "input_ids" in maker.parameters:
        stages.append([(None, None)])
    main = getattr(maker.model, "main_input_name", "input_ids")
    texts = (True, False) if main != "input_ids" and "input_ids" not in maker.required else (True,)
    masks, bins = ((True, False), frequencies(maker)) if recordings else ((True,), [0])
    words = [None] + (["last", "batch"] if maker.books() else [])
    extra = [None, *(name for name in ("encoder_hidden_states", "inputs_embeds") if name in maker.parameters)]
    for stage, maker.with_text, maker.extra, maker.codebooks in product(stages, texts, extra, words):
        for (maker.side, maker.words), maker.masked, maker.bins in product(((SIDE, WORDS), (224, 64)), masks, bins):
            for picture, recording in stage:
                try:
                    inputs = _make(maker, picture, recording)
                except DoesNotApply:
                    continue
                yield inputs
                if maker.told:
                    yield _make(maker, picture, recording)
                    maker.told = {}


def _plain_vision(maker: Maker, model: nn.Module) -> Iterator[Inputs]:
    """Pictures for a model without a configuration of ``transformers``."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = dict(cfg).get("input_size", (3, 224, 224))
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    name = next(iter(maker.parameters))
    if size is not None:
        yield {name: maker.noise(maker.batch, shape[0], *two(size))}
    for side in (shape[-1], SIDE):
        yield {name: maker.noise(maker.batch, shape[0], side, side)}


def _make(maker: Maker, picture: Any, recording: Any) -> Inputs:
    names = maker.parameters
    inputs: Inputs = {}
    if picture is not None:
        inputs |= picture(maker)
    if recording is not None:
        inputs |= recording(maker)
    for name, other in OTHERS.items():
        if name in names:
            inputs |= {key: value for key, value in other(maker).items() if key in names}
    if "input_ids" in names and (maker.with_text or not inputs):
        inputs |= maker.text(inputs)
    if "decoder_input_ids" in names:
        near = "decoder text generator"
        inputs["decoder_input_ids"] = maker.ids(maker.words, maker.vocabulary(near), maker.codebooks)
    for name in maker.parameters:
        needed = name in maker.required or (name == "lang_ids" and maker.entry("languages"))
        make = ALWAYS.get(name) or (NEEDED.get(name) if needed else None)
        if make is not None and name not in inputs:
            value = make(maker, inputs)
            inputs |= {} if value is None else {name: value}
    if maker.extra == "encoder_hidden_states" and maker.extra not in inputs:
        inputs[maker.extra] = remembered(maker, inputs)
    if maker.extra == "inputs_embeds" and inputs.pop("input_ids", None) is not None:
        inputs[maker.extra] = embedded(maker, inputs)
    if "use_cache" in names or hasattr(maker.config, "use_cache"):
        inputs["use_cache"] = False
    return inputs
