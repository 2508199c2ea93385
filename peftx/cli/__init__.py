"""The command line: it parses, calls the library, and prints.

Heavy libraries are imported inside the commands that need them.
"""

from .export import export
from .inspect import inspect
from .main import app
from .prune import prune

for command in (prune, export, inspect):
    app.command()(command)

__all__ = ["app"]
