import dataclasses
import itertools
import json
import threading

import grain
import numpy as np
import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data import mixture, packing
from lightning_jax.data.batch import Batch
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import ByteTokenizer
from tests.tiny import tiny_stage

TOKENIZER = ByteTokenizer()


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for letter, count in (("a", 40), ("b", 25), ("c", 5)):
        (tmp_path / letter).mkdir()
        for i in range(count):
            text = f"{letter}{i:03} " * int(rng.integers(1, 30))
            (tmp_path / letter / f"{i}.txt").write_text(text)
    sources = tuple(SourceConfig(n, f"{tmp_path}/{n}/*.txt", "", 1.0) for n in "abc")
    return DataConfig("bytes", sources, "text", 0.2, "concat", 2, 1)


def stage(**changes):
    mixture_of_three = (("a", 0.7), ("b", 0.25), ("c", 0.05))
    return tiny_stage(**{"mixture": mixture_of_three, "batch_size": 4, "seq_len": 48, **changes})


def iterator(data, stage_config=None, **options):
    options = {"tokenizer": TOKENIZER, "seed": 0, **options}
    sources = Sources.open(data)
    return mixture.make_train_iterator(sources, data, stage_config or stage(), **options)


def take(it, count):
    return [next(it) for _ in range(count)]


def letter_tokens(batches):
    """Real tokens by source: the letter is in the text of every short document part."""
    counts = dict.fromkeys("abc", 0)
    for batch in batches:
        for tokens, mask in zip(batch.tokens, batch.loss_mask, strict=True):
            present = [n for n in "abc" if ord(n) in tokens]
            assert len(present) == 1  # a row has one source
            counts[present[0]] += int(mask.sum())
    return counts


@pytest.mark.parametrize("packing_kind", ["concat", "first_fit"])
def test_shapes_shares_and_determinism(data, packing_kind):
    data = dataclasses.replace(data, packing=packing_kind)
    batches = take(iterator(data), 50)
    assert all(a.shape == (4, 48) for a in batches[0])
    counts = letter_tokens(batches)
    total = sum(counts.values())
    for name, weight in stage().mixture:
        assert abs(counts[name] - weight * total) <= 2 * 48
    np.testing.assert_equal(take(iterator(data), 20), batches[:20])
    with pytest.raises(AssertionError):
        np.testing.assert_equal(take(iterator(data, seed=1), 2), batches[:2])


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("packing_kind", ["concat", "first_fit"])
def test_resume_is_exact_in_the_middle_of_an_epoch(data, packing_kind, prefetch):
    data = dataclasses.replace(data, packing=packing_kind, prefetch=prefetch)
    it = iterator(data)
    states, batches = [], []
    for _ in range(25):
        states.append(json.dumps(it.get_state()))
        batches.append(next(it))
    it.close()
    for at in (0, 1, 7, 24):
        resumed = iterator(data)
        take(resumed, at % 3)
        resumed.set_state(json.loads(states[at]))
        assert json.dumps(resumed.get_state()) == states[at]
        np.testing.assert_equal(take(resumed, 25 - at), batches[at:])
        resumed.close()


def test_mix_passes_grains_own_checkpoint_test():
    parents = {}
    for name, count in (("x", 9), ("yy", 20)):
        docs = [packing.document_tokens(name * (i % 7 + 1), TOKENIZER) for i in range(count)]
        parents[name] = packing.PackDataset(docs, seq_len=8, packing="concat")
    weights = {"x": 1.0, "yy": 2.0}
    rows = mixture.MixDataset(parents, weights=weights, seq_len=8, stage="s").batch(2)
    grain.experimental.assert_equal_output_after_checkpoint(
        grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=2)
    )


def test_epochs_are_whole_and_in_different_orders(data):
    source = Sources.open(data).train["c"]
    documents = mixture._endless(source, TOKENIZER, 3, slice(0, None, 1))
    names = [bytes(documents[i][1:5].astype(np.uint8)) for i in range(6 * len(source))]
    epochs = [tuple(names[i : i + len(source)]) for i in range(0, len(names), len(source))]
    assert len({frozenset(e) for e in epochs}) == 1 and len(set(epochs[0])) == len(source)
    assert len(set(epochs)) > 1


def test_a_source_without_weight_is_opened_for_what_it_holds_out(data):
    missing = dataclasses.replace(data.sources[1], path="gone/*.txt")
    data = dataclasses.replace(data, sources=(data.sources[0], missing))
    with pytest.raises(UserError, match="data.sources.b.path"):
        iterator(data, stage(mixture=(("a", 1.0), ("b", 0.0))))


def test_bad_record_reaches_the_caller_through_the_thread(data, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": 1}\n')
    (tmp_path / "held_out.txt").write_text("held out")
    bad = SourceConfig("a", str(path), str(tmp_path / "held_out.txt"), 1.0)
    data = dataclasses.replace(data, sources=(bad,))
    with pytest.raises(UserError, match="bad.jsonl, line 1"):
        next(iterator(data, stage(mixture=(("a", 1.0),))))


def test_prefetch_is_one_thread_and_ends(data):
    before = threading.active_count()
    it = iterator(data)
    next(it)
    assert threading.active_count() == before + 1
    it.close()
    assert threading.active_count() == before


class TracedTokenizer:
    """Tokens that say which document and which place in it they are."""

    bos_id, eos_id = 10**8, 10**8 + 1

    def encode(self, text):
        number, length = map(int, text.split())
        return [number * 1000 + i for i in range(length)]


TRACED = TracedTokenizer()


@pytest.fixture
def traced(tmp_path):
    rng = np.random.default_rng(1)
    for source, name in enumerate("abc"):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for i in range((40, 20, 20)[source]):  # Grain shuffles few documents slowly
                file.write(json.dumps({"text": f"{source * 100 + i} {rng.integers(1, 90)}"}) + "\n")
    (tmp_path / "held_out.txt").write_text("held out")
    held_out = str(tmp_path / "held_out.txt")
    files = tuple(SourceConfig(n, f"{tmp_path}/{n}.jsonl", held_out, 1.0) for n in "abc")
    return DataConfig("bytes", files, "text", 0.2, "concat", 2, 1)


# Seams with another length, batch size and mixture; weights that drop to 0 and come back.
STAGES = [
    (dict(name="one", seq_len=48, batch_size=4, mixture=(("a", 0.7), ("b", 0.3))), 7),
    (dict(name="two", seq_len=17, batch_size=2, mixture=(("a", 1.0), ("b", 0.0))), 9),
    (dict(name="three", seq_len=160, batch_size=2, mixture=(("b", 0.5), ("c", 0.5))), 3),
    (dict(name="four", seq_len=160, batch_size=6, mixture=(("a", 0.3), ("b", 0.3), ("c", 0.4))), 4),
    (dict(name="five", seq_len=16, batch_size=4, mixture=(("c", 0.1), ("a", 0.9))), 30),
]


def run_stages(data, state=None, first=0, skip=0, **options):
    """Yields (stage index, batches left in the stage, batch, state after it) as the loop does."""
    for index, (changes, count) in enumerate(STAGES[first:], first):
        it = iterator(data, stage(**changes), tokenizer=TRACED, **options)
        if state is not None:
            it.set_state(json.loads(state))
        for number in range(skip + 1, count + 1):
            batch, state = next(it), json.dumps(it.get_state())
            yield index, count - number, batch, state
        it.close()
        skip = 0


def document_pairs(documents, spans):
    """(document, input, target) of spans of a source's documents."""
    pairs = []
    for document, start, stop in spans:
        tokens = documents[document][start : stop + 1].tolist()
        pairs += zip(tokens[:-1], tokens[1:], strict=True)
    return pairs


def own_rows(batch, stream, count):
    """The rows of a batch that one of `count` streams gives."""
    each = len(batch.tokens) // count
    return Batch(*(array[stream * each : (stream + 1) * each] for array in batch))


def seen_pairs(batches):
    """By source, the pairs of all batches in order."""
    seen = {name: [] for name in "abc"}
    for batch in batches:
        for row in range(len(batch.tokens)):
            count = int(batch.loss_mask[row].sum())
            tokens, targets = batch.tokens[row][:count], batch.targets[row][:count]
            pairs = [*zip(tokens.tolist(), targets.tolist(), strict=True)]
            first = next(token for pair in pairs for token in pair if token < TRACED.bos_id)
            seen["abc"[first // 100_000]] += pairs
    return seen


@pytest.mark.parametrize("count", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("packing_kind", ["concat", "first_fit"])
def test_seams_neither_repeat_nor_drop(traced, packing_kind, count, monkeypatch):
    data = dataclasses.replace(traced, packing=packing_kind, streams=count)
    monkeypatch.setattr(packing, "_OPEN_ROWS", 6)
    steps = [*run_stages(data)]
    positions = json.loads(steps[-1][-1])["streams"]
    assert [*positions] == [str(stream) for stream in range(count)]
    for stream in range(count):
        seen = seen_pairs(own_rows(batch, stream, count) for _, _, batch, _ in steps)
        for name, source in Sources.open(data).train.items():
            documents = mixture._endless(source, TRACED, 0, slice(stream, None, count))
            state = positions[str(stream)]["sources"][name]
            assert state["next"] * count > len(source), "the second epoch was begun"
            given = document_pairs(
                documents, [(i, 0, len(documents[i]) - 1) for i in range(state["next"])]
            )
            rows, spans = json.loads(state.get("rows", "[]")), json.loads(state["spans"])
            held = document_pairs(documents, [*sum(rows, []), *spans])
            if packing_kind == "concat":
                assert seen[name] + held == given
            else:
                assert sorted(seen[name] + held) == sorted(given)


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("packing_kind", ["concat", "first_fit"])
def test_resume_at_a_seam_and_one_step_around_it(traced, packing_kind, prefetch, monkeypatch):
    monkeypatch.setattr(packing, "_OPEN_ROWS", 6)
    data = dataclasses.replace(traced, packing=packing_kind, prefetch=prefetch)
    steps = [*run_stages(data)]
    around = [i for i, (_, left, _, _) in enumerate(steps) if left <= 1]
    around += [i + 1 for i in around if i + 1 < len(steps)]
    for at in sorted(set(around)):
        index, left, _, state = steps[at]
        first, skip = (index, STAGES[index][1] - left) if left else (index + 1, 0)
        resumed = [*itertools.islice(run_stages(data, state, first, skip), 5)]
        expected = steps[at + 1 : at + 6]
        np.testing.assert_equal([r[2] for r in resumed], [s[2] for s in expected])
        assert [r[3] for r in resumed] == [s[3] for s in expected]


def test_another_stage_with_the_same_shape_goes_on_as_if_it_were_one(traced):
    data = dataclasses.replace(traced, packing="first_fit")
    shape = dict(seq_len=64, batch_size=2, mixture=(("a", 1.0),))
    whole = take(iterator(data, stage(name="whole", **shape), tokenizer=TRACED), 12)
    first = iterator(data, stage(name="first", **shape), tokenizer=TRACED)
    parts = take(first, 5)
    second = iterator(data, stage(name="second", **shape), tokenizer=TRACED)
    second.set_state(first.get_state())
    np.testing.assert_equal(parts + take(second, 7), whole)


def test_without_prefetch_the_thread_starts_with_the_first_batch(data):
    it = iterator(dataclasses.replace(data, prefetch=0))
    before = threading.active_count()
    it.set_state(it.get_state())
    it.start_prefetch()  # what Grain's checkpoint handler does
    assert threading.active_count() == before
    next(it)
    it.close()
    assert threading.active_count() == before


class _Panics:
    bos_id = eos_id = 0

    def encode(self, text):
        class PanicException(BaseException):
            """As pyo3 derives it."""

        raise PanicException("called `Option::unwrap()` on a `None` value")


# Case F10
def test_a_panic_of_a_tokenizer_names_its_document(data):
    it = iterator(data, stage(mixture=(("a", 1.0),)), tokenizer=_Panics())
    with pytest.raises(
        UserError, match=r"^\d+.txt: cannot be tokenized .PanicException: called `Option"
    ):
        next(it)
    it.close()


def eval_source(data, name="a"):
    return Sources.open(data).eval[name]


def test_eval_predicts_every_token_once(data):
    source = eval_source(data)
    batches = mixture.eval_batches(source, tokenizer=TOKENIZER, seq_len=16, batch_size=4)
    read = list(batches)
    assert len(read) == len(batches) and all(a.shape == (4, 16) for batch in read for a in batch)
    mask = np.concatenate([b.loss_mask.ravel() for b in read]) > 0
    targets = np.concatenate([b.targets.ravel() for b in read])
    expected = [t for text in source.texts() for t in [*text.encode(), TOKENIZER.eos_id]]
    assert targets[mask].tolist() == expected
    assert np.all(np.diff(mask.astype(int)) <= 0)
    assert batches.num_targets == len(expected)
    assert batches.num_bytes == source.num_bytes
    np.testing.assert_equal(list(batches), read)  # as often as one likes


def test_eval_truncates_by_whole_documents(data):
    source = eval_source(data)
    texts = [text.encode() for text in source.texts()]
    sizes = [*map(len, texts)]
    options = dict(tokenizer=TOKENIZER, seq_len=16, batch_size=4)
    for limit in (1, sizes[0] + 1, sum(sizes) // 2):
        batches = mixture.eval_batches(source, max_tokens=limit, **options)
        chosen = sorted([*source.hash_order()][: len(batches.tokens)])
        assert [bytes(t[1:-1].tolist()) for t in batches.tokens] == [texts[i] for i in chosen]
        assert batches.num_bytes == sum(sizes[i] for i in chosen)
        assert batches.num_targets == batches.num_bytes + len(chosen) >= limit
        assert sum(b.loss_mask.sum() for b in batches) == batches.num_targets
    assert len(mixture.eval_batches(source, max_tokens=1, **options).tokens) == 1
    assert len(mixture.eval_batches(source, max_tokens=10**9, **options).tokens) == len(source)
