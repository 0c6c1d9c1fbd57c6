"""Stands in for `lightning_jax.ablation.child`: does what the name of its folder says, at once."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main():
    request = json.loads(sys.stdin.readline())
    folder = Path(request["folder"])
    (folder / "request.json").write_text(json.dumps(request))
    name = folder.name
    print(f"words of {name}", file=sys.stderr)
    if name.startswith("kill"):
        os.kill(os.getpid(), int(name.removeprefix("kill_")))
    if name.startswith("exit"):
        sys.exit(int(name.removeprefix("exit_")))
    if name.startswith("meet"):
        wait_for(folder.parent, 2)
    if name.startswith("stop"):
        signal.signal(signal.SIGTERM, lambda *_: save(folder))
        wait_for(folder.parent, 1000)
    failure = "a reason" if name.startswith("fail") else None
    print(json.dumps({"failure": failure}))


def wait_for(root, count):
    """Until so many have begun; none waits for ever."""
    for _ in range(3000):
        if len(list(root.glob("*/request.json"))) >= count:
            return
        time.sleep(0.01)


def save(folder):
    (folder / "saved").touch()
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
