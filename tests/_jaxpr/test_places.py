"""Whose line an operation is of: the user's, and not one of the libraries that it goes through."""

import importlib

import pytest

from nadaptor._jaxpr import places


@pytest.fixture
def torch(tmp_path, monkeypatch):
    """A folder in the place of torch, which need not be installed."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for cached in (places.in_library, places._library_folders):
        cached.cache_clear()
    yield tmp_path / "torch"
    for cached in (places.in_library, places._library_folders):
        cached.cache_clear()


def test_a_line_of_torch_is_not_the_user_s_and_one_of_his_own_torch_networks_is(torch):
    assert places.in_library(str(torch / "overrides.py"))
    assert not places.in_library(str(torch.parent / "torch_net.py"))
