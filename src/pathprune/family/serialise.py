"""Pairs as plain data: format 1 of path.json, which stays as it is whatever becomes of our classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pathprune.family.pair_list import BaseModel, PairList
from pathprune.family.pairs import Pair, Slot

# Key in the file -> field of the class.
SLOT = {
    "module": "module",
    "side": "side",
    "size": "size",
    "repeat": "repeat",
    "bias": "bias",
    "start": "start",
    "total": "total",
    "layout": "layout",
    "parameter": "parameter",
    "transposed": "transposed",
}
PAIR = {
    "name": "name",
    "kind": "kind",
    "block": "block",
    "groups": "groups",
    "width": "width",
    "slots": "slots",
    "rotary": "rotary",
    "mixing": "mixing",
    "narrow": "narrow",
    "fewer": "fewer",
    "rescale": "rescale",
    "calls": "calls",
    "once": "once",
}
BASE = {
    "architecture": "architecture",
    "config_hash": "config_hash",
    "fingerprint": "fingerprint",
    "params": "params",
    "macs_per_token": "macs_per_token",
    "macs_per_sequence": "macs_per_sequence",
}
ON_DISK = {"bytes": "bytes", "itemsize": "itemsize"}  # of the base model; 0.1.0 wrote neither


def pair_to_json(pair: Pair) -> dict[str, Any]:
    slots = [{key: getattr(slot, field) for key, field in SLOT.items()} for slot in pair.slots]
    return {key: getattr(pair, field) for key, field in PAIR.items()} | {"slots": slots}


def pair_from_json(entry: Mapping[str, Any]) -> Pair:
    slots = tuple(Slot(**_fields("a slot", slot, SLOT)) for slot in entry["slots"])
    return Pair(**_fields("a pair", entry, PAIR) | {"slots": slots})


def base_to_json(base: BaseModel) -> dict[str, Any]:
    keys = BASE | ON_DISK if base.bytes else BASE
    return {key: getattr(base, field) for key, field in keys.items()}


def base_from_json(entry: Mapping[str, Any]) -> BaseModel:
    return BaseModel(**_fields("the base model", entry, BASE | ON_DISK if "bytes" in entry else BASE))


def _fields(what: str, entry: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """By the names of fields.

    Raises:
        ValueError: a key is missing, or unknown.
    """
    if wrong := sorted(map(str, set(entry) ^ set(keys))):
        raise ValueError(f"{what} has {'no' if wrong[0] in keys else 'an unknown'} {wrong[0]}")
    return {field: entry[key] for key, field in keys.items()}


def pairs_from_json(entries: Any, base: Mapping[str, Any], refused: Any) -> PairList:
    """The pairs of a path.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, SettingError: they are malformed.
    """
    return PairList([pair_from_json(entry) for entry in entries], base_from_json(base), refused)
