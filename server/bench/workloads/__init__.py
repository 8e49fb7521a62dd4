"""Workloads of the load tester: what is asked, made from options or read from files.

`build` makes the workload that a text such as `zipf:s=1.1,unique=0.2` or `mooncake:FILE` names.
"""

from server.bench.workloads.requests import Common
from server.bench.workloads.spec import NAMES, build

__all__ = ["NAMES", "Common", "build"]
