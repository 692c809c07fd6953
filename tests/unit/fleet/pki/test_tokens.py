"""An invitation survives mail and paste, or says that it did not."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_fl.errors import IdentityRefused
from lepton_fl.fleet.pki.tokens import Token

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
tokens = st.builds(
    Token,
    site=names,
    id=st.binary(min_size=8, max_size=8),
    secret=st.binary(min_size=16, max_size=16),
    fingerprint=st.binary(min_size=32, max_size=32),
)
TOKEN = Token(site="bank-1", id=b"i" * 8, secret=b"s" * 16, fingerprint=b"f" * 32)


@given(tokens)
def test_a_token_is_read_as_it_was_written(token):
    """Whatever is in it, and with the line breaks of mail."""
    text = str(token)

    assert Token.read(f"  {text[:30]}\r\n {text[30:]}\n") == token


@given(tokens, st.data())
def test_a_slip_is_noticed(token, data):
    """A character cut off, left out or changed."""
    text = str(token)
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("aA0-_").filter(lambda c: c != text[at]))
    for wrong in (text[:at], text[:at] + text[at + 1 :], text[:at] + other + text[at + 1 :]):
        with pytest.raises(IdentityRefused, match="token"):
            Token.read(wrong)


def test_a_slip_in_the_last_character_is_noticed():
    """Some of its bits stand for nothing, and decoding passes over them."""
    text = str(Token(site="00000000", id=TOKEN.id, secret=TOKEN.secret, fingerprint=TOKEN.fingerprint))
    others = [text[:-1] + c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef0123456789-_" if c != text[-1]]
    for wrong in others:
        with pytest.raises(IdentityRefused, match="cut short or mistyped"):
            Token.read(wrong)


@pytest.mark.parametrize(
    "text", ["", "lfl2-AAAA", "hello", "lfl1-", "lfl1-é", "lfl1-****", "lfl1-" + "A" * 5000]
)
def test_what_is_no_token_is_refused(text):
    """With what to do instead."""
    with pytest.raises(IdentityRefused) as refused:
        Token.read(text)

    assert "enroll invite" in refused.value.fix


def test_a_name_that_no_site_may_have_is_refused():
    """Though the checksum is right: anybody can compute that."""
    with pytest.raises(IdentityRefused, match="cut short or mistyped"):
        Token.read(
            str(Token(site="../bank", id=TOKEN.id, secret=TOKEN.secret, fingerprint=TOKEN.fingerprint))
        )


def test_the_secret_shows_only_where_it_is_meant_to():
    """Printed for the operator; not in a log or a traceback."""
    assert base64.urlsafe_b64encode(TOKEN.id + TOKEN.secret) in str(TOKEN).encode()
    assert "ssss" not in repr(TOKEN)
