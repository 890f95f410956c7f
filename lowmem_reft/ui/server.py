"""``lowmem-reft ui``: the page is served to this machine alone, and nothing leaves it."""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from lowmem_reft.options import UiOptions

HOST = "127.0.0.1"


def run_ui(options: UiOptions) -> dict[str, Any]:
    """Serve the page until Ctrl-C; return nothing to print.

    Raises:
        InputError: Gradio is not installed, or the port is taken.
    """
    if find_spec("gradio") is None:
        raise InputError(
            "gradio must be installed for the page, got none; pip install 'lowmem-reft[ui]'"
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    # Here, as they import gradio.
    from lowmem_reft.ui.desk import Desk
    from lowmem_reft.ui.page import HEAD, STYLE, THEME, build_page

    desk = Desk()
    page = build_page(desk)
    try:
        page.launch(
            server_name=HOST,
            server_port=options.port,
            inbrowser=not options.no_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            theme=THEME,
            css=STYLE,
            head=HEAD,
            app_kwargs={"middleware": _own_names_alone()},
        )
    except OSError as error:
        raise InputError(
            f"port must be free on this machine, got {options.port}, which another program has; "
            f"choose another, for example --port {options.port % 65535 + 1}"
        ) from error
    try:
        if not options.quiet:
            print(f"http://{HOST}:{options.port}  (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)  # first, so that nothing is started meanwhile
        desk.close()
    return {}


def _own_names_alone() -> list[Any]:
    """Refuse requests by another host's name, which a page of the network could point here."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])]
