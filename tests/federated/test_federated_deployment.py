"""The example app in Flower's real deployment over the loopback, against the same app in one process."""

import sys

import pytest
from conftest import EXAMPLES

pytest.importorskip("flwr")
pytest.importorskip("opacus")


@pytest.mark.slow
def test_superlink_and_supernodes_give_what_one_process_gives(tmp_path, monkeypatch, request):
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes: run with -m slow")
    monkeypatch.syspath_prepend(str(EXAMPLES / "federated"))
    import deployment
    import in_process

    config = {"rounds": 2, "clients": 2, "method": "fedsvd", "epsilon": 0.0}
    deployed = deployment.deploy(config, tmp_path / "run")
    here = in_process.main([f"--{name}={value}" for name, value in config.items()])
    assert deployed["audit"] == here["audit"] == []
    assert set(deployed["server"]) == set(here["server"]) == {"0", "1", "2"}
    for number, found in here["server"].items():
        assert deployed["server"][number] == pytest.approx(found, abs=1e-5)
    for number, found in here["train"].items():
        assert deployed["train"][number] == pytest.approx(found, abs=1e-5)
    assert here["server"]["2"]["loss"] < here["server"]["0"]["loss"]  # something was learnt, in both
    for name in ("in_process", "deployment"):
        monkeypatch.delitem(sys.modules, name)
