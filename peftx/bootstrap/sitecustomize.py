"""Python imports this as it starts, where `peftx run` has put this folder into PYTHONPATH.

It registers the methods of peftx once PEFT has been imported, or a compressed model is loaded, and lets the
environment's own `sitecustomize` run. Every Python program that is started meets it: it imports next to nothing.
"""

import os
import sys
from _thread import _local

HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib takes its time
ROOT = os.path.dirname(os.path.dirname(HERE))  # noqa: PTH120
WATCHED = ("peft", "transformers")
COMPRESSED = "lowrank_svd"  # the `quant_method` of compressed models


class Registrar:
    """A finder that is asked for every module first and leaves all to the others.

    It imports peftx when PEFT is there and none of `WATCHED` is half imported: `transformers.trainer` imports PEFT on
    its own way. Until then it stands for the class of the configs of compressed models, which transformers looks up.
    """

    def __init__(self):
        self.local = _local()
        self.classes = {}
        self.registered = False

    def find_spec(self, name, path=None, target=None):
        if name == "peftx":  # the one that was asked, wherever the program is run
            from importlib.machinery import PathFinder

            self.classes.pop(COMPRESSED, None)
            return PathFinder.find_spec(name, [ROOT])
        if name.partition(".")[0] in WATCHED:
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                spec = find(name, path, target) if find and finder is not self else None
                if spec is not None:
                    self.watch(spec.loader)
                    return spec
        return None

    def watch(self, loader):
        if isinstance(loader, type) or not hasattr(loader, "exec_module") or not hasattr(loader, "__dict__"):
            return
        execute = loader.exec_module

        def exec_module(module):
            del loader.exec_module
            self.local.depth = getattr(self.local, "depth", 0) + 1
            try:
                execute(module)
            finally:
                self.local.depth -= 1
            if module.__name__ == "transformers.quantizers.auto" and "peftx" not in sys.modules:
                self.classes = module.AUTO_QUANTIZATION_CONFIG_MAPPING
                self.classes[COMPRESSED] = self
            if not self.local.depth and "peft" in sys.modules and not self.registered:
                self.registered = True
                import peftx  # noqa: F401

                sys.meta_path.remove(self)

        loader.exec_module = exec_module

    def from_dict(self, settings):
        import peftx  # noqa: F401

        return self.classes[COMPRESSED].from_dict(settings)


sys.path[:] = [place for place in sys.path if place != HERE]
asked = os.environ.get("PEFTX_RUN")
if asked and os.path.realpath(asked) == os.path.realpath(sys.prefix):  # not in another environment
    sys.meta_path.insert(0, Registrar())

ours = sys.modules.pop(__name__)
try:
    import sitecustomize  # noqa: F401 - the next one
except ImportError as error:
    if error.name != "sitecustomize":
        raise
finally:
    sys.modules.setdefault(__name__, ours)
