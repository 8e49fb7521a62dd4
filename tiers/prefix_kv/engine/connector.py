"""vLLM's side of the store: a `KVConnectorBase_V1`, written against vLLM 0.32.

It translates between vLLM and `Planner` (in the scheduler's process) or `BlockLoader`, `BlockSaver`
(in each worker's). All names of vLLM are here and in `engine_cache`. The contract is in
`vllm/distributed/kv_transfer/kv_connector/v1/base.py`.

Loads are asynchronous, since vLLM gives wrong output after a synchronous one that fails. Each hook
fails open: an exception is logged, and the engine computes as if there were no store. Where the
engine's cache isn't understood, the connector does nothing, and says so once.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from tiers.prefix_kv.engine.engine_cache import (
    NotUnderstoodError,
    is_on_gpu,
    preferred_layout,
    regions,
    require_known,
    scope_facts,
)
from tiers.prefix_kv.engine.host_copies import HostCopies
from tiers.prefix_kv.engine.orders import StepOrders
from tiers.prefix_kv.engine.planner import RequestProgress
from tiers.prefix_kv.engine.sides import Prompt, SchedulerSide, WorkerSide, describe, open_shared
from tiers.prefix_kv.engine.transfers import BlockCopies
from tiers.prefix_kv.options import DISK_TOKENS, WARM, ConnectorOptions
from tiers.prefix_kv.scope import scope_of_facts

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_Hook = TypeVar("_Hook", bound=Callable[..., Any])
_LOGGED_FAILURES = 3


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the scheduler orders of the workers in a step."""

    orders: StepOrders = field(default_factory=StepOrders)


@dataclass
class WorkerFacts(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler once."""

    scope: bytes
    block_bytes: int


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What workers tell the scheduler after a step."""

    failed: set[str]
    """Requests whose load failed at a worker."""
    saves_over: dict[int, int]
    """How many orders to store a block are over, by rank."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerReport":
        """Return the report of both."""
        if not isinstance(other, WorkerReport):
            return self
        return WorkerReport(self.failed | other.failed, self.saves_over | other.saves_over)


def _fails_open(default: Callable[[], Any]) -> Callable[[_Hook], _Hook]:
    """Have a hook return a default where it is off or raises an exception."""

    def decorate(hook: _Hook) -> _Hook:
        @functools.wraps(hook)
        def guarded(self: "PrefixConnector", *args: Any, **kwargs: Any) -> Any:
            if not self.is_on:
                return default()
            try:
                return hook(self, *args, **kwargs)
            except Exception as exc:
                self.note_failure(hook.__name__, exc)
                return default()

        return cast("_Hook", guarded)

    return decorate


def _nothing() -> None:
    pass


class PrefixConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads prefix blocks from the store, and stores them there."""

    _cache_hit_source = CacheHitSource.DISK

    def __init__(
        self,
        vllm_config: "VllmConfig",
        role: KVConnectorRole,
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _show_logs()
        self.is_on = True
        """Whether hooks do anything."""
        self._failures = 0
        self._options = ConnectorOptions.of(self._kv_transfer_config.kv_connector_extra_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._facts: WorkerFacts | None = None
        self._lost: set[str] = set()
        """Requests that wait for a load which will not come."""
        try:
            self._block_tokens = require_known(vllm_config, kv_cache_config)
        except NotUnderstoodError as exc:
            self._turn_off(str(exc), role)

    def note_failure(self, hook: str, exc: Exception) -> None:
        """Count and log an exception; most likely the same will come again and again."""
        self._failures += 1
        side = self._scheduler or self._worker
        if side is not None:
            side.books.counts.add("errors")
        if self._failures <= _LOGGED_FAILURES:
            logger.error(
                "prefix blocks: %s failed; the engine computes instead", hook, exc_info=exc
            )

    def _turn_off(self, reason: str, role: KVConnectorRole) -> None:
        self.is_on = False
        if role is KVConnectorRole.SCHEDULER:
            logger.warning("prefix blocks are neither loaded nor stored: %s", reason)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a block that isn't stored is computed again."""
        return False

    # The workers' side.

    @_fails_open(_nothing)
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Open the store for this worker, whose cache is `kv_caches`."""
        try:
            self._worker = self._open_worker(kv_caches)
        except NotUnderstoodError as exc:
            self.is_on = False
            logger.warning("prefix blocks are neither loaded nor stored: %s", exc)

    def _open_worker(self, kv_caches: dict[str, torch.Tensor]) -> WorkerSide:
        found = regions(kv_caches, self._kv_cache_config)
        if found[0].is_cuda:
            from tiers.prefix_kv.engine.cuda_copies import CudaCopies

            copies: BlockCopies = CudaCopies(found)
        else:
            copies = HostCopies([region.numpy() for region in found])
        facts = scope_facts(self._vllm_config, self._kv_cache_config)
        scope = scope_of_facts(facts | {"weights": self._options.weights})
        store = open_shared(self._options.store(os.environ))
        rank = self._vllm_config.parallel_config.rank
        described = facts | {"rank": rank, "kv_blocks": self._kv_cache_config.num_blocks}
        store.index.describe_scope(scope, describe(described, self._options.model))
        worker = WorkerSide(self._options, store, scope, copies, rank)
        # The scheduler orders nothing of a worker that isn't ready.
        self._facts = WorkerFacts(scope, copies.block_bytes)
        return worker

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Return what the scheduler has to know of this worker; `None` without a store."""
        return self._facts

    @_fails_open(_nothing)
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Have the step wait for copies of blocks that it overwrites."""
        if self._worker is not None and isinstance(kv_connector_metadata, StepMetadata):
            self._worker.copies.protect(kv_connector_metadata.orders.new_block_ids)

    @_fails_open(_nothing)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Begin the step's loads, after its computing."""
        orders = self._orders()
        self._lost.update(orders.lost, (order.request for order in orders.loads))
        if self._worker is not None:
            for order in orders.loads:
                self._worker.loader.start(order)
                self._lost.discard(order.request)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: a request waits until its load is over."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing: whole blocks are saved after the step."""

    @_fails_open(_nothing)
    def wait_for_save(self) -> None:
        """Copy the blocks that are to be stored."""
        if self._worker is not None and (saves := self._orders().saves):
            self._worker.saver.stage(saves)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:  # noqa: ARG002
        """Return the requests whose loads are over, also those whose load failed.

        Of one that failed, the blocks that it brought are kept; of one that never began, nothing.
        """
        lost, self._lost = self._lost, set()
        return KVConnectorTransferResults(
            finished_recving=self._take_finished() | lost, failed_recving=lost
        )

    @_fails_open(set)
    def _take_finished(self) -> set[str]:
        return set() if self._worker is None else self._worker.take_finished()

    @_fails_open(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that the loads that are over have not brought."""
        return set() if self._worker is None else self._worker.take_failed_blocks()

    @_fails_open(_nothing)
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Return the requests whose loads have failed, and how much of what was ordered is over."""
        if self._worker is None:
            return None
        failed, over = self._worker.take_failed_requests(), self._worker.take_saves_over()
        return WorkerReport(failed, over) if failed or over else None

    # The scheduler's side.

    @_fails_open(_nothing)
    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Open the store for the scheduler, whose workers have told their scopes."""
        facts = [each for _, each in sorted(metadata.items()) if isinstance(each, WorkerFacts)]
        if len(facts) != self._vllm_config.parallel_config.world_size:
            self._turn_off("a worker has no store", KVConnectorRole.SCHEDULER)
            return
        store = open_shared(self._options.store(os.environ))
        self._scheduler = SchedulerSide(
            self._options, store, [each.scope for each in facts],
            block_tokens=self._block_tokens, block_bytes=facts[0].block_bytes,
        )  # fmt: skip

    @_fails_open(_nothing)
    def on_new_request(self, request: "Request") -> None:
        """Count a request for its prefix."""
        if self._scheduler is not None:
            self._scheduler.add(request.request_id, _prompt(request, self._block_tokens))

    @_fails_open(lambda: (0, False))
    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many tokens can be loaded beyond those of the engine's own cache."""
        if self._scheduler is None:
            return 0, False
        computed = num_computed_tokens // self._block_tokens
        blocks = self._scheduler.planner.match(request.request_id, computed)
        return (None, False) if blocks is None else (blocks * self._block_tokens, blocks > 0)

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        """Order the load of tokens for which the engine has taken blocks.

        From here on, the engine waits until the load is reported as over, whatever happens.
        """
        if not num_external_tokens or self._scheduler is None:
            return
        if not self._order_load(request, blocks, num_external_tokens):
            self._scheduler.planner.give_up(request.request_id)

    @_fails_open(bool)
    def _order_load(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> bool:
        planner = cast("SchedulerSide", self._scheduler).planner
        planner.load(
            request.request_id,
            num_external_tokens // self._block_tokens,
            blocks.get_block_ids()[0],
        )
        return True

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        """Return the orders of a step. Loads are among them even where stores fail."""
        if self._scheduler is None:
            return StepMetadata()
        orders = self._scheduler.begin_step(scheduler_output.total_num_scheduled_tokens)
        self._order_saves(orders, scheduler_output)
        return StepMetadata(orders)

    @_fails_open(_nothing)
    def _order_saves(self, orders: StepOrders, output: "SchedulerOutput") -> None:
        if is_on_gpu():
            orders.new_block_ids = list(_new_block_ids(output))
        planner = cast("SchedulerSide", self._scheduler).planner
        orders.saves = planner.saves(_progress(output, self._block_tokens, planner.is_due))

    @_fails_open(_nothing)
    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Take note of loads that are over."""
        if self._scheduler is not None:
            report = connector_output.kv_connector_worker_meta
            failed = connector_output.failed_recving
            if isinstance(report, WorkerReport):
                failed = failed | report.failed
                self._scheduler.note_saves(report.saves_over)
            self._scheduler.finish(connector_output.finished_recving or (), failed)

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; the engine may free its blocks at once."""
        return self.request_finished_all_groups(request, (block_ids,))

    @_fails_open(lambda: (False, None))
    def request_finished_all_groups(
        self,
        request: "Request",
        block_ids: tuple[list[int], ...],  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; the engine may free its blocks at once."""
        loaded = 0
        if self._scheduler is not None:
            loaded = self._scheduler.planner.remove(request.request_id)
        return False, {DISK_TOKENS: loaded} if loaded else None

    @_fails_open(_nothing)
    def reset_cache(self) -> bool | None:
        """Purge the model's blocks."""
        if self._scheduler is not None:
            self._scheduler.purge()
        return True

    # Both sides.

    @_fails_open(_nothing)
    def shutdown(self) -> None:
        """Write what is left, within seconds."""
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.close()
        self._scheduler = self._worker = None
        self.is_on = False

    def _orders(self) -> StepOrders:
        metadata = self._connector_metadata
        return metadata.orders if isinstance(metadata, StepMetadata) else StepOrders()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str | None:  # noqa: ARG003
        """Ask for a layout in which a block is one run of bytes, where each copy is launched."""
        return preferred_layout()


def _prompt(request: "Request", block_tokens: int) -> Prompt:
    tokens = request.prompt_token_ids or []
    adapter = request.lora_request
    return Prompt(
        hashes=request.block_hashes[: request.num_prompt_tokens // block_tokens],
        tokens=tokens,
        number=request.num_prompt_tokens,
        adapter="" if adapter is None else adapter.lora_name,
        salt=request.cache_salt or "",
        is_plain=not request.mm_features and request.prompt_embeds is None,
        is_warm=request.kv_transfer_params == WARM,
    )


def _progress(
    output: "SchedulerOutput", block_tokens: int, is_due: Callable[[str, int], bool]
) -> Iterator[RequestProgress]:
    """Yield how far requests are after a step, if they are due.

    Of a request that isn't, the engine needn't look up the blocks, which may be thousands.
    """
    table = output.kv_connector_block_state
    if table is None:
        return
    cached = output.scheduled_cached_reqs
    computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for request, scheduled in output.num_scheduled_tokens.items():
        blocks = (computed[request] + scheduled) // block_tokens
        if is_due(request, blocks) and (ids := table.get_block_ids(request)) is not None:
            yield RequestProgress(request, blocks, ids[0])


def _new_block_ids(output: "SchedulerOutput") -> Iterator[int]:
    """Yield the blocks that were given to requests in a step."""
    for new in output.scheduled_new_reqs:
        yield from new.block_ids[0]
    for ids in output.scheduled_cached_reqs.new_block_ids:
        if ids is not None:
            yield from ids[0]


def _show_logs() -> None:
    """Log as vLLM does, which shows only the logs of its own modules."""
    own, shown = logging.getLogger("tiers"), logging.getLogger("vllm")
    own.handlers, own.propagate = shown.handlers, False
    own.setLevel(shown.level)
