"""Which keys a query may see, as data; only the reference attention turns it into an array."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

# Position of a cache slot that holds nothing: later than any query, so causality hides it.
EMPTY_POSITION = 2**30


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "query_positions_BT",
        "key_positions_BS",
        "query_segments_BT",
        "key_segments_BS",
    ],
    meta_fields=["window", "causal", "query_offset"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Query q sees key k iff all of these hold (positions are written q and k too):

    * both are in the same segment, and it is not segment 0 (padding);
    * q - k >= 0, if `causal`;
    * q - k < `window`, if there is one.

    A pytree: positions and segments are leaves, the other fields are static.

    Without positions the queries are the last T of the row's S keys, which lets a row be computed
    in parts. T = 2 queries at `query_offset` 3, with a window of 3, see of S = 5 keys:

        query 0 (key 3):  . x x x .
        query 1 (key 4):  . . x x x

    Attributes:
        query_positions_BT: int32, position of each query in its document or row. None together
            with `key_positions_BS` means aligned: query t is key t + `query_offset` of its row.
        key_positions_BS: int32, position of each key; `EMPTY_POSITION` for an empty cache slot,
            which a causal mask hides.
        query_segments_BT: int32, document of each query, 0 for padding. None together with
            `key_segments_BS` means one document without padding.
        key_segments_BS: int32, document of each key, 0 for padding.
        window: number of visible keys, self included; None for all.
        causal: hide the future.
        query_offset: keys before the first query of a mask without positions, S - T.

    Raises:
        ValueError: a window below 1; positions or segments for one side only; an offset that is
            negative, or given together with positions.
    """

    query_positions_BT: jax.Array | None = None
    key_positions_BS: jax.Array | None = None
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    window: int | None = None
    causal: bool = True
    query_offset: int = 0

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: must be at least 1 (self), or None for all")
        for query, key in (
            ("query_positions_BT", "key_positions_BS"),
            ("query_segments_BT", "key_segments_BS"),
        ):
            given, missing = (key, query) if getattr(self, query) is None else (query, key)
            # JAX rebuilds pytrees with placeholders for leaves: only arrays are held to the rule.
            if getattr(self, missing) is None and hasattr(getattr(self, given), "shape"):
                raise ValueError(f"{missing}=None with {given} given: give both or neither")
        if self.query_offset < 0:
            raise ValueError(f"query_offset={self.query_offset}: must not be negative")
        if self.query_offset and hasattr(self.query_positions_BT, "shape"):
            raise ValueError(
                f"query_offset={self.query_offset} with positions given: positions say all"
            )

    @property
    def aligned(self) -> bool:
        """Whether no positions are given, so that query t is key t + `query_offset` of its row."""
        return self.query_positions_BT is None

    def check_lengths(self, T: int, S: int) -> None:
        """Raises a ValueError if aligned, unless T queries at the offset are the last of S keys."""
        if self.aligned and T + self.query_offset != S:
            needed = "as many keys"
            if self.query_offset:
                needed = f"{T + self.query_offset} keys at query_offset={self.query_offset}"
            raise ValueError(f"mask without positions: {T} queries need {needed}, not {S}")

    def as_array(self, T: int, S: int) -> jax.Array:
        """Visibility of every pair as bool_BTS; B is 1 if neither positions nor segments are given.

        Raises:
            ValueError: an aligned mask with T + `query_offset` != S.
        """
        self.check_lengths(T, S)
        query_BT, key_BS = self.query_positions_BT, self.key_positions_BS
        if query_BT is None or key_BS is None:
            key_BS = jnp.arange(S, dtype=jnp.int32)[None]
            query_BT = key_BS[:, self.query_offset :]
        distance_BTS = query_BT[:, :, None] - key_BS[:, None, :]
        visible_BTS = jnp.ones(distance_BTS.shape, bool)
        if self.causal:
            visible_BTS &= distance_BTS >= 0
        if self.window is not None:
            visible_BTS &= distance_BTS < self.window
        query_BT, key_BS = self.query_segments_BT, self.key_segments_BS
        if query_BT is not None and key_BS is not None:
            visible_BTS &= query_BT[:, :, None] == key_BS[:, None, :]
            visible_BTS &= (key_BS != 0)[:, None, :]
        return visible_BTS
