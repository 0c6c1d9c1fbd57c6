"""Text to token ids and back: UTF-8 bytes, Hugging Face `tokenizer.json`, SentencePiece `*.model`.

Ids never carry specials: `encode` adds none (text that spells one is ordinary text unless asked
for) and `decode` drops them. `bos_id` and `eos_id` are always usable, and equal where a model has
only one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_jax.config.errors import UserError
from lightning_jax.data import round_trip, tokenizer_folder
from lightning_jax.data.ends import BOS, EOS
from lightning_jax.data.files import optional_import
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer_files import load_hugging_face, load_sentencepiece, quiet
from lightning_jax.data.tokenizer_folder import Settings
from lightning_jax.data.tokenizer_kinds import ByteTokenizer, Tokenizer, too_small
from lightning_jax.runtime.files import StrPath, write_file
from lightning_jax.runtime.phases import phase

_LOADERS = {".json": load_hugging_face, ".model": load_sentencepiece}
_SMALLEST_BPE = 256 + 2
logger = logging.getLogger(__name__)
_SAMPLE_BYTES = 16 * 2**20


def load_tokenizer(spec: str) -> Tokenizer:
    """Returns the tokenizer that `spec` names: `bytes`, or a path.

    The path is a Hugging Face folder, whose configs name bos, eos and other ids that end an answer,
    and which may hold a chat template; or a `*.json` or `*.model` file, which is read alone.

    Raises:
      UserError: no such file, a corrupt one, a model without any bos or eos token, or a missing
        library. `bpe:<size>` needs a run's text: see `resolve_tokenizer`.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path, settings = Path(spec).expanduser(), Settings()
    if path.is_dir():
        path, settings = tokenizer_folder.vocabulary_file(path), Settings.load(path)
    if path.suffix not in _LOADERS:
        raise UserError(
            f"data.tokenizer = {spec!r}: must be bytes, bpe:<size>, or a path to a folder with a "
            "tokenizer, a tokenizer.json or a SentencePiece *.model"
        )
    if not path.is_file():
        raise UserError(f"data.tokenizer = {spec!r}: no such file")
    tokenizer = _LOADERS[path.suffix](path, settings)
    with quiet():
        lost = round_trip.lost_share(tokenizer)
    if lost:
        logger.warning(
            "data.tokenizer = %r: loses %.1f%% of the bytes of a sample text; text of which it "
            "loses anything has no bits per byte",
            spec,
            100 * lost,
        )
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Trains a byte-level BPE tokenizer, writes it to `path` as `tokenizer.json`, and returns it.

    Digits are split singly. All 256 bytes are tokens, so every text round-trips exactly. The same
    texts give the same file, which appears whole or not at all.

    Raises:
      UserError: `vocab_size` below 258 (bytes, bos, eos), more than `texts` has merges for, or
        a `path` that does not end in `.json`.
    """
    if vocab_size < _SMALLEST_BPE:
        raise UserError(f"BPE vocab_size = {vocab_size}: must be at least {_SMALLEST_BPE}")
    if Path(path).suffix != ".json":
        raise UserError(f"path of a BPE tokenizer = {str(path)!r}: must end in .json")
    tokenizers = optional_import("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() != vocab_size:
        raise UserError(
            f"BPE vocab_size = {vocab_size}: must be at most {model.get_vocab_size()}, "
            "all that this text has merges for"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(path, model.to_str())
    return load_tokenizer(str(path))


def resolve_tokenizer(sources: Sources, workdir: StrPath, *, rows: int = 0) -> Tokenizer:
    """Returns the run's tokenizer, and keeps it in `workdir` so that the folder is complete.

    `rows` are those of the model's embedding, 0 if they follow from the tokenizer. Ids beyond them
    are never encoded or generated; see `Tokenizer.within`. Nothing is kept of a tokenizer that does
    not fit.

    `bpe:<size>` is trained once on at most 16 MB of the train split, an equal part from each
    source, its documents in hash order; the result is `workdir/tokenizer.json`. A file is copied to
    `workdir/tokenizer.json` or `workdir/tokenizer.model`, the tokenizer's files of a folder to
    `workdir/tokenizer/`. A later call reuses these files and opens no source.

    Raises:
      UserError: as `load_tokenizer` and `train_bpe`, where `workdir` holds another tokenizer, and
        where the model has too few rows.
    """
    spec = sources.data.tokenizer
    if spec == "bytes":
        return _fitted(ByteTokenizer(), rows)
    if spec.startswith("bpe:"):
        return _resolve_bpe(sources, Path(workdir) / "tokenizer.json", rows)
    given = Path(spec).expanduser()
    is_file = given.suffix in _LOADERS and not given.is_dir()
    kept = Path(workdir) / (f"tokenizer{given.suffix}" if is_file else "tokenizer")
    if not kept.exists():
        tokenizer = _fitted(load_tokenizer(spec), rows)
        if is_file:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_file(kept, given.read_bytes())
        else:
            tokenizer_folder.copy(given, kept)
        return tokenizer
    if given.exists() and _contents(given) != _contents(kept):
        raise UserError(
            f"data.tokenizer = {spec!r}: differs from {kept}, which this run was started with"
        )
    return _fitted(load_tokenizer(str(kept)), rows)


def _fitted(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    return tokenizer.within(rows) if rows else tokenizer


def _contents(path: Path) -> dict[str, bytes]:
    return tokenizer_folder.files(path) if path.is_dir() else {"": path.read_bytes()}


def _resolve_bpe(sources: Sources, path: Path, rows: int) -> Tokenizer:
    spec = sources.data.tokenizer
    size = spec.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < _SMALLEST_BPE:
        raise UserError(
            f"data.tokenizer = {spec!r}: must be bpe:<size> with a size of at least {_SMALLEST_BPE}"
        )
    if rows and int(size) > rows:
        raise too_small(rows, int(size))
    if not path.exists():
        with phase(f"training the tokenizer {spec}"):
            return train_bpe(_sample(sources), int(size), path)
    tokenizer = load_tokenizer(str(path))
    if tokenizer.vocab_size != int(size):
        raise UserError(
            f"data.tokenizer = {spec!r}: {path} has {tokenizer.vocab_size} tokens; give "
            "the run another workdir, or that size"
        )
    return tokenizer


def _sample(sources: Sources) -> Iterator[str]:
    splits = sources.trained()
    for source in splits:
        left = _SAMPLE_BYTES // len(splits)
        for index in source.hash_order():
            if left <= 0:
                break
            text = source[index]["text"][:left]
            left -= len(text.encode("utf-8"))
            yield text
