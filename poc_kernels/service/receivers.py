"""Receivers of callbacks: the URLs that are posted to, what may be shown of them, and which hosts they may have."""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import unquote_plus

Address = IPv4Address | IPv6Address

_URL = re.compile(r"\bhttps?://[^\s'\"]+", re.IGNORECASE)
_USERINFO = re.compile(r"//[^/?#]*@")
_HIDDEN = "..."
_MIN_SECRET = 4
"""Shorter values of a query are hidden in the URL alone: as words, they would be anywhere in a text."""

_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_THIS_NETWORK = ip_network("0.0.0.0/8")
_METADATA = tuple(map(ip_address, ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")))
"""Where clouds serve a machine's credentials, beside the link-local 169.254.169.254."""
_NAT64 = ip_network("64:ff9b::/96")


# ---- URLs ----


def url_below(callback_url: str, kind: str) -> str:
    """Return the URL for posts of a kind: kind is added to the path, before the query. Nothing else changes."""
    path, mark, query = callback_url.partition("#")[0].partition("?")
    return f"{path.rstrip('/')}/{kind}{mark}{query}"


def receiver_of(url: str) -> str:
    """Return host and port of a URL, which receivers are told apart by; any text is taken."""
    return _USERINFO.sub("//", url.partition("?")[0]).partition("//")[2].partition("/")[0].lower()


def masked(url: str) -> str:
    """Return what may be shown of a URL: all but user, password and query, which can be secrets."""
    head, mark, _ = url.partition("?")
    return _USERINFO.sub("//", head) + (mark and mark + _HIDDEN)


def masked_urls(text: str) -> str:
    """Return a text with every URL in it `masked`."""
    return _URL.sub(lambda found: masked(found[0]), text)


def secrets_of(url: str) -> tuple[str, ...]:
    """Return the parts of a URL that must not be shown, longest first, in the forms in which receivers quote them."""
    head, _, query = url.partition("?")
    userinfo = "".join(_USERINFO.findall(head))[2:-1]
    values = {each.partition("=")[2] for each in query.split("&")}
    found = {query, userinfo, userinfo.partition(":")[2], *values}
    found |= {unquote_plus(each) for each in found}
    return tuple(sorted((each for each in found if len(each) >= _MIN_SECRET), key=len, reverse=True))


def without(secrets: tuple[str, ...], text: str) -> str:
    """Return a text with every secret in it hidden."""
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    return text


# ---- hosts ----


class CallbackHosts:
    """Which hosts callbacks may go to.

    A host is allowed if its address lies in a listed network, or if its name is listed and its address is none that
    only machines nearby can mean: loopback, link-local (where clouds serve credentials), unspecified, multicast or
    reserved. Names are judged by the addresses that they resolve to, each time that a connection is made.

    Args:
        allowed: names, ``*.suffix`` for all names below one, ``*`` for all hosts, addresses, and networks such as
            10.0.0.0/8, separated by commas; None for ``*``.
        loopback: whether addresses of loopback are allowed as others are: where the server itself listens on one.

    Raises:
        ValueError: an entry is none of these.
    """

    def __init__(self, allowed: str | None = None, *, loopback: bool = False) -> None:
        self._loopback = loopback
        self._names: set[str] = set()
        self._suffixes: list[str] = []
        self._networks: list[IPv4Network | IPv6Network] = []
        for entry in ("*" if allowed is None else allowed).split(","):
            self._add(entry.strip().lower().removesuffix("."))

    def _add(self, entry: str) -> None:
        try:
            self._networks.append(ip_network(entry))
            return
        except ValueError:
            pass
        name = entry.removeprefix("*.")
        if entry == "*":
            self._suffixes.append("")
        elif not _NAME.fullmatch(name) or literal_address(name) is not None:
            raise ValueError(f"hosts must be names, *.suffix, addresses or networks, got {entry!r}")
        elif name == entry:
            self._names.add(name)
        else:
            self._suffixes.append(f".{name}")

    def may_allow(self, host: str, *, by_proxy: bool = False) -> bool:
        """Return whether callbacks may go to a host, as far as that is known before its name is resolved.

        Args:
            host: a name or an address, in ASCII and without brackets.
            by_proxy: whether it is a proxy that resolves the name: then only the name can be judged.
        """
        host = host.lower().removesuffix(".")
        address = literal_address(host)
        if address is None and (host == "localhost" or host.endswith(".localhost")):
            address = IPv4Address("127.0.0.1")
        if address is not None:
            return self.allows(host, address)
        return self._lists(host) or (bool(self._networks) and not by_proxy)

    def allows(self, host: str, address: Address) -> bool:
        """Return whether a connection may be made to this address of a host."""
        address = meant(address)
        if any(address in network for network in self._networks):
            return True
        return self._lists(host.lower().removesuffix(".")) and not self._is_near(address)

    def _lists(self, host: str) -> bool:
        return host in self._names or any(host.endswith(suffix) for suffix in self._suffixes)

    def _is_near(self, address: Address) -> bool:
        if address.is_loopback:
            return not self._loopback
        return (
            address.is_link_local
            or address.is_unspecified
            or address.is_multicast
            or address.is_reserved
            or address in _THIS_NETWORK
            or address in _METADATA
        )


def literal_address(host: str) -> Address | None:
    """Return the address that a host is itself, in any form that systems read as one: 127.1 and 0x7f000001 too."""
    try:
        return ip_address(host)
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None


def meant(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for, if it does."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


def is_loopback(host: str) -> bool:
    """Return whether a server that listens on ``host`` can be reached from its own machine alone."""
    address = literal_address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)
