"""The metrics of several engines as one text."""

from prometheus_client.parser import text_string_to_metric_families

from server.handlers.engine_metrics import _merge, _Told

ONE = """# HELP vllm:prompt_tokens_total Number of tokens.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="a"} 5.0
# TYPE seconds histogram
seconds_bucket{le="1.0",} 1
seconds_bucket{le="+Inf"} 2.0 1395066363000
seconds_sum 1e-05
seconds_count 2
# a comment
<html>no metric at all</html>
plain NaN
"""
OTHER = """# HELP vllm:prompt_tokens_total Another text.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{model="own",upstream="x",text="a,model=\\"b}"} 7
plain{} +Inf
# EOF
"""


def test_samples_are_labelled_and_stand_together() -> None:
    text = _merge([_Told("m", "http://a", ONE), _Told('n "', "http://b", OTHER)])
    families = {each.name: each for each in text_string_to_metric_families(text)}
    # Once each: the format wants all samples of a name together.
    assert text.count("# TYPE vllm:prompt_tokens_total") == 1
    assert list(families) == ["vllm:prompt_tokens", "seconds", "plain"]
    assert families["seconds"].type == "histogram"
    assert families["vllm:prompt_tokens"].documentation == "Number of tokens."
    one, other = families["vllm:prompt_tokens"].samples
    of_m = {"model": "m", "upstream": "http://a"}
    assert (one.labels, one.value) == (of_m | {"engine": "0", "model_name": "a"}, 5)
    assert other.labels == {
        "exported_model": "own", "exported_upstream": "x", "text": 'a,model="b}', "model": 'n "',
        "upstream": "http://b",
    }  # fmt: skip
    assert [each.labels for each in families["seconds"].samples] == [
        of_m | {"le": "1.0"}, of_m | {"le": "+Inf"}, of_m, of_m
    ]  # fmt: skip
    # The parser knows no family without a type.
    assert text.endswith('plain{model="m",upstream="http://a"} NaN\n'
                         'plain{model="n \\"",upstream="http://b"} +Inf\n')  # fmt: skip
