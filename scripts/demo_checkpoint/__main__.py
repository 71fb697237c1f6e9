"""`scripts/demo-checkpoint`: trains the demo checkpoint, part by part or all at once."""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from project import CACHE, DEMO_CHECKPOINT

from . import assembly, corpus, diffusion_training, parts, sound_training, text_training
from .training import Plan

FOLDER: Final = CACHE / "demo_checkpoint"
# What one process with one thread does while another does the other lane; the UNet needs both and gets all threads.
LANES: Final = (("vae", "latents"), ("vocoder", "t5", "clap", "language_model", "conditioning"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo-checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="all parts, or one; goes on where it stopped")
    train.add_argument("--part", choices=[*LANES[0], *LANES[1], "unet", "save"])
    train.add_argument("--folder", type=Path, default=FOLDER, help="states and caches (several GB)")
    train.add_argument("--out", type=Path, default=DEMO_CHECKPOINT)
    train.add_argument("--steps", type=int, help="of the part, instead of its plan's")
    train.add_argument(
        "--start-from",
        type=Path,
        help="a checkpoint of these parts: its UNet is trained on, or its vocoder (--part), and all is saved",
    )
    options = parser.parse_args()
    if options.start_from:
        part = options.part or "unet"
        if part not in ("unet", "vocoder"):
            parser.error(f"--part: got {part} but expected unet or vocoder with --start-from")
        _FurtherTraining(options.folder, options.out, options.steps, options.start_from, part).run("save")
    elif options.part:
        _Training(options.folder, options.out, options.steps).run(options.part)
    else:
        _train_all(options.folder, options.out)
    return 0


def _train_all(folder: Path, out: Path) -> None:
    corpus.make(folder / "corpus")
    command = [sys.executable, "-m", "demo_checkpoint", "train", "--folder", str(folder), "--out", str(out), "--part"]

    def lane(parts: tuple[str, ...], threads: int) -> subprocess.Popen:
        script = " && ".join(" ".join([*command, part]) for part in parts)
        return subprocess.Popen(["bash", "-c", script], env=os.environ | {"OMP_NUM_THREADS": str(threads)})

    running = [lane(parts, max(1, (os.cpu_count() or 2) // 2)) for parts in LANES]
    codes = [process.wait() for process in running]
    # All are waited for before the first failure ends the run.
    if any(codes) or lane(("unet", "save"), os.cpu_count() or 2).wait():
        raise SystemExit("scripts/demo-checkpoint: a part failed; its lines are above")


class _Training:
    """The parts by name; what a part needs of the others is read from their finished states."""

    def __init__(self, folder: Path, out: Path, steps: int | None) -> None:
        self._folder = folder
        self._out = out
        self._steps = steps
        self._corpus = corpus.make(folder / "corpus")

    def run(self, part: str) -> None:
        getattr(self, f"_{part}")(self._steps)

    def _plan(self, plan: Plan, steps: int | None) -> Plan:
        return replace(plan, steps=steps) if steps else plan

    def _vae(self, steps: int | None = None) -> Any:
        return sound_training.train_vae(self._corpus, self._folder, self._plan(sound_training.VAE_PLAN, steps))

    def _vocoder(self, steps: int | None = None) -> Any:
        plan = self._plan(sound_training.VOCODER_PLAN, steps)
        return sound_training.train_vocoder(self._untrained_vocoder(), self._corpus, self._folder, plan)

    def _t5(self, steps: int | None = None) -> Any:
        return text_training.train_t5(self._folder, self._plan(text_training.T5_PLAN, steps))

    def _clap(self, steps: int | None = None) -> Any:
        return text_training.train_clap(self._corpus, self._folder, self._plan(text_training.CLAP_PLAN, steps))

    def _language_model(self, steps: int | None = None) -> Any:
        plan = self._plan(text_training.LANGUAGE_PLAN, steps)
        return text_training.train_language_model(self._corpus, self._clap(), self._t5(), self._folder, plan)

    def _latents(self, _: int | None = None) -> tuple[Any, float]:
        return diffusion_training.cache_latents(self._corpus, self._vae(), self._folder)

    def _conditioning(self, _: int | None = None) -> Any:
        path = self._folder / "conditioning.npz"
        return diffusion_training.cache_conditioning(self._pipeline(), self._corpus.captions, path)

    def _unet(self, steps: int | None = None) -> Any:
        plan = self._plan(diffusion_training.UNET_PLAN, steps)
        latents, factor = self._latents()
        return diffusion_training.train_unet(
            self._untrained_unet(), latents, factor, self._conditioning(), self._corpus.shares, self._folder, plan
        )

    def _untrained_unet(self) -> Any:
        return parts.unet()

    def _untrained_vocoder(self) -> Any:
        return parts.vocoder()

    def _factor(self) -> float:
        return self._latents()[1]

    def _save(self, _: int | None = None) -> None:
        pipe = self._finished()
        size = assembly.save(pipe, self._factor(), len(pipe.tokenizer_2), self._out)
        print(f"{self._out}: {size / 1e6:.1f} MB")

    def _finished(self) -> Any:
        return self._pipeline(vae=self._vae(), unet=self._unet(), vocoder=self._vocoder())

    def _pipeline(self, **trained: Any) -> Any:
        tokenizers = text_training.tokenizers(self._folder)
        return assembly.pipeline(tokenizers, self._clap(), self._t5(), self._language_model(), **trained)


class _FurtherTraining(_Training):
    """A part of a saved checkpoint, trained on; all other parts are the checkpoint's."""

    def __init__(self, folder: Path, out: Path, steps: int | None, checkpoint: Path, part: str) -> None:
        super().__init__(folder, out, steps)
        self._checkpoint = checkpoint
        self._part = part

    def _vae(self, _: int | None = None) -> Any:
        return self._pipeline().vae

    def _untrained_unet(self) -> Any:
        return self._pipeline().unet

    def _untrained_vocoder(self) -> Any:
        return self._pipeline().vocoder

    def _factor(self) -> float:
        # The UNet knows latents by the factor that it was trained with.
        return super()._factor() if self._part == "unet" else self._pipeline().vae.config.scaling_factor

    def _finished(self) -> Any:
        train = self._unet if self._part == "unet" else self._vocoder
        return self._pipeline(**{self._part: train(self._steps)})

    def _pipeline(self, **trained: Any) -> Any:
        pipe = assembly.load(self._checkpoint)
        pipe.register_modules(**trained)
        return pipe


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(main())
