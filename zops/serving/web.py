"""The page at `/`: files of this package, nothing from elsewhere, under a policy that allows nothing else."""

from pathlib import Path

from fastapi import FastAPI, Response
from starlette.requests import Request
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

DIRECTORY = Path(__file__).parent / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'; "
    # The page never reads text as markup; where the browser knows this, a mistake of ours that did would throw.
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Small files, and a server that may be another version tomorrow.
    "Cache-Control": "no-cache",
}


class _Assets(StaticFiles):
    """Static files with the headers of the page."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """Serve the page and its assets."""
    assets = _Assets(directory=DIRECTORY)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await assets.get_response("index.html", request.scope)

    app.mount("/assets", _Assets(directory=DIRECTORY / "assets", check_dir=False), name="assets")
