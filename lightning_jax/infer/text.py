"""Text in, text out: shared by the generation program and the samples of a training run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from lightning_jax import checkpoint, sharding
from lightning_jax import model as lm
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.config.routing import EvalRouting
from lightning_jax.data.ends import Answer
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import Tokenizer, resolve_tokenizer
from lightning_jax.infer.engine import Engine
from lightning_jax.infer.sampling import Sampling

TRAINING_SAMPLE = Sampling(temperature=0.8, top_p=0.95)


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Options of `generate_run`; `routing` may replace how the run chooses experts.

    With `chat` the prompt is a user's message, and only the answer is written.

    Raises:
      UserError: a number out of its range.
    """

    prompt: str
    sampling: Sampling
    max_new_tokens: int
    num_samples: int
    seed: int
    step: int | None
    chat: bool
    routing: EvalRouting = EvalRouting()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2^32)")


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the ids of a document that begins with `prompt`, as documents begin in training."""
    ids = tokenizer.encode(prompt)
    return [tokenizer.bos_id, *ids] if tokenizer.adds_bos or not ids else ids


def encode_chat(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the ids of a conversation that `prompt` opens, up to where the answer begins.

    Raises:
      UserError: the tokenizer has no chat template, or its template refuses the prompt.
    """
    template = tokenizer.chat_template
    if template is None:
        raise UserError("chat = True: must be False: this run's tokenizer has no chat template")
    return template.encode(tokenizer, [{"role": "user", "content": prompt}])


def stream_text(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    key: jax.Array,
    rows: int = 1,
    answer: bool = False,
) -> Iterator[str]:
    """Yields the text after the ids `prompt`.

    There is one string per token (complete characters, possibly empty), then a final flush.
    `answer=True` decodes as the start of a new text. `rows` repeats the prompt so that the batch
    divides over the mesh; row 0 is decoded. The text ends as `data.ends` says.
    """
    text = Answer(tokenizer, () if answer else prompt)
    for token_B in engine.stream(
        [prompt] * rows,
        sampling,
        max_new_tokens=max_new_tokens,
        key=key,
        stop_ids=tokenizer.stop_ids,
    ):
        yield text.push(int(token_B[0]))
        if text.is_done:
            break
    yield text.end()


def generate_run(
    workdir: str | Path,
    options: GenerateOptions,
    *,
    write: Callable[[str], None],
    report: Callable[[str], None],
) -> None:
    """Continues a prompt with the model of a run.

    Args:
      workdir: folder of the run.
      write: takes the text piece by piece, prompt first unless it is a chat; each sample ends with
        a line end.
      report: takes one line of measurements per sample.

    Raises:
      UserError: no such run or checkpoint, or options that do not fit its model or tokenizer.
    """
    run = checkpoint.load_run(workdir, step=options.step).with_routing(options.routing)
    rows = run.config.model.vocab_size
    tokenizer = resolve_tokenizer(Sources.open(run.config.data), workdir, rows=rows)
    prompt = (encode_chat if options.chat else encode_prompt)(tokenizer, options.prompt)
    engine = Engine(
        run.model,
        run.params,
        run.router,
        max_length=len(prompt) + options.max_new_tokens,
        valid_vocab=tokenizer.vocab_size,
    )
    for index in range(options.num_samples):
        write("" if options.chat else options.prompt)
        times = []
        for piece in stream_text(
            engine,
            tokenizer,
            prompt,
            options.sampling,
            max_new_tokens=options.max_new_tokens,
            key=jax.random.fold_in(jax.random.key(options.seed), index),
            answer=options.chat,
        ):
            write(piece)
            times.append(time.perf_counter())
        write("\n")
        report(_measurements(times[:-1], engine.experts_per_token))


def sample(
    config: RunConfig,
    params: Any,
    router: lm.Router,
    tokenizer: Tokenizer,
    rope_base_global: float,
    sampling: Sampling = TRAINING_SAMPLE,
) -> str:
    """Returns `config.sample_prompt` continued by `config.sample_tokens` tokens.

    `rope_base_global` is that of the stage, in place of the config's.

    Works under the ambient mesh of a training run; the same weights give the same text.
    """
    mesh = jax.sharding.get_abstract_mesh()
    prompt = encode_prompt(tokenizer, config.sample_prompt)
    attention = dataclasses.replace(
        config.model.attention, rope_base_global=float(rope_base_global)
    )
    engine = Engine(
        dataclasses.replace(config.model, attention=attention),
        params,
        router,
        max_length=len(prompt) + config.sample_tokens,
        valid_vocab=tokenizer.vocab_size,
    )
    pieces = stream_text(
        engine,
        tokenizer,
        prompt,
        sampling,
        max_new_tokens=config.sample_tokens,
        key=jax.random.key(config.seed),
        rows=1 if mesh.empty else sharding.batch_shards(mesh),
    )
    return config.sample_prompt + "".join(pieces)


def _measurements(times: list[float], experts_per_token: float | None) -> str:
    """One line; the rate leaves out the time before the first token (compilation, the prompt)."""
    parts = [f"{len(times)} tokens"]
    if len(times) > 1:
        parts.append(f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s")
    if experts_per_token is not None:
        parts.append(f"{experts_per_token:.2f} experts per token")
    return ", ".join(parts)
