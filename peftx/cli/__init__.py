"""The command line: it parses, calls the library, and prints.

Heavy libraries are imported inside the commands that need them.
"""

from .export import export
from .main import app
from .prune import prune

for command in (prune, export):
    app.command()(command)

__all__ = ["app"]
