"""Our models under lm-evaluation-harness (`lm_eval` from 0.4.13 on, the `lm-eval` extra).

Conventions are those of the harness's own Hugging Face adapter, so that numbers compare: spaces at
the end of a context belong to the continuation, text that spells a special token is that token,
contexts begin with bos where the tokenizer's texts do, too long contexts lose their beginning, and
`loglikelihood_rolling` scores disjoint windows. We deviate in three cases, where the harness scores
different text: (1) a continuation whose first character merges with the context is tokenized alone,
(2) a rolling text does not predict its own bos, and (3) text without a context follows the model's
bos even if the tokenizer names none (the harness then takes eos).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lightning_jax.checkpoint import LoadedRun
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.config.kinds import FLAG, TEXT, check, either, integer, list_of, or_null
from lightning_jax.config.kinds import number as number_in
from lightning_jax.data import round_trip
from lightning_jax.data.chat import encode_inside
from lightning_jax.data.ends import Answer
from lightning_jax.data.tokenizer import Tokenizer
from lightning_jax.infer.buckets import length_bucket
from lightning_jax.infer.engine import Engine
from lightning_jax.infer.sampling import Sampling
from lightning_jax.infer.scoring import Scorer
from lightning_jax.runtime.invocation import install

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise UserError(f"package {error.name} is missing: {install('lm-eval')}") from error

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_MAX_GEN_TOKS = 256
_KINDS = {
    "until": or_null(either(TEXT, list_of(TEXT))),
    "temperature": or_null(number_in(0)),
    "do_sample": or_null(FLAG),
    "top_k": integer(0),
    "top_p": number_in(0, 1),
    **dict.fromkeys(_LENGTHS, or_null(integer(1))),
}
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Generation:
    """The settings in a task's `generation_kwargs`; `until` are strings that end an answer."""

    sampling: Sampling
    max_new_tokens: int
    until: tuple[str, ...]

    @classmethod
    def parse(cls, kwargs: Mapping[str, Any], default_length: int) -> Generation:
        """Reads `generation_kwargs`; greedy unless `do_sample` or a temperature above 0 is given.

        Raises:
          UserError: a setting that we do not support.
        """
        check(kwargs, _KINDS, "generation_kwargs", required=())
        left = dict(kwargs)
        until = left.pop("until", None) or ()
        lengths = [left.pop(name, None) for name in _LENGTHS]
        temperature, do_sample = left.pop("temperature", None), left.pop("do_sample", None)
        top_k, top_p = left.pop("top_k", 0), float(left.pop("top_p", 1.0))
        if left.get("num_beams") == 1:
            del left["num_beams"]
        if left:
            raise UserError(
                f"generation_kwargs = {left}: must be among until, do_sample, temperature, top_k, "
                f"top_p, {', '.join(_LENGTHS)}"
            )
        if do_sample is None:
            do_sample = bool(temperature)
        if do_sample and temperature != 0:
            sampling = Sampling(1.0 if temperature is None else float(temperature), top_k, top_p)
        else:
            sampling = Sampling(temperature=0.0)
        length = next((value for value in lengths if value is not None), default_length)
        return cls(sampling, length, (until,) if isinstance(until, str) else tuple(until))


class LightningAdapter(LM):
    """A model and its tokenizer as `lm_eval.simple_evaluate(model=...)` takes them."""

    def __init__(
        self,
        run: LoadedRun,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ):
        """Args:
          run: from `checkpoint.load_run`.
          tokenizer: of that run.
          max_length: most tokens of context and continuation; default: the sequence length of the
            checkpoint's stage.
          batch_size: requests per forward pass.
          seed: for tasks that sample.

        Raises:
          UserError: a number out of its range.
        """
        super().__init__()
        self._run, self._tokenizer, self._seed = run, tokenizer, seed
        self.max_length = run.meta.seq_len if max_length is None else max_length
        self._scorer = Scorer(
            run.model,
            run.params,
            run.router,
            max_length=self.max_length,
            batch_size=batch_size,
        )
        self._generations = 0
        # By task, bytes of rolling texts: in texts that the tokenizer changes, and in all.
        self.lost_bytes: dict[str | None, tuple[int, int]] = {}

    @property
    def batch_size(self) -> int:
        return self._scorer.batch_size

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns log-probability and greediness of each `(context, continuation)`."""
        pairs = [self.encode_pair(*request.args) for request in requests]
        scores = self._scored(pairs, disable_tqdm)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, score)
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each text, cut into windows of `max_length` targets.

        Each token is scored once. The first window follows bos, each other window the token before
        it, and the last, which is shorter, as many tokens as fit.
        """
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            ids = self._tokenizer.encode(request.args[0], specials=True)
            self._note_loss(request)
            ids = ids[1:] if ids[:1] == [self._tokenizer.bos_id] else ids
            windows = get_rolling_token_windows(
                ids, prefix_token=self._tokenizer.bos_id, max_seq_len=self.max_length, context_len=1
            )
            pairs += map(make_disjoint_window, windows)
            owners += [owner] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._scored(pairs, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _note_loss(self, request: Instance) -> None:
        """Counts the bytes of a text, and whether the tokenizer loses any of it."""
        text, tokenizer = request.args[0], self._tokenizer
        size = len(text.encode("utf-8"))
        is_kept = round_trip.keeps(tokenizer, text, tokenizer.encode(text))
        lost, total = self.lost_bytes.get(request.task_name, (0, 0))
        self.lost_bytes[request.task_name] = (lost + size * (not is_kept), total + size)

    def _scored(self, pairs: Sequence[Any], disable_tqdm: bool) -> list[tuple[float, bool]]:
        cut = sum(len(pair[0]) + len(pair[1]) > self.max_length + 1 for pair in pairs)
        if cut:
            logger.warning(
                "%d contexts lose their beginning: max_length = %d", cut, self.max_length
            )
        with tqdm(total=len(pairs), desc="scored", disable=disable_tqdm) as progress:
            return self._scorer.score(pairs, advance=progress.update)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the model's answer to each `(context, generation_kwargs)`, without its end.

        An answer ends before the first string of `until`, with a token that ends a text, or after
        `max_gen_toks` tokens (256 or half of `max_length` if the task does not say).

        Raises:
          UserError: a setting that we do not support, or no room for a context beside the answer.
        """
        default = max(1, min(_DEFAULT_MAX_GEN_TOKS, self.max_length // 2))
        prompts, groups = [], defaultdict(list)
        asked = [Generation.parse(request.arguments[1], default) for request in requests]
        for number, (request, generation) in enumerate(zip(requests, asked, strict=True)):
            room = self.max_length - generation.max_new_tokens
            require(
                room >= 1,
                "max_gen_toks",
                generation.max_new_tokens,
                f"below max_length = {self.max_length}",
            )
            prompts.append(self.encode_context(request.args[0])[-room:])
            groups[generation.sampling, generation.max_new_tokens].append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="answered", disable=disable_tqdm) as progress:
            for (sampling, length), numbers in groups.items():
                numbers.sort(key=lambda number: -len(prompts[number]))
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    answers = [Answer(self._tokenizer, until=asked[n].until) for n in batch]
                    made = self._generate([prompts[n] for n in batch], answers, sampling, length)
                    for number, text in zip(batch, made, strict=True):
                        texts[number] = text
                    progress.update(len(batch))
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generate(
        self,
        prompts: list[list[int]],
        answers: Sequence[Answer],
        sampling: Sampling,
        max_new_tokens: int,
    ) -> list[str]:
        tokenizer, run = self._tokenizer, self._run
        engine = Engine(
            run.model,
            run.params,
            run.router,
            max_length=length_bucket(max(map(len, prompts)) + max_new_tokens),
            valid_vocab=tokenizer.vocab_size,
        )
        # Every batch has the same number of rows, so that no other shape compiles.
        filler = [[tokenizer.bos_id]] * (self.batch_size - len(prompts))
        key = jax.random.fold_in(jax.random.key(self._seed), self._generations)
        self._generations += 1
        texts = [""] * len(answers)
        for token_B in engine.stream(
            prompts + filler,
            sampling,
            max_new_tokens=max_new_tokens,
            key=key,
            stop_ids=tokenizer.stop_ids,
        ):
            for row, token in enumerate(token_B.tolist()[: len(answers)]):
                texts[row] += answers[row].push(token)
            if all(answer.is_done for answer in answers):
                break
        return [text + answer.end() for text, answer in zip(texts, answers, strict=True)]

    def encode_context(self, text: str) -> list[int]:
        """Returns the ids of a text with bos before it where the model expects one, never empty."""
        tokenizer = self._tokenizer
        ids = tokenizer.encode(text, specials=True)
        needs_bos = tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]
        return [tokenizer.bos_id, *ids] if needs_bos or not ids else ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the ids of a context, never empty, and of its continuation."""
        kept = context.rstrip()
        continuation, tokenizer = context[len(kept) :] + continuation, self._tokenizer
        head = tokenizer.encode(kept, specials=True)
        whole = tokenizer.encode(kept + continuation, specials=True)
        if whole[: len(head)] == head:
            tail = whole[len(head) :]
        else:
            tail = encode_inside(tokenizer, continuation, specials=True)
        if not kept and tail[:1] == [tokenizer.bos_id]:
            tail = tail[1:]
        return self.encode_context(kept), tail

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a conversation, its last message open without a generation prompt.

        As in the harness's own adapter, a system message that the template refuses is left out.

        Raises:
          UserError: the tokenizer has no chat template, or it refuses the other messages.
        """
        template = self._chat_template()
        options = {"continue_final": not add_generation_prompt}
        try:
            return template.render(chat_history, add_generation_prompt, **options)
        except UserError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history) or not others:
                raise
            logger.warning("a system message is left out: %s", error)
            return template.render(others, add_generation_prompt, **options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the source of the chat template (of that name); None for False."""
        if chat_template is False or chat_template is None:
            return None
        return self._chat_template().source(None if chat_template is True else chat_template)

    @property
    def tokenizer_name(self) -> str:
        """A name for the chat template, by which the harness caches requests."""
        source = self._chat_template().source()
        return f"lightning_jax-{hashlib.sha256(source.encode()).hexdigest()[:16]}"

    def _chat_template(self) -> Any:
        template = self._tokenizer.chat_template
        if template is None:
            raise UserError("apply_chat_template = True: this run's tokenizer has no chat template")
        return template
