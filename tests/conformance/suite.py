"""Aims PEFT's own, unmodified test suite at methods that PEFT does not know.

The suite is the folder `tests` of PEFT's source distribution, so it always fits the installed release. Its tests are
parametrised by module-level lists, which pytest expands at collection: new contents in the same list object, between
import and collection, aim every test at other methods. Tests of PEFT's own configs are not inherited.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import jinja2
import peft
import pytest
import torch
from filelock import FileLock
from peft.tuners.tuners_utils import BaseTuner

import peftx

from .cases import Awake, awake, skip_reason

CACHE = Path(__file__).with_name(".cache")


def fetch() -> Path:
    """The folder with the package `peft_suite`: downloaded once for each version of PEFT."""
    home = CACHE / f"peft-{peft.__version__}"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "lock"):  # several processes run tests
        if home.exists():
            return home
        with tempfile.TemporaryDirectory(dir=CACHE) as tmp:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--dest", tmp]
            wanted = ["--no-deps", "--no-binary", "peft", f"peft=={peft.__version__}"]
            subprocess.run([*pip, *wanted], check=True, capture_output=True, text=True, timeout=300)
            with tarfile.open(next(Path(tmp).glob("peft-*.tar.gz"))) as sdist:
                members = [member for member in sdist if "/tests/" in member.name and member.isfile()]
                sdist.extractall(tmp, members, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
            package = Path(tmp, "home", "peft_suite")
            package.parent.mkdir()
            next(Path(tmp).glob("peft-*/tests")).rename(package)
            (package / "__init__.py").touch()
            package.parent.rename(home)
    return home


@contextmanager
def stand_in(name: str, **attributes: object) -> Iterator[None]:
    """An importable module with these attributes while the context lasts, where the real one is not installed."""
    if find_spec(name):
        yield
        return
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


def load(*names: str) -> list[ModuleType]:
    """PEFT's test modules of these names. Skips the importing test module where the suite cannot be had."""
    try:
        home = fetch()
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()
        reason = f"PEFT {peft.__version__}'s source distribution cannot be had: {said[-1] if said else error!r}"
        pytest.skip(reason, allow_module_level=True)
    if "peft_suite" not in sys.modules:
        pytest.register_assert_rewrite("peft_suite")
    sys.path.insert(0, str(home))
    try:
        with stand_in("diffusers", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {})):
            modules = [importlib.import_module(f"peft_suite.{name}") for name in names]
    finally:
        sys.path.remove(str(home))
    for module in (*modules, sys.modules["peft_suite.testing_common"]):
        vars(module).update({name: helper for name, helper in REPLACED.items() if hasattr(module, name)})
    return modules


def aim(module: ModuleType, **lists: list) -> dict[str, type]:
    """Replaces the contents of the module's lists; returns its test classes, with only the tests these lists drive."""
    ours = [getattr(module, name) for name in lists]
    for old, new in zip(ours, lists.values(), strict=True):
        old[:] = new

    def driven(test: object) -> bool:
        marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
        return any(mark.args[1] is rows for mark in marks for rows in ours)

    adopted = {}
    for name, case in vars(module).items():
        if isinstance(case, type) and name.startswith("Test"):
            tests = {test: driven(getattr(case, test)) for test in dir(case) if test.startswith("test")}
            if any(tests.values()):
                hidden = {test: None for test, kept in tests.items() if not kept}
                adopted[name] = type(name, (Conformance, case), {"module": module, **hidden})
    return adopted


def inject_awake(tuner: BaseTuner, model: torch.nn.Module, adapter_name: str, *args, **kwargs) -> None:
    """PEFT's `inject_adapter`, and random weights where the adapter's mode is `Awake`."""
    inject(tuner, model, adapter_name, *args, **kwargs)
    if isinstance(getattr(tuner.peft_config[adapter_name], "init_weights", None), Awake):
        for name, parameter in model.named_parameters():
            if tuner.prefix in name and adapter_name in name.split("."):
                parameter.data.normal_(std=0.1)


def let_pass(*args: object) -> None:
    """In place of a guard of the suite that turns methods away by their class."""


def skip_unmergeable(model_id: str, config_cls: type, config_kwargs: dict) -> None:
    """In place of the suite's list of methods that cannot be merged; the rest of a test is merging."""
    method = next(method for method in peftx.methods() if method.config is config_cls)
    if not method.mergeable:
        pytest.skip(f"{method.name} is not mergeable")


# Helpers of the suite that know PEFT's own methods only.
REPLACED = {
    "_skip_if_merging_not_supported": skip_unmergeable,
    "set_init_weights_false": awake,
    "_skip_if_conv1d_not_supported": let_pass,  # a list of classes; all of our methods support transformers' Conv1D
    "check_beft_config": let_pass,  # meant for BEFT, but keeps every method from merging into a Llama or Gemma
}
inject = BaseTuner.inject_adapter
template = cache(jinja2.Template)  # a third of the suite's time goes into compiling one template of a model card


class Conformance:
    """Mixed into PEFT's test classes: what every test of ours runs under."""

    module: ModuleType  # of PEFT's suite

    @pytest.fixture(autouse=True)
    def conformance(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        (variant,) = request.node.get_closest_marker("conformance").args
        test = request.node.originalname
        row = request.node.callspec.params
        subject = row["test_name"].split()[1] if "test_name" in row else Path(row.get("model_id", "")).name
        if reason := skip_reason(variant, test, subject):
            pytest.skip(reason)
        monkeypatch.setattr(BaseTuner, "inject_adapter", inject_awake)
        monkeypatch.setattr(jinja2, "Template", template)
        # PEFT's suite goes online for a model that it meets for the first time. None of ours is on the Hub.
        model_id = request.node.callspec.params.get("model_id")
        sys.modules["peft_suite.testing_utils"]._HUB_MODEL_ACCESSES.setdefault(model_id, 0)
        if "mixed_adapter_batches" in test:
            # A row alone and in a batch goes through other kernels; of logits of 10^4 log_softmax keeps the rounding.
            monkeypatch.setattr(torch, "allclose", partial(torch.allclose, rtol=1e-4, atol=1e-6))
        if variant.method.mixed_batches and "mixed_adapter_batches" in test:
            # PEFT's mixed-batch tests of transformers models skip every class but `LoraConfig`.
            for module in (self.module, sys.modules["peft_suite.testing_common"]):
                monkeypatch.setattr(module, "LoraConfig", variant.method.config, raising=False)
        with warnings.catch_warnings(record=True):  # recorded, not ignored: some tests look for warnings
            warnings.simplefilter("always")
            yield
