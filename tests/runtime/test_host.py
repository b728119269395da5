"""A host outside the pins is refused in one sentence, and can be forced."""

from importlib import metadata

import pytest

from trl_ext.runtime import host


@pytest.mark.parametrize(("name", "version"), [("trl", "1.17.0"), ("transformers", "5.23.0")])
def test_other_versions_are_refused_unless_forced(name, version, monkeypatch):
    real = metadata.version
    monkeypatch.setattr(
        host.metadata, "version", lambda package: version if package == name else real(package)
    )
    with pytest.raises(ImportError, match=f"{name}.*installed is {version}.*{host.OVERRIDE}=1"):
        host.check_host()
    monkeypatch.setenv(host.OVERRIDE, "1")
    host.check_host()


def test_the_installed_host_is_tested():
    host.check_host()
