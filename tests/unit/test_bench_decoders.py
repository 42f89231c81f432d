"""`transformers.generate` as a decoder, beside our engine's plain decoding, on the embedded model."""

import warnings

import pytest

from gorgon.bench.contestants import Contestants
from gorgon.bench.decoders import Answer, EngineDecoder, TransformersDecoder, top_margin
from gorgon.data.chat import encode_prompt
from gorgon.decode.engine import PLAIN, Engine
from gorgon.models.backbone import load_backbone


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("embedded", dtype="float32")


@pytest.fixture(scope="module")
def prompt(backbone):
    schema = "CREATE TABLE head (age INTEGER, name VARCHAR)"
    return encode_prompt(
        backbone.tokenizer,
        [{"role": "system", "content": schema}, {"role": "user", "content": "How many heads are older than 56?"}],
    )


@pytest.fixture(scope="module")
def theirs(backbone):
    backbone.model.generation_config.do_sample = True  # what some checkpoints ship with
    backbone.model.generation_config.temperature = 2.0
    return TransformersDecoder(backbone)


@pytest.fixture(scope="module")
def plain(backbone):
    return EngineDecoder("plain", Engine(backbone, None, PLAIN))


def test_same_answer_as_plain_decoding_without_surprises(theirs, plain, prompt, backbone, caplog, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = theirs.answer(prompt, 40, ())
    expected = plain.answer(prompt, 40, ())
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.step_tokens == []
    assert 0 < answer.first_token_s < 30
    assert not set(answer.token_ids[:-1]) & backbone.end_ids
    assert caplog.text == ""
    assert "max_length" not in capfd.readouterr().err


def test_length_limit(theirs, plain, prompt):
    assert theirs.answer(prompt, 3, ()).token_ids == plain.answer(prompt, 3, ()).token_ids
    assert len(theirs.answer(prompt, 1, ()).token_ids) == 1


def test_stop_strings_end_both_at_the_same_text(theirs, plain, prompt):
    whole = plain.answer(prompt, 40, ()).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    ours, other = plain.answer(prompt, 40, (stop,)), theirs.answer(prompt, 40, (stop,))
    assert ours.text == other.text == whole[: whole.index(stop)]
    assert ours.token_ids == other.token_ids


def test_top_margin_is_positive_and_of_the_next_token(backbone, prompt):
    assert top_margin(backbone, prompt) > 0


def test_blocks_put_the_text_back_together(backbone, plain):
    tokenizer = backbone.tokenizer
    text = "SELECT naïve 日本 FROM t"
    ids = tokenizer.encode(text, add_special_tokens=False)
    contestants = Contestants(Engine(backbone, None, PLAIN), [])
    for size in (1, 2, 3):
        steps = [min(size, len(ids) - 1 - i) for i in range(0, len(ids) - 1, size)]
        blocks = contestants.blocks(Answer(ids, text, 0.0, steps))
        assert [b["tokens"] for b in blocks] == [1, *steps]
        assert "".join(b["text"] for b in blocks) == tokenizer.decode(ids, skip_special_tokens=True)
        assert all("\ufffd" not in b["text"] for b in blocks)
