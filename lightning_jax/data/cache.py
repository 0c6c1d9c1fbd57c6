"""Results kept in the user's cache folder: a file appears whole or not at all, and is checked.

A cache only saves time. If a file is missing, damaged or cannot be written, the caller does the
work again.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_jax.runtime.files import replacing, user_folder

__all__ = ["load_arrays", "save_arrays", "user_folder"]

logger = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes; the arrays begin at a multiple of it
_LONGEST_HEADER = 4096


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> bool:
    """Writes arrays [n] for `load_arrays`; False if the disk does not take them.

    The file is a line of JSON (names, dtypes, lengths and a checksum), then the arrays as they are
    in memory. Put those of 8-byte dtypes first, for alignment.
    """
    flat = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    shapes = [[name, array.dtype.str, len(array)] for name, array in flat.items()]
    checksum = zlib.crc32(json.dumps(shapes).encode())
    for array in flat.values():
        checksum = zlib.crc32(array.view(np.uint8), checksum)
    header = json.dumps({"crc32": checksum, "arrays": shapes}).encode()
    header += b" " * (-(len(header) + 1) % _ALIGNMENT) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(header)
            for array in flat.values():
                file.write(array.view(np.uint8))
    except OSError as error:
        logger.debug("%s is not kept: %s", path, error)
        return False
    return True


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Returns memory-mapped arrays that `save_arrays` wrote; None without a whole file of them."""
    try:
        with open(path, "rb") as file:
            line = file.readline(_LONGEST_HEADER)
            header = json.loads(line)
            content = np.asarray(np.memmap(file, np.uint8, "r", offset=len(line)))
        shapes = header["arrays"]
        if zlib.crc32(content, zlib.crc32(json.dumps(shapes).encode())) != header["crc32"]:
            raise ValueError("its checksum is wrong")
        arrays, end = {}, 0
        for name, dtype, count in shapes:
            start, end = end, end + count * np.dtype(dtype).itemsize
            arrays[name] = content[start:end].view(dtype)
        return arrays
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.debug("%s is made again: %s", path, error)
        return None
