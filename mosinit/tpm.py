"""The TPM as provisioning uses it: tpm2-pytss on any TCTI. What is read is read by the core's own functions,
through the same connection.

Secrets cross the bus in salted, encrypted sessions, passwords not at all. The salt goes to the storage root
key that the TPM itself shows: who sits on the bus and plays TPM while a machine is provisioned gets all.
Provision machines that you hold.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_SE, TPMA_NV, TPMA_SESSION
from tpm2_pytss.TCTILdr import TCTILdr
from tpm2_pytss.tsskey import TSSPrivKey
from tpm2_pytss.types import (
    TPM2B_NV_PUBLIC,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMS_NV_PUBLIC,
    TPMS_SENSITIVE_CREATE,
    TPMT_PUBLIC,
)

from mosinit import explain, init
from mosinit.exchange import Seal
from mosinit.host import Failure, Usage
from mosinit.records import SUDI_HEAD, parse_point

DEVICE = "device:/dev/tpmrm0"
OWNERS_KEYS = range(0x81000000, 0x81010000)  # TCG, Registry of Reserved TPM 2.0 Handles, 2.3
NV_INDICES = 0x01000000  # where they begin; part 2, 7.2
WRITTEN = 0x20000000  # TPMA_NV, part 2, 13.4

# Dictionary attacks are on whatever asks for a password outside our policy: 32 tries, one more every ten
# minutes, a day after a wrong lockout password. Never off: that would be for good.
TRIES, RECOVERY_SECONDS, LOCKOUT_SECONDS = 32, 600, 86400

CC_SET_PRIMARY_POLICY = 0x12E  # part 2, 6.5.2
CAP_AUTH_POLICIES, RC_CAPABILITY = 9, 0x1C4  # part 2, 6.12; TPM_RC_VALUE for the first parameter
RC_AUTH = (0x8E, 0xA2)  # TPM_RC_AUTH_FAIL, TPM_RC_BAD_AUTH (part 2, 6.6.3), of whatever session
RC_FORMAT_ONE = 0xBF  # what is left of such a code without the session's number
_REMOVE_SRK = (
    f"remove it (`tpm2_evictcontrol -C o -c {init.SRK:#x}`), or clear the TPM in the firmware's setup"
)
_NAME_ONE = (
    f"name the TPM by --tpm: {DEVICE} where the firmware has one that is switched on, or swtpm:path=SOCKET "
    "for a running swtpm whose control socket is SOCKET.ctrl"
)
HIERARCHIES: Mapping[str, tuple[init.Permanent, ESYS_TR]] = {
    "lockout": (init.Permanent.LOCKOUT_AUTH, ESYS_TR.LOCKOUT),
    "endorsement": (init.Permanent.ENDORSEMENT_AUTH, ESYS_TR.ENDORSEMENT),
    "owner": (init.Permanent.OWNER_AUTH, ESYS_TR.OWNER),
}
POLICY_HANDLES = (0x4000000A, 0x4000000B, 0x40000001)  # of the same; part 2, 7.4


class WrongAuth(Failure):
    """The TPM does not take a password."""


class TpmKey(NamedTuple):
    """A key that only its TPM can load: its public area, and the file (PEM) that tpm2-openssl takes."""

    public: bytes
    pem: bytes


@contextlib.contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn whatever the TPM or the way to it does not do into a refusal."""
    try:
        with init.asking_tpm(what):
            yield
    except TSS2_Exception as error:
        if error.rc & RC_FORMAT_ONE in RC_AUTH and error.rc < 1 << 16:
            raise WrongAuth(f"the TPM does not take the password: {what}") from error
        check = "TPM-LOCKOUT" if error.rc & 0xFFFF == init.RC_LOCKOUT else "TPM-ANSWER"
        raise init.Refused(check, expected=what, seen=f"{error} ({error.rc:#x})") from error


def split_tcti(words: str) -> tuple[str, str]:
    """Return the way to a TPM and its place, as a TCTI string has them. Raises `Usage` if it is none."""
    name, _, place = words.partition(":")
    if not name.isalnum() or not place:
        raise Usage(f"{words!r} is no TCTI: name one such as {DEVICE}")
    return name, place


@contextlib.contextmanager
def open_tpm(words: str) -> Iterator[Tpm]:
    """Yield the TPM that a TCTI string names, such as device:/dev/tpmrm0 or swtpm:path=SOCKET."""
    # The libraries' own messages: each is an exception here as well.
    os.environ.setdefault("TSS2_LOG", "all+NONE")
    name, place = split_tcti(words)
    with explain.advising({"TPM-ABSENT": _NAME_ONE}):
        if name == "device" and not os.path.exists(place):
            raise init.Refused("TPM-ABSENT", expected="a TPM 2.0", seen=f"no {place}")
        try:
            way = TCTILdr(name, place)
        except TSS2_Exception as error:
            raise init.Refused("TPM-ABSENT", expected=f"a TPM 2.0 at {words}", seen=str(error)) from error
    with contextlib.closing(way), asking("a TPM 2.0"), contextlib.closing(ESAPI(way)) as esapi:
        yield Tpm(way, esapi)


class Tpm(init.Machine):
    """A TPM: the core's seam for reading, and what provisioning alone does."""

    def __init__(self, way: TCTILdr, esapi: ESAPI) -> None:
        super().__init__()
        self._way, self._esapi = way, esapi

    def tpm(self, command: bytes) -> bytes:
        """Send one command of the core's and return the answer."""
        try:
            self._way.transmit(command)
            return bytes(self._way.receive())
        except TSS2_Exception as error:
            raise OSError(errno.EIO, str(error)) from error

    # --- The storage root key and what lies under it

    def find_storage_key(self) -> bytes | None:
        """Return the public area of the storage root key, None if there is none.

        Raises `Failure` if what is there is no key of our template.
        """
        with asking("the storage root key"):
            seen = init.read_storage_key(self)
        try:
            return seen and whole_point(seen, init.SRK_HEAD)
        except init.Refused as refused:
            raise Failure(
                f"the TPM holds another object at {init.SRK:#x} than its storage root key: {_REMOVE_SRK}"
            ) from refused

    def make_storage_key(self, random: bytes) -> bytes:
        """Make a new key and keep it as the storage root key, in place of one that is there.

        64 random bytes make it another one than every key before: nothing that those guarded loads under it,
        and there is no need to know them again.
        """
        unique = b"".join(b"\0\x20" + random[start : start + 32] for start in (0, 32))
        with self._primary(unique) as (key, public):
            whole_point(public, init.SRK_HEAD)
            self.remove_storage_key()
            with asking("the storage root key to be kept"):
                self._evict(key)
        again = self.find_storage_key()
        if again != public:
            raise init.Refused("TPM-ANSWER", expected="the key just made", seen=repr(again))
        return public

    def remove_storage_key(self) -> None:
        """Remove the SRK if it is there."""
        if self.find_storage_key() is not None:
            with asking("the storage root key to be removed"):
                self._evict(self._esapi.tr_from_tpmpublic(init.SRK))

    def _evict(self, key: ESYS_TR) -> None:
        """Make a loaded key persistent as the SRK; if it is the SRK, remove it."""
        with self._session() as session:
            self._esapi.evict_control(ESYS_TR.OWNER, key, init.SRK, session1=session)

    @contextlib.contextmanager
    def _primary(self, unique: bytes) -> Iterator[tuple[ESYS_TR, bytes]]:
        """Yield the primary key of the SRK's template while it is loaded."""
        template = TPMT_PUBLIC.unmarshal(init.SRK_HEAD + unique)[0]
        with asking("a storage root key"):
            with self._session() as session:
                key, public, *_ = self._esapi.create_primary(
                    TPM2B_SENSITIVE_CREATE(), TPM2B_PUBLIC(template), ESYS_TR.OWNER, session1=session
                )
            try:
                yield key, public.publicArea.marshal()
            finally:
                with contextlib.suppress(TSS2_Exception):
                    self._esapi.flush_context(key)

    @contextlib.contextmanager
    def _session(self, *, salted: bool = False) -> Iterator[ESYS_TR]:
        """Yield a session that proves passwords without sending them.

        With the salt it also encrypts the first parameter both ways.
        """
        key = self._esapi.tr_from_tpmpublic(init.SRK) if salted else ESYS_TR.NONE
        session = self._esapi.start_auth_session(
            key, ESYS_TR.NONE, TPM2_SE.HMAC, "aes128cfb", TPM2_ALG.SHA256
        )
        try:
            attributes = TPMA_SESSION.CONTINUESESSION
            attributes |= (TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT) if salted else 0
            self._esapi.trsess_set_attributes(session, attributes)
            yield session
        finally:
            with contextlib.suppress(TSS2_Exception):
                self._esapi.flush_context(session)

    def _create(self, template: bytes, auth: bytes, data: bytes) -> tuple[bytes, bytes, bytes]:
        """Make an object under the SRK; return its TPM2B_PRIVATE (no size), public area and PEM."""
        area = TPM2B_PUBLIC(TPMT_PUBLIC.unmarshal(template)[0])
        sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(userAuth=auth, data=data))
        with self._session(salted=True) as session:
            key = self._esapi.tr_from_tpmpublic(init.SRK)
            private, public, *_ = self._esapi.create(key, sensitive, area, session1=session)
        pem = TSSPrivKey(private, public, empty_auth=not auth, parent=init.SRK).to_pem()
        return bytes(private), public.publicArea.marshal(), pem

    def make_identity(self, auth: bytes) -> TpmKey:
        """Make the SUDI key: it signs only in this TPM, and only for who knows `auth`."""
        with asking("a SUDI key"):
            _, public, pem = self._create(SUDI_HEAD + bytes(4), auth, b"")
        whole_point(public, SUDI_HEAD)
        return TpmKey(public, pem)

    def seal(self, keys: init.PolicyKeys, secret: bytes) -> Seal:
        """Seal the config volume's secret: to this TPM, and to what the organisation approves."""
        with asking("a sealed secret"):
            private, public, _ = self._create(keys.sealed_head[:-2] + bytes(2), b"", secret)
        return Seal(public, private)

    # --- The epoch index

    def find_epoch_index(self, keys: init.PolicyKeys) -> bytes | None:
        """Return the public area of the epoch index, None if there is none, Refused if it is not ours."""
        try:
            with asking("the epoch index"):
                seen = init.read_epoch_index(self)
        except init.Refused as refused:
            if refused.check == "TPM-INDEX":
                return None
            raise
        if seen not in (keys.epoch_index, unwritten(keys)):
            raise init.Refused("TPM-INDEX", expected=keys.epoch_index.hex(), seen=seen.hex())
        return seen

    def make_epoch_index(self, keys: init.PolicyKeys, epoch: int) -> bytes:
        """Define the epoch index unless it is there, set the bits up to `epoch`, return its public area."""
        seen, bits = self.find_epoch_index(keys), init.epoch_bits(epoch)
        with asking("the epoch index to be made"):
            if seen is None:
                public = TPM2B_NV_PUBLIC(nvPublic=TPMS_NV_PUBLIC.unmarshal(unwritten(keys))[0])
                with self._session() as session:
                    self._esapi.nv_define_space(b"", public, session1=session)
            if seen != keys.epoch_index or init.read_epoch(self) & bits != bits:
                index = self._esapi.tr_from_tpmpublic(init.EPOCH_INDEX)
                with self._session() as session:
                    self._esapi.nv_set_bits(index, bits, auth_handle=ESYS_TR.OWNER, session1=session)
            seen, set_bits = init.read_epoch_index(self), init.read_epoch(self)
        if seen != keys.epoch_index:
            raise init.Refused("TPM-INDEX", expected=keys.epoch_index.hex(), seen=seen.hex())
        if set_bits != bits:
            raise init.Refused("EPOCH", expected=f"epoch bits {bits:#x}", seen=f"{set_bits:#x}")
        return seen

    def remove_epoch_index(self) -> None:
        """Remove the epoch index if it is there."""
        with asking("the epoch index to be removed"):
            try:
                init.read_epoch_index(self)
            except init.TpmError as error:
                if error.code == init.RC_ABSENT:
                    return
                raise
            index = self._esapi.tr_from_tpmpublic(init.EPOCH_INDEX)
            with self._session() as session:
                self._esapi.nv_undefine_space(index, session1=session)

    # --- The hierarchies' passwords

    def flags(self) -> tuple[init.Permanent, int]:
        """Return TPMA_PERMANENT and TPMA_STARTUP_CLEAR."""
        with asking("the TPM to tell its state"):
            return init.read_tpm_flags(self)

    def policies(self) -> list[str]:
        """Return the hierarchies that a policy opens beside their password: none, where all is well.

        A TPM from before this capability (revision 1.38) tells of none.
        """
        with asking("the TPM to tell the policies of its hierarchies"):
            try:
                found = dict(self._policy(handle) for handle in POLICY_HANDLES)
            except init.TpmError as error:
                if error.code == RC_CAPABILITY:
                    return []
                raise
        return [name for name, handle in zip(HIERARCHIES, POLICY_HANDLES, strict=True) if found[handle]]

    def _policy(self, handle: int) -> tuple[int, bool]:
        answer = init.read_capability(self, CAP_AUTH_POLICIES, handle, 1)
        if (answer.number(4), answer.number(4)) != (1, handle):
            raise init.TpmError(init.Cc.GET_CAPABILITY, 0, "the policy of another hierarchy")
        return handle, (answer.number(2) != TPM2_ALG.NULL)

    def remove_policies(self) -> None:
        """Take every policy of a hierarchy away: who set one needs no password, and a password ends none.

        That of lockout only while it has no password: none was set before the policies were removed.
        """
        self._remove_policies(ESYS_TR.ENDORSEMENT, ESYS_TR.OWNER)

    def _remove_policies(self, *handles: ESYS_TR) -> None:
        flags, _ = self.flags()
        with asking("the policies of the hierarchies to be removed"):
            for handle in handles:
                with self._session() as session:
                    self._esapi.set_primary_policy(handle, b"", TPM2_ALG.NULL, session1=session)
            if not flags & init.Permanent.LOCKOUT_AUTH:
                self._remove_lockout_policy()

    def _remove_lockout_policy(self) -> None:
        """Do what tpm2-pytss does with the other hierarchies alone (part 3, 24.3)."""
        body = struct.pack(">II", POLICY_HANDLES[0], len(init.EMPTY_PASSWORD)) + init.EMPTY_PASSWORD
        body += struct.pack(">HH", 0, TPM2_ALG.NULL)
        head = struct.pack(">HII", init.ST_SESSIONS, 10 + len(body), CC_SET_PRIMARY_POLICY)
        answer = self.tpm(head + body)
        if answer[6:10] != bytes(4):
            raise OSError(errno.EIO, f"TPM2_SetPrimaryPolicy: the TPM answered {answer[:10].hex()}")

    def close_hierarchies(self, auths: Mapping[str, bytes]) -> None:
        """Remove policies, set dictionary attack parameters and the passwords that are not set, and switch
        TPM2_Clear off.

        An interrupted run goes on from what is set: passwords that are set must be these. The lockout
        password comes last: while there is none, whoever lost the others can still undo or end this, see
        `clear` and `end_closing`.
        """
        self._use(auths)
        self.remove_policies()
        self._close(auths)

    def clear(self) -> None:
        """Clear a TPM that has no lockout password yet, passwords and keys."""
        with asking("the TPM to be cleared"), self._session() as session:
            self._esapi.clear(ESYS_TR.LOCKOUT, session1=session)

    def keeps_others(self) -> bool:
        """Say whether the owner's hierarchy keeps a key or an index beside ours: clearing would end it."""
        with asking("the keys and indices that the TPM keeps"):
            _, found = self._esapi.get_capability(TPM2_CAP.HANDLES, OWNERS_KEYS[0], 64)
            keys = any(int(key) in OWNERS_KEYS and int(key) != init.SRK for key in found.data.handles)
            more, found = self._esapi.get_capability(TPM2_CAP.HANDLES, NV_INDICES, 64)
            indices = [int(index) for index in found.data.handles if int(index) != init.EPOCH_INDEX]
            return keys or bool(more) or any(not self._is_firmwares(index) for index in indices)

    def _is_firmwares(self, index: int) -> bool:
        """Say whether an index stays when the TPM is cleared, as its maker's certificates do."""
        public, _ = self._esapi.nv_read_public(self._esapi.tr_from_tpmpublic(index))
        return bool(public.nvPublic.attributes & TPMA_NV.PLATFORMCREATE)

    def end_closing(self, auths: Mapping[str, bytes]) -> None:
        """Set the passwords that are not set yet, and switch TPM2_Clear off; those that are set need not be
        known.

        Since the first ones were set anybody may have had this TPM: what the others still let be changed is
        set once more.
        """
        flags, _ = self.flags()
        set_before = {handle for flag, handle in HIERARCHIES.values() if flags & flag}
        self._remove_policies(*({ESYS_TR.ENDORSEMENT, ESYS_TR.OWNER} - set_before))
        self._close(auths)

    def _close(self, auths: Mapping[str, bytes]) -> None:
        """Limit wrong tries, set the passwords that are not set, the lockout's last, and switch TPM2_Clear
        off.
        """
        self._limit_tries()
        with asking("the TPM to be closed"):
            self._set("endorsement", auths["endorsement"])
            self._set("owner", auths["owner"])
            self._switch_clear_off()
            self._set("lockout", auths["lockout"])

    def _limit_tries(self) -> None:
        with asking("the TPM to limit wrong tries"), self._session() as session:
            self._esapi.dictionary_attack_parameters(
                TRIES, RECOVERY_SECONDS, LOCKOUT_SECONDS, session1=session
            )

    def _switch_clear_off(self) -> None:
        if not self.flags()[0] & init.Permanent.CLEAR_DISABLED:
            with self._session() as session:
                self._esapi.clear_control(ESYS_TR.LOCKOUT, True, session1=session)

    def check_owner(self, auths: Mapping[str, bytes]) -> None:
        """Try the owner's password, if one is set, on what leaves nothing behind.

        Raises `WrongAuth`; no wrong try of that one locks the TPM. From here these passwords are used.
        """
        self._use(auths)
        with self._primary(bytes(4)):
            pass

    def open_hierarchies(self, auths: Mapping[str, bytes]) -> None:
        """Take the passwords away; an interrupted run goes on from what is still set.

        Only the firmware could switch TPM2_Clear on again (part 3, 24.7): it stays off.
        """
        self._use(auths)
        with asking("the TPM to be opened"):
            for hierarchy in ("endorsement", "owner", "lockout"):
                self._unset(hierarchy)

    def _use(self, auths: Mapping[str, bytes]) -> None:
        flags, _ = self.flags()
        for hierarchy, (flag, handle) in HIERARCHIES.items():
            self._esapi.tr_set_auth(handle, auths[hierarchy] if flags & flag else b"")

    def _set(self, hierarchy: str, auth: bytes) -> None:
        flag, handle = HIERARCHIES[hierarchy]
        if not self.flags()[0] & flag:
            with self._session(salted=True) as session:
                self._esapi.hierarchy_change_auth(handle, auth, session1=session)

    def _unset(self, hierarchy: str) -> None:
        flag, handle = HIERARCHIES[hierarchy]
        if self.flags()[0] & flag:
            with self._session() as session:
                self._esapi.hierarchy_change_auth(handle, b"", session1=session)


def whole_point(area: bytes, head: bytes) -> bytes:
    """Return the public area of a P-256 key as it is, if both of its coordinates have all their 32 bytes.

    A TPM may leave out zeros that one begins with; what takes such a key apart would have to guess.
    """
    try:
        parse_point(area, head)
    except ValueError as error:
        expected = "a P-256 key of our template with coordinates of 32 bytes; the next one made is another"
        raise init.Refused("TPM-ANSWER", expected=expected, seen=area.hex()[:300]) from error
    return area


def unwritten(keys: init.PolicyKeys) -> bytes:
    """Return the public area of the epoch index as it is until its first bits are set."""
    area = keys.epoch_index
    attributes = int.from_bytes(area[6:10], "big") & ~WRITTEN
    return area[:6] + attributes.to_bytes(4, "big") + area[10:]
