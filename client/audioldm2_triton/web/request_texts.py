"""A request as texts to copy: Python, the command, and curl."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from audioldm2_triton import contract
from audioldm2_triton.transport.endpoint import DEFAULT_URL, parse_url

FILE = "out.wav"


@dataclass(frozen=True)
class RequestTexts:
    """Each, run as it stands, makes `out.wav`: the best waveform of the request."""

    python: str
    command: str
    curl: str


def request_texts(url: str, model: str, prompt: str, options: Mapping[str, Any]) -> RequestTexts:
    """Returns the texts of a request.

    Args:
        url: of the server, as the client takes it.
        options: by the names of the contract; those that have their defaults may be left out.
    """
    return RequestTexts(
        _python(url, model, prompt, options), _command(url, model, prompt, options), _curl(url, model, prompt, options)
    )


def _python(url: str, model: str, prompt: str, options: Mapping[str, Any]) -> str:
    model_argument = "" if model == contract.ENSEMBLE else f", model={_literal(model)}"
    lines = [f"        {_literal(prompt)},", *(f"        {name}={_literal(value)}," for name, value in options.items())]
    return "\n".join(
        [
            "from audioldm2_triton import AudioLDM2Client",
            "",
            f"with AudioLDM2Client({_literal(url)}{model_argument}) as client:",
            "    result = client.generate(",
            *lines,
            "    )",
            f"result.save({_literal(FILE)})",
        ]
    )


def _literal(value: Any) -> str:
    """Writes a value as Python does, with double quotes where that needs no backslash."""
    if isinstance(value, str) and not {'"', "'", "\\"} & set(value) and value.isprintable():
        return f'"{value}"'
    return repr(value)


def _command(url: str, model: str, prompt: str, options: Mapping[str, Any]) -> str:
    where = {"url": url} if url != DEFAULT_URL else {}
    if model != contract.ENSEMBLE:
        where["model"] = model
    given = [f"--{name.replace('_', '-')}={value}" for name, value in {**options, **where}.items()]
    if prompt.startswith("-") or prompt == "web":
        return shlex.join(["audioldm2", *given, "--", prompt])  # behind -- it is a prompt, whatever it looks like
    return shlex.join(["audioldm2", prompt, *given])


def _curl(url: str, model: str, prompt: str, options: Mapping[str, Any]) -> str:
    body = {"prompt": prompt, **options, "audio_format": f"wav{contract.AS_BASE64}"}
    several = options.get("num_waveforms_per_prompt", contract.DEFAULT_NUM_WAVEFORMS_PER_PROMPT) > 1
    return "\n".join(
        [
            f"curl -s {shlex.quote(f'{_http_url(url)}/v2/models/{model}/generate')} \\",
            f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))} \\",
            f"  | jq -r '.encoded_audio{'[0]' if several else ''}' | base64 -d > {FILE}",
        ]
    )


def _http_url(url: str) -> str:
    """Returns where the same server is for HTTP. Only for one that is known by gRPC, it is on the usual port."""
    endpoint = parse_url(url, api_key="")
    if endpoint.protocol == "http":
        return url.rstrip("/")
    host = endpoint.address.rpartition(":")[0]
    return f"https://{host}" if endpoint.tls else f"http://{host}:8000"
