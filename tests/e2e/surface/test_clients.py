"""What applications use asks twice, and gets from the tiers what it got from the engine.

Each of the clients parses text, a tool's call and structured output, of a body and of a stream.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anthropic
import openai
import orjson
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

from tests.e2e.conftest import MODEL, Server

from .conftest import kept
from .requests import user

pytestmark = [
    pytest.mark.engine,
    # LangChain dumps what OpenAI's client has parsed, without its types.
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
]

AI_SDK = Path(__file__).parent / "ai_sdk"
QUESTIONS = {
    "text": "What is the capital of France?",
    "tools": "What is the weather in Rome?",
    "structured": "Is water wet?",
}


class Weather(BaseModel):
    """Tells the weather of a city."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Oslo", "Rome"]


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    yes: bool


FORCED = {"type": "function", "function": {"name": "Weather"}}


class Said(NamedTuple):
    """What a client parsed.

    Args:
        told: what an application uses, however it was sent.
        rest: what goes with it, but for ids of the answer itself and times.
        status: the Cache-Status.
    """

    told: Any
    rest: Any
    status: str


class Clients:
    """The clients of a server, and asking through them as their documentation shows it."""

    def __init__(self, url: str) -> None:
        self.statuses: list[str] = []
        hooks = {"response": [lambda got: self.statuses.append(got.headers["cache-status"])]}
        self.http = openai.DefaultHttpxClient(event_hooks=hooks)
        self.url, v1 = url, f"{url}/v1"
        options = {"api_key": "k", "max_retries": 0, "http_client": self.http}
        self.openai = openai.OpenAI(base_url=v1, **options)
        self.anthropic = anthropic.Anthropic(base_url=url, **options)
        self.langchain = ChatOpenAI(
            base_url=v1, model=MODEL, temperature=0, stream_usage=True, **options
        )
        self._ai_sdk: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        self.http.close()
        if self._ai_sdk is not None:
            with self._ai_sdk as process:
                process.stdin.close()

    def said(self, told: Any, whole: BaseModel) -> Said:
        new = dict.fromkeys(("id", "created", "created_at", "completed_at"), True)
        rest = whole.model_dump(exclude=new | {"response_metadata": {"id"}}, warnings=False)
        return Said(told, rest, self.statuses.pop())

    def chat(self, kind: str, stream: bool, salt: str) -> Said:
        asked = {
            "model": MODEL,
            "messages": user(QUESTIONS[kind]),
            "temperature": 0,
            "max_tokens": 64,
            "extra_body": {"cache_salt": salt},
        }
        if kind == "tools":
            tools = [openai.pydantic_function_tool(Weather)]
            asked |= {"tools": tools, "tool_choice": FORCED}
        elif kind == "structured":
            asked |= {"response_format": Verdict}
        else:
            # The client parses no answer that was cut, and how long one is depends on the machine.
            asked |= {"stop": [".", ",", "\n"]}
        if stream:
            asked |= {"stream_options": {"include_usage": True}}
            with self.openai.chat.completions.stream(**asked) as events:
                made = events.get_final_completion()
        else:
            made = self.openai.chat.completions.parse(**asked)
        message = made.choices[0].message
        calls = [call.function.parsed_arguments for call in message.tool_calls or ()]
        return self.said(
            {"text": message.content or "", "calls": calls, "output": message.parsed}, made
        )

    def completions(self, _kind: str, stream: bool, salt: str) -> Said:
        made = self.openai.completions.create(
            model=MODEL,
            prompt="The capital of France is",
            temperature=0,
            max_tokens=6,
            stream=stream,
            extra_body={"cache_salt": salt},
        )
        events = list(made) if stream else [made]
        text = "".join(event.choices[0].text for event in events if event.choices)
        return self.said({"text": text}, events[-1])

    def responses(self, kind: str, stream: bool, salt: str) -> Said:
        asked = {
            "model": MODEL,
            "input": QUESTIONS[kind],
            "temperature": 0,
            "max_output_tokens": 64,
            "extra_body": {"cache_salt": salt},
        }
        if kind == "tools":
            function = openai.pydantic_function_tool(Weather)["function"]
            asked |= {
                "tools": [{"type": "function", **function}],
                "tool_choice": {"type": "function", "name": "Weather"},
            }
        elif kind == "structured":
            asked |= {"text_format": Verdict}
        if stream:
            with self.openai.responses.stream(**asked) as events:
                made = events.get_final_response()
        else:
            made = self.openai.responses.parse(**asked)
        calls = [each.parsed_arguments for each in made.output if each.type == "function_call"]
        told = {"text": made.output_text, "calls": calls, "output": made.output_parsed}
        return self.said(told, made)

    def messages(self, kind: str, stream: bool, salt: str) -> Said:
        asked = {
            "model": MODEL,
            "max_tokens": 64,
            "messages": user(QUESTIONS[kind]),
            "extra_body": {"temperature": 0, "cache_salt": salt},
        }
        if kind == "tools":
            schema = Weather.model_json_schema()
            asked |= {
                "tools": [{"name": "Weather", "input_schema": schema, "strict": True}],
                "tool_choice": {"type": "tool", "name": "Weather"},
            }
        elif kind == "structured":
            asked |= {"output_format": Verdict}
        if stream:
            with self.anthropic.messages.stream(**asked) as events:
                made = events.get_final_message()
        elif kind == "structured":
            made = self.anthropic.messages.parse(**asked)
        else:
            made = self.anthropic.messages.create(**asked)
        text = "".join(each.text for each in made.content if each.type == "text")
        calls = [Weather(**each.input) for each in made.content if each.type == "tool_use"]
        output = made.parsed_output if kind == "structured" else None
        return self.said({"text": text, "calls": calls, "output": output}, made)

    def langchain_chat(self, kind: str, stream: bool, salt: str) -> Said:
        model = self.langchain.bind(max_tokens=64, extra_body={"cache_salt": salt})
        if kind == "tools":
            options = {"tool_choice": "Weather", "strict": True} | model.kwargs
            model = self.langchain.bind_tools([Weather], **options)
        elif kind == "structured":
            model = self.langchain.with_structured_output(
                Verdict, method="json_schema", include_raw=True, **model.kwargs
            )
        if stream:
            made, *more = model.stream(QUESTIONS[kind])
            for each in more:
                made += each
        else:
            made = model.invoke(QUESTIONS[kind])
        output = made["parsed"] if kind == "structured" else None
        message = made["raw"] if kind == "structured" else made
        calls = [Weather(**call["args"]) for call in message.tool_calls]
        return self.said({"text": message.content, "calls": calls, "output": output}, message)

    def ai_sdk(self, kind: str, stream: bool, salt: str) -> Said:
        if self._ai_sdk is None:
            self._ai_sdk = start_ai_sdk(f"{self.url}/v1")
        line = orjson.dumps({"kind": kind, "stream": stream, "salt": salt})
        self._ai_sdk.stdin.write(line + b"\n")
        self._ai_sdk.stdin.flush()
        said = orjson.loads(self._ai_sdk.stdout.readline())
        assert "error" not in said, said["error"]
        return Said(**said)


def start_ai_sdk(url: str) -> subprocess.Popen[bytes]:
    """Start the npm client, installed once for all times in the user's cache folder."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("the AI SDK needs node and npm")
    if int(subprocess.check_output([node, "--version"])[1:].split(b".")[0]) < 18:
        pytest.skip("the AI SDK needs node 18 or newer")
    lock = AI_SDK / "package-lock.json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tierserve"
    folder = cache / f"ai-sdk-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in (AI_SDK / "package.json", lock):
            shutil.copy(file, folder)
        # A registry may fail for a while.
        install = [npm, "ci", "--ignore-scripts", "--no-audit", "--fetch-retries=5"]
        subprocess.run(install, cwd=folder, check=True)
        (folder / "installed").touch()
    asked = {
        "url": url,
        "model": MODEL,
        "questions": QUESTIONS,
        "tool": {"name": "Weather", "schema": Weather.model_json_schema()},
        "schema": Verdict.model_json_schema(),
    }
    # Given as text, so that its imports are looked for where it runs.
    command = [node, "--input-type=module", "--eval", (AI_SDK / "ask.js").read_text()]
    env = os.environ | {"ASKED": orjson.dumps(asked).decode()}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdin=pipe, stdout=pipe)


@pytest.fixture(scope="module")
def clients(ready: Server) -> Iterator[Clients]:
    made = Clients(ready.url)
    yield made
    made.close()


KINDS = tuple(QUESTIONS)
Ask = Callable[[Clients, str, bool, str], Said]
CHATS = (Clients.chat, Clients.langchain_chat, Clients.ai_sdk)
# Their streams and bodies are one entry, but for those of tools and of others.
ONE = [
    *((ask, kind) for ask in CHATS for kind in KINDS if kind != "tools"),
    (Clients.completions, "text"),
]
APART = [
    *((ask, "tools") for ask in CHATS),
    *((ask, kind) for ask in (Clients.responses, Clients.messages) for kind in KINDS),
]


@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
@pytest.mark.parametrize(("ask", "kind"), [*ONE, *APART])
def test_a_hit_is_parsed_as_the_miss(clients: Clients, ask: Ask, kind: str, stream: bool) -> None:
    salt = f"{ask.__name__} {kind} {stream}"
    miss = ask(clients, kind, stream, salt)
    hit = kept(lambda: ask(clients, kind, stream, salt), attrgetter("status"))
    assert "fwd=miss" in miss.status
    assert "detail=memory" in hit.status
    assert hit[:2] == miss[:2]
    assert miss.told[{"text": "text", "tools": "calls", "structured": "output"}[kind]]
    if (ask, kind) in ONE:
        other = ask(clients, kind, not stream, salt)
        assert "detail=memory" in other.status
        assert other.told == miss.told
