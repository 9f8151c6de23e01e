"""The hashed locks: making them, checking them, trying them for a Mac, auditing them.

``make`` and ``check`` work on ``constraints/NAME.txt``; ``in_file`` reads ``NAME.in``, ``header``
is what the first lines of a lock record, ``resolve`` asks uv. ``cross_check`` (with ``macho``)
installs the macOS wheels, ``audit`` looks up vulnerabilities, ``upstream`` judges kohya's own file.
"""
