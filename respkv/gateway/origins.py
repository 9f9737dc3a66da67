"""Which web pages may ask a gateway that asks nobody for a token.

Without a token everybody is let in who reaches the port, which by default is this machine; and a
browser on this machine lets every page that it shows send requests there. A page of another origin
cannot read the answer, but a POST has done its work by then. So, as long as there is no token:

    a request that changes something and comes from a page of another origin is refused. Browsers
        say so, in Sec-Fetch-Site or, where that is not sent, in Origin; what is no browser says
        neither, and passes. (As net/http's CrossOriginProtection in Go 1.25; after Filippo
        Valsorda, "Cross-Site Request Forgery", 2025.)
    on an address of this machine only, Host has to be a name that nobody else can have: else a page
        may point its own name at 127.0.0.1 once it is loaded, and is then of the same origin (DNS
        rebinding). Addresses and names that are not in the public DNS cannot be used like that.

With a token none of this is needed: a page does not know it, and browsers do not add it.
`allow_origin` names pages that may ask all the same and, by CORS, read the answer.
"""

import ipaddress

from starlette.types import Scope

from respkv.gateway.failures import Refused, shown
from respkv.gateway.settings import GatewaySettings

ANY = "*"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
# RFC 6761, RFC 6762 and ICANN's resolution of 2024-07-29: nobody can register a name under these.
_PRIVATE = (".localhost", ".local", ".internal")
_MAX_AGE_S = b"600"

Headers = list[tuple[bytes, bytes]]


class Origins:
    """Decides about each request of one gateway, by its settings."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._origins = frozenset(settings.allow_origin)
        self._names = frozenset(name.lower() for name in (settings.host, *settings.allow_host))
        self._is_open = settings.token is None
        is_told = settings.is_local or bool(settings.allow_host)
        self._checks_host = self._is_open and is_told and ANY not in self._names

    def check(self, scope: Scope) -> None:
        """Raise Refused when a page must not ask this."""
        if not self._is_open:
            return
        host, origin = _text(scope, b"host"), _origin(scope)
        if self._checks_host and host is not None and not self._is_own(host):
            told = (
                f"{shown(host)} is not known as a name of this gateway: --allow-host makes it one"
            )
            raise Refused(403, "unknown_host", told)
        if scope["method"] in _SAFE or self._is_allowed(origin):
            return
        site = _text(scope, b"sec-fetch-site")
        if site is not None:
            is_other = site not in ("same-origin", "none")
        else:
            is_other = origin is not None and origin.partition("://")[2] != (host or "").lower()
        if is_other:
            page = "another origin" if origin is None else shown(origin)
            told = f"pages of {page} may not ask this gateway: --allow-origin lets them"
            raise Refused(403, "cross_origin", told)

    def is_preflight(self, scope: Scope) -> bool:
        """Whether a browser asks what an allowed page may send."""
        is_asked = _text(scope, b"access-control-request-method") is not None
        return scope["method"] == "OPTIONS" and is_asked and self._is_allowed(_origin(scope))

    def headers(self, scope: Scope) -> Headers:
        """Return what an answer says so that an allowed page may read it."""
        if not self._origins:
            return []
        found: Headers = [(b"vary", b"origin")]
        origin = _origin(scope)
        if origin is not None and self._is_allowed(origin):
            found.append((b"access-control-allow-origin", origin.encode("latin-1")))
            found.append((b"access-control-expose-headers", b"x-request-id, retry-after"))
        if self.is_preflight(scope):
            asked = _text(scope, b"access-control-request-headers") or ""
            found.append((b"access-control-allow-methods", b"GET, POST"))
            found.append((b"access-control-allow-headers", asked.encode("latin-1")))
            found.append((b"access-control-max-age", _MAX_AGE_S))
        return found

    def _is_allowed(self, origin: str | None) -> bool:
        return origin is not None and (ANY in self._origins or origin in self._origins)

    def _is_own(self, host: str) -> bool:
        name = _name_of(host)
        if name in self._names or name.endswith(_PRIVATE) or "." not in name:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _name_of(host: str) -> str:
    """Return the name or address in a Host header, without port, brackets and last dot."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().removesuffix(".")


def _origin(scope: Scope) -> str | None:
    return _text(scope, b"origin")


def _text(scope: Scope, name: bytes) -> str | None:
    found = next((value for key, value in scope["headers"] if key == name), None)
    return None if found is None else found.decode("latin-1")
