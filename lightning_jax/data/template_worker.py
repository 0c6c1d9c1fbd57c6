"""The process in which chat templates run, so that their time and memory are bounded.

A template is a program of somebody else: Jinja's sandbox keeps it from the machine, but no check
inside of a process ends `10**10**8`. Here the kernel does: the process dies when its alarm rings.

It runs as a script and imports nothing of the project. Each line of its stdin is a request: JSON
with `source`, `values`, `seconds` and `characters`, the limits. Each line of its stdout is the
answer: JSON with the `text`, or with the `error` and, where a line of the template is known, its
`line`.
"""

import contextlib
import datetime
import functools
import json
import resource
import signal
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

_MEMORY_BYTES = 2 * 2**30


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words, which are kept."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(style):
    return datetime.datetime.now().strftime(style)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter would escape `<`, `>`, `&` and quotes for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _make_environment():
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


@functools.lru_cache(maxsize=32)
def _compiled(environment, source):
    return environment.from_string(source)


def _render(environment, request):
    pieces, left = [], request["characters"]
    for piece in _compiled(environment, request["source"]).generate(**request["values"]):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise ValueError(f"makes more than {request['characters']} characters")
    return "".join(pieces)


def _answer(environment, request):
    try:
        return json.dumps({"text": _render(environment, request)})
    except jinja2.TemplateSyntaxError as error:
        return json.dumps({"error": str(error.message), "line": error.lineno})
    except Exception as error:  # The template or its input causes whatever goes wrong inside.
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


def main():
    """Answers requests until stdin ends."""
    # An interrupt at the terminal is the parent's; an alarm must kill, whatever was inherited.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # Not every system has these limits.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    environment = _make_environment()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        answer = _answer(environment, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
