"""What tests and benchmarks compare with: a peer that is missing, and one that is broken."""

from types import SimpleNamespace

import pytest

from bench import peers


def test_a_peer_that_does_not_import_is_not_a_missing_one(monkeypatch, tmp_path):
    """The missing one skips tests."""

    def broken(name):
        raise ImportError(f"{name} is broken")

    found = peers.torchvision, peers.lpips
    monkeypatch.setattr(peers, "torchvision", lambda: None)  # lpips asks for it
    monkeypatch.setattr(peers.importlib, "import_module", broken)
    for spec in (SimpleNamespace(origin=str(tmp_path / "x.py")), None):
        monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name, spec=spec: spec)
        for peer in found:
            with pytest.raises(ImportError) as error:
                peer.__wrapped__()
            assert isinstance(error.value, peers.NotInstalled) == (spec is None)
