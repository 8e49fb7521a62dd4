"""vLLM's own scheduler with our connector on both sides, and a model that computes nothing.

Its «model» fills each block with bytes that follow from the block's hash, so from all tokens before
and in it, and from adapter and salt. Before that it checks, as attention would read them, that all
blocks before hold what belongs there. So a step fails where a load has brought something wrong, and
where anything is written into blocks that aren't ours any more.
"""

import json
import pickle
import time
from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import shake_128
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.utils import allocate_kv_cache

from tests.waiting import HANGS_S
from tiers.prefix_kv.engine import sides, transfers
from tiers.prefix_kv.engine.connector import PrefixConnector
from tiers.prefix_kv.engine.sides import SchedulerSide, WorkerSide
from tiers.prefix_kv.options import ConnectorOptions
from tiers.prefix_kv.store import PrefixStore

from .prompts import TOKENS

LAYERS = ("a", "b")
SPEC = FullAttentionSpec(block_size=TOKENS, num_kv_heads=2, head_size=32, dtype=torch.uint8)
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 512, "max_position_embeddings": 4096,
}  # fmt: skip


def vllm_config(folder: Path, transfer: dict[str, Any] | None = None, **cache: Any) -> VllmConfig:
    """Return vLLM's configuration for a model of which there is only a `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL))
    options = {"prefix_caching_hash_algo": "sha256_cbor", "enable_prefix_caching": True}
    made = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=2048
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=32, max_num_batched_tokens=256, max_model_len=2048,
            enable_chunked_prefill=True, is_encoder_decoder=False,
        ),
        cache_config=CacheConfig(block_size=TOKENS, **(options | cache)),
        kv_transfer_config=None if transfer is None else KVTransferConfig(**transfer),
        device_config=DeviceConfig("cpu"),
    )  # fmt: skip
    made.cache_config.kv_cache_layout = "LBHNC"
    return made


def kv_config(config: VllmConfig, blocks: int, layout: str = "LBHNC") -> KVCacheConfig:
    """Return vLLM's own plan of a cache of so many blocks."""
    config.cache_config.kv_cache_layout = layout
    config.cache_config.num_gpu_blocks = blocks
    planned = get_kv_cache_config_from_groups(
        config,
        [KVCacheGroupSpec(list(LAYERS), SPEC)],
        available_memory=blocks * len(LAYERS) * SPEC.page_size_bytes,
    )
    planned.kv_cache_layout = layout
    return planned


@cache
def block_hasher() -> Any:
    hash_fn = get_hash_fn_by_name("sha256_cbor")
    init_none_hash(hash_fn)
    return get_request_block_hasher(TOKENS, hash_fn)


def computed(block_hash: bytes, layer: str) -> bytes:
    """Return what the model computes for a layer's page."""
    return shake_128(block_hash + layer.encode()).digest(SPEC.page_size_bytes)


class Engine:
    """An engine, whose two processes are one here.

    Args:
        folder: of the store, and of the model's `config.json`.
        blocks: of the cache.
        layout: of the cache.
        transfer: options of the connector that replace ours.
        cache: options of vLLM's `CacheConfig` that replace ours.
        groups: groups of caches that replace ours.
        options: of our connector.
    """

    def __init__(
        self,
        folder: Path,
        *,
        blocks: int = 64,
        layout: str = "LBHNC",
        transfer: dict[str, Any] | None = None,
        cache: dict[str, Any] | None = None,
        groups: Sequence[KVCacheGroupSpec] | None = None,
        **options: Any,
    ) -> None:
        chosen = {
            "folder": str(folder / "store"), "max_bytes": 2**27, "model": "m", "weights": "w",
            "store_after": 1, "min_tokens": 1,
        } | options  # fmt: skip
        given = ConnectorOptions(**chosen).engine_options()["kv_transfer_config"]
        self.config = vllm_config(folder, given | (transfer or {}), **(cache or {}))
        self.cache = kv_config(self.config, blocks, layout)
        if groups is not None:
            self.cache.kv_cache_groups = list(groups)
        self.worker_connector = KVConnectorFactory.create_connector(
            self.config, KVConnectorRole.WORKER, self.cache
        )
        self.views = allocate_kv_cache(self.cache, torch.device("cpu"), KVCacheLayout[layout])
        self.worker_connector.register_kv_caches(self.views)
        self.scheduler = Scheduler(
            vllm_config=self.config, kv_cache_config=self.cache, log_stats=True,
            structured_output_manager=StructuredOutputManager(self.config), block_size=TOKENS,
        )  # fmt: skip
        self.connector = self.scheduler.connector
        facts = self.worker_connector.get_handshake_metadata()
        self.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): facts} if facts else {})
        self.requests: dict[str, Request] = {}
        self.computed_tokens: dict[str, int] = {}
        """How many tokens of each request the model has computed."""
        self.reported: list[str] = []
        """Requests whose loads were reported as over."""

    @property
    def planner(self) -> Any:
        return self.side.planner

    @property
    def side(self) -> SchedulerSide:
        assert isinstance(self.connector, PrefixConnector)
        assert self.connector._scheduler is not None
        return self.connector._scheduler

    @property
    def worker(self) -> WorkerSide:
        assert isinstance(self.worker_connector, PrefixConnector)
        assert self.worker_connector._worker is not None
        return self.worker_connector._worker

    @property
    def store(self) -> PrefixStore:
        return sides.open_shared(self.connector._options.store({}))

    def add(
        self,
        name: str,
        tokens: list[int] | None,
        *,
        max_tokens: int = 1,
        salt: str | None = None,
        adapter: str | None = None,
        params: dict[str, Any] | None = None,
        **others: Any,
    ) -> Request:
        """Give the engine a request."""
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        sampling.extra_args = {"kv_transfer_params": params} if params else None
        made = Request(
            request_id=name, prompt_token_ids=tokens, sampling_params=sampling,
            pooling_params=None, block_hasher=block_hasher(), cache_salt=salt,
            lora_request=LoRARequest(adapter, 1, "/adapter") if adapter else None, **others,
        )  # fmt: skip
        self.requests[name] = made
        self.scheduler.add_request(made)
        return made

    def ask(self, name: str, tokens: list[int], **options: Any) -> int:
        """Serve a request to its end; returns how many tokens the model had to compute."""
        self.add(name, tokens, **options)
        self.run()
        return self.computed_tokens[name]

    def drain(self) -> None:
        """Wait until all that is staged is stored."""
        saver = self.worker.saver
        slots = transfers.saver_slots(self.worker.copies.block_bytes)
        self.wait_for(lambda: saver._slots.qsize() == slots)

    def wait_for(self, is_done: Any) -> None:
        give_up_at = time.monotonic() + HANGS_S
        while not is_done():
            assert time.monotonic() < give_up_at, "it hangs"
            time.sleep(0.001)

    def run(self, names: Iterable[str] | None = None) -> None:
        """Take steps until requests are finished."""
        pending = set(self.requests if names is None else names)

        def step() -> bool:
            self.step()
            return all(self.requests[name].is_finished() for name in pending)

        self.wait_for(step)

    def key(self, name: str, at: int) -> bytes:
        """Return the key in the store of a block of a request without an adapter."""
        return self.side._scopes[""][0] + self.requests[name].block_hashes[at]

    def block_ids(self, name: str) -> list[int]:
        return self.scheduler.kv_cache_manager.get_block_ids(name)[0]

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> Any:
        """Schedule, compute, and let the scheduler know, as vLLM's `EngineCore` does."""
        output = self.scheduler.schedule()
        # It goes to another process.
        metadata = pickle.loads(pickle.dumps(output.kv_connector_metadata))
        worker = self.worker_connector
        worker.handle_preemptions(metadata)
        worker.bind_connector_metadata(metadata)
        for name, tokens in output.num_scheduled_tokens.items():
            self._compute(self.requests[name], tokens)
        worker.start_load_kv(None)
        worker.wait_for_save()
        results = worker.get_transfer_results(output.finished_req_ids)
        told = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )
        worker.clear_connector_metadata()
        self.reported += results.finished_recving
        self.scheduler.update_from_output(output, self._answer(output, told))
        return output

    def _answer(self, output: Any, told: KVConnectorOutput) -> ModelRunnerOutput:
        names = list(output.num_scheduled_tokens)
        # `num_computed_tokens` counts the step's tokens by now.
        sampled = [
            [7] if self.requests[name].num_computed_tokens >= self.requests[name].num_tokens else []
            for name in names
        ]
        is_empty = not names and told.is_empty()
        return ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=sampled, kv_connector_output=None if is_empty else told,
        )  # fmt: skip

    def _compute(self, request: Request, tokens: int) -> None:
        block_ids, *_ = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        end = request.num_computed_tokens
        begin, hashes = end - tokens, request.block_hashes
        for at in range(begin // TOKENS):
            self.check(block_ids[at], hashes[at])
        for at in range(begin // TOKENS, end // TOKENS):
            self.fill(block_ids[at], hashes[at])
        before = self.computed_tokens.get(request.request_id, 0)
        self.computed_tokens[request.request_id] = before + tokens

    def check(self, block_id: int, block_hash: bytes) -> None:
        """Check that a block holds what the model computes."""
        for layer in LAYERS:
            held = self.views[layer][block_id].contiguous().numpy().tobytes()
            assert held == computed(block_hash, layer), f"block {block_id} holds something else"

    def fill(self, block_id: int, block_hash: bytes) -> None:
        for layer in LAYERS:
            view = self.views[layer][block_id]
            page = torch.frombuffer(bytearray(computed(block_hash, layer)), dtype=torch.uint8)
            view.copy_(page.view(view.shape))

    def counts(self, side: Any | None = None) -> dict[str, float]:
        """Return and reset the counts of one side: the scheduler's unless another is given."""
        return dict((side or self.side).books.counts.take())

    def assert_is_idle(self) -> None:
        """Check that nothing has leaked."""
        scheduler, pool = self.scheduler, self.scheduler.kv_cache_manager.block_pool
        assert not scheduler.requests
        assert not scheduler.finished_recving_kv_req_ids
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert len(self.reported) == len(set(self.reported))
        if self.connector.is_on:
            planner = self.planner
            assert not planner._requests
            assert not planner._loads
            assert not planner._loading
            assert not self.worker.loader._loads
            assert not self.worker_connector._lost

    def close(self) -> None:
        self.scheduler.shutdown()
        self.worker_connector.shutdown()
