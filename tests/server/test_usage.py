"""The token counts of answers."""

from server.usage import output_tokens
from tiers import Answer, Form


def test_an_answer_tells_its_tokens() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":64}}\n\n'
    assert output_tokens(Answer(Form.EVENTS, b"data: {}\n\n", usage)) == 64
    body = b'{"content":"\\"completion_tokens\\":9","usage":{"completion_tokens":7,"total":8}}'
    assert output_tokens(Answer(Form.BODY, body)) == 7
    assert output_tokens(Answer(Form.BODY, b'{"usage":{"output_tokens":5}}')) == 5
    for odd in (b"{}", b"", b'{"usage":{"completion_tokens":null}}'):
        assert output_tokens(Answer(Form.BODY, odd)) is None
