"""The compiled functions of a run, lowered for devices that are not here, and what they must do.

Training keeps parameters and moments split as `train.placement` does. Serving keeps parameters as
they are used (`Rules.of(mesh)`): experts over `expert`, heads, features and vocabulary over
`tensor`, everything else whole on each device; rows of the cache are split as a batch is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lightning_jax import accounting, sharding
from lightning_jax import model as lm
from lightning_jax.config import ModelConfig, RunConfig
from lightning_jax.config.errors import UserError, suggest
from lightning_jax.config.fields import require
from lightning_jax.infer import engine
from lightning_jax.infer.decode_state import DecodeState
from lightning_jax.infer.sampling import Sampling
from lightning_jax.train.placement import TrainProgram, abstract_batch, make_mesh
from lightning_jax.train.plan import Plan, Segment

PROGRAMS = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is compiled.

    Attributes:
      stage: of which the train step is compiled; None: the one with the longest sequences.
      rows: requests in one prefill or decode step; None: one for each part of the batch.
      length: tokens for which the cache has room, all filled; None: the stage's `seq_len`.
      prefill_chunk: tokens of each prompt that one prefill step reads, the last before `length`.
    """

    stage: str | None = None
    rows: int | None = None
    length: int | None = None
    prefill_chunk: int = 2048


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A function before it is compiled.

    Attributes:
      lowered: the result of `jax.jit(...).lower`.
      mesh: of its devices.
      shape: sizes to report.
      model_flops: FLOPs that the model needs for one call, on all devices together.
      device_flops: the same with those that are computed again, or twice.
      argument_bytes: bytes of one device's part of the arguments, without padding.
      least_bytes: that one device moves at the least: it reads its arguments, and training writes
        the new state.
      tokens: that one call trains on, reads or writes.
    """

    lowered: Any
    mesh: Mesh
    shape: dict[str, int | str]
    model_flops: float
    device_flops: float
    argument_bytes: int
    least_bytes: int
    tokens: int


def lower(name: str, config: RunConfig, shape: Shape, devices: Sequence[jax.Device]) -> Lowered:
    """Lowers one of `PROGRAMS` for the devices; the config's vocabulary is resolved.

    Raises:
      UserError: no such stage, or sizes that do not divide over the mesh.
    """
    segment = segment_of(config, shape.stage)
    if name == "train":
        return _lower_train(config, segment, devices)
    mesh = sharding.make_mesh(config.mesh, devices)
    length = shape.length or segment.seq_len
    rows = shape.rows or sharding.batch_shards(mesh)
    sharding.check_divisible(config.model, mesh, batch={"rows": rows}, seq_len={})
    with jax.set_mesh(mesh):
        if name == "prefill":
            return _lower_prefill(
                config.model, mesh, rows, length, min(shape.prefill_chunk, length)
            )
        return _lower_decode(config.model, mesh, rows, length)


def segment_of(config: RunConfig, stage: str | None) -> Segment:
    """Returns the segment of a stage, or the one with the longest sequences.

    Raises:
      UserError: no such stage.
    """
    segments = {segment.stage.name: segment for segment in Plan.of(config).segments}
    if stage is None:
        return max(segments.values(), key=lambda segment: segment.seq_len)
    if stage not in segments:
        raise UserError(f"stage = {stage!r}: must be {suggest(stage, segments)}")
    return segments[stage]


def check_shape(shape: Shape) -> None:
    """Raises UserError for a size that is no size."""
    for name in ("rows", "length", "prefill_chunk"):
        value = getattr(shape, name)
        require(value is None or value >= 1, name, value, "at least 1")


def _lower_train(config: RunConfig, segment: Segment, devices: Sequence[jax.Device]) -> Lowered:
    plan = Plan.of(config)
    plan = dataclasses.replace(plan, segments=(segment,))
    mesh = make_mesh(plan, devices)
    with jax.set_mesh(mesh):
        program = TrainProgram(config, mesh)
        whole = sharding.replicated(mesh)
        knobs = jax.tree.map(
            lambda value: jax.ShapeDtypeStruct((), value.dtype, sharding=whole),
            plan.knobs(segment.first_step),
        )
        arguments = program.abstract_state, abstract_batch(segment, mesh), knobs
        lowered = program.step.lower(*arguments, segment.accumulate)
    model, tokens = config.model, segment.step_tokens
    return Lowered(
        lowered,
        mesh,
        {
            "stage": segment.stage.name,
            "rows": segment.batch_size,
            "seq_len": segment.seq_len,
            "accumulate": segment.accumulate,
            "remat": model.remat,
        },
        model_flops=tokens * accounting.flops_per_token(model, seq_len=segment.seq_len),
        device_flops=tokens
        * accounting.device_flops_per_token(
            model, seq_len=segment.seq_len, accumulate=segment.accumulate
        ),
        argument_bytes=local_bytes(arguments),
        least_bytes=local_bytes(arguments) + local_bytes(program.abstract_state),
        tokens=tokens,
    )


def _lower_prefill(model: ModelConfig, mesh: Mesh, rows: int, length: int, chunk: int) -> Lowered:
    served = engine.compiled_for(model)
    arguments = (
        _weights(served, mesh),
        _cache(served, mesh, rows, length),
        _rows(mesh, rows, jnp.float32, model.vocab_size),
        _rows(mesh, rows, jnp.int32, chunk),
        _rows(mesh, rows, jnp.int32),
        _whole(mesh, jax.ShapeDtypeStruct((), jnp.int32)),
        _rows(mesh, rows, jnp.float32),
    )
    flops = rows * accounting.prefill_flops(model, length - chunk, length)
    return Lowered(
        engine.prefill_step.lower(served, *arguments),
        mesh,
        {"rows": rows, "length": length, "chunk": chunk},
        model_flops=flops,
        device_flops=flops,
        argument_bytes=local_bytes(arguments),
        least_bytes=local_bytes(arguments),
        tokens=rows * chunk,
    )


def _lower_decode(model: ModelConfig, mesh: Mesh, rows: int, length: int) -> Lowered:
    served = engine.compiled_for(model)

    def start(key: jax.Array) -> DecodeState:
        return DecodeState.start(
            [[0]] * rows,
            [Sampling()] * rows,
            max_new_tokens=1,
            key=key,
            stop_ids=(),
            routing_top_p=model.moe.top_p,
            rows=rows,
        )

    state = jax.eval_shape(start, jax.eval_shape(lambda: jax.random.key(0)))
    arguments = (
        _weights(served, mesh),
        _cache(served, mesh, rows, length),
        jax.tree.map(lambda a: _placed(a, mesh, ("batch",)), state),
    )
    flops = rows * accounting.decode_flops(model, length)
    return Lowered(
        engine.decode_step.lower(served, *arguments, valid_vocab=model.vocab_size),
        mesh,
        {"rows": rows, "length": length},
        model_flops=flops,
        device_flops=flops,
        argument_bytes=local_bytes(arguments),
        least_bytes=local_bytes(arguments),
        tokens=rows,
    )


def _weights(model: ModelConfig, mesh: Mesh) -> engine.Weights:
    """Weights in the dtypes and the placement of serving."""
    abstract = jax.eval_shape(
        lambda params: lm.inference_params(model, params), lm.abstract_params(model)
    )
    placement = sharding.tree_shardings(lm.logical_axes(model), mesh, stored=False)
    params = jax.tree.map(
        lambda a, to: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to), abstract, placement
    )
    router = jax.eval_shape(lambda: lm.init_router(model))
    base: Any = _whole(mesh, jax.ShapeDtypeStruct((), jnp.float32))
    return engine.Weights(params, jax.tree.map(lambda a: _whole(mesh, a), router), base)


def _cache(model: ModelConfig, mesh: Mesh, rows: int, length: int) -> lm.Cache:
    return jax.tree.map(
        lambda a, to: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to),
        lm.abstract_cache(model, rows, length),
        lm.cache_shardings(model, rows, length, mesh),
    )


def _rows(mesh: Mesh, rows: int, dtype: Any, *rest: int) -> jax.ShapeDtypeStruct:
    return _placed(jax.ShapeDtypeStruct((rows, *rest), dtype), mesh, ("batch",))


def _whole(mesh: Mesh, array: Any) -> jax.ShapeDtypeStruct:
    return _placed(array, mesh, ())


def _placed(array: Any, mesh: Mesh, names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
    placement = NamedSharding(mesh, sharding.Rules.of(mesh).spec(*names))
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placement)


def local_bytes(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        part = jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        # A PRNG key is two words of 32 bits.
        size = part.dtype.itemsize if not jnp.issubdtype(part.dtype, jax.dtypes.prng_key) else 8
        total += part.size * size
    return total
