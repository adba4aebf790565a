"""Damage that files may come with: to JSON as a faulty tool or an attacker would do it, and to bytes."""

from __future__ import annotations

import copy
import json
import math
from random import Random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 2**31 - 1, 2**31, 2**63, 10**30, 0.5, 1.0, -0.0, 1e30, 1e308, math.nan,
    math.inf, "", "x", "out", "in", "qk", "vo", "mlp", "halves", "dims", "\ud800", "\x00", "../x", "__class__", "a.b",
    [], {}, [[]], [0], [0, 0], {"": 0}, [None], ["x"], {"side": "in"},
)  # fmt: skip


def _nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        found.append((value, key))
        _nodes(entry, found)
    return found


def altered(document: Any, random: Random, most: int = 3) -> Any:
    """A copy of a JSON document with one to ``most`` alterations."""
    document = copy.deepcopy(document)
    for _ in range(random.randint(1, most)):
        nodes = _nodes(document, [])
        if not nodes:
            return copy.deepcopy(random.choice(HOSTILE))
        container, key = random.choice(nodes)
        value, way = container[key], random.randrange(9)
        if way == 0:
            del container[key]
        elif way == 1 and isinstance(container, dict):
            container[random.choice(["x", str(key) + "x", str(key).rpartition(".")[2]])] = container.pop(key)
        elif way == 2 and isinstance(container, list):
            other = random.randrange(len(container))
            container[key], container[other] = container[other], container[key]
        elif way == 3 and isinstance(container, list):
            container.insert(random.randrange(len(container) + 1), copy.deepcopy(value))
        elif way == 4 and isinstance(container, dict):
            container[random.choice(list(container))] = copy.deepcopy(value)
        elif way in (5, 6) and isinstance(value, int | float) and math.isfinite(value) and abs(value) < 2**60:
            container[key] = random.choice(
                [value + 1, value - 1, value * 2, value // 2, -value, float(value), not value]
            )
        elif way == 7:
            container[key] = copy.deepcopy(random.choice(nodes)[0])
            json.dumps(document, default=str)  # no circle: the part was copied
        else:
            container[key] = copy.deepcopy(random.choice(HOSTILE))
    return document


def damaged(data: bytes, random: Random) -> bytes:
    """Bytes with one to three places changed, taken out, put in or cut off."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 3)):
        at, length = random.randrange(len(changed) + 1), random.choice([1, 1, 2, 4, 8, 64])
        way = random.randrange(6)
        if way == 0 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif way == 1 and at < len(changed):
            changed[at] = random.choice([0, 1, 0x22, 0x30, 0x39, 0x5B, 0x7B, 0x7F, 0xC0, 0xFF])
        elif way == 2:
            del changed[at : at + length]
        elif way == 3:
            changed[at:at] = random.choice([b"\x00", b"9", b'"', b"[", b"{", b"}", b",", b"e9", b"-"]) * length
        elif way == 4:
            changed[at : at + length] = changed[: len(changed[at : at + length])]
        else:
            del changed[at:]
    return bytes(changed)
