"""Sizes that programs are compiled for: few, so that a new length or batch compiles nothing."""

from __future__ import annotations

_SMALLEST_LENGTH = 32


def length_bucket(length: int) -> int:
    """Returns the least of 32, 48, 64, 96, 128, 192, ... that holds `length` tokens."""
    size = max(_SMALLEST_LENGTH, power_of_two(length))
    return size * 3 // 4 if size > _SMALLEST_LENGTH and length <= size * 3 // 4 else size


def power_of_two(count: int) -> int:
    """Returns the least power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
