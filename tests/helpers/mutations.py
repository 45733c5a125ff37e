"""Damage to files: what the mutation test and the fuzzer do to valid ones, from a stream of bytes."""

import re

# What a value of a JSON file is replaced by: other types, numbers too large, places outside the folder.
VALUES = (
    b"0", b"-1", b"null", b"[]", b"{}", b'"x"', b"1e400", b"NaN", b"true", b"99999999999999999999", b"1.5", b"[[1]]",
    b'"../../../etc/passwd"', b'"/etc/passwd"', b"[" * 2000, b'"\\ud800"', b'{"a": {"a": 1}}',
)  # fmt: skip
_VALUE = re.compile(rb'(?<=: )("[^"]*"|-?[\d.e+-]+|true|false|null|\[[^\[\]]*\]|\{[^{}]*\})')


class Bytes:
    """Numbers drawn from a string of bytes; zeros when it is used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def below(self, bound: int) -> int:
        taken = self.data[self.place : self.place + 3]
        self.place += 3
        return int.from_bytes(taken, "little") % max(bound, 1)


def damaged(data: bytes, name: str, source: Bytes) -> bytes:
    """`data`, cut short, with another JSON value, with a length in its header changed, or with some bytes changed."""
    kind = source.below(8)
    if kind == 0:
        return data[: source.below(len(data))]
    if kind <= 3 and name.endswith((".json", ".jsonl")):
        spans = [match.span() for match in _VALUE.finditer(data)]
        if spans:
            start, end = spans[source.below(len(spans))]
            return data[:start] + VALUES[source.below(len(VALUES))] + data[end:]
    changed = bytearray(data)
    if kind == 4:  # the lengths that safetensors, zip and npy put first
        at = source.below(min(32, len(changed)))
        changed[at : at + 4] = source.below(1 << 24).to_bytes(4, "big")
        return bytes(changed[: len(data)])
    if kind == 5:
        at = source.below(len(changed))
        return bytes(changed[:at] + changed[at : at + 40] * 3 + changed[at:])
    for _ in range(1 + source.below(4)):
        at = source.below(len(changed))
        changed[at] = (changed[at] ^ (1 << source.below(8))) if source.below(2) else source.below(256)
    return bytes(changed)
