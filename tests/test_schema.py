"""The schema for editors: it agrees with the core, key by key and document by document."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mosinit import cli, init, publish, schema

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = "11111111-2222-4333-8444-555555555555"
Document = dict[str, Any]

FULL: Document = {
    "version": 1,
    "product": PRODUCT,
    "sequence": 42,
    "epoch": 3,
    "update_type": "complete",
    "storage": [{"label": "data", "persistent": True, "nsgroup": "zot", "size": "3G"}],
    "targets": [
        {"service_name": "hostfs", "service_type": "hostfs", "source": "oci:./hostfs", "version": "1.0",
         "writable": "etc", "network": {"type": "none"}},
        {"service_name": "bootkit", "service_type": "bootkit", "source": "oci:./bootkit", "version": "1.0"},
        {"service_name": "tree", "service_type": "fs-only", "source": "docker://r.example/t:1",
         "version": "1.0", "storage": [{"dest": "/a/b", "label": "data"}]},
        {"service_name": "zot", "service_type": "container", "source": "docker://r.example/zot:2",
         "version": "2.10", "nsgroup": "zot", "storage": [],
         "network": {"type": "simple", "ipv4": "10.0.3.99/24", "ipv6": "fd00::1/64",
                     "ports": [{"host": 80, "container": 5000}]}},
    ],
}  # fmt: skip


def by_core(document: object) -> bool:
    """Ask the core; JSON in this form is YAML, and nothing in it can be read in two ways."""
    try:
        init.parse_manifest(json.dumps(document).encode(), publish.WRITTEN)
    except init.Refused:
        return False
    return True


def by_schema(document: object) -> bool:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema.manifest())
    return bool(validator.is_valid(document))


def test_the_checked_in_schema_is_the_printed_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Made anew by: python3 -m mosinit schema > docs/manifest.schema.json."""
    assert cli.main(["schema"]) == 0
    assert (ROOT / "docs/manifest.schema.json").read_text() == capsys.readouterr().out


def test_the_schema_is_one() -> None:
    pytest.importorskip("jsonschema").Draft202012Validator.check_schema(schema.manifest())


def test_the_example_of_the_readme_is_valid() -> None:
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(version: 1\n.*?)```", text, re.DOTALL)
    assert by_schema(plain(init.parse_yaml(example.encode())))


def plain(node: init.Node) -> object:
    """Return a parsed YAML document without its lines."""
    if isinstance(node.value, dict):
        return {key: plain(value) for key, value in node.value.items()}
    if isinstance(node.value, list):
        return [plain(item) for item in node.value]
    return node.value


def test_every_key_of_the_core_is_in_the_schema() -> None:
    """The core names all keys that it knows when it meets one that it does not."""

    def known(path: tuple[str | int, ...]) -> set[str]:
        document = copy.deepcopy(FULL)
        place: Any = document
        for step in path:
            place = place[step]
        place["unknown"] = 1
        with pytest.raises(init.Refused) as refused:
            init.parse_manifest(json.dumps(document).encode(), publish.WRITTEN)
        return set(refused.value.expected.removeprefix("one of ").split(", "))

    def stated(*path: str) -> set[str]:
        place: Any = schema.manifest()
        for step in path:
            place = place["properties"][step]
            place = place.get("items", place)
        return set(place["properties"])

    assert known(()) == stated()
    assert known(("storage", 0)) == stated("storage")
    assert known(("targets", 3)) == stated("targets")
    assert known(("targets", 3, "network")) == stated("targets", "network")
    assert known(("targets", 3, "network", "ports", 0)) == stated("targets", "network", "ports")
    assert known(("targets", 2, "storage", 0)) == stated("targets", "storage")


def test_a_full_manifest_is_valid_for_both() -> None:
    assert by_core(FULL)
    assert by_schema(FULL)


# --- Documents that are wrong in one place ------------------------------------------------------------


REMOVED = object()


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


# Without line ends in texts: `$` matches before them in Python, and in no editor.
VALUES: list[object] = [
    0, 1, 2, -1, 64, 65, 65535, 65536, init.MAX_SEQUENCE, init.MAX_SEQUENCE + 1, True, False, None, 1.5, "",
    "x", "X", "hostfs", "container", "bootkit", "fs-only", "all", "etc", "none", "host", "simple", "partial",
    "1G", "0G", "1g", "1", "999999999T", "1000000000T", "/a", "/", "a", "/a/../b", "/a/.b", "/a/", "/a:b",
    "/" + "x" * 256, "oci:", "oci:x", "docker://x", "oci:a b", "http://x", "10.0.0.1/8", "10.0.0.1",
    "fd00::1/64", "x" * 64, "x" * 65, PRODUCT.upper(), PRODUCT, [], {}, [{}], [1], {"type": "host"},
    {"type": "none"}, {"type": "host", "ports": []}, {"type": "none", "ipv4": "10.0.0.1/8"},
]  # fmt: skip

# The core alone looks at addresses closely, and at what one part says about another.
CORE_ALONE = {"ipv4", "ipv6", "label", "service_name"}


@pytest.mark.parametrize("path", places(FULL), ids=lambda path: ".".join(map(str, path)))
def test_one_change_is_judged_alike(path: tuple[str | int, ...]) -> None:
    """Put each value into each place, or take away what is there."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema.manifest())
    for value in [*VALUES, REMOVED]:
        document = copy.deepcopy(FULL)
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        if value is REMOVED:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        strict = not CORE_ALONE & set(path) and path[:1] != ("storage",)
        agree = by_core(document) == validator.is_valid(document)
        assert agree or not (strict or by_core(document)), value


@pytest.mark.parametrize("word", ["042", "0x2a", "0o52", "4_2", "+42", "42.0", "'42'", "1:30", "1e1"])
@pytest.mark.parametrize("key", ["sequence", "epoch"])
def test_numbers_are_written_in_one_way(word: str, key: str) -> None:
    """A schema sees what an editor has read, as a number or as text: it says in words which form counts."""
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema.manifest())
    text = "\n".join(f"{name}: {json.dumps(value)}" for name, value in {**FULL, key: 42}.items())
    assert f"{key}: 42\n" in f"{text}\n"
    init.parse_manifest(text.encode(), publish.WRITTEN)
    spelled = text.replace(f"{key}: 42", f"{key}: {word}")
    with pytest.raises(init.Refused, match=f"MANIFEST-FORMAT.*{key}"):
        init.parse_manifest(spelled.encode(), publish.WRITTEN)
    stated: Any = schema.manifest()["properties"]
    if validator.is_valid(yaml.safe_load(spelled)):
        assert stated[key]["description"].endswith("; in digits, without a zero in front")


def test_addresses_have_one_form_for_both() -> None:
    """Scopes, masks and leading zeros are the ones that programs read differently."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema.manifest())
    for key, value in [("ipv6", "fe80::1%eth0/64"), ("ipv6", "fe80::1%x\nA=/64"), ("ipv6", "::1/064"),
                       ("ipv4", "1.2.3.4/0.0.0.255"), ("ipv4", "1.2.3.4/08")]:  # fmt: skip
        document = copy.deepcopy(FULL)
        document["targets"][3]["network"][key] = value
        assert not by_core(document), value
        assert not validator.is_valid(document), value
