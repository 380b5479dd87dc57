"""The chat page and the description of the interface: two static files that ask nobody but this server for anything."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI, Response

PAGES = {"/": "page.html", "/docs": "docs.html"}


def read_page(path: str) -> tuple[bytes, str]:
    """Returns the page at a path of `PAGES`, and its Content-Security-Policy.

    A browser runs the script in the file and nothing else, and asks no other server, whatever a model writes.
    """
    page = (Path(__file__).parent / PAGES[path]).read_bytes()
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return page, (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def add_pages(app: FastAPI) -> None:
    """Adds both pages to the application."""

    def add(path: str) -> None:
        page, policy = read_page(path)
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}

        @app.get(path, include_in_schema=False)
        async def show() -> Response:
            return Response(page, media_type="text/html", headers=headers)

    for path in PAGES:
        add(path)
