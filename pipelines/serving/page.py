"""The gallery page: one file that needs nothing from elsewhere, and a policy that lets it have nothing else."""

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources as package_files

from fastapi.responses import HTMLResponse

_INLINE = r"<{0}>(.*?)</{0}>"


@dataclass(frozen=True, slots=True)
class Page:
    """A page with its scripts and styles inside.

    Attributes:
        text: The page.
        policy: Its content-security-policy.
    """

    text: str
    policy: str

    @classmethod
    def shipped(cls) -> "Page":
        """The one that comes with the package."""
        text = package_files.files("pipelines").joinpath("gallery.html").read_text(encoding="utf-8")
        return cls(text, policy_of(text))

    def response(self) -> HTMLResponse:
        """The page as an answer; it is asked for again each time, as its policy goes with it."""
        headers = {
            "content-security-policy": self.policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return HTMLResponse(self.text, headers=headers)


def policy_of(text: str) -> str:
    """The content-security-policy under which a page's own script and style run, and no others.

    Images come from this service, or are what the user has chosen; nothing is asked of another place. It may not be
    framed, and no form leaves it.
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes(text, 'script')}",
            f"style-src {_hashes(text, 'style')}",
            "img-src 'self' data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _hashes(text: str, name: str) -> str:
    """Sources for what stands between the tags of a name, by its sha256."""
    found = re.findall(_INLINE.format(name), text, flags=re.DOTALL)
    digests = [hashlib.sha256(one.encode()).digest() for one in found]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
