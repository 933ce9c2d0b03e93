"""What the remedies say of `mosinit recover` is what it does, and can be typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mosinit import cli, init, recover
from mosinit.host import Host, Usage

CALL = re.compile(r"`mosinit recover( [^`]*)`")
DOCUMENT = Path(__file__).resolve().parent.parent / "docs/recover.md"


def calls(check: str) -> list[str]:
    return [words.strip() for words in CALL.findall(init.CHECKS[check].remedy)]


def test_each_check_that_recover_mends_says_so_and_no_other() -> None:
    assert {check: calls(check) for check in init.CHECKS if calls(check)} == {
        check: [words] for check, words in recover.HANDLED.items()
    }


def test_the_document_lists_them() -> None:
    text = DOCUMENT.read_text()
    assert {check for check in init.CHECKS if f"`{check}`" in text} == set(recover.HANDLED)


@pytest.mark.parametrize("words", sorted({*recover.HANDLED.values(), "--reseal --approvals FILE"}))
def test_what_is_said_can_be_typed(words: str) -> None:
    values = cli.parser().parse_args(["recover", *words.split()])
    assert values.verb.words == "recover"


@pytest.mark.parametrize(
    "words",
    ["--reseal --key x", "--reseal --dir x", "--reseal --anew", "x --reseal", "--approvals x", "--out x"],
)
def test_words_that_do_not_go_together(words: str) -> None:
    values = cli.parser().parse_args(["recover", *words.split()])
    with pytest.raises(Usage):
        values.verb.run(Host(), values)
