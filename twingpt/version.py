"""The version, in this one place: pyproject.toml and everything that names it read it here."""

__version__ = "0.1.0"
