"""A real vLLM with the prefix connector, without a front, so that each request reaches it.

It is asked with tokens, so that a test knows where blocks begin and end.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import orjson
import psutil
import pytest

import tiers
from server.engine.dtype import dtype_for
from server.engine.identity import fingerprint
from server.engine.weights import embedded_folder
from tests.servers import free_port
from tiers.prefix_kv.options import ConnectorOptions
from tiers.prefix_kv.store import PrefixStore

MODEL, POET = "m", "poet"
BLOCK = 128
"""Tokens of a block in the CPU build of vLLM."""
MAX_BYTES = 2 * 1024**3
TOKENS = 16
"""Of each answer."""

_ROUNDING = 0.3
"""Of logprobs in bfloat16. vLLM alone differs by up to 0.125 between batches."""
_CONNECTOR = "tests.e2e.prefix.patient_connector"
_VLLM = "vllm.entrypoints.launchers.api_server.entry"
_ENVIRONMENT = {
    "PYTHONPATH": str(Path(tiers.__file__).parents[1]),
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The same number of threads with a connector and without.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
}


class Answer(NamedTuple):
    """A greedy answer of vLLM, with logprobs of the first and the second token at each place."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]
    """By how much the first token was likelier than the second."""
    cached: int
    """Tokens of the prompt that weren't computed."""
    loaded: int
    """Those of them that came from disk; 0 in a stream, which doesn't say it."""

    def agrees(self, expected: "Answer") -> bool:
        """Return whether the tokens are the expected ones, up to rounding.

        What is computed in other parts, or in another batch, is rounded otherwise. So from the
        first token on that hardly was likelier than the second, others may follow.
        """
        for number, (own, other) in enumerate(zip(self.tokens, expected.tokens, strict=False)):
            if own != other:
                return expected.margins[number] < _ROUNDING
            if abs(self.logprobs[number] - expected.logprobs[number]) > _ROUNDING:
                return False
        return True


class Engine:
    """One vLLM; `start` may be called again after `kill`.

    Args:
        folder: for its log.
        store: the folder of the prefix blocks; `None` for vLLM without a connector.
        arguments: options of vLLM beside the usual ones.
        environment: variables beside the usual ones.
        adapter: an adapter in `folder` that is served as `POET`.
        options: of the connector, beside the usual ones.
    """

    def __init__(
        self,
        folder: Path,
        store: Path | None,
        *,
        arguments: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        adapter: Path | None = None,
        **options: Any,
    ) -> None:
        self.folder, self.store, self.adapter = folder, store, adapter
        self.port = free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=600)
        self.process: subprocess.Popen[bytes] | None = None
        self._arguments, self._environment = dict(arguments or {}), dict(environment or {})
        self._options = options

    @property
    def log(self) -> Path:
        return self.folder / "vllm.log"

    def command(self) -> list[str]:
        options: dict[str, Any] = {
            "model": str(embedded_folder()),
            "served_model_name": MODEL,
            "host": "127.0.0.1",
            "port": self.port,
            "max_model_len": 1024,
            "dtype": dtype_for(Path("/proc/cpuinfo").read_text()),
        }
        flags = ["--enforce-eager", "--enable-prompt-tokens-details"]
        if self.adapter is not None:
            # As it is called in its folder, since its path is part of a block's name.
            flags += ["--enable-lora", "--lora-modules", f"{POET}={self.adapter.name}"]
        if self.store is not None:
            options |= patient(self.connector().engine_options())
        options |= self._arguments
        pairs = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
        texts = [
            (name, orjson.dumps(value).decode() if isinstance(value, dict) else str(value))
            for name, value in pairs
        ]
        return [sys.executable, "-m", _VLLM, *(part for pair in texts for part in pair), *flags]

    def connector(self) -> ConnectorOptions:
        adapters = {} if self.adapter is None else {POET: fingerprint(self.adapter)}
        usual = {"store_after": 1, "min_tokens": BLOCK, "max_bytes": MAX_BYTES}
        return ConnectorOptions(
            folder=str(self.store), model=MODEL, weights="embedded", adapters=adapters,
            **(usual | self._options),
        )  # fmt: skip

    def start(self) -> None:
        # Where its processes meet. vLLM would take one that any other program may be given.
        meeting = {"VLLM_PORT": str(free_port())}
        environment = os.environ | _ENVIRONMENT | meeting | self._environment
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), env=environment, stdout=log, stderr=log, start_new_session=True,
                cwd=self.folder,
            )  # fmt: skip

    def wait_ready(self) -> None:
        while not self.is_ready():
            if not self.lives():
                pytest.fail(f"vLLM ended:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.1)

    def is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self.client.get("/health").status_code == 200
        return False

    def lives(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def processes(self) -> list[psutil.Process]:
        if self.process is None:
            return []
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def kill(self) -> None:
        """Kill all of its processes at once."""
        found = self.processes()
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found)
        if self.process is not None:
            self.process.wait()
            self.process = None

    def ask(
        self, prompt: Sequence[int], *, stream: bool = False, model: str = MODEL,
        tokens: int = TOKENS, **fields: Any,
    ) -> Answer:  # fmt: skip
        """Return the greedy answer to a prompt."""
        body = {
            "model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "logprobs": 2, "return_token_ids": True,
            "return_tokens_as_token_ids": True, **fields,
        }  # fmt: skip
        if not stream:
            response = self.client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return _answer([response.json()])
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            return _answer(list(_events(response.iter_lines())))

    def ask_all(
        self, prompts: Sequence[Sequence[int]], at_once: int, **fields: Any
    ) -> list[Answer]:
        """Return the answers to prompts, several of which are asked at the same time."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda prompt: self.ask(prompt, **fields), prompts))

    def forget(self, *, on_disk: bool = False) -> None:
        """Empty the engine's own cache, and have the model's blocks purged on disk as well."""
        query = {"reset_external": "true"} if on_disk else {}
        assert self.client.post("/reset_prefix_cache", params=query).status_code == 200

    def metric(self, name: str, **labels: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(name) and all(label in line for label in wanted)
        )

    def open_store(self) -> PrefixStore:
        assert self.store is not None
        return PrefixStore(self.connector().store(self._environment))


def patient(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of vLLM with which the connector waits for the disk."""
    made = options["kv_transfer_config"] | {"kv_connector_module_path": _CONNECTOR}
    return options | {"kv_transfer_config": made}


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield orjson.loads(line.removeprefix("data: "))


def _answer(events: Sequence[dict[str, Any]]) -> Answer:
    tokens: list[int] = []
    logprobs: list[float] = []
    margins: list[float] = []
    for event in events:
        for choice in event["choices"]:
            tokens += choice.get("token_ids") or []
            if said := choice.get("logprobs"):
                logprobs += said["token_logprobs"]
                for top in said["top_logprobs"]:
                    first, second = sorted(top.values(), reverse=True)[:2]
                    margins.append(first - second)
    usage = events[-1]["usage"]
    details = usage.get("prompt_tokens_details") or {}
    params = events[-1].get("kv_transfer_params") or {}
    return Answer(
        tuple(tokens), tuple(logprobs), tuple(margins), details.get("cached_tokens") or 0,
        params.get("prefix_disk_tokens", 0),
    )  # fmt: skip
