import dataclasses
import json
import threading

import grain
import numpy as np
import pytest

from lightning_jax.config import DataConfig, SourceConfig, StageConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data import mixture, packing
from lightning_jax.data.batch import Batch
from lightning_jax.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for letter, count in (("a", 40), ("b", 25), ("c", 5)):
        (tmp_path / letter).mkdir()
        for i in range(count):
            text = f"{letter}{i:03} " * int(rng.integers(1, 30))
            (tmp_path / letter / f"{i}.txt").write_text(text)
    sources = tuple(SourceConfig(n, f"{tmp_path}/{n}/*.txt", "") for n in "abc")
    return DataConfig("bytes", sources, "text", 0.2, "concat", 2)


def stage(**changes):
    fields = dict(
        name="s",
        tokens=1000,
        mixture=(("a", 0.7), ("b", 0.25), ("c", 0.05)),
        batch_size=4,
        seq_len=48,
        accumulate=1,
        learning_rate=1.0,
        final_learning_rate=0.0,
        warmup_tokens=0,
        decay="none",
        decay_tokens=0,
        rope_base_global=0.0,
    )
    return StageConfig(**{**fields, **changes})


def iterator(data, stage_config=None, **options):
    options = {"tokenizer": TOKENIZER, "seed": 0, "stage_index": 0, **options}
    return mixture.make_train_iterator(data, stage_config or stage(), **options)


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
    for other in ({"seed": 1}, {"stage_index": 1}):
        with pytest.raises(AssertionError):
            np.testing.assert_equal(take(iterator(data, **other), 2), batches[:2])


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
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    parents = []
    for name, weight in (("x", 9), ("yy", 20)):
        docs = [packing.document_tokens(name * (i % 7 + 1), TOKENIZER) for i in range(weight)]
        documents = grain.MapDataset.source(docs).to_iter_dataset(options)
        parents.append(packing.PackDataset(documents, seq_len=8, packing="concat"))
    rows = mixture.MixDataset(parents, weights=[1.0, 2.0], seq_len=8).batch(2)
    grain.experimental.assert_equal_output_after_checkpoint(
        grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=2)
    )


def document_counts(batches):
    """How often each document begins, by its name in its first tokens."""
    counts = {}
    for batch in batches:
        for tokens in batch.tokens:
            for at in np.flatnonzero(tokens[:-4] == TOKENIZER.bos_id):
                name = bytes(tokens[at + 1 : at + 5].astype(np.uint8)).decode()
                counts[name] = counts.get(name, 0) + 1
    return counts


def test_processes_share_each_epoch(data):
    """Documents of single-row size under first_fit: none is cut, so each can be counted."""
    data = dataclasses.replace(data, packing="first_fit")
    config = stage(mixture=(("a", 1.0), ("b", 0.0)), seq_len=160, batch_size=2)
    source = mixture.open_source(
        data.sources[0], split="train", text_field="text", eval_fraction=data.eval_fraction
    )
    names = {text[:4] for text in source.texts()}
    rows = {}
    for process in range(2):
        documents = mixture._train_rows(
            source,
            tokenizer=TOKENIZER,
            seed=mixture._order_seed(0, 0, "a"),
            part=slice(process, None, 2),
            seq_len=160,
            packing="first_fit",
        )
        it = iter(documents._parent)
        share = len(source) // 2 + (process == 0 and len(source) % 2)
        rows[process] = [bytes(next(it)[1:5].astype(np.uint8)).decode() for _ in range(share)]
    assert not set(rows[0]) & set(rows[1])
    assert set(rows[0]) | set(rows[1]) == names
    assert len(rows[0]) + len(rows[1]) == len(names)
    batches = take(iterator(data, config, process_index=1, process_count=2), 3)
    assert batches[0].tokens.shape == (1, 160)
    first = [name for name in document_counts(batches[:1])]
    assert first and set(first) <= set(rows[1])


def test_epochs_are_whole_and_in_different_orders(data):
    source = mixture.open_source(
        data.sources[2], split="train", text_field="text", eval_fraction=data.eval_fraction
    )
    rows = mixture._train_rows(
        source, tokenizer=TOKENIZER, seed=3, part=slice(0, None, 1), seq_len=9, packing="concat"
    )
    it = iter(rows._parent)
    epochs = [tuple(bytes(next(it)[1:5].astype(np.uint8)) for _ in source.index) for _ in range(6)]
    assert len({frozenset(e) for e in epochs}) == 1 and len(set(epochs[0])) == len(source)
    assert len(set(epochs)) > 1


def test_zero_weight_source_is_not_opened(data):
    missing = dataclasses.replace(data.sources[1], path="gone/*.txt")
    data = dataclasses.replace(data, sources=(data.sources[0], missing))
    next(iterator(data, stage(mixture=(("a", 1.0), ("b", 0.0)))))
    with pytest.raises(UserError, match="data.sources.b.path"):
        iterator(data, stage(mixture=(("a", 1.0), ("b", 0.1))))


def test_batch_must_divide(data):
    with pytest.raises(UserError, match="stages.s.batch_size = 4: .*multiple of the 3 processes"):
        iterator(data, process_count=3)


def test_bad_record_reaches_the_caller_through_the_thread(data, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": 1}\n')
    bad = SourceConfig("a", str(path), str(path))
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


def eval_source(data, name="a"):
    return mixture.open_eval_sources(data)[name]


@pytest.mark.parametrize("processes", [1, 2])
def test_eval_predicts_every_token_once(data, processes):
    source = eval_source(data)
    parts = [
        mixture.eval_batches(
            source,
            tokenizer=TOKENIZER,
            seq_len=16,
            batch_size=4,
            process_index=process,
            process_count=processes,
        )
        for process in range(processes)
    ]
    batches = []
    for shards in zip(*parts, strict=True):
        assert all(a.shape == (4 // processes, 16) for s in shards for a in s)
        batches.append(Batch(*map(np.concatenate, zip(*shards, strict=True))))
    assert len(batches) == len(parts[0])
    mask = np.concatenate([b.loss_mask.ravel() for b in batches]) > 0
    targets = np.concatenate([b.targets.ravel() for b in batches])
    expected = [t for text in source.texts() for t in [*text.encode(), TOKENIZER.eos_id]]
    assert targets[mask].tolist() == expected
    assert np.all(np.diff(mask.astype(int)) <= 0)
    assert parts[0].num_targets == len(expected)
    assert parts[0].num_bytes == source.num_bytes == len(mixture.held_out_text(data)["a"])
    np.testing.assert_equal(list(parts[0]), list(parts[0]))  # as often as one likes


def test_eval_truncates_by_whole_documents(data):
    source = eval_source(data)
    sizes = [len(t.encode()) for t in source.texts()]
    options = dict(tokenizer=TOKENIZER, seq_len=16, batch_size=4)
    for limit in (1, sizes[0] + 1, sum(sizes) // 2):
        batches = mixture.eval_batches(source, max_tokens=limit, **options)
        chosen = batches.documents
        assert batches.num_bytes == sum(sizes[i] for i in chosen)
        assert batches.num_targets == batches.num_bytes + len(chosen) >= limit
        assert sum(b.loss_mask.sum() for b in batches) == batches.num_targets
        assert list(chosen) == sorted(set(chosen))
    assert len(mixture.eval_batches(source, max_tokens=1, **options).documents) == 1
    assert len(mixture.eval_batches(source, max_tokens=10**9, **options).documents) == len(source)


def test_fingerprint_and_held_out_text_agree(data):
    prints, held_out = mixture.data_fingerprint(data), mixture.held_out_text(data)
    assert list(prints) == list(held_out) == list("abc")
    for name, count in (("a", 40), ("b", 25), ("c", 5)):
        assert prints[name]["documents"] + prints[name]["eval_documents"] == count
        assert prints[name]["eval_bytes"] == len(held_out[name])
        assert len(prints[name]["fingerprint"]) == 64
    json.dumps(prints)
    other = dataclasses.replace(data, eval_fraction=0.5)
    assert mixture.data_fingerprint(other)["a"] != prints["a"]
