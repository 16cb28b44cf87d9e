"""What tests of bundles from hostile hands share: one that is signed, and how others must be refused."""

from __future__ import annotations

import pytest

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.bundle.signatures import new_key, trust
from edge_rsvlm.bundle.signing import sign_bundle
from edge_rsvlm.errors import BundleError
from tests import tiny_bundle


def refused(path, message="."):
    """The message, one line that says what to do, of a bundle that does not load."""
    with pytest.raises(BundleError, match=message) as caught:
        load_bundle(path, allow_unsigned=True)
    assert ";" in str(caught.value) and len(str(caught.value)) < 1000
    str(caught.value).encode()  # can be printed
    return str(caught.value)


def loads_or_says_why(path):
    """Whether it loads; where not, the message can be shown."""
    try:
        load_bundle(path, allow_unsigned=True, allow_older=True)
    except BundleError as exc:
        text = str(exc)
        text.encode()
        assert ";" in text and "\n" not in text and len(text) < 1500 and text.isprintable()
        return False
    return True


def sign_tiny(folder):
    """A bundle signed by a trusted key."""
    new_key("ours")
    trust("ours")
    return sign_bundle(tiny_bundle.write(folder), "ours")
