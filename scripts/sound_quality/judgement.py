"""`scripts/sound-quality judge`: a checkpoint behind a real server, judged; a table and a file of figures."""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from audioldm2_triton.server.geometry import read_audio_geometry
from project import CACHE, DEMO_CHECKPOINT
from serving.local_server import local_server
from sound_quality import experiments
from sound_quality.experiments import Comparison, Request
from sound_quality.judge import Judge, attributes_right, own_accuracy, train_judge
from sound_quality.window_layout import make_layout

EXPERIMENTS: Final = ("kinds", "steps", "guidance", "negative", "candidates", "seams", "lossy")
_WINDOWS: Final = 3  # of long audio
# Lossy options: steps, and arguments of scripts/serve.
LOSSY: Final = {
    "8 steps": (8, ()),
    "8 steps, trailing": (8, ("--timestep-spacing=trailing",)),
    "8 steps, karras": (8, ("--timestep-spacing=karras",)),
    "12 steps": (12, ()),
    "12 steps, trailing": (12, ("--timestep-spacing=trailing",)),
    "guidance in the first 60 %": (20, ("--guidance-interval=0,0.6",)),
    "guidance from 20 to 80 %": (20, ("--guidance-interval=0.2,0.8",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--clips", type=int, default=360, help="of `kinds`")
    parser.add_argument("--pairs", type=int, default=108, help="of each comparison")
    out = CACHE / "sound_quality" / "judgement.json"
    parser.add_argument("--out", type=Path, default=out, help="a JSON file; experiments not run now keep their figures")


def measure(arguments: argparse.Namespace) -> None:
    judge = train_judge()
    figures: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    figures["judge"] = asdict(own_accuracy(judge))
    print("the judge on sounds of the library that it does not know:", figures["judge"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with local_server(arguments.checkpoint, log) as server:
            for name in arguments.only:
                start = time.perf_counter()
                figures[name] = _run(name, judge, server.grpc_url, arguments)
                figures[name]["seconds"] = round(time.perf_counter() - start)
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


def _run(name: str, judge: Judge, url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    requests = experiments.make_requests(arguments.clips if name == "kinds" else arguments.pairs)
    if name == "kinds":
        return _judge_kinds(judge, url, requests)
    if name == "steps":
        changes = {"scheduler": "DDIMScheduler", "num_inference_steps": 200}
        return _report(
            "20 DPM-Solver++ steps, 200 DDIM steps", experiments.compare_arms(judge, url, requests, **changes)
        )
    if name == "guidance":
        return _report("guidance 3.5, 1.0", experiments.compare_arms(judge, url, requests, guidance_scale=1.0))
    if name == "negative":
        comparison = experiments.compare_negative(judge, url, arguments.pairs)
        return _report("background heard without, with a negative prompt that names it", comparison)
    if name == "lossy":
        return _judge_lossy(judge, url, requests, arguments.checkpoint)
    if name == "seams":
        layout = make_layout(read_audio_geometry(arguments.checkpoint), None, _WINDOWS)
        comparison = experiments.compare_seams(judge, url, requests, layout)
        return _report("heard in single windows, across their seams", comparison)
    return _report("any of 4, the best of 4 by CLAP score", experiments.compare_candidates(judge, url, requests))


def _judge_kinds(judge: Judge, url: str, requests: Sequence[Request]) -> dict[str, Any]:
    sounds = experiments.first_features(experiments.generate(url, requests))
    right = experiments.kinds_right(judge, requests, sounds)
    kinds = experiments.share(right)
    asked_for = [(request.kind, request.attributes) for request in requests]
    attributes = experiments.share(attributes_right(judge, asked_for, list(sounds)))
    print(f"kinds right: {kinds}\nattributes right: {attributes}", flush=True)
    by_kind = _by_kind(judge, requests, right, sounds)
    for kind, row in by_kind.items():
        print(f"  {kind:12s} {100 * row['right']:5.1f} %  taken for {row['taken_for'] or 'nothing else'}")
    return {"kinds": asdict(kinds), "attributes": asdict(attributes), "by_kind": by_kind}


def _judge_lossy(judge: Judge, url: str, requests: Sequence[Request], checkpoint: Path) -> dict[str, Any]:
    """The same requests by 20 exact steps and with each option, whose server is one of its own."""
    exact = experiments.kinds_heard(judge, url, requests)
    figures = {}
    for option, (steps, serve_arguments) in LOSSY.items():
        arm = [replace(request, num_inference_steps=steps) for request in requests]
        with (
            tempfile.TemporaryDirectory() as folder,
            local_server(checkpoint, Path(folder) / "log", *serve_arguments) as server,
        ):
            heard = experiments.kinds_heard(judge, server.grpc_url, arm)
        figures[option] = _report(f"20 steps, {option}", experiments.compare(exact, heard))
    return figures


def _by_kind(
    judge: Judge, requests: Sequence[Request], right: Sequence[bool], sounds: NDArray[np.float64]
) -> dict[str, dict[str, Any]]:
    rows: dict[str, list[tuple[bool, str]]] = defaultdict(list)
    for request, is_right, name in zip(requests, right, judge.name_kinds(sounds), strict=True):
        rows[request.kind].append((is_right, name))
    return {
        kind: {
            "right": float(np.mean([is_right for is_right, _ in row])),
            "taken_for": sorted(name for is_right, name in row if not is_right),
        }
        for kind, row in rows.items()
    }


def _report(ways: str, comparison: Comparison) -> dict[str, Any]:
    print(f"{ways}: {comparison.first}, {comparison.second}; difference {comparison.difference}", flush=True)
    return {"ways": ways, **asdict(comparison)}
