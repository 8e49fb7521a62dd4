"""As many threads compute with the prefix tier as without it, by vLLM's own count."""

import os
import subprocess
import sys

import orjson
import pytest

from server.engine.threads import thread_variables

pytestmark = pytest.mark.engine

_PROGRAM = """
import json
from types import SimpleNamespace as Made
from vllm.utils.ompmultiprocessing import OMPProcessManager

parallel = Made(local_world_size=1, data_parallel_rank_local=None, _api_process_count=1)
made = [
    OMPProcessManager(Made(parallel_config=parallel, kv_transfer_config=config))
    for config in (None, {"kv_connector": "PrefixConnector"})
]
print(json.dumps([each.cpu_lists for each in made]))
"""


def test_vllm_binds_the_same_cpus() -> None:
    environment = {name: value for name, value in os.environ.items() if "VLLM_CPU" not in name}
    environment |= thread_variables({}, environment)
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, stdout=subprocess.PIPE, check=True
    )
    without, with_tier = orjson.loads(ended.stdout.splitlines()[-1])
    assert without == with_tier
    assert any(without)
