"""One of the processes of `test_loop` that train in the same folders at the same time.

    python racing_runs.py CORPUS FOLDER NAME ROUND...

For each round it says `NAME.ROUND.ready`, waits for `ROUND.go`, trains in `ROUND`, and leaves what
came of it in `NAME.ROUND.done`.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_jax.config.errors import UserError
from lightning_jax.runtime.files import write_file
from lightning_jax.train import loop
from tests.tiny import tiny_run


def main() -> None:
    corpus, folder, name, *rounds = sys.argv[1:]
    config = tiny_run(corpus, model__unit="G", model__moe__num_experts=0)
    root = Path(folder)
    for number in rounds:
        (root / f"{name}.{number}.ready").touch()
        while not (root / f"{number}.go").exists():
            time.sleep(0.001)
        try:
            loop.run(config, root / number)
            outcome = "trained"
        except UserError as error:
            outcome = str(error)
        write_file(root / f"{name}.{number}.done", outcome)


if __name__ == "__main__":
    main()
