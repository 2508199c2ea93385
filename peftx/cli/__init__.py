"""The command line: it parses, calls the library, and prints.

Heavy libraries are imported inside the commands that need them.
"""

from .main import app
from .prune import prune

app.command()(prune)

__all__ = ["app"]
