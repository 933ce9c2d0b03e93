"""What a person types and reads: options that would not count are wrong usage, and results read as lines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mosinit import cli, commands, init, keys, publish, verbs

BARE = tuple(replace(verb, tools=False, checkout=False, secrets=False) for verb in commands.VERBS)
REGISTRY = {"tls-ca": "c", "login": "l", "token-host": "h", "timeout": "5"}
IN_REGISTRY = "a registry, docker://…"
SOURCE = f"a SOURCE in {IN_REGISTRY}"
RESEAL, ANSWERS = "--reseal, which", "--answers, which says all"
RESEALS = {
    "key k": "needs no secret", "dir s": "is for the TPM as it was provisioned",
    "anew": "makes nothing anew",
    **{f"{o} {v}": "reads no release" for o, v in REGISTRY.items()},
}  # fmt: skip


def mosinit(words: str) -> int:
    return cli.main(words.split(), BARE)


# --- Options that would not count --------------------------------------------------------------------

COMBINATIONS = {
    "build --keys k --out o --manifest m --sequence 7": "--sequence goes without --manifest",
    "vm boot --disk d --dir s --enroll": "name its keyset by --keys",
    "vm boot --disk d --dir s --setup-mode --keys k": "for --enroll alone",
    "test unit --cold": "--cold",
    # provision: a request, an answer, or approvals
    "provision --dir s": "name one thing: --organisation ORG",
    "provision --dir s --organisation o --answer a": "name one thing: --organisation ORG",
    "provision --organisation o --approvals a": "name one thing: --organisation ORG",
    "provision --dir s --answer a --approvals b": "name one thing: --organisation ORG",
    "provision --organisation o": "name by --dir where",
    "provision --dir s --answer a --epoch 1": "--epoch goes with --organisation",
    "provision --dir s --answer a --event-log e": "--event-log goes with --organisation",
    "provision --dir s --answer a --again c --auths f": "--again goes with --organisation",
    "provision --dir s --answer a --auths f": "--auths goes with --organisation",
    "provision --dir s --organisation o --again c": "--again and --auths go together",
    "provision --dir s --organisation o --auths f": "--again and --auths go together",
    "provision --dir s --organisation o --tpm foo": "'foo' is no TCTI: name one such as device:/dev/tpmrm0",
    "provision --dir s --answer a --tpm foo": "'foo' is no TCTI",
    "provision --approvals a --dir s": "--dir goes with --organisation or --answer",
    "provision --approvals a --tpm t": "--tpm goes with --organisation or --answer",
    # enroll: a request, a consent, or a recovery record
    "enroll r --keys k --consent s --out o": "name one thing",
    "enroll r --keys k --open-recovery f": "name one thing",
    "enroll --keys k --consent s --open-recovery f": "name one thing",
    "enroll --keys k --consent s --out o --again s": "--again goes with a REQUEST",
    "enroll --keys k --consent s --out o --epoch 1": "--epoch goes with a REQUEST",
    "enroll --keys k --open-recovery f --again s": "--again goes with a REQUEST",
    "enroll --keys k --open-recovery f --epoch 1": "--epoch goes with a REQUEST",
    "enroll --keys k --open-recovery f --machines m": "--machines goes with a REQUEST, --consent or --out",
    "approve log --keys k --out o --machines m": "--machines goes with --machine SERIAL",
    # install: a disk, answers, or a person
    "install oci:s --answers a": f"SOURCE does not go with {ANSWERS}",
    **{
        f"install --answers a --{option}": f"--{option.split()[0]} does not go with {ANSWERS}"
        for option in (
            "disk d",
            "dir s",
            "erase w",
            "erase-members",
            "state 5",
            "store 5",
            "scratch 5",
            "plan",
        )
    },
    **{f"install --answers a --{o} {v}": f"--{o} does not go with {ANSWERS}" for o, v in REGISTRY.items()},
    **{f"install --disk d --{o} {v}": f"--{o} goes with {SOURCE}" for o, v in REGISTRY.items()},
    **{f"install oci:s --disk d --{o} {v}": f"--{o} goes with {SOURCE}" for o, v in REGISTRY.items()},
    **{
        f"install --{option}": f"--{option.split()[0]} goes with --disk"
        for option in ("erase w", "erase-members", "state 5", "store 5", "scratch 5", "plan")
    },
    "install oci:s": "a SOURCE that is in no registry goes with --disk",
    # recover: a key, what provisioning left, or a reseal
    "recover": "what shows that the disk is yours is missing: --key FILE",
    "recover oci:s --disk d --anew --plan": "what shows that the disk is yours is missing",
    "recover --key k --approvals a": "--approvals goes with --reseal",
    "recover --key k --out o": "--out goes with --reseal",
    "recover oci:s --reseal": f"SOURCE does not go with {RESEAL} reads no release",
    **{
        f"recover --reseal --{option}": f"--{option.split()[0]} does not go with {RESEAL} {reason}"
        for option, reason in RESEALS.items()
    },
    "recover --reseal --approvals a --out o": "--out does not go with --approvals",
    **{f"recover --key k --{o} {v}": f"--{o} goes with {SOURCE}" for o, v in REGISTRY.items()},
    **{f"recover oci:s --dir s --{o} {v}": f"--{o} goes with {SOURCE}" for o, v in REGISTRY.items()},
    # explain: an id, a report, all, or two logs
    "explain SB-OFF --all": "one id",
    "explain SB-OFF --markdown": "--markdown goes with --all",
    "explain --event-log e": "--event-log and --against go together",
    "explain --against e": "--event-log and --against go together",
    "explain SB-OFF --event-log e --against f": "--event-log and --against go with a report",
    "explain --all --event-log e --against f": "--event-log and --against go with a report",
    "explain --all --markdown --event-log e --against f": "--event-log and --against go with a report",
}


@pytest.mark.parametrize("words", COMBINATIONS)
def test_an_option_that_would_not_count_is_wrong_usage(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is to believe that it did, and nothing is looked at before it is said."""
    monkeypatch.chdir(tmp_path)
    assert mosinit(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert COMBINATIONS[words] in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", REGISTRY)
def test_what_says_how_a_registry_is_reached_is_for_registries(
    option: str, tmp_path: Path, keyset: keys.Keyset, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a publication they may be the sources', too."""
    written = tmp_path / "manifest.yaml"
    for source, says in (("oci:./x", f"--{option} goes with {IN_REGISTRY}"), ("docker://127.0.0.1:1/x", "")):
        written.write_text(
            f"version: 1\nproduct: {keyset.product}\nsequence: 1\nepoch: 1\nupdate_type: partial\ntargets:\n"
            f"  - {{service_name: a, service_type: fs-only, source: '{source}', version: '1'}}\n"
        )
        words = f"publish {written} --keys {keyset.folder} --to oci:{tmp_path}/release"
        status = mosinit(f"{words} --{option} {REGISTRY[option]}")
        err = capsys.readouterr().err
        assert (status == 2, "goes with" in err) == (bool(says), bool(says)), err
        assert says in err


def test_a_login_is_for_one_registry(
    tmp_path: Path, keyset: keys.Keyset, capsys: pytest.CaptureFixture[str]
) -> None:
    """A password does not go wherever a manifest points to."""
    written, login = tmp_path / "manifest.yaml", tmp_path / "login"
    login.touch(0o600)
    login.write_text("user:password")
    lines = [f"version: 1\nproduct: {keyset.product}\nsequence: 1\nepoch: 1\nupdate_type: partial\ntargets:"]
    for n in (1, 2):
        source = f"docker://127.0.0.1:{n}/x"
        lines += [f"  - {{service_name: a{n}, service_type: fs-only, source: '{source}', version: '1'}}"]
    written.write_text("\n".join(lines) + "\n")
    assert mosinit(f"publish {written} --keys {keyset.folder} --to oci:{tmp_path}/r --login {login}") == 2
    assert "--login is for one registry, and these are 127.0.0.1:1, 127.0.0.1:2" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["recover --dir none", "recover --dir none --plan", "recover --key none"])
def test_what_may_show_whose_a_disk_is_suffices(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What provisioning left opens a disk as well as the recovery key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mosinit.install.LEFT", Path("/nonexistent"))
        assert mosinit(words) != 2
    assert "what shows that the disk is yours" not in capsys.readouterr().err


# --- Results -----------------------------------------------------------------------------------------

BUILT = {
    "key": "0" * 64, "medium": "out/live.raw", "medium_bytes": 300 << 20,
    "ukis": {"live": "out/live.efi", "run": "out/run.efi"}, "uki_ids": {"live": "a" * 64, "run": "b" * 64},
    "uki_bytes": {"live": 40 << 20, "run": 41 << 20}, "initrd_bytes": {"live": 19 << 20, "run": 18 << 20},
    "kernel": "6.12", "release": "out/release", "manifest_sha256": "c" * 64, "sequence": 7, "epoch": 2,
}  # fmt: skip


def test_what_was_built_reads_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a program wants of it is in the JSON, all of it."""
    monkeypatch.setattr("mosinit.build.build", lambda *given, **options: BUILT)
    assert mosinit("build --keys k --out o") == 0
    assert (
        capsys.readouterr().out
        == f"""\
medium: out/live.raw (300.0 MiB)
release: out/release
sequence: 7
epoch: 2
manifest: sha256:{"c" * 64}
kernel: 6.12
UKI of live mode: out/live.efi (40.0 MiB, initrd 19.0 MiB)
  id: {"a" * 64}
UKI of run mode: out/run.efi (41.0 MiB, initrd 18.0 MiB)
  id: {"b" * 64}
"""
    )
    assert mosinit("build --keys k --out o --json") == 0
    assert json.loads(capsys.readouterr().out) == BUILT


def test_what_was_published_reads_well() -> None:
    made = publish.Published(7, "a" * 64, "b" * 64, "sha256:c", {"hostfs": "sha256:d"}, "6")
    assert (
        verbs.published_text(made)
        == f"""\
sequence: 7
manifest: sha256:{"a" * 64}
signature: sha256:{"b" * 64}
index: sha256:c
image of hostfs: sha256:d"""
    )


def test_a_result_reads_as_lines() -> None:
    data = {
        "disk": Path("/dev/vda"), "epoch": 3, "good": True, "plan": False, "answer": None, "empty": [],
        "left": ["one thing", "another"], "tpm": {"state": "closed", "flags": ["a", "b"], "more": {}},
        "generations": [{"sequence": 7, "runs": True, "files": ["x"]}, {"sequence": 6, "runs": False}],
        "pairs": [[1, 2], []],
    }  # fmt: skip
    made = verbs.outcome(data)
    assert (
        made.text
        == """\
disk: /dev/vda
epoch: 3
good: yes
plan: no
answer: none
empty: none
left:
  one thing
  another
tpm:
  state: closed
  flags:
    a
    b
  more: none
generations:
  - sequence: 7
    runs: yes
    files:
      x
  - sequence: 6
    runs: no
pairs:
  - 1
    2
  - none"""
    )
    assert json.loads(json.dumps(made.data)) == {**data, "disk": "/dev/vda"}


def test_a_result_cannot_drive_the_terminal() -> None:
    bad = "\x1b[2J\n"
    made = verbs.outcome({bad: [bad, {bad: bad}], "x": bad}, [bad])
    assert [c for c in made.text if not c.isprintable() and c != "\n"] == []
    assert len(made.text.splitlines()) == 5


def test_a_refused_boot_keeps_its_status_and_its_report() -> None:
    report = {"result": "refused", "failed": "SB-OFF", "checks": [], "stages": []}
    made = verbs.outcome({"report": report, "status": 3, "seconds": {"kernel": 1.5}})
    assert made.status == 3
    assert made.text.startswith("refused: ")
    assert init.CHECKS["SB-OFF"].remedy in made.text
    assert made.text.endswith("seconds:\n  kernel: 1.5")
