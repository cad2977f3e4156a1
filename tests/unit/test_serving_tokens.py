"""The HTTP process must count the tokens that the worker's text encoder gets, without torch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.studio import write_tokenizer
from zops.serving.tokens import TokenCounter, bucket


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("snapshot")
    write_tokenizer(snapshot)
    return TokenCounter(snapshot)


def test_prompt_and_template_must_be_counted(counter):
    assert counter.count("", ("", "")) == 0
    # The tiny tokenizer has a token for nearly each byte, and its special ones.
    assert counter.count("qqq", ("", "")) == 3
    assert counter.count("qqq", ("<|im_start|>qq", "<|im_end|>")) == 7


def test_a_long_text_must_be_counted_to_its_end(counter):
    assert counter.count("a" * 5000, ("", "")) == 5000


@given(st.integers(0, 2000))
def test_a_bucket_must_hold_its_tokens_and_be_no_larger_than_needed(tokens):
    found = bucket(tokens)
    assert found % 32 == 0
    assert found == 512 if tokens > 480 else found - 32 < tokens <= found


def test_a_missing_tokenizer_must_not_go_unnoticed(tmp_path):
    with pytest.raises(Exception, match="No such file"):
        TokenCounter(tmp_path).count("a", ("", ""))
