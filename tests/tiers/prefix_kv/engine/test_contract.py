"""vLLM's contract of connectors, beside the one that ours was written against.

After an upgrade of vLLM, the difference says what to look at. Once the connector is right, write
the new contract: `python -m tests.tiers.prefix_kv.engine.test_contract`.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

RECORDED = Path(__file__).with_name("contract.json")


def contract() -> dict[str, Any]:
    """Return the names and signatures that vLLM calls, and what goes between its processes."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.v1.core.sched.output import KVConnectorBlockState
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
    from vllm.v1.outputs import KVConnectorOutput

    classes = (base.KVConnectorBase_V1, base.SupportsHMA, base.KVConnectorWorkerMetadata)
    data = (
        base.KVConnectorTransferResults, KVConnectorOutput, KVConnectorBlockState, KVCacheConfig,
        KVCacheGroupSpec, KVCacheTensor,
    )  # fmt: skip
    return {each.__name__: methods_of(each) for each in classes} | {
        each.__name__: list(each.__dataclass_fields__) for each in data
    }


def methods_of(owner: type) -> dict[str, str]:
    return {
        name: described(member)
        for name, member in sorted(vars(owner).items())
        if isinstance(member, property | classmethod) or inspect.isfunction(member)
    }


def described(member: Any) -> str:
    if isinstance(member, property):
        return "property"
    kind = "classmethod " if isinstance(member, classmethod) else ""
    function = inspect.unwrap(getattr(member, "__func__", member))
    kind += "abstract " if getattr(function, "__isabstractmethod__", False) else ""
    return kind + str(inspect.signature(function))


def test_the_contract_is_the_recorded_one():
    assert contract() == json.loads(RECORDED.read_text())


def test_the_connector_overrides_what_is_there():
    from tiers.prefix_kv.engine.connector import PrefixConnector

    recorded = json.loads(RECORDED.read_text())
    known = recorded["KVConnectorBase_V1"] | recorded["SupportsHMA"]
    own = {
        name: member
        for name, member in vars(PrefixConnector).items()
        if not name.startswith("_") and (inspect.isfunction(member) or name in known)
    }
    # What is public and not vLLM's is used by the module only.
    assert own.keys() - known.keys() == {"note_failure"}
    abstract = {name for name, signature in known.items() if "abstract" in signature}
    assert abstract <= own.keys()


def test_the_connectors_parameters_are_those_of_the_contract():
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

    from tiers.prefix_kv.engine.connector import PrefixConnector

    for base in (SupportsHMA, KVConnectorBase_V1):
        for name in methods_of(base).keys() & vars(PrefixConnector).keys():
            theirs, ours = vars(base)[name], vars(PrefixConnector)[name]
            assert type(theirs) is type(ours), name
            if not isinstance(theirs, property):
                theirs, ours = (getattr(each, "__func__", each) for each in (theirs, ours))
                assert parameters(ours) == parameters(theirs), name


def parameters(function: Any) -> list[tuple[str, Any]]:
    signature = inspect.signature(inspect.unwrap(function))
    return [(each.name, each.kind) for each in signature.parameters.values()]


def test_the_ways_of_the_connector_are_what_vllm_asks_for():
    from vllm.distributed.kv_transfer.kv_connector.v1.base import supports_hma
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    from tiers.prefix_kv.engine.connector import PrefixConnector

    assert supports_hma(PrefixConnector)
    assert not PrefixConnector.requires_piecewise_for_cudagraph({})
    assert PrefixConnector._cache_hit_source is CacheHitSource.DISK


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(contract(), indent=1) + "\n")
