from __future__ import annotations

import importlib
import json
import sys

import pytest

from lightning_jax.config.errors import UserError

ROWS = [
    {"question": "def return", "choices": ["lambda", "class", "zzz"], "answer": 0},
    {"question": "yield pass", "choices": ["raise", "qqqq", "import"], "answer": 2},
    {"question": "while", "choices": ["break", "assert"], "answer": 1},
]
TASK = """
task: words_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/words.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1.0}}
"""
KINDS = {
    "multiple_choice": (
        "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]"
    ),
    "generate_until": (
        'doc_to_target: "{{choices[answer]}}"\n'
        'generation_kwargs: {until: [" "], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]'
    ),
    "loglikelihood_rolling": (
        'doc_to_target: "{{question}}"\nmetric_list: [{metric: bits_per_byte}]'
    ),
}


@pytest.fixture
def tasks():
    pytest.importorskip("lm_eval", reason="needs the lm-eval extra")
    return importlib.import_module("lightning_jax.interop.lm_eval.tasks")


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "words.jsonl").write_text("\n".join(lines) + "\n")
    for kind, rest in KINDS.items():
        text = TASK.format(kind=kind, folder=tmp_path) + rest + "\n"
        (tmp_path / f"{kind}.yaml").write_text(text)
    gone = TASK.format(kind="multiple_choice", folder=tmp_path / "nowhere") + "\n"
    (tmp_path / "gone.yaml").write_text(gone.replace("words_multiple_choice", "words_gone"))
    return tmp_path


def options(module, folder, **changes):
    fields = dict(
        tasks=tuple(f"words_{kind}" for kind in KINDS),
        include_path=str(folder),
        limit=None,
        num_fewshot=None,
        batch_size=3,
        seq_len=None,
        step=None,
        chat=False,
        seed=0,
    )
    return module.TaskOptions(**(fields | changes))


@pytest.mark.slow
def test_local_tasks(tasks, folder, monkeypatch):
    from lightning_jax.data.tokenizer import ByteTokenizer
    from lightning_jax.interop.lm_eval.adapter import LightningAdapter
    from tests.interop.lm_eval.test_adapter import instances, loaded

    monkeypatch.setattr(tasks, "load_run", lambda workdir, *, step: loaded())
    monkeypatch.setattr(tasks, "resolve_tokenizer", lambda *_, rows: ByteTokenizer())
    found = tasks.evaluate_tasks(folder, options(tasks, folder))
    json.dumps(found)
    assert found["step"] == 3 and set(found["results"]) == {f"words_{kind}" for kind in KINDS}

    ours = LightningAdapter(loaded(), ByteTokenizer())
    right = 0
    for row in ROWS:
        asked = [(row["question"], " " + choice) for choice in row["choices"]]
        scores = ours.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
        right += max(range(len(scores)), key=lambda i: scores[i][0]) == row["answer"]
    acc = found["results"]["words_multiple_choice"]["acc,none"]
    assert acc == pytest.approx(right / len(ROWS))

    texts = [row["question"] for row in ROWS]
    nats = ours.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True
    )
    bits = -sum(nats) / sum(map(len, texts)) / 0.6931471805599453
    measured = found["results"]["words_loglikelihood_rolling"]["bits_per_byte,none"]
    assert measured == pytest.approx(bits, rel=1e-6)

    # Case D12
    class Lossy(ByteTokenizer):
        def encode(self, text, *, specials=False):
            return super().encode(text.replace("e", ""), specials=specials)

    with monkeypatch.context() as changed:
        changed.setattr(tasks, "resolve_tokenizer", lambda *_, rows: Lossy())
        only = options(tasks, folder, tasks=("words_loglikelihood_rolling",))
        row = tasks.evaluate_tasks(folder, only)["results"]["words_loglikelihood_rolling"]
    assert row["bits_per_byte,none"] is None and row["no_bits_per_byte"].startswith("no bits")

    only = options(tasks, folder, tasks=("words_multiple_choice",), limit=2, num_fewshot=1)
    found = tasks.evaluate_tasks(folder, only)
    assert found["n-samples"]["words_multiple_choice"] == {"original": 3, "effective": 2}
    assert found["n-shot"] == {"words_multiple_choice": 1}


@pytest.mark.slow
def test_tasks_that_cannot_be_loaded_are_one_line(tasks, folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    # Its own thousands of tasks take it long to read.
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda include_path, **options: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )
    for name, message in (
        (
            "words_multiple_choise",
            r'no task of lm_eval .*\(did you mean "words_multiple_choice"\?\)',
        ),
        ("words_gone", "FileNotFoundError"),
    ):
        with pytest.raises(UserError, match=f"^tasks = .?{name}.*{message}") as caught:
            tasks.load_tasks([name], str(folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": ("",)},
        {"limit": 0.0},
        {"num_fewshot": -1},
        {"include_path": "/nowhere"},
        {"seed": -1},
    ],
)
def test_bad_options_are_named(tasks, folder, changes):
    with pytest.raises(UserError, match=f"^{next(iter(changes))} = "):
        options(tasks, folder, **changes)


def test_without_the_harness_one_line_says_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("adapter", "tasks"):
        monkeypatch.delitem(sys.modules, f"lightning_jax.interop.lm_eval.{name}", raising=False)
    with pytest.raises(
        UserError, match=r"^package lm_eval.* is missing: pip install .*\[lm-eval\]'$"
    ):
        importlib.import_module("lightning_jax.interop.lm_eval.tasks")
