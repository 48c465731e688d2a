"""Clients: what they are told apart by, wherever one must not take what it does not leave to others."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

from .receivers import meant

_NETWORK_BITS = 64


def client_at(address: str) -> str:
    """Return the name of the client at an address; any text is taken.

    All IPv6 addresses of a /64 network are one client: a single machine has them all.
    """
    try:
        one = meant(ip_address(address))
    except ValueError:
        return address
    return str(one) if isinstance(one, IPv4Address) else str(ip_network((int(one), _NETWORK_BITS), strict=False))


def client_of(scope: Mapping[str, Any]) -> str:
    """Return the name of the client of an ASGI request; "" where the server does not say."""
    return client_at((scope.get("client") or ("",))[0])
