"""The dashboard and the alert rules: that they ask for metrics that a real server exports."""

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import pytest_asyncio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.config.secrets import new_key
from tests.server.conftest import Front, question, running
from tests.server.prefix_blocks import opened

CONFIGS = Path("configs")
DASHBOARD = json.loads((CONFIGS / "grafana" / "tierserve.json").read_text())
RULES = CONFIGS / "prometheus" / "alerts.yaml"
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

# Prometheus adds these itself.
OF_PROMETHEUS = {"up": set()}
LABELS_OF_PROMETHEUS = {"instance", "job"}
LABELS_OF_VLLM = {"engine", "model_name", "model", "upstream"}
"""The last two are those that `/metrics/engine` adds."""
WORDS = {"and", "bool", "offset", "or", "unless"}


def alerts() -> list[dict]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Yield what asks, and its PromQL."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m")
    for rule in alerts():
        yield rule["alert"], rule["expr"]


def asked_for(promql: str) -> tuple[set[str], set[str]]:
    """Return the names of metrics and of labels in an expression."""
    text = re.sub(r'"[^"]*"', '""', promql)
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"\"", text))
    grouping = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)"
    for group in re.findall(grouping, text):
        labels |= set(re.findall(r"\w+", group))
    text = re.sub(grouping, " ", text)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
    return set(re.findall(r"(?<![\w:])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()", text)) - WORDS, labels


def test_what_an_expression_asks_for() -> None:
    promql = (
        'sum by (le, tier) (rate(a_total{x=~"by (y)", z!="{"}[5m] offset 1d))'
        " / on (w) group_left () vllm:b > bool 0.5 and c"
    )
    assert asked_for(promql) == ({"a_total", "vllm:b", "c"}, {"le", "tier", "x", "z", "w"})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exported(_upstream, redis_server, tmp_path_factory) -> dict[str, set[str]]:
    """The metrics of a server with all tiers and a tenant, and the labels of each."""
    folder = tmp_path_factory.mktemp("front")
    key = new_key()
    options = {
        "shared": {"url": redis_server.url},
        "prefix": {"path": str(folder / "prefix"), "max_bytes": "64MiB"},
        "sections": {
            "tenants": {"key": key},
            "models": {"f": {"upstreams": [_upstream.url], "fallback": "m"}},
        },
        "headers": {"Authorization": f"Bearer {key}"},
    }
    # As engines count, of which there is none here.
    store = opened(folder / "prefix")
    store.index.save({("m", "hits"): 1}, {})
    store.close()
    front: Front
    async with running(folder, _upstream, **options) as front:
        asked = question()
        await front.ask(asked)
        assert "; hit; " in (await front.ask_alone(asked))[1]
        await front.until_metric("tierserve_prefix_available ", 1)
        async with front.session.get("/metrics") as response:
            text = await response.text()
    labels: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels[sample.name] |= sample.labels.keys()
    return labels


def vllm_metrics() -> set[str]:
    """Return the names that vLLM's source gives its metrics, as they are exposed."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "v1", "metrics", "loggers.py").read_text()
    names = set(re.findall(r'name="(vllm:\w+)"', source))
    return names | {f"{name}{end}" for name in names for end in ("_bucket", "_total")}


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_asked_for_is_told(exported: dict[str, set[str]]) -> None:
    of_vllm = dict.fromkeys(vllm_metrics(), LABELS_OF_VLLM)
    there = exported | of_vllm | OF_PROMETHEUS
    for who, promql in expressions():
        metrics, labels = asked_for(promql)
        assert metrics, who
        assert metrics <= there.keys(), who
        known = LABELS_OF_PROMETHEUS.union({"le"}, *(there[metric] for metric in metrics))
        assert labels <= known, who


@pytest.mark.asyncio(loop_scope="module")
async def test_every_metric_of_ours_is_shown(exported: dict[str, set[str]]) -> None:
    asked = set().union(*(asked_for(promql)[0] for _, promql in expressions()))
    ours = {name for name in exported if not name.endswith(("_sum", "_count", "_created"))}
    assert ours <= asked


def test_panels_say_what_they_show() -> None:
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= asked_for(target["expr"])[1], panel["title"]
            assert 'instance=~"$instance"' in target["expr"]
    for named in ([each["id"] for each in DASHBOARD["panels"]], [p["title"] for p in PANELS]):
        assert len(named) == len(set(named))


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells


def test_a_data_source_is_asked_for() -> None:
    variables = {each["name"]: each["type"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "instance": "query"}
    assert "__inputs" not in DASHBOARD
    assert "id" not in DASHBOARD


def test_alerts_say_how_bad_they_are_and_what_it_means() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"]
        assert rule["alert"].startswith("Tierserve")


def promtool(*arguments: str | Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.fail("promtool isn't there; apt-get install prometheus")
    ran = subprocess.run(
        [program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert ran.returncode == 0, ran.stdout


def test_prometheus_takes_the_configuration() -> None:
    promtool("check", "config", CONFIGS / "prometheus" / "scrape.yaml")


def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", *sorted(Path("tests", "data").glob("alerts*_test.yaml")))


def test_prometheus_takes_the_panels(tmp_path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": promql}
        for number, (_, promql) in enumerate(expressions())
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", file)
