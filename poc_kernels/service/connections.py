"""Connections to the receivers of callbacks: only to addresses that `CallbackHosts` allows."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

from .receivers import CallbackHosts, literal_address

_KEEP_ALIVE_SECONDS = 5.0
_NOT_ALLOWED = "callbacks may not go to the host, or to none of its addresses: see callback_hosts"


class HostNotAllowedError(Exception):
    """A callback may not go to any address of its host."""


def check_host(name: str, url: str, hosts: CallbackHosts) -> None:
    """Raise a ValueError unless the argument ``name`` is a URL with a host that callbacks may go to.

    A name is not resolved here, but whenever a connection is made.
    """
    try:
        host = httpx2.URL(url).raw_host.decode()
    except httpx2.InvalidURL as error:
        got = urlsplit(url).hostname
        raise ValueError(f"{name} must have a host that can be connected to, got {got!r}") from error
    if not hosts.may_allow(host):
        raise ValueError(f"{name} must have a host that this node may send callbacks to (callback_hosts), got {host!r}")


class CheckedTransport(httpx2.AsyncBaseTransport):
    """Sends requests to hosts that are allowed, or to the proxies of the environment.

    A proxy resolves names itself: only they are judged then, and the proxy has to bound where they lead.

    Args:
        hosts: which hosts connections are made to; None for all.
        max_connections: of receivers that are reached alike, including idle connections.
    """

    def __init__(self, hosts: CallbackHosts | None, max_connections: int) -> None:
        ssl_context = httpx2.create_ssl_context()
        self._hosts = hosts
        self._direct = httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=_KEEP_ALIVE_SECONDS,
            network_backend=_CheckedBackend(hosts),
        )
        limits = httpx2.Limits(
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=_KEEP_ALIVE_SECONDS,
        )
        self._proxies = {
            scheme: httpx2.AsyncHTTPTransport(
                verify=ssl_context, limits=limits, proxy=proxy if "://" in proxy else f"http://{proxy}"
            )
            for scheme, proxy in getproxies().items()
            if scheme in ("http", "https", "all") and proxy
        }

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request: see `httpx2.AsyncBaseTransport`.

        Raises:
            HostNotAllowedError: no address of the host is allowed.
            httpcore2 or httpx2 errors of the same names: there is no answer.
        """
        proxy = self._proxies.get(request.url.scheme) or self._proxies.get("all")
        if proxy is not None and not proxy_bypass(request.url.host):
            if self._hosts is not None and not self._hosts.may_allow(request.url.raw_host.decode(), by_proxy=True):
                raise HostNotAllowedError(_NOT_ALLOWED)
            return await proxy.handle_async_request(request)
        response = await self._direct.handle_async_request(
            httpcore2.Request(
                method=request.method,
                url=httpcore2.URL(
                    scheme=request.url.raw_scheme,
                    host=request.url.raw_host,
                    port=request.url.port,
                    target=request.url.raw_path,
                ),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx2.Response(response.status, headers=response.headers, stream=_Stream(response.stream))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._direct.aclose()
        for proxy in self._proxies.values():
            await proxy.aclose()


class _Stream(httpx2.AsyncByteStream):
    """The body of an answer."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


class _CheckedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to addresses that are allowed: a name is resolved once, and the addresses that were checked are taken.

    So a name that resolves to something else a moment later leads nowhere else.
    """

    def __init__(self, hosts: CallbackHosts | None) -> None:
        self._hosts = hosts
        self._backend = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._addresses(host, port)
        share = None if timeout is None else timeout / len(addresses)
        for address in addresses[:-1]:
            try:
                return await self._backend.connect_tcp(address, port, share, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self._backend.connect_tcp(addresses[-1], port, share, local_address, socket_options)

    async def _addresses(self, host: str, port: int) -> list[str]:
        """Return the allowed addresses of a host, in the order in which to try them."""
        literal = literal_address(host)
        if literal is not None:
            found = [literal]
        else:
            try:
                loop = asyncio.get_running_loop()
                answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                raise httpcore2.ConnectError(str(error)) from error
            found = [address for *_, end in answers if (address := literal_address(str(end[0]))) is not None]
        allowed = [each for each in found if self._hosts is None or self._hosts.allows(host, each)]
        if not allowed:
            raise HostNotAllowedError(_NOT_ALLOWED)
        return list(dict.fromkeys(map(str, allowed)))
