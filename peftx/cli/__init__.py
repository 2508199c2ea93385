"""The command line: it parses, calls the library, and prints.

Heavy libraries are imported inside the commands that need them.
"""

from .compare import compare
from .compress import compress
from .export import export
from .inspect import inspect
from .main import app
from .prune import prune
from .run import SETTINGS, run
from .train import train

for command in (train, compare, prune, compress, export, inspect):
    app.command()(command)
app.command(context_settings=SETTINGS)(run)

__all__ = ["app"]
