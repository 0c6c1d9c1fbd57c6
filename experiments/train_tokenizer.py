"""Train a byte-level BPE tokenizer.

    python -m experiments.train_tokenizer --data='text/**/*.txt' --vocab_size=4096 --out=t.json

Prints `{"path", "vocab_size", "bytes_per_token"}` as JSON, measured on the text it was trained on.
"""

from __future__ import annotations

from absl import flags

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import train_bpe
from lightning_jax.runtime import files, program

_DATA = flags.DEFINE_string(
    "data", None, "File, folder or glob, stdlib:code or stdlib:docs.", required=True
)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Tokens, bos and eos included.")
_OUT = flags.DEFINE_string("out", None, "Where to write tokenizer.json.", required=True)
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Key of the text in record files.")


def main() -> None:
    files.check_output("out", _OUT.value)
    # The eval split of an eval path is all of it.
    config = DataConfig(
        tokenizer="bytes",
        sources=(SourceConfig("data", path=_DATA.value, eval_path=_DATA.value, weight=0.0),),
        text_field=_TEXT_FIELD.value,
        eval_fraction=0.5,
        packing="concat",
        prefetch=0,
        streams=1,
    )
    source = Sources.open(config).eval["data"]
    tokenizer = train_bpe(source.texts(), _VOCAB_SIZE.value, _OUT.value)
    tokens = sum(len(tokenizer.encode(text)) for text in source.texts())
    result = {
        "path": _OUT.value,
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": round(source.num_bytes / max(tokens, 1), 4),
    }
    program.emit_json(result)


if __name__ == "__main__":
    program.run(main)
