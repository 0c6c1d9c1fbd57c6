"""Damaged JSON: what can become of a file of a workdir, the same in every session."""

import copy
import json
import random

VALUES = (
    None,
    True,
    -1,
    0,
    1,
    0.5,
    1e308,
    -1e308,
    2**31,
    2**63,
    10**400,
    "",
    "x",
    "\ud800",
    "a/../b",
    [],
    [1],
    ["x", None],
    {},
    {"x": 1},
)
# Bytes that no writer of ours makes.
BROKEN = (
    b"",
    b"[]",
    b"null",
    b"3",
    b'"x"',
    b"\xff\xfe{}",
    b"{" + b'"a": [' * 1000,
    b"[" * 1000 + b"]" * 1000,
    b'{"a": NaN}',
    b'{"step": 1' + b"0" * 5000 + b"}",
    b"\0" * 4096,
)
TOKENS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"1" + b"0" * 5000,
    b"[" * 1000 + b"]" * 1000,
)


def places(value, path=()):
    """Paths of all values inside an object."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in inside:
        yield (*path, key)
        if isinstance(entry, (dict, list)):
            yield from places(entry, (*path, key))


def changed(document, generator):
    """One JSON document with a value, a key or a few bytes other than they were; as bytes."""
    document = copy.deepcopy(document)
    *path, last = generator.choice(list(places(document)))
    parent = document
    for key in path:
        parent = parent[key]
    what = generator.choice(["value", "value", "value", "token", "gone", "more", "cut", "byte"])
    if what == "value":
        parent[last] = copy.deepcopy(generator.choice(VALUES))
    elif what == "gone":
        del parent[last]
    elif what == "more":
        parent = parent if isinstance(parent, dict) else document
        parent[generator.choice(["x", "step", "stages", "", "__class__"])] = generator.choice(
            VALUES
        )
    elif what == "token":
        parent[last] = "here"
        return json.dumps(document).encode().replace(b'"here"', generator.choice(TOKENS))
    content = bytearray(json.dumps(document).encode())
    at = generator.randrange(len(content))
    if what == "cut":
        return bytes(content[:at])
    if what == "byte":
        content[at] = generator.randrange(256)
    return bytes(content)


def damaged(document, count, seed):
    """All of `BROKEN`, and `count` random changes of a document."""
    generator = random.Random(seed)
    return [*BROKEN, *(changed(document, generator) for _ in range(count))]
