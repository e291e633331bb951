"""The few forms of DER (X.690) in which Intel and AMD write their certificate extensions."""

from __future__ import annotations


def value(tag: int, content: bytes) -> bytes:
    """One DER value: tag, length, content."""
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def sequence(*parts: bytes) -> bytes:
    """A SEQUENCE of values that are encoded already."""
    return value(0x30, b"".join(parts))


def integer(number: int) -> bytes:
    """An INTEGER that is not negative: one more bit than it needs, so that the sign is 0."""
    return value(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def enumerated(number: int) -> bytes:
    """An ENUMERATED below 128."""
    return value(0x0A, bytes([number]))


def boolean(truth: bool) -> bytes:
    """A BOOLEAN."""
    return value(0x01, b"\xff" if truth else b"\x00")


def octets(content: bytes) -> bytes:
    """An OCTET STRING."""
    return value(0x04, content)


def ia5(text: str) -> bytes:
    """An IA5String."""
    return value(0x16, text.encode("ascii"))


def identifier(dotted: str) -> bytes:
    """An OBJECT IDENTIFIER, from its dotted form."""
    first, second, *rest = map(int, dotted.split("."))
    return value(0x06, b"".join(map(_base_128, [40 * first + second, *rest])))


def _base_128(number: int) -> bytes:
    """Seven bits to a byte, the highest first; each byte but the last has its top bit set."""
    digits = [number & 0x7F]
    while number := number >> 7:
        digits.append(0x80 | number & 0x7F)
    return bytes(reversed(digits))
