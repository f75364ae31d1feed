"""The one exception type that the package adds to Python's own."""


class UnsupportedError(RuntimeError):
    """The arguments are right, but the backend that was forced cannot run them; the text says why and the way out."""
