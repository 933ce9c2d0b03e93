"""The command line: what was typed is read by the table (commands.py), and its verb (verbs.py) is run.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 refused by a check (its id is shown), 130 interrupted.
Results go to standard output, as text or with `--json` as one JSON value; progress and errors to stderr.
`--help`, `--version` and `explain` need nothing but Python: the other verbs first enter the tools tree.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mosinit import __version__, explain, init, tools
from mosinit.commands import GROUPS, VERBS, Verb
from mosinit.host import Failure, Host, Usage
from mosinit.verbs import FAILED, Result

WRONG_USAGE, REFUSED, INTERRUPTED = 2, 3, 130


# --- argparse on top --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, with one line per error like everything else here."""

    def error(self, message: str) -> NoReturn:
        """Raise `Usage` instead of printing the usage and leaving."""
        raise Usage(f"{message} (see `{self.prog} --help`)")


def parser(table: Sequence[Verb] = VERBS) -> argparse.ArgumentParser:
    """Build the parser from the table."""
    overview = "\n".join(f"  {verb.words:<11} {verb.summary}\n{'':<16}{verb.example}" for verb in table)
    root = Parser(
        prog="mosinit",
        usage="mosinit VERB ...",
        **_words(
            "Brings a Linux machine from power-on to a running, verified root filesystem.",
            f"verbs and examples (in a checkout, `mosinit` is `python3 -m mosinit`):\n{overview}\n\n"
            "`mosinit VERB --help` says more.",
        ),
    )
    root.add_argument("--version", action="version", version=f"mosinit {__version__}")
    verbs = root.add_subparsers(metavar="VERB", help=argparse.SUPPRESS, parser_class=Parser)
    groups: dict[str, Any] = {"": verbs}
    for verb in table:
        group, _, name = verb.words.rpartition(" ")
        if group not in groups:
            groups[group] = _add_group(verbs, group, table)
        _add_verb(groups[group], name, verb)
    return root


def _add_group(verbs: Any, group: str, table: Sequence[Verb]) -> Any:
    lines = "\n".join(f"  {verb.words:<11} {verb.summary}" for verb in _verbs_of(group, table))
    words = _words(GROUPS[group], f"verbs:\n{lines}")
    inner = verbs.add_parser(group, prog=f"mosinit {group}", usage=f"mosinit {group} VERB ...", **words)
    inner.set_defaults(group=group)
    return inner.add_subparsers(metavar="VERB", help=argparse.SUPPRESS, parser_class=Parser)


def _add_verb(verbs: Any, name: str, verb: Verb) -> None:
    words = _words(f"{verb.summary}.", f"example:\n  {verb.example}")
    made = verbs.add_parser(name, prog=f"mosinit {verb.words}", **words)
    for option in verb.options:
        made.add_argument(option.name, help=option.help, **option.more)
    made.set_defaults(verb=verb, json=False)
    if verb.json:
        made.add_argument("--json", action="store_true", help="print the result as JSON")


def _verbs_of(group: str, table: Sequence[Verb]) -> list[Verb]:
    return [verb for verb in table if not group or verb.words.startswith(f"{group} ")]


def _words(description: str, epilog: str) -> dict[str, Any]:
    return {
        "description": description[0].upper() + description[1:],
        "epilog": epilog,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        # An abbreviation that works today would be ambiguous or mean something else tomorrow.
        "allow_abbrev": False,
    }


def _parse(words: Sequence[str], table: Sequence[Verb]) -> argparse.Namespace:
    """Parse a command line; the help that a word too many points to is that of its verb."""
    values, rest = parser(table).parse_known_args(words)
    if rest:
        verb = getattr(values, "verb", None)
        where = f"mosinit {verb.words}" if verb else "mosinit"
        raise Usage(f"unrecognized arguments: {' '.join(rest)} (see `{where} --help`)")
    return values


# --- Running a verb --------------------------------------------------------------------------------


def run(host: Host, values: argparse.Namespace, arguments: list[str]) -> Result:
    """Run the verb; if it needs the tools tree, enter that first, which starts this command again."""
    verb: Verb = values.verb
    if verb.checkout:
        tools.checkout()
    if verb.tools and not (verb.on_machines and tools.on_machine()):
        for name, value in vars(values).items():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path):
                    tools.check_visible(path, name)
        tools.run_inside(host, arguments)
    if verb.secrets:
        host.hide_memory()
    try:
        return verb.run(host, values)
    except ModuleNotFoundError as error:
        if verb.tools or (error.name or "mosinit").partition(".")[0] == "mosinit":
            raise
        raise Failure(
            f"Python's {error.name} is missing here: run this on a machine that mosinit started, whose "
            "hostfs has it"
        ) from error


def main(arguments: Sequence[str] | None = None, table: Sequence[Verb] = VERBS) -> int:
    """Run the command and return its exit status."""
    host = Host()
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = False
    try:
        if arguments is None:
            # What a verb started (VMs, TPMs, mounts) is stopped by its `finally`: a plain SIGTERM skips
            # those.
            signal.signal(signal.SIGTERM, _terminated)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # So is one by a connection that breaks, unless `nohup` says that it does not matter.
            if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
                signal.signal(signal.SIGHUP, _terminated)
        values = _parse(words, table)
        as_json = getattr(values, "json", False)
        if not hasattr(values, "verb"):
            group = getattr(values, "group", "")
            names = [verb.words for verb in _verbs_of(group, table)]
            where = f"mosinit {group}".rstrip()
            raise Usage(f"a verb is missing: {', '.join(names)} (see `{where} --help`)")
        result = run(host, values, words)
        _print(json.dumps(result.data, indent=1) if as_json else result.text)
        return result.status
    except init.Refused as refused:
        return _refused(host, refused, as_json)
    except Failure as failure:
        host.say(f"error: {failure}")
        return failure.status
    except KeyboardInterrupt:
        host.say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output left; a second error when Python flushes at its end would only confuse.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        host.say(f"error: {_os_error(error)}")
        return FAILED


def _os_error(error: OSError) -> str:
    """Name the file that an operation failed on, and what helps."""
    remedies = {
        errno.ENOSPC: "make room there",
        errno.EDQUOT: "make room there",
        errno.EROFS: "name a folder that can be written",
        errno.EACCES: "name another, or change who may use it",
        errno.EPERM: "name another, or change who may use it",
        errno.EEXIST: "name another",
        errno.ENOTDIR: "name another",
        errno.EISDIR: "name a file",
        errno.ENOENT: "name one that exists",
    }
    if error.filename is None or error.errno not in remedies:
        return str(error)
    return f"cannot use {error.filename}: {error.strerror}; {remedies[error.errno]}"


def _refused(host: Host, refused: init.Refused, as_json: bool) -> int:
    """Say what was refused and what to do."""
    refusal = explain.refusal(refused)
    host.say(f"refused: {refusal['failed']}: expected {refusal['expected']}, seen {refusal['seen']}")
    if refusal["remedy"]:
        # A title is about a boot, as the table's remedy is.
        what = "what to do" if explain.advice(refused) else refusal["title"]
        host.say(f"{what}: {refusal['remedy']}")
    if as_json:
        _print(json.dumps(refusal, indent=1))
    return REFUSED


def _print(text: str) -> None:
    if text:
        print(text, flush=True)


def _terminated(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)
