"""The token counts of answers."""

from server.protocol.formats import Encoding
from server.protocol.usage import input_tokens, output_tokens, reused_tokens_in
from tiers import Answer


def test_an_answer_tells_its_tokens() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":64}}\n\n'
    assert output_tokens(Answer(Encoding.SSE, b"data: {}\n\n", usage)) == 64
    body = b'{"content":"\\"completion_tokens\\":9","usage":{"completion_tokens":7,"total":8}}'
    assert output_tokens(Answer(Encoding.JSON, body)) == 7
    assert output_tokens(Answer(Encoding.JSON, b'{"usage":{"output_tokens":5}}')) == 5
    for odd in (b"{}", b"", b'{"usage":{"completion_tokens":null}}'):
        assert output_tokens(Answer(Encoding.JSON, odd)) is None


def test_an_answer_tells_what_its_prompt_took() -> None:
    chat = b'{"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}'
    assert (input_tokens(Answer(Encoding.JSON, chat)), reused_tokens_in(chat)) == (9, 4)
    # Messages count what was reused apart.
    message = b'{"usage":{"input_tokens":5,"output_tokens":1,"cache_read_input_tokens":4}}'
    assert (input_tokens(Answer(Encoding.JSON, message)), reused_tokens_in(message)) == (9, 4)
    assert reused_tokens_in(b'{"usage":{"prompt_tokens":9,"prompt_tokens_details":null}}') is None
