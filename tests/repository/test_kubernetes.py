"""The Helm chart and the files for KServe: rendered, valid, sized for the drain, refusing a wrong value in words."""

import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml

from audioldm2_triton.server.settings import Settings, environment_name
from monitoring_files import MONITORING, families, metrics_in
from project import ROOT
from serving.loopback import read_page
from serving.server_error import DRAIN_TIMEOUT_IN_S
from serving.supervision import EXIT_TIMEOUT_IN_S

if TYPE_CHECKING:
    from serving.local_server import LocalServer

KUBERNETES: Final = ROOT / "docker" / "kubernetes"
CHART: Final = KUBERNETES / "chart"
SCHEMA: Final = json.loads((CHART / "values.schema.json").read_text())
SHIPPED: Final = sorted(path.stem for path in (KUBERNETES / "values").glob("*.yaml"))
KUBERNETES_VERSIONS: Final = ("1.28", "1.37")
# Defined by operators; the schemas of kubernetes-validate are Kubernetes's own.
CUSTOM: Final = {"PodMonitor", "PrometheusRule", "ScaledObject", "ServingRuntime", "InferenceService"}
HPA: Final = {"autoscaling": {"kind": "hpa"}}
Manifest = dict[str, Any]


def render(values: dict[str, Any]) -> list[Manifest]:
    """Renders the chart by Helm's own library. Raises its `HelmError`."""
    helm = pytest.importorskip("helm_python", reason="no helm-python-sdk here, which is Helm as a library")
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render(values, name="demo", namespace="prod")
    pages = [text for name, text in sorted(rendered.items()) if name.endswith(".yaml")]
    return [manifest for text in pages for manifest in yaml.safe_load_all(text) if manifest]


@cache
def shipped(name: str) -> list[Manifest]:
    return render(yaml.safe_load((KUBERNETES / "values" / f"{name}.yaml").read_text()))


def of_kind(kind: str, manifests: list[Manifest]) -> Manifest:
    (found,) = (each for each in manifests if each["kind"] == kind)
    return found


def kserve() -> list[Manifest]:
    return [yaml.safe_load(path.read_text()) for path in sorted((KUBERNETES / "kserve").glob("*.yaml"))]


def pod_of(manifests: list[Manifest]) -> Manifest:
    return dict(of_kind("Deployment", manifests)["spec"]["template"]["spec"])


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("name", [*SHIPPED, "hpa"])
def test_kubernetes_accepts_what_is_rendered(name: str, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate here")
    manifests = render(HPA) if name == "hpa" else shipped(name)
    kinds = {manifest["kind"] for manifest in manifests}
    assert kinds >= {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            validator.validate(manifest, version, strict=True)


def test_the_validation_can_fail() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate here")
    deployment = of_kind("Deployment", render({}))
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(validator.ValidationError):
        validator.validate(deployment, KUBERNETES_VERSIONS[-1], strict=True)


def test_helm_has_nothing_to_say() -> None:
    helm = pytest.importorskip("helm_python", reason="no helm-python-sdk here, which is Helm as a library")
    found = helm.lint(CHART, strict=True)
    assert not found["errors"]
    assert {message["error"] for message in found["messages"]} <= {"icon is recommended"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"settings": {"dtype": "float8"}}, "'/settings/dtype': value must be one of 'auto', 'float32'"),
        ({"settings": {"max_waitng": 3}}, "'max_waitng' not allowed"),
        ({"settings": {"max_audio_length_in_s": 4000}}, "'/settings/max_audio_length_in_s': maximum"),
        ({"settings": {"offload": True}}, "'/settings/offload': got boolean, want string"),
        ({"setting": {}}, "'setting' not allowed"),
        ({"gpus": -1}, "'/gpus': minimum: got -1, want 0"),
        ({"resources": {"limits": {"nvidia.com/gpu": 1}}}, "'/resources/limits'"),
        ({"arguments": ["--host=127.0.0.1"]}, "'/arguments/0'"),
        ({"monitoring": {"interval": "60s"}}, "'/monitoring/interval'"),
        ({"checkpoints": [{"path": "a"}]}, "checkpoints[0].hub: got nothing but expected a hub id"),
        ({"checkpoints": [{"path": "a", "hub": "b/c"}, {"path": "d", "hub": "e/f"}]}, "checkpoints[1]: got no name"),
        ({"autoscaling": {"min": 5}}, "autoscaling.min: got 5 but expected at most autoscaling.max, 4"),
        ({"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}, "got 0 for both"),
    ],
)
def test_a_wrong_value_is_refused_in_words(values: dict[str, Any], words: str) -> None:
    helm = pytest.importorskip("helm_python", reason="no helm-python-sdk here, which is Helm as a library")
    with pytest.raises(helm.HelmError) as refused:
        render(values)
    assert words in str(refused.value)


def test_the_schema_has_the_settings() -> None:
    properties = SCHEMA["properties"]["settings"]["properties"]
    assert list(properties) == [field.name for field in fields(Settings) if field.name != "checkpoint"]
    for field in fields(Settings):
        if field.name == "checkpoint":
            continue
        allowed = properties[field.name]
        assert allowed["description"] == field.metadata["help"], field.name
        assert tuple(allowed.get("enum", ())) == field.metadata["choices"], field.name
        assert (allowed.get("minimum"), allowed.get("maximum")) == (field.metadata["range"] or (None, None)), field.name


def test_settings_reach_the_server() -> None:
    given = {"max_waiting": 1_000_000, "compile_lengths_in_s": "2.56,10.24", "default_timeout_in_s": 0.5}
    (server,) = pod_of(render({"settings": given}))["containers"]
    environment = {variable["name"]: variable.get("value") for variable in server["env"]}
    assert {environment[environment_name(name)] for name in given} == {"1000000", "2.56,10.24", "0.5"}


def test_several_checkpoints() -> None:
    (server,) = pod_of(shipped("four-gpus"))["containers"]
    assert server["args"][:3] == [
        "--checkpoint=/weights/audioldm2",
        "--also=music=/weights/audioldm2-music",
        "--also=large=/weights/audioldm2-large",
    ]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert "initContainers" not in pod_of(shipped("four-gpus"))
    (fetch,) = pod_of(shipped("one-gpu"))["initContainers"]
    assert fetch["command"][-2:] == ["/weights/audioldm2", "cvssp/audioldm2"]
    assert {"name": "HF_HUB_OFFLINE", "value": "0"} in fetch["env"]


@pytest.mark.parametrize("name", SHIPPED)
def test_without_a_gpu_none_is_asked_for(name: str) -> None:
    (server,) = pod_of(shipped(name))["containers"]
    assert ("nvidia.com/gpu" in server["resources"]["limits"]) == (name != "cpu")


def confined(pod: Manifest, container: Manifest) -> bool:
    context = pod.get("securityContext", {}) | container["securityContext"]
    return (
        context["readOnlyRootFilesystem"] is True
        and context["runAsNonRoot"] is True
        and context["runAsUser"] == 1000
        and context["allowPrivilegeEscalation"] is False
        and context["capabilities"] == {"drop": ["ALL"]}
        and context["seccompProfile"] == {"type": "RuntimeDefault"}
    )


def pods_and_servers() -> list[tuple[Manifest, Manifest]]:
    """The pods, with the containers of servers, of the chart and of KServe."""
    runtime, predictor = of_kind("ServingRuntime", kserve()), of_kind("InferenceService", kserve())
    pod = predictor["spec"]["predictor"] | {"volumes": runtime["spec"]["volumes"]}
    charted = pod_of(render({}))
    return [(charted, charted["containers"][0]), (pod, runtime["spec"]["containers"][0])]


def test_pods_are_confined() -> None:
    for pod, server in pods_and_servers():
        assert all(confined(pod, container) for container in (*pod.get("initContainers", ()), server))
        assert pod["automountServiceAccountToken"] is False
        written = {mount["mountPath"] for mount in server["volumeMounts"] if not mount.get("readOnly")}
        assert written == {"/home/audioldm2/.cache", "/tmp", "/dev/shm"}
        (shared,) = (volume for volume in pod["volumes"] if volume["name"] == "shm")
        assert shared["emptyDir"]["medium"] == "Memory"


def test_probes_ask_the_supervisor() -> None:
    for _, server in pods_and_servers():
        ports = {port.get("name"): port["containerPort"] for port in server["ports"]} | {8003: 8003}
        for probe, path in (("startupProbe", "/ready"), ("readinessProbe", "/ready"), ("livenessProbe", "/live")):
            asked = server[probe]["httpGet"]
            assert (asked["path"], ports[asked["port"]]) == (path, 8003)
        startup = server["startupProbe"]
        assert startup["failureThreshold"] * startup["periodSeconds"] == 1200  # as the container's health check


@pytest.mark.parametrize("drain", [1, DRAIN_TIMEOUT_IN_S, 300])
def test_the_chart_waits_for_the_drain(drain: float) -> None:
    pod = pod_of(render({"drainTimeoutInS": int(drain)}))
    (server,) = pod["containers"]
    assert f"--drain-timeout-in-s={drain:g}" in server["args"]
    leaving = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert leaving > server["readinessProbe"]["periodSeconds"]
    assert pod["terminationGracePeriodSeconds"] >= leaving + drain + EXIT_TIMEOUT_IN_S + 10


def test_kserve_waits_for_the_drain() -> None:
    pod, server = pods_and_servers()[1]
    assert f"--drain-timeout-in-s={DRAIN_TIMEOUT_IN_S:g}" in server["args"]
    leaving = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= leaving + DRAIN_TIMEOUT_IN_S + EXIT_TIMEOUT_IN_S + 10


def test_kserve_finds_the_runtime() -> None:
    runtime, service = of_kind("ServingRuntime", kserve()), of_kind("InferenceService", kserve())
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in {each["name"] for each in runtime["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert service["metadata"]["name"] == "audioldm2"  # by which KServe asks for the model
    known = {environment_name(field.name) for field in fields(Settings)}
    assert {variable["name"] for variable in model["env"]} <= known


def test_rules_are_those_of_the_compose_profile() -> None:
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    assert of_kind("PrometheusRule", shipped("one-gpu"))["spec"] == rules


def test_pods_are_scraped_as_the_jobs_that_rules_name() -> None:
    endpoints = of_kind("PodMonitor", shipped("one-gpu"))["spec"]["podMetricsEndpoints"]
    ports = {port["name"]: port["containerPort"] for port in pod_of(shipped("one-gpu"))["containers"][0]["ports"]}
    charted = {endpoint["relabelings"][0]["replacement"]: ports[endpoint["port"]] for endpoint in endpoints}
    configuration = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    assert charted == {
        job["job_name"]: int(job["static_configs"][0]["targets"][0].rpartition(":")[2])
        for job in configuration["scrape_configs"]
    }


def test_selectors_select_the_pods() -> None:
    manifests = shipped("one-gpu")
    deployment = of_kind("Deployment", manifests)
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    services = [each["spec"]["selector"] for each in manifests if each["kind"] == "Service"]
    matched = [
        of_kind(kind, manifests)["spec"]["selector"]["matchLabels"] for kind in ("PodMonitor", "PodDisruptionBudget")
    ]
    matched.append(of_kind("NetworkPolicy", manifests)["spec"]["podSelector"]["matchLabels"])
    assert all(selector.items() <= labels for selector in (*services, *matched))
    assert [each["spec"].get("clusterIP") for each in manifests if each["kind"] == "Service"] == [None, "None"]


def test_a_scaler_decides_how_many_there_are() -> None:
    assert "replicas" not in of_kind("Deployment", shipped("one-gpu"))["spec"]
    assert "replicas" not in of_kind("Deployment", render(HPA))["spec"]
    assert of_kind("Deployment", shipped("four-gpus"))["spec"]["replicas"] == 2


def scaler_metrics() -> set[str]:
    queries = [
        trigger["metadata"]["query"] for trigger in of_kind("ScaledObject", shipped("one-gpu"))["spec"]["triggers"]
    ]
    pods = of_kind("HorizontalPodAutoscaler", render(HPA))["spec"]["metrics"]
    return {name for query in queries for name in metrics_in(query)} | {each["pods"]["metric"]["name"] for each in pods}


def test_scalers_ask_for_metrics_that_exist(server: "LocalServer") -> None:
    named = scaler_metrics()
    assert {"audioldm2_requests_waiting", "audioldm2_rows_in_flight"} <= named
    assert named <= families([read_page(server.metrics_port, "/metrics", 10).decode()])


def test_the_rules_file_is_a_link() -> None:
    assert Path(CHART / "rules.yaml").is_symlink()
    assert (CHART / "rules.yaml").resolve() == MONITORING / "rules.yaml"
