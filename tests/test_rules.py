"""The rules of the code, as tests: what a reviewer would otherwise have to look for each time."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mosinit import explain, init

Need = Callable[..., None]
ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "mosinit.py"

# What the bring-up may import. Each further module is in the signed initrd and costs start-up time.
ALLOWED_IMPORTS = {
    "__future__", "_thread", "binascii", "collections", "contextlib", "cryptography", "ctypes", "enum",
    "errno", "fcntl", "functools", "hashlib", "hmac", "ipaddress", "json", "os", "re", "stat", "struct",
    "subprocess", "sys", "time", "typing", "yaml", "zlib",
}  # fmt: skip
IMPORTED_WHERE_USED = {"cryptography", "yaml"}

TOP_LEVEL = {
    "CHANGELOG.md", "LICENSE", "README.md", "build-initrd.sh", "docs", "mosinit", "mosinit.py",
    "pyproject.toml", "tests", "vm-tests",
}  # fmt: skip


def python_files() -> list[Path]:
    folders = [ROOT / name for name in ("mosinit", "tests", "vm-tests")]
    found = [path for folder in folders for path in folder.rglob("*.py") if not path.is_symlink()]
    return sorted([CORE, *found])


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def tracked() -> list[Path]:
    """Every file of the project: what git knows, or, without git, what an unpacked source archive has."""
    if (ROOT / ".git").exists():
        words = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        listed = subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout.decode()
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def passes(*command: str | Path) -> None:
    """Run a program in the checkout; its messages are the failure."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{command[0]} {command[1]}:\n{done.stdout}{done.stderr}", pytrace=False)


# --- Lint and types ----------------------------------------------------------------------------------


def test_ruff(need: Need) -> None:
    need("ruff")
    passes("ruff", "check", "--no-cache", "--output-format=concise", ".")


def test_ruff_format(need: Need) -> None:
    need("ruff")
    passes("ruff", "format", "--no-cache", "--check", ".")


def test_mypy(need: Need, tmp_path: Path) -> None:
    need("mypy")
    folders = [name for name in ("mosinit", "tests", "vm-tests") if any((ROOT / name).glob("*.py"))]
    passes("mypy", f"--cache-dir={tmp_path}", "--no-error-summary", *folders)


@pytest.mark.parametrize("name", ["build-initrd.sh", ".ci/run"])
def test_shellcheck(need: Need, name: str) -> None:
    need("shellcheck")
    passes("shellcheck", "--severity=style", name)


@pytest.mark.parametrize("name", ["build-initrd.sh", ".ci/run"])
def test_shell_scripts(name: str) -> None:
    text = (ROOT / name).read_text()
    assert os.access(ROOT / name, os.X_OK)
    assert "set -euo pipefail" in text
    assert text.count("\n") <= 150, "logic beyond that belongs in Python"


# --- The core ----------------------------------------------------------------------------------------


def test_the_core_stays_small() -> None:
    text = CORE.read_text()
    assert text.count("\n") <= 3500
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(text))) <= 2500


def test_the_core_imports_only_what_it_may() -> None:
    tree = ast.parse(CORE.read_text())
    assert imports_of(tree) <= ALLOWED_IMPORTS
    outside = [node for node in tree.body if not is_type_checking(node)]
    assert not imports_of(ast.Module(outside, []), deep=False) & IMPORTED_WHERE_USED


def imports_of(tree: ast.AST, *, deep: bool = True) -> set[str]:
    """Return the top modules that a tree imports; unless `deep`, without what functions import."""
    found: set[str] = set()
    for node in ast.walk(tree) if deep else ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the core is one file"
            found.add(str(node.module).partition(".")[0])
    return found


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_the_core_starts_on_bare_python() -> None:
    """The check table needs neither cryptography nor yaml: `-S` leaves all packages of the system away."""
    program = "import sys; sys.path.insert(0, '.'); import mosinit.init as i; print(len(i.CHECKS))"
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-B", "-c", program], cwd=ROOT, capture_output=True, check=True
    )
    assert int(done.stdout) == len(init.CHECKS)


def test_the_table_of_checks_is_what_the_core_raises() -> None:
    nodes = list(ast.walk(ast.parse(CORE.read_text())))
    words = Counter(
        node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    raised = {
        node.args[0].value
        for node in nodes
        if isinstance(node, ast.Call)
        and called(node) == "Refused"
        and isinstance(node.args[0], ast.Constant)
    }
    assert raised <= set(init.CHECKS)
    assert {check for check in init.CHECKS if not words[check]} == set()


def test_check_ids_and_words() -> None:
    for check, entry in init.CHECKS.items():
        assert re.fullmatch(r"[A-Z][A-Z0-9]*(-[A-Z0-9]+)*", check), check
        for words in entry:
            assert words.strip() == words != "", check
            assert not words.endswith("."), check


# --- All code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_a_screen(path: Path) -> None:
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in functions(ast.parse(path.read_text()))
        if node.end_lineno and node.end_lineno - node.lineno + 1 > 60
    ]
    assert long == []


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_verifiers_return_the_thing_or_raise(path: Path) -> None:
    """Whoever forgets to look at a bool has verified nothing: there is none to look at."""
    verifier = re.compile(r"_?verify(_|$)")
    tree = ast.parse(path.read_text())
    named = [
        node.name
        for node in functions(tree)
        if verifier.match(node.name) and isinstance(node.returns, ast.Name) and node.returns.id == "bool"
    ]
    asked = [
        node.lineno
        for decision in decisions(tree)
        for node in ast.walk(decision)
        if isinstance(node, ast.Call) and verifier.match(called(node))
    ]
    assert (named, asked) == ([], [])


def decisions(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield what decides a branch: `if`, `while`, conditional expressions, filters of comprehensions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs


def called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def test_the_core_never_imports_the_package_and_nobody_copies_it() -> None:
    assert "mosinit" not in imports_of(ast.parse(CORE.read_text()))
    link = ROOT / "mosinit" / "init.py"
    assert link.is_symlink()
    assert os.readlink(link) == "../mosinit.py"


def test_the_package_does_not_use_the_inside_of_the_core() -> None:
    """What begins with an underscore in the core is nobody else's; tests may look."""
    used = [
        f"{path.name}:{node.lineno} init.{node.attr}"
        for path in python_files()
        if path.parent.name == "mosinit"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "init" and node.attr.startswith("_")
    ]
    assert used == []


# --- The checkout ------------------------------------------------------------------------------------


def test_the_top_level_holds_only_agreed_names() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    extra = {name for name in names - TOP_LEVEL if not name.startswith((".", "mkosi."))}
    assert extra == set()


def test_no_work_is_left_over() -> None:
    # Split, so that this file is not a finding.
    marks = re.compile(
        "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", r"\bHA" + r"CK\b", "NotImplemented" + "Error"))
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        if path.name != "LICENSE"
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []


def test_the_readme_has_the_table_of_checks() -> None:
    """Made anew by: python3 -m mosinit explain --all --markdown."""
    assert explain.table_in((ROOT / "README.md").read_text()) == explain.markdown_table()
