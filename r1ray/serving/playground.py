"""The web page of the server: one file, nothing from elsewhere."""

import base64
import functools
import hashlib
import re
from importlib.resources import files

__all__ = ["read_page"]


@functools.cache
def read_page() -> tuple[str, dict[str, str]]:
    """(HTML, headers that let it run what is in it and speak to this server, and nothing else)."""
    text = files("r1ray.serving").joinpath("playground.html").read_text(encoding="utf-8")
    hashes = {
        tag: " ".join(_hash(body) for body in re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {hashes['script']}; "
        f"style-src {hashes['style']}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


def _hash(body: str) -> str:
    digest = hashlib.sha256(body.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
