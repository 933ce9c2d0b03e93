"""What is signed so that a TPM opens: PCR 11 of a UKI, PCR 7 of a firmware that trusts just the keyset."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from mosinit import approvals, eventlog, firmware, init, keys
from mosinit.eventlog import DB, DBX, EV_ACTION, EV_AUTHORITY, EV_SEPARATOR, EV_VARIABLE, Variable
from mosinit.host import Failure
from tests.eventlogs import encode_log, measured, unmeasured
from tests.tpms import Swtpm, TpmMachine, swtpm

Need = Callable[..., None]
GOLDEN = Path(__file__).parent / "golden"
SEVEN = init.Pcr(7)


@pytest.fixture(scope="module")
def trusted(keyset: keys.Keyset) -> firmware.Certificates:
    return firmware.certificates_of_keyset(keyset.folder)


# --- PCR 11 -----------------------------------------------------------------------------------------


def make_pe(sections: Sequence[tuple[str, bytes, int]]) -> bytes:
    """Make a PE file of sections: name, content, bytes more that are zero once it is loaded."""
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40)
    head += struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, len(sections), 0, 0, 0, 112, 0)
    head += struct.pack("<H", 0x20B).ljust(112, b"\0")
    at = len(head) + 40 * len(sections)
    table, body = b"", b""
    for name, content, more in sections:
        table += struct.pack(
            "<8sIIII16x", name.encode(), len(content) + more, 0, len(content), at + len(body)
        )
        body += content
    return head + table + body


UKI = [(".sbat", b"sbat", 2), (".linux", b"kernel", 0), (".initrd", b"initrd", 0), (".cmdline", b"--", 1)]


def fold(*words: bytes) -> bytes:
    value = bytes(32)
    for word in words:
        value = hashlib.sha256(value + hashlib.sha256(word).digest()).digest()
    return value


def test_sections_are_measured_in_the_stubs_order_as_they_are_loaded() -> None:
    words = [
        b".linux\0",
        b"kernel",
        b".cmdline\0",
        b"--\0",
        b".initrd\0",
        b"initrd",
        b".sbat\0",
        b"sbat\0\0",
    ]
    assert approvals.predict_pcr11(make_pe(UKI)) == fold(*words, b"enter-initrd")
    assert approvals.predict_pcr11(make_pe(UKI[::-1])) == fold(*words, b"enter-initrd")


@pytest.mark.parametrize("name", [".pcrsig", ".text"])
def test_what_the_stub_does_not_measure_changes_nothing(name: str) -> None:
    assert approvals.predict_pcr11(make_pe([*UKI, (name, b"x", 0)])) == approvals.predict_pcr11(make_pe(UKI))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        make_pe(UKI[:3]),
        make_pe([*UKI, (".profile", b"ID=x", 0)]),
        make_pe([*UKI, (".dtbauto", b"x", 0)]),
        make_pe([*UKI, (".initrd", b"x", 0)]),
        make_pe([*UKI, (".osrel", b"", 0)]),
    ],
    ids=["no PE", "no command line", "profile", "device trees", "two initrds", "an empty section"],
)
def test_a_uki_that_could_be_measured_otherwise_is_not_approved(keyset: keys.Keyset, data: bytes) -> None:
    with pytest.raises(Failure):
        approvals.approve_uki(keyset, data, 1)


def test_the_approval_is_what_the_bring_up_reads(keyset: keys.Keyset) -> None:
    section = approvals.approve_uki(keyset, make_pe(UKI), 5)
    read = init.parse_uki_approval(section)
    fields = {"schema": 1, "epoch": 5, "unseal": read.unseal.hex(), "set_epoch": read.set_epoch.hex()}
    assert json.loads(section) == fields
    for epoch in (0, 65):
        with pytest.raises(init.Refused):
            approvals.approve_uki(keyset, make_pe(UKI), epoch)


# --- PCR 7: the events ------------------------------------------------------------------------------


def certificates(name: str) -> firmware.Certificates:
    def load(role: str) -> x509.Certificate:
        return x509.load_pem_x509_certificate((GOLDEN / f"{name}-{role}.pem").read_bytes())

    return firmware.Certificates(load("PK"), load("KEK"), (load("uki"), load("layer")))


def golden_pcrs() -> Mapping[int, bytes]:
    lines = (GOLDEN / "ovmf-pcrs.txt").read_text().splitlines()
    return {int(number): bytes.fromhex(value) for number, value in (line.split() for line in lines)}


def test_a_real_boots_pcr_7_is_what_its_certificates_predict() -> None:
    """OVMF 2025.02 under QEMU 10, Secure Boot on, swtpm: the live medium, systemd-boot, our UKI."""
    pcrs, trusted = golden_pcrs(), certificates("ovmf")
    assert approvals.predict_pcr7(trusted, firmware.EMPTY_DBX) == pcrs[7]
    log = (GOLDEN / "ovmf-event-log.bin").read_bytes()
    found = approvals.read_platform_log(log, pcrs[7], trusted)
    assert found == approvals.Platform(pcrs[7], firmware.EMPTY_DBX, ())
    assert found.describe()["pcr7"] == pcrs[7].hex()
    events = [event for event in eventlog.parse_event_log(log) if event.pcr == 7]
    assert tuple(events) == approvals.platform_events(trusted, firmware.EMPTY_DBX)


def test_the_log_of_a_real_boot_gives_what_its_tpm_had() -> None:
    events = eventlog.parse_event_log((GOLDEN / "ovmf-event-log.bin").read_bytes())
    pcrs = golden_pcrs()
    for pcr in (0, 1, 2, 3, 4, 5, 6, 7):
        assert eventlog.replay(events, init.Pcr(pcr)) == pcrs[pcr], pcr
    # What the initrd extends afterwards is in no firmware's log.
    value = eventlog.replay(events, init.MEASURED)
    for word in (init.ENTER_INITRD, init.LEAVE_INITRD):
        value = hashlib.sha256(value + hashlib.sha256(word).digest()).digest()
    assert value == pcrs[11]


def test_published_values_of_another_project() -> None:
    """The keyset "snakeoil" of project-machine/keys, whose PCR 7 values its folder signdata names.

    Events with a certificate of theirs are here as digests alone, in their place; all others are made anew.
    """
    shim = "605dab50-e046-4300-abb6-3dd810dd8b23"
    theirs = {
        "PK": "13a35384c1ab0491c27d68c7e43b1b1ce1d99945e15b8d52c1429a28b810b324",
        "KEK": "7cfc3b56fe174f927724a791c554644443743b87a113194a1f95814b310d3402",
        "db": "68c6cb43e41255bc2b88305cedebb06dc389e14bd40d02fd20453e312f2a601a",
        "shim": "a8f4da2f370d6fef4d735f13a92227fdf753c11b1aa2912271803132e1b738ec",
        "production": "0411b84771c49f60228aff8b38068d195e295d8c48cb93ef68731390475ad38e",
        "limited": "c3b4cbbceba53ab29dba427599f33bf37b4bff8d97a9500ce76a3f24655f5f5e",
        "tpm": "f0973cd5975524d17fc9efdbaff56d6fbb3110fa1b9a13e4303986b615ee2046",
    }
    values = {
        "production": "e5936c3e9f1b8f53d1ba5b597ed11ba0d66e29f9558d02c96e99a149b75dada8",
        "limited": "cecf0859d0c82f9b074d48d300cc83dae05df98da4144f4beaef88faf967f38c",
        "tpm": "254d1d3854f71ad22f7046d037a898a51880415b01ecdc577e242a146116eea0",
    }

    def variable(name: tuple[str, str], content: bytes) -> bytes:
        return hashlib.sha256(eventlog.encode_variable(Variable(name, content))).digest()

    for kind, value in values.items():
        digests = [variable(eventlog.SECURE_BOOT, b"\1")]
        digests += [bytes.fromhex(theirs[name]) for name in ("PK", "KEK", "db")]
        digests += [variable(DBX, firmware.EMPTY_DBX), hashlib.sha256(eventlog.SEPARATOR).digest()]
        digests += [bytes.fromhex(theirs["shim"])]
        digests += [variable((shim, "SbatLevel"), b"sbat,1,2021030218\n")]
        digests += [variable((shim, "MokListTrusted"), b"\1"), bytes.fromhex(theirs[kind])]
        events = [eventlog.Event(SEVEN, EV_VARIABLE, digest, b"") for digest in digests]
        assert eventlog.replay(events, SEVEN).hex() == value


names = st.tuples(st.uuids().map(str), st.text(st.characters(max_codepoint=0xD7FF), max_size=20))


@given(names, st.binary(max_size=100))
def test_variables_read_back(name: tuple[str, str], content: bytes) -> None:
    made = Variable(name, content)
    assert eventlog.parse_variable(eventlog.encode_variable(made)) == made


@given(st.binary(max_size=80))
def test_no_bytes_are_another_variable(data: bytes) -> None:
    try:
        assert eventlog.encode_variable(eventlog.parse_variable(data)) == data
    except ValueError:
        return


# --- PCR 7: what may be approved --------------------------------------------------------------------


def read(events: Sequence[eventlog.Event], trusted: firmware.Certificates) -> approvals.Platform:
    return approvals.read_platform_log(encode_log(events), eventlog.replay(events, SEVEN), trusted)


def variable_event(name: tuple[str, str], content: bytes, kind: int = EV_VARIABLE) -> eventlog.Event:
    return measured(7, kind, eventlog.encode_variable(Variable(name, content)))


def swap(events: Sequence[eventlog.Event], name: tuple[str, str], content: bytes) -> list[eventlog.Event]:
    """Give a variable other content, in an event that is right otherwise."""
    return [
        variable_event(name, content)
        if event.kind == EV_VARIABLE and eventlog.parse_variable(event.data).name == name
        else event
        for event in events
    ]


def test_what_differs_among_good_firmware_is_reported(trusted: firmware.Certificates) -> None:
    dbx = firmware.EMPTY_DBX
    good = list(approvals.platform_events(trusted, dbx))
    more = [
        variable_event((init.EFI_GLOBAL, "AuditMode"), b"\0"),
        variable_event((init.EFI_GLOBAL, "DeployedMode"), b"\1"),
        variable_event((init.EFI_IMAGE_SECURITY, "dbt"), b""),
        variable_event((init.EFI_IMAGE_SECURITY, "dbr"), b""),
    ]
    events = [measured(0, 8, b"version"), *good[:5], *more, *good[5:], good[-1]]
    found = read(events, trusted)
    assert found == approvals.Platform(
        eventlog.replay(events, SEVEN), dbx, ("AuditMode", "DeployedMode", "dbt", "dbr")
    )
    assert (
        read(good, trusted).pcr7 == approvals.predict_pcr7(trusted, dbx) != approvals.predict_pcr7(trusted)
    )


def test_entries_of_another_owner_or_in_another_order_are_the_same_trust(
    trusted: firmware.Certificates,
) -> None:
    turned = replace(trusted, db=trusted.db[::-1])
    assert read(approvals.platform_events(turned, loader=trusted.db[0]), trusted)
    lists = firmware.signature_list(trusted.pk)
    other = lists[:28] + bytes(16) + lists[44:]
    assert read(swap(approvals.platform_events(trusted), eventlog.PK, other), trusted)


Change = Callable[[Sequence[eventlog.Event], firmware.Certificates], Sequence[eventlog.Event]]


def inserted(place: int, event: eventlog.Event) -> Change:
    return lambda good, trusted: [*good[:place], event, *good[place:]]


def without(place: int) -> Change:
    return lambda good, trusted: [*good[:place], *good[place + 1 :]]


def holding(name: tuple[str, str], make: Callable[[firmware.Certificates], bytes]) -> Change:
    return lambda good, trusted: swap(good, name, make(trusted))


def lists(*certificates: x509.Certificate) -> bytes:
    return b"".join(firmware.signature_list(each) for each in certificates)


def headed(certificate: x509.Certificate) -> bytes:
    """Encode a list with a header of its own, as no known kind has one (UEFI 2.10, 32.4.1)."""
    plain = firmware.signature_list(certificate)
    kind, size, _, each = struct.unpack_from("<16sIII", plain)
    return struct.pack("<16sIII", kind, size + 4, 4, each) + b"more" + plain[28:]


def authority(
    choose: Callable[[firmware.Certificates], x509.Certificate], name: tuple[str, str] = DB
) -> Change:
    def change(good: Sequence[eventlog.Event], trusted: firmware.Certificates) -> list[eventlog.Event]:
        entry = bytes(16) + choose(trusted).public_bytes(Encoding.DER)
        return [*good, variable_event(name, entry, EV_AUTHORITY)]

    return change


AUDIT = variable_event((init.EFI_GLOBAL, "AuditMode"), b"\1")
RECOVERY = variable_event((init.EFI_IMAGE_SECURITY, "dbr"), b"\1" * 99)
A_HASH = bytes(16) + struct.pack("<III", 76, 0, 48) + bytes(48)
BAD_SEPARATOR = measured(7, EV_SEPARATOR, b"\1\0\0\0")
# The good events: SecureBoot, PK, KEK, db, dbx, separator, authority.
REFUSED: dict[str, tuple[Change, str]] = {
    "Secure Boot off": (holding(eventlog.SECURE_BOOT, lambda t: b"\0"), "'SecureBoot': its value is 00"),
    "another PK": (holding(eventlog.PK, lambda t: lists(t.kek)), "'PK': it holds other certificates"),
    "no KEK": (holding(eventlog.KEK, lambda t: b""), "'KEK': .* none"),
    "one more in KEK": (holding(eventlog.KEK, lambda t: lists(t.kek, t.pk)), "'KEK': it holds other"),
    "one more in db": (holding(DB, lambda t: lists(*t.db, t.pk)), "'db': it holds other certificates"),
    "one in db alone": (holding(DB, lambda t: lists(t.db[0])), "'db': it holds other certificates"),
    "one in db twice": (holding(DB, lambda t: lists(*t.db, t.db[0])), "'db': it holds other certificates"),
    "a hash in db": (holding(DB, lambda t: lists(*t.db) + A_HASH), "'db': it holds other certificates"),
    "more in a header": (holding(DB, lambda t: headed(t.db[0]) + lists(t.db[1])), "'db': a signature list"),
    "a damaged db": (holding(DB, lambda t: lists(*t.db)[:-1]), "'db': a signature list"),
    "audit mode": (inserted(5, AUDIT), "'AuditMode': its value is 01"),
    "a recovery key": (inserted(5, RECOVERY), "'dbr': its value is 0101"),
    "an unknown variable": (inserted(5, variable_event((init.EFI_GLOBAL, "Mok"), b"")), "'Mok': it is none"),
    "db of another": (inserted(5, variable_event((init.EFI_GLOBAL, "db"), b"")), "'db': it is none"),
    "a variable twice": (lambda g, t: [*g[:5], g[0], *g[5:]], "'SecureBoot': it was measured twice"),
    "a variable that is late": (lambda g, t: [*g[:4], g[5], g[4], g[6]], "'dbx': nothing of this kind"),
    "debug mode": (
        inserted(0, measured(7, EV_ACTION, b"UEFI Debug Mode")),
        "EV_EFI_ACTION b'UEFI Debug Mod",
    ),
    "an unknown kind": (inserted(7, measured(7, 0x800000E1, b"device")), "kind 0x800000e1 b'device': noth"),
    "an event of the log alone": (inserted(5, unmeasured(b"", 7)), "EV_NO_ACTION"),
    "an error separator": (
        lambda g, t: [*g[:5], BAD_SEPARATOR, g[6]],
        "EV_SEPARATOR .* nothing of this kind",
    ),
    "two separators": (lambda g, t: [*g[:6], *g[5:]], "event 6 .* EV_SEPARATOR"),
    "an early authority": (lambda g, t: [*g[:5], g[6], *g[5:]], "EV_EFI_VARIABLE_AUTHORITY 'db': nothing"),
    "the layer key": (authority(lambda t: t.db[1]), "event 7 .* verified by the layer key"),
    "a foreign key": (authority(lambda t: t.pk), "'db': .* a foreign one"),
    "shim's list": (authority(lambda t: t.db[0], (firmware.SHIM, "MokList")), "'MokList': .* by MokList"),
    "no separator": (lambda g, t: g[:5], "has no separator"),
    "nothing verified": (without(6), "has no authority"),
    **{
        f"no {name}": (without(place), f"has no {name}")
        for place, (_, name) in enumerate(approvals.REQUIRED)
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_just_the_keyset_is_not_approved(trusted: firmware.Certificates, case: str) -> None:
    change, words = REFUSED[case]
    with pytest.raises(Failure, match=f"{words}.*trust exactly this keyset.*make a new request"):
        read(change(approvals.platform_events(trusted), trusted), trusted)


def test_a_log_that_says_another_thing_than_it_measured_is_refused(trusted: firmware.Certificates) -> None:
    good = list(approvals.platform_events(trusted))
    bad = variable_event(eventlog.SECURE_BOOT, b"\0")
    with pytest.raises(Failure, match="'SecureBoot': what was measured is something else"):
        read([good[0]._replace(digest=bad.digest), *good[1:]], trusted)


def test_a_log_that_is_not_this_tpms_is_refused(trusted: firmware.Certificates) -> None:
    log = encode_log(approvals.platform_events(trusted))
    with pytest.raises(Failure, match="gives PCR 7 .* its TPM has 00.*: restart .* make a new request"):
        approvals.read_platform_log(log, bytes(32), trusted)
    with pytest.raises(Failure, match="cannot be read: an event log.*; restart .* make a new request"):
        approvals.read_platform_log(log[:-1], bytes(32), trusted)


@given(st.data())
def test_no_spoiled_log_does_more_than_be_refused(data: st.DataObject) -> None:
    log = bytearray((GOLDEN / "ovmf-event-log.bin").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        log[data.draw(st.integers(0, len(log) - 1))] = data.draw(st.integers(0, 255))
    try:
        pcr7 = eventlog.replay(eventlog.parse_event_log(bytes(log)), SEVEN)
        assert approvals.read_platform_log(bytes(log), pcr7, certificates("ovmf"))
    except (Failure, ValueError):
        return


@pytest.mark.parametrize("value", [b"", bytes(32), b"\xff" * 32, bytes(20)])
def test_what_is_no_pcr_7_is_not_approved(keyset: keys.Keyset, value: bytes) -> None:
    with pytest.raises(Failure, match="no PCR 7"):
        approvals.approve_platform(keyset, value, 1)


# --- Both, and a TPM that opens ---------------------------------------------------------------------


def sealed(tpm: Swtpm, policies: init.PolicyKeys, secret: bytes) -> list[bytes]:
    """Do what provisioning does, by tpm2-tools: storage key, epoch index, sealed secret."""
    (tpm.folder / "seal.policy").write_bytes(policies.seal)
    parent = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt"
    tpm.run("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc256:aes128cfb", "-a", parent, "-c", "srk")
    tpm.run("tpm2_evictcontrol", "-Q", "-C", "o", "-c", "srk", f"{init.SRK:#x}")
    tpm.run("tpm2_flushcontext", "-t")
    index = f"{init.EPOCH_INDEX:#x}"
    bits = "ownerwrite|policywrite|authread|no_da|nt=bits"
    tpm.run("tpm2_nvdefine", "-Q", index, "-C", "o", "-s", "8", "-a", bits, "-L", "seal.policy")
    tpm.run("tpm2_nvsetbits", "-Q", index, "-C", "o", "-i", "1")
    mode = "fixedtpm|fixedparent|adminwithpolicy|noda"
    tpm.run("tpm2_create", "-Q", "-C", f"{init.SRK:#x}", "-i", "-", "-L", "seal.policy", "-a", mode,
            "-u", "seal.pub", "-r", "seal.priv", data=secret)  # fmt: skip
    tpm.run("tpm2_flushcontext", "-t")
    return [(tpm.folder / f"seal.{kind}").read_bytes()[2:] for kind in ("pub", "priv")]


def extend(tpm: Swtpm, pcr: int, *words: bytes) -> None:
    for word in words:
        tpm.run("tpm2_pcrextend", "-Q", f"{pcr}:sha256={hashlib.sha256(word).hexdigest()}")


def test_a_tpm_opens_for_what_was_approved_alone(
    need: Need, keyset: keys.Keyset, trusted: firmware.Certificates, tmp_path: Path
) -> None:
    need("swtpm", "tpm2_create")
    policies, secret = approvals.policy_keys(keyset), b"s" * 32
    approval = init.parse_uki_approval(approvals.approve_uki(keyset, make_pe(UKI), 2))
    pcr7 = approvals.predict_pcr7(trusted)
    platform = {pcr7.hex(): approvals.approve_platform(keyset, pcr7, 64)}
    with swtpm(tmp_path / "tpm") as tpm:
        public, private = sealed(tpm, policies, secret)
        tokens, machine = init.Tokens(public, private, b"", platform, b"", b"", b""), TpmMachine(tpm)
        extend(tpm, 7, *(event.data for event in approvals.platform_events(trusted)))
        extend(tpm, 11, b".linux\0", b"kernel", b".cmdline\0", b"--\0", b".initrd\0", b"initrd")
        extend(tpm, 11, b".sbat\0", b"sbat\0\0")
        storage_key = init.read_storage_key(machine)
        assert storage_key

        def unseal() -> bytearray:
            return init.unseal(machine, tokens, storage_key, policies, approval)

        with pytest.raises(init.Refused, match="TPM-POLICY|TPM-APPROVAL"):
            unseal()
        extend(tpm, 11, init.ENTER_INITRD)
        assert unseal() == secret
        init.raise_epoch(machine, tokens, storage_key, policies, approval, 2)
        assert init.read_epoch(machine) == 0b11
        assert unseal() == secret
        tpm.run("tpm2_nvsetbits", "-Q", f"{init.EPOCH_INDEX:#x}", "-C", "o", "-i", "4")
        with pytest.raises(init.Refused, match="EPOCH"):
            unseal()
        extend(tpm, 11, init.LEAVE_INITRD)
        with pytest.raises(init.Refused):
            unseal()
