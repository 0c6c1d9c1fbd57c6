"""Turn a Hugging Face folder into a run's folder, or a run's checkpoint into a Hugging Face folder.

    python -m experiments.convert --from=hf --path=FOLDER --workdir=runs/a [--kv_source=0,0,2,2]
    python -m experiments.convert --to=hf --path=FOLDER --workdir=runs/a [--model_type=llama]

Prints a summary of the model as JSON. The folder to make must be new or empty. One made from
Hugging Face can be evaluated and generate text at once; to train it further, use
--config=configs/imported.py:runs/a.
"""

from absl import flags

from lightning_jax.config.errors import UserError
from lightning_jax.runtime import files, program

_FROM = flags.DEFINE_enum("from", None, ["hf"], "Read PATH, write WORKDIR.")
_TO = flags.DEFINE_enum("to", None, ["hf"], "Read WORKDIR, write PATH.")
_PATH = flags.DEFINE_string("path", None, "The Hugging Face folder.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_KV_SOURCE = flags.DEFINE_list("kv_source", None, "By layer, the layer whose K/V it reads.")
_STEP = program.define_step()
_TYPE = flags.DEFINE_string("model_type", None, "Layout to write; default: the first that fits.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype to write.")


def main() -> None:
    if bool(_FROM.value) == bool(_TO.value):
        raise UserError("give one of --from=hf and --to=hf")
    source = program.numbers(_KV_SOURCE)
    if _TO.value:
        files.check_output_folder("path", _PATH.value)
    else:
        files.check_output_folder("workdir", _WORKDIR.value)
    with program.loading():
        from configs import imported
        from lightning_jax.config import RunConfig
        from lightning_jax.config.fields import build
        from lightning_jax.interop import convert

    if _TO.value:
        result = convert.to_hugging_face(
            _WORKDIR.value,
            _PATH.value,
            step=_STEP.value,
            model_type=_TYPE.value,
            dtype=_DTYPE.value,
        )
    else:
        config = build(RunConfig, imported.get_config(_PATH.value))
        result = convert.from_hugging_face(
            _PATH.value, _WORKDIR.value, config, kv_source=source or None
        )
    program.emit_json(result)


if __name__ == "__main__":
    program.run(main)
