"""Text streaming: the same text however tokens arrive, stop strings across token borders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorgon.decode.text import TextStream
from gorgon.errors import GorgonError
from gorgon.models.backbone import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@given(text=st.text(min_size=1, max_size=40))
def test_streamed_text_is_the_decoded_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer)
    for token in ids:
        stream.push(token)
    assert stream.finish() == tokenizer.decode(ids, skip_special_tokens=True)
    assert stream.finish().startswith(stream.text)


@given(text=st.text(alphabet="abcSELECT \n;é漢", min_size=2, max_size=30), data=st.data())
def test_a_stop_string_is_found_at_the_token_that_completes_it(tokenizer, text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    stream = TextStream(tokenizer, [stop])
    ids = tokenizer.encode(text, add_special_tokens=False)
    for count, token in enumerate(ids, start=1):
        if stream.push(token):
            assert stop in tokenizer.decode(ids[:count])
            assert stop not in tokenizer.decode(ids[: count - 1])
            break
    else:
        pytest.fail("the stop string was not found")
    assert stream.finish() == text[: text.index(stop)]


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(GorgonError, match="empty"):
        TextStream(tokenizer, ["\n", ""])
