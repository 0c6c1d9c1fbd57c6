"""The errors that docs/faq.md quotes are those that the code gives, letter by letter."""

import re

import pytest

from tests.docs import tiny
from tests.docs.blocks import ROOT
from tests.programs import call_all

PAGE = ROOT / "docs" / "faq.md"
TRAIN = ["train", "--config=configs/tour.py"]
SMALL = "--config={home}/configs/tour.py"
NEW, RUN = "--workdir={home}/runs/new", "--workdir={home}/runs/a"
FILES = {
    "corrupt.jsonl": '{"text": "a b c"}\n{"text": \n',
    "other.jsonl": '{"content": "a b c"}\n{"content": "d"}\n',
    "one.txt": "x",
    "table.parquet": "",
    "notes.docx": "word",
    "model/config.json": '{"model_type": "gpt2"}',
    "theirs/metrics.jsonl": "{}\n",
}
TEXT = "--config.data.sources.code.path={home}/"
# In the order of the page. A list is a command line; the last is what it needs, if anything.
CASES = [
    ["train", NEW],
    ["train", "--config=configs/smal.py", NEW],
    [*TRAIN, NEW, "--config.learning_rate=1e-3"],
    [*TRAIN, NEW, "--config.model.atention.window=32"],
    [*TRAIN, NEW, "--config.model.unit=Lg"],
    [*TRAIN, NEW, "--config.model.moe.top_k=99"],
    ["evaluate", "--workdir={home}/runs/none"],
    ["evaluate", RUN, "--step=7"],
    [*TRAIN, NEW, TEXT + "nowhere/*.txt"],
    [*TRAIN, NEW, TEXT + "notes.docx"],
    [*TRAIN, NEW, TEXT + "corrupt.jsonl"],
    [*TRAIN, NEW, TEXT + "other.jsonl"],
    [*TRAIN, NEW, TEXT + "one.txt"],
    [*TRAIN, NEW, "--config.data.tokenizer=bytez"],
    ["train", SMALL, RUN, "--config.model.model_dim=64"],
    ["train", SMALL, RUN, TEXT + "texts/0.txt"],
    [*TRAIN, "--workdir={home}/theirs"],
    ["train", SMALL, NEW, "--config.mesh.tensor=2"],
    ["train", SMALL, NEW, "--config.model.attention.implementation=pallas_tpu"],
    ["train", SMALL, NEW, "--config.model.moe.implementation=pallas_gpu"],
    [*TRAIN, NEW, "--distributed"],
    [*TRAIN, NEW, "--num_processes=4"],
    ["aot_compile", "--config=configs/tour.py", "--topology=v5e:16x32"],
    [
        "train",
        SMALL,
        "--workdir={home}/runs/nan",
        "--config.stages.stable.learning_rate=1e30",
        "--config.optimizer.clip_norm=1e30",
    ],
    ["convert", "--from=hf", "--path={home}/model", NEW],
    ["convert", "--to=hf", "--model_type=llama", RUN, "--path={home}/out"],
    ["upcycle", "--source={home}/runs/a", SMALL, "--workdir={home}/runs/up"],
    ["evaluate", RUN, "--eval.top_k=2"],
    ["generate", RUN, "--prompt=x", "--temperature=-1"],
    ["generate", RUN, "--prompt=x", "--chat"],
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("faq") / "home"
    home.mkdir()
    tiny.write_home(home)
    for name, content in FILES.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(content)
    return home


@pytest.fixture(scope="module")
def said(home):
    made = ["train", SMALL, RUN]
    lines = [[word.replace("{home}", str(home)) for word in line] for line in [made, *CASES]]
    first, *results = call_all(lines, timeout=900, seconds=120, environment=tiny.QUICK)
    assert first.status == 0, first.stderr
    return [plain(result.stderr, home) for result in results]


def plain(stderr, home):
    """The last line, with paths as a reader has them."""
    line = stderr.strip().splitlines()[-1] if stderr else ""
    return re.sub(r"pytest-\S*", "", line.replace(f"{home}/", ""))


@pytest.mark.slow
def test_every_quoted_error_is_one_that_the_code_gives(said):
    quoted = re.findall(r"^error: .*$", PAGE.read_text(), re.MULTILINE)
    wrong = [line for line in said if not line.startswith("error: ")]
    assert not wrong
    missing, old = [*filter(lambda line: line not in quoted, said)], {*quoted} - {*said}
    assert not missing and not old, "\n".join(["docs/faq.md lacks", *missing, "has", *sorted(old)])
