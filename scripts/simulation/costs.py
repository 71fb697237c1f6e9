"""The costs of a forward, measured on this machine or read from a file."""

import json
from dataclasses import asdict, astuple
from pathlib import Path

from stepping.forward_plan import Bucket, ForwardCosts, LaunchBoundCost, LinearCost


def read_costs(path: Path) -> ForwardCosts:
    """Reads what `write_costs` has written. Raises `KeyError` or `TypeError` for anything else."""
    read = json.loads(path.read_text())
    kinds = {"plain": read["plain"], "masked": read["masked"]}
    costs = {
        name: LaunchBoundCost(**given) if "launching" in given else LinearCost(**given) for name, given in kinds.items()
    }
    compiled = {Bucket(*shape): seconds for *shape, seconds in read["compiled"]}
    return ForwardCosts(costs["plain"], costs["masked"], compiled)


def write_costs(path: Path, costs: ForwardCosts) -> None:
    compiled = [[bucket.items, bucket.frames, bucket.masked, seconds] for bucket, seconds in costs.compiled.items()]
    content = {"plain": asdict(costs.plain), "masked": asdict(costs.masked), "compiled": compiled}
    path.write_text(json.dumps(content, indent=2) + "\n")


def scaled_costs(costs: ForwardCosts, factor: float) -> ForwardCosts:
    """Returns what forwards cost where each takes so many times as long."""
    compiled = {bucket: factor * seconds for bucket, seconds in costs.compiled.items()}
    return ForwardCosts(_scaled(costs.plain, factor), _scaled(costs.masked, factor), compiled)


def _scaled(cost: LinearCost | LaunchBoundCost, factor: float) -> LinearCost | LaunchBoundCost:
    return type(cost)(*(factor * part for part in astuple(cost)))


def measure_costs(checkpoint: Path) -> ForwardCosts:
    """Loads a checkpoint's UNet as the denoiser does and times its forwards."""
    import torch

    from audioldm2_triton.server.geometry import read_audio_geometry
    from audioldm2_triton.server.settings import Settings, resolve_device, resolve_dtype
    from stepping.denoising_unet import load_unet

    settings = Settings(str(checkpoint))
    device = resolve_device(settings)
    geometry = read_audio_geometry(checkpoint)
    with torch.inference_mode():
        unet = load_unet(checkpoint, geometry.latent_width, device, resolve_dtype(settings, device), ())
        return unet.warm_up()
