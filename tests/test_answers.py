"""Answers, which anybody may have written, wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mosinit import answers, demo, init
from mosinit.answers import Answers, Places
from mosinit.host import Failure, Host
from tests.test_smbios import BARE, BINARY, END, PLAIN, SYSTEM, oem


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "answers.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_answers_choose_disk_source_and_sizes(tmp_path: Path) -> None:
    text = (
        'version: 1\ndisk: /dev/disk/by-id/nvme-one\nerase: "0123"\nstate: 512\nstore: 4096\nscratch: 64\n'
    )
    source = "docker://registry.example:5000/acme/release:7"
    path = write(tmp_path, f"{text}source: {source}\n")
    disk = Path("/dev/disk/by-id/nvme-one")
    assert answers.read_answers(path) == Answers(disk, "0123", source, 512 << 20, 4096 << 20, 64 << 20)
    both = "version: 1\ndisk: /dev/vdb\nerase: 0123abc\nmembers: true\n"
    assert answers.read_answers(write(tmp_path, both)) == Answers(Path("/dev/vdb"), "0123abc", members=True)
    path = write(tmp_path, "version: 1\ndisk: /dev/vdb\nsource: oci:/atomfs-cache/mosinit\n")
    assert answers.read_answers(path) == Answers(Path("/dev/vdb"), source="oci:/atomfs-cache/mosinit")
    assert answers.read_answers(write(tmp_path, "version: 1\ndisk: /dev/vdb\n")) == Answers(Path("/dev/vdb"))


def test_the_demo_s_answers_are_answers(tmp_path: Path) -> None:
    assert answers.read_answers(write(tmp_path, demo.ANSWERS)).state


BAD = [
    "", "[]", "version: 1\n", "disk: /dev/vdb\n", "version: 2\ndisk: /dev/vdb\n",
    "version: 1\ndisk: vdb\n", "version: 1\ndisk: /etc/passwd\n", "version: 1\ndisk: 7\n",
    "version: 1\ndisk: /dev/vdb\ndisk: /dev/vda\n", "version: 1\ndisk: /dev/vdb\nsource: oci:tmp\n",
    "version: 1\ndisk: /dev/vdb\nsource: oci:\n", "version: 1\ndisk: /dev/vdb\nsource: docker://A/b\n",
    "version: 1\ndisk: /dev/vdb\nsource: docker://u:p@host/b\n", "version: 1\ndisk: /dev/vdb\nsource: 7\n",
    "version: 1\ndisk: /dev/vdb\nsource: https://host/name\n", "version: 1\ndisk: /dev/vdb\nsource: false\n",
    "version: 1\ndisk: /dev/vdb\nverify: false\n", "version: 1\ndisk: /dev/vdb\nstate: -1\n",
    "version: 1\ndisk: /dev/vdb\nstate: 1G\n", "version: 1\ndisk: /dev/vdb\nstate: true\n",
    "version: 1\ndisk: /dev/vdb\nstore: 1G\n", "version: 1\ndisk: /dev/vdb\nscratch: -1\n",
    "version: 1\ndisk: /dev/vdb\nsizes: 1\n", "version: 1\ndisk: /dev/vdb\nstore: 9999999999\n",
    "version: 1\ndisk: /dev/vdb\nerase: true\n", "version: 1\ndisk: /dev/vdb\nerase: [a]\n",
    "version: 1\ndisk: /dev/vdb\nerase: ''\n", "version: 1\ndisk: /dev/vdb\nerase: ' a'\n",
    'version: 1\ndisk: /dev/vdb\nerase: "a\\e[2J"\n', f"version: 1\ndisk: /dev/vdb\nerase: {'a' * 201}\n",
    "version: 1\ndisk: /dev/vdb\nerase: null\nmembers: true\n",
    "version: 1\ndisk: /dev/vdb\nmembers: true\n",
    "version: 1\ndisk: /dev/vdb\nerase: a\nmembers: 1\n",
    "version: 1\ndisk: /dev/vdb\nerase: a\nmembers: 'true'\n",
    "version: 1\ndisk: /dev/../etc/x y\n",
    "version: 1.0\ndisk: /dev/vdb\n", "version: true\ndisk: /dev/vdb\n",
    "version: 1\ndisk: [/dev/vdb]\n", "version: 1\ndisk: ''\n", f"version: 1\ndisk: /dev/{'a' * 300}\n",
    "version: 1\ndisk: /dev/vdb\nsource: oci:/a b\n", "version: 1\ndisk: /dev/vdb\nsource: [docker://h/n]\n",
    "version: 1\ndisk: /dev/vdb\nscratch: '64'\n", "version: 1\ndisk: /dev/vdb\nstore: 1.5\n",
    "version: 1\ndisk: /dev/vdb\nstate: !!int 5\n", "version: 1\n? [a]\n: b\n",
    "version: 1\ndisk: /dev/vdb\n---\na: 1\n",
    "version: 1\ndisk: \"/dev/vdb\\n\"\n", "version: 1\ndisk: &a /dev/vdb\n", "#" * 5000, b"\xff\0",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_other_answers_are_refused_in_a_line(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="answers.yaml") as failure:
        answers.read_answers(write(tmp_path, text))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version: 1\ndisc: /dev/vdb\n", "disc is no key of answers: they have disk, erase, "),
        ("disk: /dev/vdb\n", "version is missing"),
        ("version: '1'\ndisk: /dev/vdb\n", "without quotes"),
        ("version: 1\ndisk: /dev/vdb\nmembers: true\n", "members without erase lets nothing be lost"),
        (
            "version: 1\ndisk: /dev/vdb\nerase: ' '\n",
            "erase is neither the serial of a disk nor what --plan",
        ),
        ("version: 1\ndisk: /dev/vdb\nstate: 512M\n", "state is no number of MiB: write 512"),
    ],
)
def test_what_is_wrong_with_answers_is_named(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=says):
        answers.read_answers(write(tmp_path, text))


def test_answers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="cannot read the answers"):
        answers.read_answers(tmp_path / "none")


# --- Where they lie --------------------------------------------------------------------------------------

ONE, TWO = b"version: 1\ndisk: /dev/one\n", b"version: 1\ndisk: /dev/two\n"
OTHERS = (b"io.systemd.credential:passwd.hashed-password.root=x", b"io.systemd.stub.kernel-cmdline-extra=x")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A live system without answers, whose tables hold what is not ours."""
    (tmp_path / "report.json").write_text(json.dumps({"mode": "live"}))
    (tmp_path / "table").write_bytes(SYSTEM + oem(OTHERS) + END)
    return Places(tmp_path / "report.json", tmp_path / "table", tmp_path / "raw", tmp_path / "copied")


def medium(**files: bytes) -> Callable[[Host], dict[str, bytes]]:
    names = {"answers": answers.ON_MEDIUM, "authority": answers.CA_ON_MEDIUM}
    return lambda host: {names[name]: data for name, data in files.items()}


def copied(places: Places) -> dict[str, bytes]:
    if not places.target.exists():
        return {}
    assert places.target.stat().st_mode & 0o777 == 0o700
    return {path.name: path.read_bytes() for path in places.target.iterdir()}


def test_no_answers_at_all(host: Host, places: Places) -> None:
    assert answers.find(host, places, medium()) == []
    places.table.unlink()
    assert answers.find(host, places, medium(authority=b"PEM")) == []
    assert copied(places) == {}


def test_answers_on_the_medium(host: Host, places: Places) -> None:
    assert answers.find(host, places, medium(answers=ONE, authority=b"PEM")) == ["the medium"]
    assert copied(places) == {
        "answers.yaml": ONE, "registry-ca.pem": b"PEM", "places.json": b'["the medium"]',
    }  # fmt: skip


@pytest.mark.parametrize("credential", [PLAIN + ONE, BINARY + b"dmVyc2lvbjogMQpkaXNrOiAvZGV2L29uZQo="])
def test_answers_from_a_hypervisor(host: Host, places: Places, credential: bytes) -> None:
    places.table.write_bytes(SYSTEM + oem([*OTHERS, credential]) + BARE + END)
    assert answers.find(host, places, medium()) == ["SMBIOS"]
    assert copied(places)["answers.yaml"] == ONE


def test_answers_of_qemu(host: Host, places: Places) -> None:
    places.fw_cfg.write_bytes(ONE)
    assert answers.find(host, places, medium()) == ["fw_cfg"]
    assert copied(places)["answers.yaml"] == ONE


def test_answers_in_every_place_must_agree(host: Host, places: Places) -> None:
    places.fw_cfg.write_bytes(ONE)
    places.table.write_bytes(oem([PLAIN + ONE]) + END)
    assert answers.find(host, places, medium(answers=ONE)) == ["the medium", "SMBIOS", "fw_cfg"]
    (places.target / "answers.yaml").unlink()
    with pytest.raises(Failure, match="the medium and SMBIOS and fw_cfg hold different answers"):
        answers.find(host, places, medium(answers=TWO))
    places.table.write_bytes(oem([PLAIN + TWO]) + END)
    with pytest.raises(Failure, match="SMBIOS and fw_cfg hold different answers"):
        answers.find(host, places, medium())
    assert "answers.yaml" not in copied(places)


@pytest.mark.parametrize("mode", ['"run"', "null", '["live"]'])
def test_only_a_live_system_looks(host: Host, places: Places, mode: str) -> None:
    def never(host: Host) -> dict[str, bytes]:
        raise AssertionError("nothing is looked at")

    places.report.write_text(f'{{"mode": {mode}}}')
    places.table.write_bytes(oem([PLAIN + ONE]) + END)
    assert answers.find(host, places, never) == []


def test_a_system_that_mosinit_did_not_start(host: Host, places: Places) -> None:
    places.report.unlink()
    with pytest.raises(OSError, match="report.json"):
        answers.find(host, places, medium(answers=ONE))


def test_tables_that_cannot_be_read(host: Host, places: Places) -> None:
    places.table.write_bytes(oem(OTHERS, count=7) + END)
    assert answers.find(host, places, medium()) == []
    places.table.write_bytes(oem([PLAIN + ONE], count=7) + END)
    with pytest.raises(Failure, match="answers in SMBIOS cannot be read"):
        answers.find(host, places, medium(answers=ONE))
    places.table.write_bytes(oem([PLAIN + ONE, PLAIN + TWO]) + END)
    with pytest.raises(Failure, match="each time another"):
        answers.find(host, places, medium())


def test_answers_are_small(host: Host, places: Places) -> None:
    places.fw_cfg.write_bytes(b"#" * (answers.BYTES + 1))
    with pytest.raises(OSError, match="larger than 4096"):
        answers.find(host, places, medium())
    assert init.Kernel().read(str(places.fw_cfg), 1 << 20)
