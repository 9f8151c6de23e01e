"""``python -m devtools.bench``, in the session's environment, which has pip."""

from __future__ import annotations

import sys

from devtools import posargs
from kohya_mps.core import settings

from . import parts

if __name__ == "__main__":
    posargs.run(sys.argv[1:], parts.parse_options, lambda options: parts.run(settings.load(), options))
