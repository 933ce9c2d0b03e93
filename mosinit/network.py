"""The network of a live system, for a person: which links there are, DHCP or an address that was typed in.

systemd-networkd does all of it. Without a word every ethernet link asks for DHCP; what a person types is one
file below /run, which is gone at the next start. What is written there was parsed first: no line of a
person's is copied.
"""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosinit.host import Failure, Host

RUNTIME = Path("/run/systemd/network")
WAIT_ONLINE = "/usr/lib/systemd/systemd-networkd-wait-online"
CONTROL_SECONDS = 30.0
# What the kernel takes for a name has more in it; networkd would read those as patterns.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
MANY = 3  # name servers, as in resolv.conf(5)

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Link:
    """An ethernet link: `how` it got its addresses is dhcp, static or none; `gateway` may be empty."""

    name: str
    mac: str
    carrier: bool
    addresses: tuple[str, ...]
    gateway: str
    how: str


# --- Looking ---------------------------------------------------------------------------------------------


def links(host: Host) -> tuple[Link, ...]:
    """Return the ethernet links of this machine. Raises `Failure`."""
    output = host.run(["networkctl", "--no-pager", "--json=short", "list"], timeout=CONTROL_SECONDS)
    try:
        return parse_links(json.loads(output))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"networkctl did not tell the links ({error}): restart, or use the medium") from error


def parse_links(listed: Any) -> tuple[Link, ...]:
    """Read what `networkctl --json` lists. ValueError, KeyError, TypeError where it makes no sense."""
    rows = [row for row in listed["Interfaces"] if row.get("Type") == "ether" and "Kind" not in row]
    return tuple(sorted((_link(row) for row in rows), key=lambda link: link.name))


def _link(row: dict[str, Any]) -> Link:
    found = [each for each in row.get("Addresses", []) if each.get("ScopeString") == "global"]
    addresses = tuple(f"{_address(each['Address'])}/{int(each['PrefixLength'])}" for each in found)
    gateways = [
        str(_address(route["Gateway"]))
        for route in row.get("Routes", [])
        if route.get("DestinationPrefixLength") == 0 and "Gateway" in route
    ]
    place = Path(row.get("NetworkFile") or "")
    how = "none" if place == Path() else "static" if place.parent == RUNTIME else "dhcp"
    mac = bytes(row.get("HardwareAddress", [])).hex(":")
    carrier = row.get("CarrierState") in ("carrier", "degraded-carrier")
    return Link(str(row["Name"]), mac, carrier, addresses, next(iter(gateways), ""), how)


def _address(numbers: list[int]) -> Address:
    return ipaddress.ip_address(bytes(numbers))


# --- Acting ----------------------------------------------------------------------------------------------


def use_dhcp(host: Host, link: Link, folder: Path = RUNTIME) -> None:
    """Let a link ask for its address, as all do from the start. Raises `Failure`."""
    _place(link, folder).unlink(missing_ok=True)
    _reload(host, link)


def use_static(host: Host, link: Link, address: str, gateway: str, dns: str, folder: Path = RUNTIME) -> None:
    """Give a link what a person typed: an address with its prefix, and perhaps a gateway and name servers
    (with spaces or commas between them). Raises `Failure` before anything is changed.
    """
    place = _place(link, folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = network_file(link.name, address, gateway, dns)
    with host.replacing(place) as fresh:
        fresh.write_text(text)
    _reload(host, link)


def network_file(name: str, address: str, gateway: str, dns: str) -> str:
    """Return what networkd reads for an address that was typed in. Raises `Failure`.

    What was typed is all that holds: neither DHCP nor a router's advertisement adds to it.
    """
    own = parse_interface(address)
    lines = ["[Match]", f"Name={name}", "[Network]", "DHCP=no", "IPv6AcceptRA=no", f"Address={own}"]
    if gateway.strip():
        lines.append(f"Gateway={parse_gateway(gateway, own)}")
    lines += [f"DNS={server}" for server in parse_servers(dns)]
    return "".join(f"{line}\n" for line in lines)


def parse_interface(text: str) -> Interface:
    """Return the address of a link with its network. Raises `Failure`."""
    typed, example = text.strip(), "write it like 10.0.0.5/24 or 2001:db8::5/64"
    if "/" not in typed:
        raise Failure(f"the address {typed[:60]!r} has no prefix length: {example}")
    try:
        own = ipaddress.ip_interface(_without_scope(typed))
    except ValueError as error:
        raise Failure(f"{typed[:60]!r} is no address: {example}") from error
    _check_unicast(own.ip, example)
    network = own.network
    if network.prefixlen == 0:
        raise Failure(f"{own} would be all of the internet: {example}")
    taken = [network.network_address, *([network.broadcast_address] if own.version == 4 else [])]
    if network.prefixlen < own.max_prefixlen - 1 and own.ip in taken:
        raise Failure(f"{own} is the network {network} itself or its broadcast address: choose another")
    return own


def parse_gateway(text: str, own: Interface) -> Address:
    """Return the gateway of a link with such an address. Raises `Failure`."""
    gateway = _parse_address(text, "gateway")
    if gateway.version != own.version:
        raise Failure(f"the gateway {gateway} and the address {own} are of two kinds: use IPv4 or IPv6")
    if gateway == own.ip:
        raise Failure(f"the gateway {gateway} is the machine's own address: name the router's")
    if gateway not in own.network and not (gateway.version == 6 and gateway.is_link_local):
        raise Failure(f"the gateway {gateway} is not in {own.network}: look at address and prefix length")
    return gateway


def parse_servers(text: str) -> tuple[Address, ...]:
    """Return name servers. Raises `Failure`."""
    words = text.replace(",", " ").split()
    if len(words) > MANY:
        raise Failure(f"{len(words)} name servers are too many: name up to {MANY}")
    return tuple(_parse_address(word, "name server") for word in words)


def _parse_address(text: str, what: str) -> Address:
    typed = text.strip()
    try:
        address = ipaddress.ip_address(_without_scope(typed))
    except ValueError as error:
        raise Failure(f"{typed[:60]!r} is no address of a {what}: write it like 10.0.0.1") from error
    _check_unicast(address, f"name the {what}'s own")
    return address


def _without_scope(typed: str) -> str:
    # What comes behind a % (fe80::1%eth0) may be anything: it would be a person's word in networkd's file.
    if "%" in typed:
        raise ValueError("a scope")
    return typed


def _check_unicast(address: Address, remedy: str) -> None:
    odd = address.is_multicast or address.is_unspecified or address.is_loopback
    if odd or address == ipaddress.IPv4Address("255.255.255.255"):
        raise Failure(f"{address} is not the address of one machine: {remedy}")


def _place(link: Link, folder: Path) -> Path:
    """Return the file for a link: its number comes before the one that asks for DHCP."""
    if not NAME.fullmatch(link.name):
        raise Failure(f"the link {link.name!r} has a name that networkd would misread: use another link")
    return folder / f"50-mosinit-{link.name}.network"


def _reload(host: Host, link: Link) -> None:
    host.run(["networkctl", "reload"], timeout=CONTROL_SECONDS)
    host.run(["networkctl", "reconfigure", link.name], timeout=CONTROL_SECONDS)


def wait_online(host: Host, seconds: int) -> None:
    """Wait until a link can reach others. Raises `Failure`."""
    words = ["--any", "--operational-state=routable", f"--timeout={seconds}"]
    try:
        host.run([WAIT_ONLINE, *words], timeout=seconds + 30)
    except Failure as failure:
        raise Failure(
            f"no network after {seconds} s: look at cable and DHCP, or type an address"
        ) from failure
