"""Alerts, runbook and dashboard: valid, each alert tested and explained, and nothing asks for a metric that is not."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from audioldm2_triton.server.metric_names import STEP_DURATION_SECONDS
from monitoring_files import MONITORING, OF_A_GPU, OWN, dashboard_expressions, families, metrics_in, rules
from operations_tables import first_cells
from project import ROOT
from serving.loopback import read_page

if TYPE_CHECKING:
    from serving.local_server import LocalServer

RULES = {rule["alert"]: rule for rule in rules()}


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool here: it is in Debian's package `prometheus`")
    result = subprocess.run([program, *arguments], cwd=MONITORING, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_prometheus_accepts_the_configuration() -> None:
    promtool("check", "config", "prometheus.yaml")


def test_each_alert_fires_by_its_fault_and_clears() -> None:
    promtool("test", "rules", "rules_test.yaml")


def cases() -> list[dict[str, Any]]:
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    return [case for test in tests for case in test["alert_rule_test"]]


@pytest.mark.parametrize("alert", RULES)
def test_each_alert_is_tested_and_has_a_runbook(alert: str) -> None:
    rule = RULES[alert]
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    found = [case["exp_alerts"] for case in cases() if case["alertname"] == alert]
    assert [] in found, "no moment at which it is silent"
    assert any(found), "no moment at which it fires"
    assert rule["annotations"]["runbook"] == f"README.md#{alert.lower()}"
    assert len(re.findall(rf"^### {alert}$", (MONITORING / "README.md").read_text(), re.MULTILINE)) == 1


def test_the_runbook_has_no_alert_that_is_not() -> None:
    assert set(re.findall(r"^### (\w+)$", (MONITORING / "README.md").read_text(), re.MULTILINE)) == set(RULES)


def test_a_start_may_take_as_long_as_the_container_s_health_check_allows() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    assert compose["services"]["server"]["healthcheck"]["start_period"] == RULES["AudioLDM2StartSlow"]["for"]


def test_rules_ask_for_the_jobs_that_are_scraped() -> None:
    configuration = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    jobs = {job["job_name"] for job in configuration["scrape_configs"]}
    for rule in RULES.values():
        for pattern in re.findall(r'job=~?"([^"]*)"', rule["expr"]):
            assert any(re.fullmatch(pattern, job) for job in jobs), rule["alert"]


def test_the_compose_profile_mounts_what_is_there() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    watching = {name: each for name, each in compose["services"].items() if "profiles" in each}
    assert set(watching) == {"prometheus", "grafana"}
    for service in watching.values():
        assert service["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for mount in service["volumes"]:
            source = mount.partition(":")[0]
            assert source in compose["volumes"] or (ROOT / "docker" / source).is_file(), source


def is_in(name: str, library: bytes) -> bool:
    """Whether a program has this name, whole or, as compilers store short ones, in words of 8 letters."""
    return all(name[start : start + 8].encode() in library for start in range(0, len(name), 8))


def triton_library() -> bytes:
    """The library of the wheel's server, in which the names of all its metrics stand."""
    spec = find_spec("pytriton")
    assert spec is not None
    assert spec.origin is not None
    (library,) = (Path(spec.origin).parent.parent / "nvidia_pytriton.libs").glob("libtritonserver-*.so")
    return library.read_bytes()


def test_every_metric_that_is_asked_for_exists(server: "LocalServer") -> None:
    expressions = [*(rule["expr"] for rule in RULES.values()), *dashboard_expressions()]
    named = {name for expression in expressions for name in metrics_in(expression)}
    assert named >= OF_A_GPU
    pages = [read_page(port, "/metrics", 10).decode() for port in (server.metrics_port, server.health_port)]
    assert named - families(pages) - OWN - OF_A_GPU == set()
    library = triton_library()
    assert {name for name in OF_A_GPU if not is_in(name, library)} == set()
    assert not is_in("nv_gpu_memory_lost_bytes", library)


def test_the_page_of_a_real_server_and_the_table_agree(server: "LocalServer") -> None:
    """In both directions: every metric with its kind, before the first request."""
    listed = dict(first_cells("Metrics"))
    pages = [read_page(port, "/metrics", 10).decode() for port in (server.metrics_port, server.health_port)]
    shown = {name: kind for page in pages for name, kind in re.findall(r"^# TYPE (audioldm2_\w+) (\w+)$", page, re.M)}
    assert shown == listed
    empty = {name for name in shown if not any(name in series for series in families(pages))}
    assert empty == set()


def test_buckets_of_times_double(server: "LocalServer") -> None:
    page = read_page(server.metrics_port, "/metrics", 10).decode()
    for name in sorted(set(re.findall(r"^# TYPE (audioldm2_\w+_seconds) histogram$", page, re.M))):
        bounds = dict.fromkeys(re.findall(rf'^{name}_bucket{{.*le="([^"]+)"', page, re.M))
        first, count = (0.000625, 15) if name == STEP_DURATION_SECONDS else (0.01, 17)  # a GPU's step takes 5 ms
        assert [float(bound) for bound in bounds][:-1] == [first * 2**power for power in range(count)], name
