"""Seeded damage to files: of bytes, and of JSON that stays well-formed."""

import copy
import json
import random
import struct
from typing import Any

TOKENS = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"-", b"9" * 30, b"1e400", b"NaN", b"\\u0000", b"\xff")
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 1 << 31, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30,
    10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "F32", "BF16", "I8", "F64", "BOOL", "../x", "a" * 600,
    "\u00e9\u202e", "\x1b[31m", [], [0], [1, 1], [[]], [1 << 62, 4], [-1], ["1"], {}, {"a": 1},
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
)  # fmt: skip


class Raw(str):
    """A string that stands for JSON text which no value has, such as a key given twice."""


def mutate_bytes(data: bytes, chosen: random.Random) -> bytes:
    """Flip, insert, delete, copy or cut."""
    result = bytearray(data)
    for _ in range(chosen.choice((1, 1, 1, 2, 5))):
        position = chosen.randrange(len(result) + 1)
        match chosen.randrange(6):
            case 0 if position < len(result):
                result[position] ^= 1 << chosen.randrange(8)
            case 1:
                result[position:position] = chosen.choice(TOKENS)
            case 2:
                del result[position : position + chosen.choice((1, 2, 8, 100))]
            case 3:
                start = chosen.randrange(len(result) + 1)
                result[position:position] = result[start : start + chosen.randrange(200)]
            case 4 if position < len(result):
                result[position] = chosen.randrange(256)
            case _ if chosen.random() < 0.2:
                del result[position:]
    return bytes(result)


def paths(value: Any, start: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value."""
    found = [start] if start else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths(inner, (*start, key))
    return found


def mutate_json(value: Any, chosen: random.Random) -> bytes:
    """Replace, remove, rename, swap, nudge or double values; the result is JSON text."""
    result = copy.deepcopy(value)
    doubled = None
    for _ in range(chosen.choice((1, 1, 1, 2, 4))):
        places = paths(result)
        if not places:
            break
        path = chosen.choice(places)
        holder = _at(result, path[:-1])
        match chosen.randrange(7):
            case 0 | 1:
                holder[path[-1]] = copy.deepcopy(chosen.choice(VALUES))
            case 2:
                del holder[path[-1]]
            case 3:
                other = chosen.choice(places)
                target = _at(result, other[:-1])
                holder[path[-1]], target[other[-1]] = copy.deepcopy(target[other[-1]]), copy.deepcopy(holder[path[-1]])
            case 4 if type(holder[path[-1]]) is int:
                holder[path[-1]] += chosen.choice((-1, 1, 2, 16, -(1 << 63), 1 << 32))
            case 5 if isinstance(holder, dict):
                holder[chosen.choice(("", "x", "__metadata__", *map(str, holder)))] = holder.pop(path[-1])
            case _ if isinstance(holder, dict):
                doubled = path[-1]
    text = json.dumps(result)
    if isinstance(doubled, str):
        quoted = json.dumps(doubled)
        text = text.replace(f"{quoted}:", f"{quoted}: {json.dumps(chosen.choice(VALUES))}, {quoted}:", 1)
    return text.encode()


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def split(raw: bytes) -> tuple[bytes, bytes]:
    """Return header JSON and data of a safetensors file."""
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return raw[8:end], raw[end:]


def join(header: bytes, data: bytes) -> bytes:
    """Return a safetensors file of header JSON and data."""
    return struct.pack("<Q", len(header)) + header + data
