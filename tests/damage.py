"""Random damage to the bytes of a file, and plain readers to tell what damaged bytes say."""

import json
import random
import struct

TRAPS = [0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**60, 2**63, 2**64 - 1]


_SIGNS = [
    *(b'"', b"[", b"]", b"{", b"}", b":", b",", b"\n", b"'", b"\\ud83d", b"1e999", b"NaN", b"null"),
    *(b"*args", b"&a ", b"- ", b"!!int ", b"? ", b"<<: ", b"[" * 3000, b"9" * 5000),
]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """``content`` after one to three accidents."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(_ACCIDENTS)(content, rng)
    return content


def _place(content: bytes, rng: random.Random) -> int:
    """Anywhere, but often near one of the ends, where heads and footers are."""
    near = min(len(content), rng.choice((50, 300, 2000)))
    ends = (rng.randint(0, near), rng.randint(len(content) - near, len(content)))
    return rng.choice((*ends, rng.randint(0, len(content))))


def _block(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = _place(content, rng)
    return start, min(len(content), start + rng.choice((1, 2, 8, 64, 1000)))


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if content else 0):
        changed[min(_place(content, rng), len(content) - 1)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: _place(content, rng)]


def _delete(content: bytes, rng: random.Random) -> bytes:
    start, stop = _block(content, rng)
    return content[:start] + content[stop:]


def _duplicate(content: bytes, rng: random.Random) -> bytes:
    start, stop = _block(content, rng)
    return content[:stop] + content[start:]


def _insert(content: bytes, rng: random.Random) -> bytes:
    start, stop = _block(content, rng)
    return content[:start] + rng.randbytes(stop - start) + content[start:]


def _blank(content: bytes, rng: random.Random) -> bytes:
    start, stop = _block(content, rng)
    return content[:start] + bytes(stop - start) + content[stop:]


def _number(content: bytes, rng: random.Random) -> bytes:
    """A number of 4 or 8 bytes that promises too much."""
    size = rng.choice((4, 8))
    start = _place(content, rng)
    number = (rng.choice(TRAPS) % 256**size).to_bytes(size, "little")
    return content[:start] + number + content[start + size :]


def _text(content: bytes, rng: random.Random) -> bytes:
    """A sign that means something to JSON or YAML."""
    start = _place(content, rng)
    sign = rng.choice(_SIGNS)
    return content[:start] + sign + content[start:]


_ACCIDENTS = (_flip, _flip, _flip, _cut, _delete, _duplicate, _insert, _blank, _number, _text)


def plain_jsonl(content: bytes) -> list[dict]:
    """Rows of a JSONL file."""
    lines = content.decode("utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def plain_safetensors(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of each tensor of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    head.pop("__metadata__", None)
    data = content[8 + size :]
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in head.items()
    }


class PlainGguf:
    """Metadata and tensors of a GGUF file of little-endian numbers, of version 2 or 3."""

    _FORMATS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 4
        self._take("I")
        n_tensors, n_values = self._take("Q"), self._take("Q")
        self.values = dict(self._pair() for _ in range(n_values))
        entries = [self._entry() for _ in range(n_tensors)]
        start = self._at + -self._at % self.values.get("general.alignment", 32)
        self.tensors = {n: (shape, kind, start + at) for n, shape, kind, at in entries}

    def _take(self, form: str):
        (value,) = struct.unpack_from(f"<{form}", self._content, self._at)
        self._at += struct.calcsize(f"<{form}")
        return value

    def _string(self) -> str:
        size = self._take("Q")
        self._at += size
        return self._content[self._at - size : self._at].decode()

    def _value(self, kind: int):
        if kind == 8:
            return self._string()
        if kind == 9:
            inner, length = self._take("I"), self._take("Q")
            return [self._value(inner) for _ in range(length)]
        return self._take(self._FORMATS[kind])

    def _pair(self):
        name = self._string()
        return name, self._value(self._take("I"))

    def _entry(self):
        name = self._string()
        shape = [self._take("Q") for _ in range(self._take("I"))]
        return name, shape, self._take("I"), self._take("Q")
