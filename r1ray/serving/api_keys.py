"""API keys, from the environment of the process that answers HTTP.

`R1RAY_API_KEYS` holds one or several, with commas between; without it every request is answered. A
request shows one as OpenAI's clients do: `Authorization: Bearer KEY`.
"""

import functools
import hashlib
import hmac
import os

from fastapi import Request

from r1ray.errors import ConfigError, ServingError

__all__ = ["ENVIRONMENT_NAME", "check_key", "read_keys", "require_key"]

ENVIRONMENT_NAME = "R1RAY_API_KEYS"


def require_key(request: Request) -> None:
    """A FastAPI dependency: `check_key` of the request's header and this process's keys."""
    shown = request.headers.get("authorization")  # read as latin-1
    if shown is not None:
        shown = shown.encode("latin-1").decode("utf-8", "surrogateescape")
    check_key(shown, _own_keys())


def check_key(authorization: str | None, keys: frozenset[bytes]) -> None:
    """Raise unless the header shows one of `keys`, if there are any.

    How long it takes depends on nothing but the length of the header and the number of keys.

    Args:
        keys: digests, as `read_keys` has them.
    Raises:
        ServingError: 401.
    """
    if not keys:
        return
    scheme, _, key = (authorization or "").partition(" ")
    shown = _digest(key.strip())
    is_known = sum([hmac.compare_digest(shown, known) for known in keys])
    if scheme.lower() != "bearer" or not is_known:
        raise ServingError(
            "incorrect API key provided; send one as 'Authorization: Bearer KEY'"
            if authorization
            else "you didn't provide an API key; send one as 'Authorization: Bearer KEY'",
            status=401,
            code="invalid_api_key",
        )


def read_keys(text: str | None) -> frozenset[bytes]:
    """Digests of the keys in `text`, which are separated by commas; none if it is None.

    Raises:
        ConfigError: there is text, but no key in it: nobody could be answered.
    """
    if text is None:
        return frozenset()
    keys = frozenset(_digest(key.strip()) for key in text.split(",") if key.strip())
    if not keys:
        raise ConfigError(
            f"{ENVIRONMENT_NAME} is set, but holds no key; put keys there, with commas between, "
            "or unset it to answer everybody"
        )
    return keys


@functools.cache
def _own_keys() -> frozenset[bytes]:
    return read_keys(os.environ.get(ENVIRONMENT_NAME))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
