"""The chart and the kustomization: rendered offline, held against Kubernetes's own schemas."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.app import CLOSING_S
from server.config.load import load
from server.engine.collector import EngineCollector, ModelState
from server.engine.supervisor import EngineState
from server.router import Router

helm = pytest.importorskip("helm_python")
kubernetes = pytest.importorskip("kubernetes_validate")

FOLDER = Path("configs", "helm")
CHART = FOLDER / "tierserve"
KUSTOMIZATION = Path("configs", "kubernetes")
RENDERED = KUSTOMIZATION / "tierserve.yaml"
VALUES = {file.stem: yaml.safe_load(file.read_text()) for file in FOLDER.glob("values/*.yaml")}
FRONT = VALUES["front"]
WORKLOADS = {"Deployment", "StatefulSet"}
# Kubernetes has no schemas of these: others define them.
FOREIGN = {"HTTPRoute", "ScaledObject", "ServiceMonitor"}
each_file = pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())

Object = dict[str, Any]


@functools.cache
def chart() -> Any:
    return helm.Chart.load(CHART)


def render(values: Object, *, tests: bool = True) -> dict[str, Object]:
    """Return the objects that the chart makes, by their kinds."""
    files = chart().render(values, name="tierserve", namespace="models")
    files = {name: text for name, text in files.items() if name.endswith(".yaml")}
    if not tests:
        files = {name: text for name, text in files.items() if "/tests/" not in name}
    made = [each for text in files.values() for each in yaml.safe_load_all(text) if each]
    by_kind = {each["kind"]: each for each in made}
    assert len(by_kind) == len(made)
    return by_kind


def workload(made: dict[str, Object]) -> Object:
    (kind,) = WORKLOADS & made.keys()
    return made[kind]


def with_value(path: str, value: Any) -> Object:
    """Return the front's values with one more, whose path has dots."""
    first, *rest = path.split(".")
    made = FRONT | {first: dict(FRONT.get(first, {})) if rest else value}
    inner = made[first]
    for number, name in enumerate(rest, 1):
        inner[name] = value if number == len(rest) else dict(inner.get(name, {}))
        inner = inner[name]
    return made


def nested(found: Any) -> Iterator[Object]:
    """Yield each mapping in a value."""
    for each in found.values() if isinstance(found, dict) else found:
        if isinstance(each, dict | list):
            yield from nested(each)
    if isinstance(found, dict):
        yield found


@each_file
def test_helm_finds_nothing(values: Object) -> None:
    assert helm.lint(CHART, values, strict=True)["errors"] == []


@each_file
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_kubernetes_takes_the_objects(values: Object, version: str) -> None:
    made = render(values)
    for kind in made.keys() - FOREIGN:
        assert kubernetes.validate(made[kind], version, strict=True) == version


def test_there_are_values_for_each_kind() -> None:
    kinds = {kind for values in VALUES.values() for kind in render(values)}
    assert kinds == WORKLOADS | FOREIGN | {
        "ConfigMap", "HorizontalPodAutoscaler", "NetworkPolicy", "Pod", "PodDisruptionBudget",
        "Service",
    }  # fmt: skip


@each_file
def test_tierserve_takes_its_configuration(values: Object, tmp_path: Path) -> None:
    made = render(values)
    file = tmp_path / "config.yaml"
    file.write_text(made["ConfigMap"]["data"]["config.yaml"])
    config = load(file)
    pod = workload(made)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == config.server.port
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "config")
    assert mount["mountPath"] == "/etc/tierserve"
    assert config.server.drain_s > 0
    assert pod["terminationGracePeriodSeconds"] >= (
        config.server.drain_s + config.server.shutdown_grace_s + CLOSING_S
    )
    # A pod whose volume is full is evicted, or stores nothing.
    claims = workload(made)["spec"].get("volumeClaimTemplates")
    (size,) = (
        [each["spec"]["resources"]["requests"]["storage"] for each in claims]
        if claims
        else [each["emptyDir"]["sizeLimit"] for each in pod["volumes"] if each["name"] == "cache"]
    )
    tiers = [tier.max_bytes for tier in (config.tiers.disk, config.tiers.prefix) if tier]
    assert sum(tiers) < int(size.removesuffix("Gi")) * 1024**3


@each_file
def test_objects_refer_to_what_is_there(values: Object) -> None:
    made = render(values)
    servers, service = workload(made), made["Service"]
    name, labels = servers["metadata"]["name"], servers["spec"]["template"]["metadata"]["labels"]
    for found in nested([*made.values()]):
        for selector in ("selector", "labelSelector", "podSelector"):
            match found.get(selector):
                case {"matchLabels": wanted} | wanted if wanted:
                    assert wanted.items() <= labels.items()
        assert found.get("scaleTargetRef", servers)["kind"] == servers["kind"]
        assert found.get("scaleTargetRef", {"name": name})["name"] == name
        for backend in found.get("backendRefs", ()):
            assert backend["name"] == service["metadata"]["name"]
            assert backend["port"] == service["spec"]["ports"][0]["port"]
    # The pod of the test must not get requests.
    tested = made["Pod"]["metadata"]["labels"]
    assert not service["spec"]["selector"].items() <= tested.items()
    pod = servers["spec"]["template"]["spec"]
    there = {each["name"] for each in pod["volumes"]}
    there |= {each["metadata"]["name"] for each in servers["spec"].get("volumeClaimTemplates", ())}
    assert {each["name"] for each in pod["containers"][0]["volumeMounts"]} == there


@pytest.mark.parametrize("scheme", ["HTTP", "HTTPS"])
def test_probes_ask_for_routes_that_are_there(scheme: str) -> None:
    tls = {"certificate_file": "/secrets/tls.crt", "key_file": "/secrets/tls.key"}
    values = FRONT if scheme == "HTTP" else with_value("config.server", {"tls": tls})
    made = render(values | {"serviceMonitor": {"enabled": True}})
    (container,) = workload(made)["spec"]["template"]["spec"]["containers"]
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
    assert [probe["path"] for probe in probes] == ["/health", "/health", "/ready"]
    assert {probe["scheme"] for probe in probes} == {scheme}
    (endpoint,) = made["ServiceMonitor"]["spec"]["endpoints"]
    assert (
        endpoint["scheme"] == made["Service"]["spec"]["ports"][0]["appProtocol"] == scheme.lower()
    )
    assert ("tlsConfig" in endpoint) == (scheme == "HTTPS")
    (script,) = made["Pod"]["spec"]["containers"][0]["args"]
    assert f"{scheme.lower()}://tierserve:8000" in script
    compile(script, "ready.yaml", "exec")
    routes = Path(str(Router.__module__).replace(".", "/") + ".py").read_text()
    assert all(f'"{path}"' in routes for path in ("/health", "/ready", "/metrics"))


def test_prometheus_scrapes_what_alerts_and_the_dashboard_ask_for() -> None:
    """Each engine's own metrics, too, by the jobs that scrape.yaml has."""
    made = render(VALUES["gpu"])
    endpoints = made["ServiceMonitor"]["spec"]["endpoints"]
    scraped = [
        (rule["replacement"], each["path"], each.get("params"))
        for each in endpoints
        for rule in each["relabelings"]
        if rule["targetLabel"] == "job"
    ]
    scrape = yaml.safe_load(Path("configs", "prometheus", "scrape.yaml").read_text())
    jobs = [(job["job_name"], job.get("metrics_path")) for job in scrape["scrape_configs"]]
    assert jobs == [("tierserve", None), ("tierserve-engine", "/metrics/engine")]
    assert scraped == [
        ("tierserve", "/metrics", None),
        ("tierserve-engine", "/metrics/engine", {"model": ["qwen3-8b"]}),
    ]


def test_weights_may_be_on_a_volume_of_their_own() -> None:
    claim = {"claimName": "models", "readOnly": True}
    made = render(
        FRONT
        | {
            "volumes": [{"name": "models", "persistentVolumeClaim": claim}],
            "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
        }
    )
    kubernetes.validate(made["Deployment"], "1.37", strict=True)
    pod = made["Deployment"]["spec"]["template"]["spec"]
    assert pod["volumes"][-1]["persistentVolumeClaim"] == claim
    assert pod["containers"][0]["volumeMounts"][-1]["mountPath"] == "/models"


def test_large_numbers_stay_whole() -> None:
    made = render(with_value("config.server.max_prompts", 30_000_000))
    assert yaml.safe_load(made["ConfigMap"]["data"]["config.yaml"])["server"]["max_prompts"] == 3e7
    assert "30000000" in made["ConfigMap"]["data"]["config.yaml"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("image.repository", ""),
        ("image.pullPolicy", "Sometimes"),
        ("replicas", "two"),
        ("replica", 2),
        ("config.server.host", "127.0.0.1"),
        ("config.server.port", 80),
        ("config.server.shutdown_grace_s", 7200),
        ("config.server.drain_s", -1),
        ("config.server.ready", "engines"),
        ("persistence.size", "much"),
        ("resources.limit", {}),
        ("autoscaling.min", 0),
        ("autoscaling.prometheus", "prometheus:9090"),
        ("podDisruptionBudget.maxUnavailable", 0),
        ("networkPolicy.from", [{}]),
        ("serviceMonitor.label", {}),
        ("httpRoute.hostnames", "llm.example.com"),
        # A ConfigMap isn't for secrets.
        ("config.models.qwen3-8b.api_key", "secret"),
        ("config.models.qwen3-8b.engine.env", {"HF_TOKEN": "secret"}),
        ("config.tiers.disk.encryption_key", "secret"),
        ("config.tiers.shared.url", "redis://user:secret@redis"),
        ("config.tenants.key", "secret"),
        ("config.admin.key", "secret"),
        ("volumes", [{"emptyDir": {}}]),
        ("volumeMounts", [{"name": "models"}]),
    ],
)
def test_wrong_values_are_refused_by_name(path: str, value: Any) -> None:
    with pytest.raises(helm.HelmValuesError) as refused:
        chart().validate_schema(with_value(path, value))
    # A name that is unknown is said at what has it.
    said = str(refused.value).replace("/", ".")
    assert all(name in said for name in path.split("."))
    assert "user:secret" not in said


@pytest.mark.parametrize(
    ("tiers", "fits"),
    [
        ({"disk": {"max_bytes": "19.9GiB"}}, True),
        ({"disk": {"max_bytes": "20 GiB"}}, False),
        ({"disk": {"max_bytes": "21GB"}}, True),
        ({"disk": {"max_bytes": 20 * 1024**3}}, False),
        ({"disk": {"max_bytes": "1TiB", "path": "/mnt/disk"}}, True),
        ({"disk": {"max_bytes": "12GiB"}, "prefix": {"max_bytes": "9GiB"}}, False),
        ({"disk": None, "prefix": {"max_bytes": "9GiB"}}, True),
    ],
)
def test_tiers_have_to_fit_into_the_volume(tiers: Object, fits: bool) -> None:
    """Otherwise the pod is evicted once they are full."""
    values = with_value("config.tiers", tiers)
    if fits:
        render(values)
        return
    with pytest.raises(Exception, match=r"scratchSize should be more than config\.tiers\.disk"):
        render(values)


def test_models_and_gateways_have_to_be_given() -> None:
    with pytest.raises(helm.HelmValuesError, match="models"):
        chart().validate_schema({})
    with pytest.raises(helm.HelmValuesError, match="parentRefs"):
        chart().validate_schema(with_value("httpRoute", {"enabled": True}))


def test_the_schema_knows_each_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert schema["properties"].keys() - {"global"} == values.keys()
    for name, known in schema["properties"].items():
        if known.get("additionalProperties") is False and name not in {"config", "resources"}:
            assert known["properties"].keys() == values[name].keys()


def test_the_kustomization_is_what_the_chart_makes() -> None:
    made = {each["kind"]: each for each in yaml.safe_load_all(RENDERED.read_text())}
    wanted = render(FRONT, tests=False)
    config_map = wanted.pop("ConfigMap")
    assert made == wanted
    told = yaml.safe_load((KUSTOMIZATION / "kustomization.yaml").read_text())
    (generated,) = told["configMapGenerator"]
    assert generated == {"name": config_map["metadata"]["name"], "files": ["config.yaml"]}
    config = yaml.safe_load((KUSTOMIZATION / "config.yaml").read_text())
    assert config == yaml.safe_load(config_map["data"]["config.yaml"])
    assert [name for name in told["resources"] if not (KUSTOMIZATION / name).is_file()] == []
    kubernetes.validate(yaml.safe_load((KUSTOMIZATION / "namespace.yaml").read_text()), "1.37")


def test_engines_are_scaled_by_metrics_that_are_there() -> None:
    scaled = yaml.safe_load((KUSTOMIZATION / "scale-to-zero.yaml").read_text())
    made = [scaled, render(VALUES["gpu"])["ScaledObject"]]
    queries = [each["spec"]["triggers"][0]["metadata"]["query"] for each in made]
    named = {name for query in queries for name in re.findall(r"tierserve_\w+", query)}
    families = EngineCollector(lambda: [ModelState("m", EngineState.DOWN, 0, 0, 0, 0)]).collect()
    assert named <= {sample.name for family in families for sample in family.samples}


def test_the_version_is_that_of_the_project() -> None:
    told = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f'version = "{told["appVersion"]}"' in Path("pyproject.toml").read_text()
