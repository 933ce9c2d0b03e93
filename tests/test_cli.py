"""The command line: its statuses and outputs are an interface, and its help needs nothing but Python."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from mosinit import __version__, cli, commands, explain, init, testing, tools, verbs
from mosinit.host import Failure, Host, Usage

ROOT = Path(__file__).resolve().parent.parent
WORDS = [verb.words for verb in commands.VERBS]


def mosinit(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a Python without any package besides its own standard library."""
    command = ["/usr/bin/python3", "-S", "-B", "-m", "mosinit", *words]
    env = {"PATH": "/usr/bin:/bin", "COLUMNS": "100"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


# --- Help, on bare Python ----------------------------------------------------------------------------


def test_help_shows_each_verb_with_its_example() -> None:
    done = mosinit("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for verb in commands.VERBS:
        assert verb.summary in done.stdout
        assert verb.example in done.stdout


@pytest.mark.parametrize("verb", commands.VERBS, ids=WORDS)
def test_help_of_a_verb(verb: commands.Verb) -> None:
    done = mosinit(*verb.words.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"example:\n  {verb.example}" in done.stdout
    for option in verb.options:
        assert option.help.split("(")[0].rstrip() in " ".join(done.stdout.split())


@pytest.mark.parametrize("group", commands.GROUPS)
def test_help_of_a_group(group: str) -> None:
    done = mosinit(group, "--help")
    assert done.returncode == 0
    assert [verb.words for verb in commands.VERBS if f"  {verb.words} " in done.stdout] == [
        words for words in WORDS if words.startswith(f"{group} ")
    ]


def test_version() -> None:
    assert mosinit("--version").stdout == f"mosinit {__version__}\n"


@pytest.mark.parametrize("verb", commands.VERBS, ids=WORDS)
def test_examples_are_valid(verb: commands.Verb) -> None:
    name, *words = shlex.split(verb.example)
    assert name == "mosinit"
    assert cli.parser().parse_args(words).verb is verb


# --- Wrong usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "a verb is missing: demo, test, keys new"),
        ("keys", "missing: keys new, keys show, keys export, keys epoch (see `mosinit keys --help`)"),
        ("nonsense", "invalid choice: 'nonsense'"),
        ("keys nonsense", "invalid choice: 'nonsense'"),
        ("keys new", "required: DIR, --product"),
        ("keys new k --prod x", "required: --product"),
        ("vm boot --disk d --dir s --until later", "invalid choice: 'later'"),
        ("build --keys k --out o --epoch one", "a whole number from 1 to 64 is expected, not 'one'"),
        ("explain SB-OFF --all", "one id"),
        ("install", "name the disk to install on: --disk"),
        ("install --answers a --disk d", "--disk does not go with --answers, which says all"),
        ("install --answers a --erase s", "--erase does not go with --answers"),
        ("install --answers a --erase-members", "--erase-members does not go with --answers"),
        ("install --answers a --state 5", "--state does not go with --answers"),
        ("install --answers a --plan", "--plan does not go with --answers"),
        ("install s --answers a", "SOURCE does not go with --answers"),
        ("recover --reseal --key k", "--key does not go with --reseal, which needs no secret"),
        ("recover s --reseal", "SOURCE does not go with --reseal, which reads no release"),
        ("recover --key k --approvals a", "--approvals goes with --reseal"),
        ("recover --key k --out o", "--out goes with --reseal"),
        ("explain SB-OFF SB-ON", "unrecognized arguments: SB-ON (see `mosinit explain --help`)"),
        ("keys show k l", "unrecognized arguments: l (see `mosinit keys show --help`)"),
        ("--none", "unrecognized arguments: --none (see `mosinit --help`)"),
        ("explain SB-OFF --markdown", "--markdown goes with --all"),
        ("explain --markdown", "--markdown goes with --all"),
        ("explain SB-OF", "did you mean SB-OFF"),
        ("explain ???", "--all"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(words: str, says: str) -> None:
    done = mosinit(*words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mosinit: error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


# --- explain -----------------------------------------------------------------------------------------


def test_explain() -> None:
    done = mosinit("explain", "sb-off")
    check = init.CHECKS["SB-OFF"]
    assert (done.returncode, done.stdout) == (0, f"SB-OFF: {check.title}\n  {check.remedy}\n")


def test_explain_json() -> None:
    check = init.CHECKS["SB-OFF"]
    assert json.loads(mosinit("explain", "SB-OFF", "--json").stdout) == {
        "id": "SB-OFF",
        "title": check.title,
        "remedy": check.remedy,
    }


def test_explain_all() -> None:
    listed = json.loads(mosinit("explain", "--all", "--json").stdout)
    assert [check["id"] for check in listed] == sorted(init.CHECKS)
    text = mosinit("explain", "--all").stdout
    assert all(f"{check}: {entry.title}\n" in text for check, entry in init.CHECKS.items())


def test_the_table_is_found_between_its_markers() -> None:
    table = explain.markdown_table()
    assert table == mosinit("explain", "--all", "--markdown").stdout
    document = f"# title\n\n{explain.TABLE_BEGIN}\n\n{table}\n{explain.TABLE_END}\n\nmore\n"
    assert explain.table_in(document) == table
    assert table.count("\n") == len(init.CHECKS) + 2


@pytest.mark.parametrize(
    "document",
    [
        "",
        explain.TABLE_BEGIN,
        explain.TABLE_END + explain.TABLE_BEGIN,
        explain.TABLE_BEGIN + explain.TABLE_END + explain.TABLE_END,
        explain.TABLE_BEGIN + explain.TABLE_END + explain.TABLE_BEGIN,
    ],
)
def test_markers_that_are_not_a_pair(document: str) -> None:
    with pytest.raises(Failure, match="each once"):
        explain.table_in(document)


def test_a_report_for_people() -> None:
    report = {
        "result": "refused",
        "mode": "live",
        "sequence": 7,
        "failed": "SB-OFF",
        "checks": [
            {"id": "TPM-ABSENT", "ok": True, "expected": "a TPM", "seen": "TPM 2.0"},
            {"id": "SB-OFF", "ok": False, "expected": "on", "seen": "off"},
        ],
        "stages": [{"name": "setup", "ms": 12}, {"name": "modules", "ms": 34}],
    }
    text = explain.report_text(report)
    for words in ("refused: mode live, sequence 7", "ok      TPM-ABSENT: TPM 2.0", "REFUSED SB-OFF: off"):
        assert words in text
    assert "expected on" in text
    assert "setup 12 ms, modules 34 ms" in text
    assert init.CHECKS["SB-OFF"].remedy in text


@pytest.mark.parametrize(
    "report",
    [{}, {"checks": None, "stages": {"x": 1}, "failed": ["x"]}, {"checks": ["x"], "failed": "NEW-ID"}],
)
def test_a_report_of_another_version_is_shown_as_far_as_it_goes(report: dict[str, object]) -> None:
    assert explain.report_text(report)


def test_a_report_cannot_drive_the_terminal() -> None:
    report: dict[str, object] = {
        "result": "\x1b[2J",
        "checks": [{"id": "X", "ok": False, "seen": "a\x1b]0;b\x07\n"}],
    }
    assert [c for c in explain.report_text(report) if not c.isprintable() and c != "\n"] == []


# --- Statuses ----------------------------------------------------------------------------------------


class Answer(NamedTuple):
    report: dict[str, object]
    status: int
    console: Path


def table(run: Callable[[Host, argparse.Namespace], verbs.Result]) -> tuple[commands.Verb, ...]:
    return (commands.Verb("go", "goes", "mosinit go", run, tools=False),)


def raising(error: BaseException) -> tuple[commands.Verb, ...]:
    def run(host: Host, values: argparse.Namespace) -> verbs.Result:
        raise error

    return table(run)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (Failure("cannot do it: do that"), 1, "mosinit: error: cannot do it: do that\n"),
        (Usage("not so"), 2, "mosinit: error: not so\n"),
        (
            PermissionError(1, "Operation not permitted", "/x"),
            1,
            "mosinit: error: cannot use /x: Operation not permitted; name another",
        ),
        (KeyboardInterrupt(), 130, "mosinit: interrupted\n"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], error: BaseException, status: int, says: str) -> None:
    assert cli.main(["go", "--json"], raising(error)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(says)
    assert err.count("\n") == 1


def test_a_refusal_names_its_check(capsys: pytest.CaptureFixture[str]) -> None:
    refused = init.Refused("SB-OFF", expected="on", seen="off")
    assert cli.main(["go"], raising(refused)) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "mosinit: refused: SB-OFF: expected on, seen off\n" in err
    assert init.CHECKS["SB-OFF"].remedy in err


def test_a_refusal_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["go", "--json"], raising(init.Refused("SB-OFF", expected="on", seen="off"))) == 3
    shown = json.loads(capsys.readouterr().out)
    assert (shown["result"], shown["failed"]) == ("refused", "SB-OFF")
    assert (shown["expected"], shown["seen"]) == ("on", "off")
    assert (shown["title"], shown["remedy"]) == init.CHECKS["SB-OFF"]


def test_a_refusal_has_the_remedy_of_what_is_being_done(capsys: pytest.CaptureFixture[str]) -> None:
    """The innermost words count, and the table's where nobody has others."""

    def run(host: Host, values: argparse.Namespace) -> verbs.Result:
        with explain.advising({"SB-OFF": "outer", "SB-DB": "outer"}), explain.advising({"SB-OFF": "inner"}):
            raise init.Refused("SB-OFF", expected="on", seen="off")

    assert cli.main(["go", "--json"], table(run)) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["remedy"] == "inner"
    assert err.endswith("mosinit: what to do: inner\n")
    assert init.CHECKS["SB-OFF"].title not in err


def test_a_fault_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.main(["go"], raising(ZeroDivisionError()))


def test_an_outcome_brings_its_status_and_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(
        {"result": "refused", "failed": "SB-OFF", "checks": [], "stages": []}, 3, Path("/x/console.log")
    )
    faked = table(lambda host, values: verbs.outcome(answer))
    assert cli.main(["go", "--json"], faked) == 3
    assert json.loads(capsys.readouterr().out) == {
        "report": answer.report,
        "status": 3,
        "console": "/x/console.log",
    }
    assert cli.main(["go"], faked) == 3
    text = capsys.readouterr().out
    assert "refused" in text
    assert "SB-OFF" in text
    assert "console: /x/console.log" in text


def run_in_child(body: str, before: str = "") -> subprocess.Popen[str]:
    program = f"""
import signal, sys, time
{before}
from mosinit import cli, commands, verbs
def run(host, values):
{body}
sys.argv[1:] = ["go"]
sys.exit(cli.main(None, (commands.Verb("go", "goes", "mosinit go", run, tools=False),)))
"""
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_lets_the_verb_clean_up(number: signal.Signals, status: int) -> None:
    # Many short sleeps: a signal just before a long one would be seen at its end.
    body = """
    try:
        print("started", flush=True); [time.sleep(0.05) for _ in range(600)]
    finally:
        print("cleaned up", flush=True)
"""
    # Whoever started the tests may have ignored SIGHUP, as nohup does, and a verb then leaves it so.
    with run_in_child(body, "signal.signal(signal.SIGHUP, signal.SIG_DFL)") as child:
        assert child.stdout
        assert child.stdout.readline() == "started\n"
        child.send_signal(number)
        out, err = child.communicate(timeout=20)
    assert (child.returncode, out) == (status, "cleaned up\n")
    assert "Traceback" not in err


def test_nohup_means_what_it_says() -> None:
    body = """
    print("started", flush=True); sys.stdin.readline(); print("goes on", flush=True)
    return verbs.Result(None, "done")
"""
    with run_in_child(body, "signal.signal(signal.SIGHUP, signal.SIG_IGN)") as child:
        assert child.stdout
        assert child.stdout.readline() == "started\n"
        child.send_signal(signal.SIGHUP)
        out, _ = child.communicate("\n", timeout=20)
    assert (child.returncode, out) == (0, "goes on\ndone\n")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    with run_in_child("    return verbs.Result(None, 'x' * 10_000_000)") as child:
        assert child.stdout
        assert child.stderr
        child.stdout.close()
        err = child.stderr.read()
    assert (child.returncode, err) == (1, "")


def test_options_that_would_not_count_are_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is to believe that they did."""
    monkeypatch.chdir(tmp_path)
    bare = tuple(replace(verb, tools=False) for verb in commands.VERBS)
    for words, says in (
        ("build --keys k --out o --manifest m --sequence 7", "--sequence goes without --manifest"),
        ("publish m --keys k --to docker://r.example/A:1", "lower-case"),
        ("vm boot --disk d --dir s --setup-mode --keys k", "for --enroll alone"),
    ):
        assert cli.main(words.split(), bare) == 2
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    "words", ["install --disk /dev/none --dir s --plan", "install --answers a", "status", "boot-good"]
)
def test_a_verb_of_machines_elsewhere_is_no_traceback(words: str) -> None:
    """On a computer whose Python has no packages; in a hostfs they are."""
    done = mosinit(*words.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert re.search(
        "error: Python's [a-z0-9_]+ is missing here: .* a machine that mosinit started", done.stderr
    )


@pytest.mark.parametrize("program", ["nosuchprogram", "./nosuchprogram", "/"])
def test_a_program_that_is_not_there_is_told(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tuple(replace(verb, tools=False) for verb in commands.VERBS)
    assert cli.main(["tools", "run", program, "--version"], bare) == 1
    said = capsys.readouterr().err
    assert (
        f"the tools tree has no program {program}: `mosinit tools run ls /usr/bin /usr/sbin` lists" in said
    )
    assert said.count("\n") == 1


def test_a_verb_of_machines_enters_no_tools_tree_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[bool] = []
    monkeypatch.setattr(tools, "run_inside", lambda host, arguments: entered.append(True))
    for started in (False, True):
        monkeypatch.setattr(tools, "on_machine", lambda started=started: started)
        assert cli.main(["provision", "--dir", str(tmp_path)]) == 2
    assert entered == [True]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["docker://127.0.0.1:1/acme:7", "--tls-ca", "/nonexistent"], 1, "cannot read /nonexistent"),
        (["docker://127.0.0.1:1/acme:7", "--login", "/nonexistent"], 1, "write USER:PASSWORD into it"),
        (["--state", "-1"], 2, "'-1' is no number of MiB"),
        (["--store", "1G"], 2, "'1G' is no number of MiB"),
        (["--scratch", "1234567890"], 2, "'1234567890' is no number of MiB"),
    ],
)
def test_installing_with_words_that_are_wrong(words: list[str], status: int, message: str) -> None:
    # In a process of its own: the verb keeps its memory from debuggers.
    command = [sys.executable, "-m", "mosinit", "install", "--disk", "/dev/none", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert message in done.stderr


# --- The test verb -----------------------------------------------------------------------------------


def test_the_strengths() -> None:
    def words(*folders: str) -> list[str]:
        return ["/usr/bin/python3", "-m", "pytest", *folders, *testing.WORKERS]

    assert testing.command(None, expression=None, cold=False) == words("tests", "vm-tests")
    assert testing.command("unit", expression="a or b", cold=False) == [*words("tests"), "-k", "a or b"]
    assert testing.command("vm", expression=None, cold=True) == [*words("vm-tests"), "--cold"]
    with pytest.raises(Usage, match="--cold"):
        testing.command("unit", expression=None, cold=True)


def test_tests_run_in_the_checkout_with_every_tool_required() -> None:
    class Recorder(Host):
        def call(self, command: object, **options: object) -> int:
            assert options["cwd"] == tools.checkout() == ROOT
            env = options["env"]
            assert isinstance(env, dict)
            assert env["MOSINIT_REQUIRE_TOOLS"] == "1"
            return 5

    assert testing.run(Recorder(), "unit") == 1


@pytest.mark.parametrize("number", ["0", "65", "-1", "1.0", "", "²"])
def test_numbers_out_of_range_are_wrong_usage(number: str) -> None:
    done = mosinit("build", "--keys", "k", "--out", "o", f"--epoch={number}")
    assert done.returncode == 2
    assert "from 1 to 64" in done.stderr


def test_messages_move_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of images and files are other people's."""
    Host().say("Bär: \x1b]0;owned\x07\x1b[2J\nmosinit: done \u202e\u009b31m \ud800 中")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "mosinit: Bär: \\x1b]0;owned\\x07\\x1b[2J\\nmosinit: done \\u202e\\x9b31m \\ud800 中"
    with Host().progress("\x1b[2J", 1):
        pass
    assert "\x1b" not in capsys.readouterr().err


def test_verbs_that_hold_secrets_leave_no_core() -> None:
    """RLIMIT_CORE and PR_GET_DUMPABLE (3), as a verb sees them."""
    # Each in a process of its own, none of which imports everything anew.
    program = (
        "import ctypes, os, resource, sys; from dataclasses import replace; "
        "from mosinit import cli, commands, verbs\n"
        "def run(host, values):\n"
        "    print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))\n"
        "    return verbs.Result(None, '')\n"
        "bare = {'run': run, 'tools': False, 'checkout': False, 'options': ()}\n"
        "table = tuple(replace(verb, **bare) for verb in commands.VERBS)\n"
        "for words in sys.argv[1:]:\n"
        "    if not os.fork():\n"
        "        print(words, end=': ')\n"
        "        os._exit(cli.main(words.split(), table))\n"
        "    assert os.wait()[1] == 0\n"
    )
    words = ["keys new", "keys show", "keys export", "build", "publish", "provision", "enroll", "uki sign"]
    words += ["keys epoch", "approve"]
    done = subprocess.run(
        [sys.executable, "-uc", program, *words, "explain"],
        capture_output=True,
        check=True,
        text=True,
        cwd=ROOT,
    )
    *closed, open_ = done.stdout.splitlines()
    assert closed == [f"{each}: (0, 0) 0" for each in words]
    assert open_.startswith("explain: ")
    assert open_.endswith(" 1")
