"""Compile a run for TPUs that are not here, and say what it would need on them.

    python -m experiments.aot_compile --config=configs/small.py --topology=v5e:2x2
        [--programs=train,decode] [--config.mesh.fsdp=4] [--search] [--out=FILE.json]

Prints JSON on stdout: memory and whether it fits, FLOPs, bytes, collectives, a roofline; tables on
stderr. Needs libtpu (`pip install 'lightning_jax[tpu-aot]'`), no TPU. `--search` tries remat
policies and micro-batches of the train step instead. docs/scaling.md says what the figures mean.
"""

from absl import flags

from lightning_jax.runtime import program

_CONFIG = program.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "Slice, such as v5p:4x8x8.", required=True)
_SLICES = flags.DEFINE_integer("slices", 1, "Slices, which --config.mesh.replica divides.")
_PROGRAMS = flags.DEFINE_list("programs", None, "Of train, prefill and decode; default: all.")
_STAGE = flags.DEFINE_string("stage", None, "Stage; default: the one with the longest sequences.")
_ROWS = flags.DEFINE_integer("rows", None, "Requests in a prefill or decode step.")
_LENGTH = flags.DEFINE_integer("length", None, "Tokens in the cache; default: the stage's seq_len.")
_CHUNK = flags.DEFINE_integer("prefill_chunk", 2048, "Tokens that a prefill step reads of a row.")
_SEARCH = flags.DEFINE_bool("search", False, "Try policies and micro-batches of the train step.")
_REMATS = flags.DEFINE_list("remats", None, "Policies to try; default: three of them.")
_NUMBERS = flags.DEFINE_list("accumulates", None, "Micro-batches to try; default: powers of two.")
_MOST = flags.DEFINE_integer("max_compiles", 8, "Compilations of a search at the most.")
_OUT = program.define_out()


def main() -> None:
    program.check_out(_OUT)
    from lightning_jax.aot import main as aot
    from lightning_jax.aot.programs import Shape
    from lightning_jax.aot.search import Space
    from lightning_jax.aot.topologies import Slice

    found = aot.run(
        program.load_config(_CONFIG.value),
        Slice.parse(_TOPOLOGY.value, _SLICES.value),
        program.names(_PROGRAMS),
        Shape(_STAGE.value, _ROWS.value, _LENGTH.value, _CHUNK.value),
        Space(program.names(_REMATS), program.numbers(_NUMBERS), _MOST.value)
        if _SEARCH.value
        else None,
    )
    program.emit_json(found, _OUT)


if __name__ == "__main__":
    program.run(main, huge_pages=False)
