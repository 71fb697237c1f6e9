"""Which metrics the files for Prometheus and Grafana name."""

import json
import re
from collections.abc import Iterable
from typing import Any, Final

import yaml

from project import ROOT

MONITORING: Final = ROOT / "docker" / "monitoring"
# What Prometheus makes itself.
OWN: Final = {"up", "ALERTS"}
# Triton's own that only a machine with a GPU shows.
OF_A_GPU: Final = {"nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}
_NAME: Final = re.compile(r"\b(?:audioldm2|nv)_\w+|\bup\b|\bALERTS\b")


def metrics_in(expression: str) -> set[str]:
    """Returns the names of the metrics in a PromQL expression, without what stands in quotes, which are labels."""
    return set(_NAME.findall(re.sub(r'"[^"]*"', '""', expression)))


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    queries = [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    return [*queries, *(target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ()))]


def families(pages: Iterable[str]) -> set[str]:
    """Returns the names of the series on pages in Prometheus's text format."""
    return {
        re.split(r"[{ ]", line)[0] for page in pages for line in page.splitlines() if line and not line.startswith("#")
    }
