"""The network of a live system: what networkctl tells, what networkd is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mosinit import network
from mosinit.host import Failure
from mosinit.network import Link
from tests.recorder import Recorder, Started

# As systemd 257's `networkctl --json=short list` tells it, shortened.
LEASED = {
    "Index": 2, "Name": "enp0s3", "Type": "ether", "HardwareAddress": [82, 84, 0, 18, 52, 86],
    "CarrierState": "carrier", "OnlineState": "online",
    "NetworkFile": "/usr/lib/systemd/network/80-mosinit-ethernet.network",
    "Addresses": [
        {"Family": 2, "Address": [10, 0, 2, 15], "PrefixLength": 24, "ScopeString": "global",
         "ConfigSource": "DHCPv4", "ConfigState": "configured"},
        {"Family": 10, "Address": [254, 128, *[0] * 13, 1], "PrefixLength": 64, "ScopeString": "link",
         "ConfigSource": "foreign", "ConfigState": "configured"},
    ],
    "Routes": [
        {"Family": 2, "Destination": [10, 0, 2, 0], "DestinationPrefixLength": 24, "ConfigSource": "DHCPv4"},
        {"Family": 2, "Destination": [0, 0, 0, 0], "DestinationPrefixLength": 0, "Gateway": [10, 0, 2, 2],
         "ConfigSource": "DHCPv4"},
    ],
}  # fmt: skip
TYPED = {
    **LEASED, "Name": "enp0s10", "NetworkFile": "/run/systemd/network/50-mosinit-enp0s10.network",
    "CarrierState": "degraded-carrier", "Routes": [],
}  # fmt: skip
IDLE = {"Index": 4, "Name": "enp0s2", "Type": "ether", "CarrierState": "no-carrier"}
OTHERS = (
    {"Index": 1, "Name": "lo", "Type": "loopback", "CarrierState": "carrier"},
    {"Index": 5, "Name": "br0", "Type": "ether", "Kind": "bridge", "CarrierState": "carrier"},
)
LINK = Link("enp0s3", "52:54:00:12:34:56", True, (), "", "dhcp")


class Networked(Recorder):
    """A host whose networkctl says what it is given."""

    def __init__(self, says: object = None, fails: str = "") -> None:
        super().__init__()
        self.says, self.fails = says, fails

    def answer(self, program: Started) -> bytes:
        assert program.timeout
        if self.fails:
            raise Failure(self.fails)
        return json.dumps(self.says).encode()


def test_links_are_ethernet_by_name_with_what_they_have() -> None:
    found = network.links(Networked({"Interfaces": [LEASED, *OTHERS, TYPED, IDLE]}))
    mac = "52:54:00:12:34:56"
    assert found == (
        Link("enp0s10", mac, True, ("10.0.2.15/24",), "", "static"),
        Link("enp0s2", "", False, (), "", "none"),
        Link("enp0s3", mac, True, ("10.0.2.15/24",), "10.0.2.2", "dhcp"),
    )


@pytest.mark.parametrize(
    "says",
    [
        None, {}, {"Interfaces": 7}, {"Interfaces": [{"Type": "ether"}]},
        {"Interfaces": [{**LEASED, "Addresses": [{"ScopeString": "global", "Address": [1, 2]}]}]},
        {"Interfaces": [{**LEASED, "HardwareAddress": [999]}]},
    ],
)  # fmt: skip
def test_what_networkctl_cannot_mean_is_told_in_a_line(says: object) -> None:
    with pytest.raises(Failure, match="did not tell the links"):
        network.links(Networked(says))


# --- What is typed ---------------------------------------------------------------------------------------


def test_what_is_typed_is_all_that_holds(tmp_path: Path) -> None:
    host, folder = Networked(), tmp_path / "network"
    network.use_static(host, LINK, " 10.0.0.5/24 ", "10.0.0.1", "10.0.0.2, 2001:db8::53", folder)
    (file,) = folder.iterdir()
    assert file.name < "80-mosinit-ethernet.network"
    assert file.stat().st_mode & 0o777 == 0o644  # networkd is another user
    assert file.read_text().splitlines() == [
        "[Match]", "Name=enp0s3", "[Network]", "DHCP=no", "IPv6AcceptRA=no", "Address=10.0.0.5/24",
        "Gateway=10.0.0.1", "DNS=10.0.0.2", "DNS=2001:db8::53",
    ]  # fmt: skip
    assert host.ran == [["networkctl", "reload"], ["networkctl", "reconfigure", "enp0s3"]]
    network.use_dhcp(host, LINK, folder)
    assert list(folder.iterdir()) == []
    assert host.ran[2:] == host.ran[:2]


@pytest.mark.parametrize(
    ("address", "gateway"),
    [
        ("10.0.0.5/24", ""), ("10.0.0.0/31", "10.0.0.1"), ("10.0.0.5/255.255.255.0", "10.0.0.254"),
        ("2001:db8::5/64", "2001:db8::1"), ("2001:db8::5/64", "fe80::1"), ("2001:db8::/127", ""),
    ],
)  # fmt: skip
def test_addresses_that_a_link_can_have(address: str, gateway: str) -> None:
    text = network.network_file("eth0", address, gateway, "")
    assert ("Gateway" in text) == bool(gateway)


BAD = [
    ("", "", "", "no prefix length"), ("10.0.0.5", "", "", "no prefix length"),
    ("10.0.0.5/33", "", "", "no address"), ("10.0.0/24", "", "", "no address"),
    ("ten/24", "", "", "no address"), ("10.0.0.5/24\nDHCP=yes", "", "", "no address"),
    ("fe80::1%x\nDHCP=yes/64", "", "", "no address"), ("10.0.0.0/24", "", "", "itself or its broadcast"),
    ("10.0.0.255/24", "", "", "itself or its broadcast"), ("2001:db8::/64", "", "", "itself"),
    ("224.0.0.1/24", "", "", "not the address of one"), ("127.0.0.2/8", "", "", "not the address of one"),
    ("0.0.0.0/24", "", "", "not the address of one"), ("10.0.0.5/0", "", "", "all of the internet"),
    ("10.0.0.5/24", "10.0.1.1", "", "not in 10.0.0.0/24"), ("10.0.0.5/24", "10.0.0.5", "", "own address"),
    ("10.0.0.5/24", "2001:db8::1", "", "two kinds"),
    ("10.0.0.5/24", "router", "", "no address of a gateway"),
    ("2001:db8::5/64", "fe80::1%eth0", "", "no address of a gateway"),
    ("10.0.0.5/24", "", "dns.example", "no address of a name server"),
    ("10.0.0.5/24", "", "255.255.255.255", "not the address of one"),
    ("10.0.0.5/24", "", "1.1.1.1 2.2.2.2 3.3.3.3 4.4.4.4", "too many"),
]  # fmt: skip


@pytest.mark.parametrize(("address", "gateway", "dns", "says"), BAD)
def test_what_no_link_can_have_changes_nothing(
    address: str, gateway: str, dns: str, says: str, tmp_path: Path
) -> None:
    host = Networked()
    with pytest.raises(Failure, match=says) as failure:
        network.use_static(host, LINK, address, gateway, dns, tmp_path)
    assert "\n" not in str(failure.value)
    assert (list(tmp_path.iterdir()), host.ran) == ([], [])


@pytest.mark.parametrize("name", ["*", "eth0 eth1", "../x", "eth0\nDHCP=yes", "!eth0", ""])
def test_a_name_that_networkd_would_take_for_a_pattern(name: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="misread"):
        network.use_static(Networked(), replace(LINK, name=name), "10.0.0.5/24", "", "", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_waiting_for_a_network() -> None:
    host = Networked()
    network.wait_online(host, 20)
    assert host.ran[0][0] == network.WAIT_ONLINE
    assert "--timeout=20" in host.ran[0]
    with pytest.raises(Failure, match="no network after 20 s"):
        network.wait_online(Networked(fails="timed out"), 20)
