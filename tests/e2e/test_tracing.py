"""That vLLM's own spans join the trace of the request that it is asked for."""

import asyncio
import tempfile
from pathlib import Path

import orjson
import pytest

from tests.collector import Collector, attributes, context
from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

OURS = "POST /v1/chat/completions"


async def test_vllm_joins_the_trace(tmp_path) -> None:
    config = Path("configs/laptop.yaml")
    collector = Collector()
    await collector.start()
    with tempfile.TemporaryDirectory(prefix="e2e-", dir="/tmp") as temporary:
        server = Server(tmp_path, Path(temporary), config, {"TIERSERVE__TIERS__PREFIX": "null"})
        try:
            await asyncio.to_thread(
                server.start,
                TIERSERVE__TRACING=orjson.dumps({"endpoint": collector.endpoint}).decode(),
                TIERSERVE__MODELS__SMOLLM2_135M_INSTRUCT__ENGINE__ARGS__OTLP_TRACES_ENDPOINT=f"{collector.endpoint}/v1/traces",
                OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf",
                OTEL_BSP_SCHEDULE_DELAY="200",
            )
            await asyncio.to_thread(server.wait_ready)
            trace, _, headers = context()
            await asyncio.to_thread(
                server.client.chat.completions.create,
                model="smollm2-135m-instruct",
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                temperature=0,
                max_tokens=8,
                extra_body={"ignore_eos": True},
                extra_headers=headers,
            )
            spans = await collector.trace(trace, "engine", "llm_request", OURS)
        finally:
            await asyncio.to_thread(server.stop)
            await collector.stop()
    assert spans["llm_request"].parent_span_id == spans["engine"].span_id
    ours = attributes(spans[OURS])
    theirs = attributes(spans["llm_request"])
    assert ours["gen_ai.usage.output_tokens"] == theirs["gen_ai.usage.completion_tokens"] == 8
    assert ours["gen_ai.usage.input_tokens"] == theirs["gen_ai.usage.prompt_tokens"]
