"""Which processes of models have ended because somebody unloaded or reloaded a model, rather than died.

Under `--model-control-mode=explicit` or `poll`, Triton ends and starts the models' processes while it runs.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Final

from serving.loopback import read_page

_OPTION: Final = "--model-control-mode="
_READY: Final = "READY"


def models_may_change(arguments: Sequence[str]) -> bool:
    """Whether Triton's arguments let models be loaded and unloaded while the server runs; the last one counts."""
    modes = [argument.removeprefix(_OPTION) for argument in arguments if argument.startswith(_OPTION)]
    return bool(modes) and modes[-1] != "none"


def read_states(port: int, host: str, admin_key: str, timeout: float) -> dict[str, str]:
    """Returns the state of each model of the repository, such as READY or UNLOADING; "" for one never loaded.

    Raises `OSError` or `ValueError` if the server does not say.
    """
    headers = {"admin-key": admin_key, "Content-Type": "application/json"}
    index = json.loads(read_page(port, "/v2/repository/index", timeout, host, headers, post=b"{}"))
    return {model["name"]: model.get("state", "") for model in index}


def was_unloaded(model: str, created: float, states: Mapping[str, str], living: Mapping[str, float]) -> bool:
    """Decides whether a process that has gone was ended by Triton.

    Args:
        created: when the process that has gone was created.
        states: of the models, from `read_states`.
        living: when the newest living process of each model was created.
    """
    # Triton takes a model for ready after its process has died, and never starts another for it.
    return states.get(model) != _READY or living.get(model, created) > created
