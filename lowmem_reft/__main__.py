"""Where the command line starts: Ctrl-C while Python still imports ends as it does later on."""

from __future__ import annotations

import importlib
import os
import sys


def main() -> int:
    """Import and run the command line; return its exit code, 130 after Ctrl-C."""
    try:
        code: int = importlib.import_module("lowmem_reft.cli").main()
        return code
    except KeyboardInterrupt:
        print("\nlowmem-reft: interrupted", file=sys.stderr, flush=True)
        # Not by sys.exit: where exec was interrupted, which makes dataclasses, Python would still
        # end as by the signal.
        os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
