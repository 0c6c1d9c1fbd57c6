"""A model of your own text, by the recipe of configs/quickstart.py, in minutes on two cores.

PATH is a file, a folder (all .txt .md .py .jsonl .jsonl.gz .parquet files below it) or a glob;
several, with commas between them, are several sources with shares by their size. A tenth of the
text is held out: of one document its end, of many a tenth of them.

    python -m experiments.train --config=configs/own_text.py:PATH --workdir=runs/mine

The first line of a run says what was chosen for a text of its size; `PATH,tokens=5e6` trains on
another number of tokens.
"""

import logging
import os
import re

from ml_collections import ConfigDict

from configs import base, quickstart
from lightning_jax.config.errors import UserError
from lightning_jax.data import paths

logger = logging.getLogger("lightning_jax.configs.own_text")  # shown, as those of the package are

# Repeats of a text are worth about as much as new text up to here (Muennighoff et al. 2023).
MOST_EPOCHS = 4
# By vocabulary, about how many bytes of text a token has; 0: a token is a byte.
BYTES_PER_TOKEN = {0: 1.0, 512: 1.7, 1024: 2.2, 2048: 2.6, 4096: 3.0}
# Bytes of text for each entry of the vocabulary, so that all of them are seen often enough.
BYTES_PER_ENTRY = 500
# How many bytes of text a byte of these files unpacks to, about.
UNPACKED = {".jsonl.gz": 3.0, ".parquet": 2.0}


def get_config(argument: str = "") -> ConfigDict:
    given, tokens = _read(argument)
    found = {path: paths.find("configs/own_text.py: PATH", path) for path in given}
    sizes = {path: sum(map(_bytes, found[path].files)) or 1.0 for path in given}
    size = sum(sizes.values())
    config = quickstart.get_config()
    shares = {path: max(round(sizes[path] / size, 3), 0.001) for path in given}
    sources = {name: base.source(path, weight=shares[path]) for name, path in _names(given).items()}
    config.data.sources = base.named(**sources)
    vocabulary = max(entries for entries in BYTES_PER_TOKEN if entries * BYTES_PER_ENTRY <= size)
    config.data.tokenizer = f"bpe:{vocabulary}" if vocabulary else "bytes"
    config.data.eval_fraction = 0.1
    epoch = (1 - config.data.eval_fraction) * size / BYTES_PER_TOKEN[vocabulary]
    recipe = sum(stage.tokens for stage in config.stages.values())
    _scale(config.stages, (tokens or min(recipe, MOST_EPOCHS * epoch)) / recipe)
    tokens = sum(stage.tokens for stage in config.stages.values())
    files = [file for path in given for file in found[path].files]
    config.sample_prompt = _first_words(files)
    logger.info(
        "text     %.3g MB in %s file%s (%s): %s, about %.2g M tokens an epoch, %.1f epochs: "
        "%.3g M tokens",
        *(size / 1e6, f"{len(files):,}", "s" * (len(files) > 1), paths.in_words(files)),
        *(config.data.tokenizer, epoch / 1e6, tokens / epoch, tokens / 1e6),
    )
    return config


def _read(argument: str) -> tuple[list[str], float]:
    """The paths, and how many tokens to train on (0: as many as the text is worth)."""
    if os.path.exists(argument):
        return [argument], 0.0
    parts = [part for part in argument.split(",") if part]
    given = [part for part in parts if not part.startswith("tokens=")]
    numbers = [part.removeprefix("tokens=") for part in parts if part not in given]
    if not given:
        raise UserError("configs/own_text.py needs a text: --config=configs/own_text.py:PATH")
    if len(set(given)) < len(given) or len(numbers) > 1:
        raise UserError(f"configs/own_text.py:{argument}: a path, or tokens, is given twice")
    if not numbers:
        return given, 0.0
    if not re.fullmatch(r"[1-9][0-9_]*(\.[0-9]+)?(e[0-9]{1,2})?", numbers[0]):
        raise UserError(f"configs/own_text.py: tokens = {numbers[0]}: must be a number like 5e6")
    return given, float(numbers[0])


def _names(given: list[str]) -> dict[str, str]:
    """Each path by a name: that of its file or of its last folder, without wildcards."""
    named: dict[str, str] = {}
    for path in given:
        parts = [part for part in path.split("/") if not re.search(r"[*?[]|^[.~]*$", part)]
        last = parts[-1] if parts else "text"
        kind = next((suffix for suffix in paths.KINDS if last.endswith(suffix)), "")
        stem = re.sub(r"\W+", "_", last.removesuffix(kind)).strip("_") or "text"
        name, number = stem, 2
        while name in named:
            name, number = f"{stem}_{number}", number + 1
        named[name] = path
    return named


def _bytes(file: paths.FoundFile) -> float:
    return file.size * UNPACKED.get(paths.kind(file), 1.0)


def _first_words(files: list[paths.FoundFile]) -> str:
    """Of one document; of many nothing, as the beginning of a text is then well known."""
    if len(files) > 1 or not paths.is_text(files[0]):
        return ""
    with open(files[0].path, encoding="utf-8-sig", errors="ignore") as file:
        lines = file.read(1000).split("\n")
    line = next((line.strip() for line in lines if line.strip()), "")
    line = "".join(c for c in line if c.isprintable())
    return line if len(line) <= 20 else line[:20].rpartition(" ")[0] or line[:20]


def _scale(stages: ConfigDict, factor: float) -> None:
    """Gives each stage that part of its tokens, and all sources by their own weight."""
    for stage in stages.values():
        stage.mixture = base.named()
        for field in ("tokens", "warmup_tokens", "decay_tokens"):
            # In thousands, so that a text that grows by a line is no other run.
            stage[field] = int(round(stage[field] * factor, -3))
        stage.tokens = max(stage.tokens, stage.warmup_tokens + stage.decay_tokens, 1000)
