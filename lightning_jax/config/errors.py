"""The one exception that means: the person who called us can mend this."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: a config field, a file, a checkpoint, a full disk.

    Its message is one line that names the field, its value and what would be right. Programs in
    `experiments/` print that line and exit with status 2; anything else that escapes is our bug
    and shows its traceback.
    """
