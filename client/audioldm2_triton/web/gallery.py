"""What the page shows of requests, as HTML."""

from collections.abc import Sequence
from html import escape
from typing import Final

from audioldm2_triton.events import Progress
from audioldm2_triton.web.generation import Beginning, Candidate, Generated

# Relative, so that the page works below any path of a proxy. Gradio serves the files of one folder there.
FILES: Final = "gradio_api/file="

STYLE: Final = """
.request { margin-bottom: 1.5rem; }
.request h2 { margin: 0 0 0.2rem; overflow-wrap: anywhere; }
.request .candidates { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; }
.request figure { margin: 0; }
.request img, .request audio, .status audio, .status progress { width: 100%; }
.status.error { color: #b91c1c; font-weight: 600; }
"""


def show_progress(progress: Progress | None) -> str:
    """Shows how far a request is; None: no step is done yet."""
    if progress is None:
        return (
            '<div class="status" role="status">waiting for the first step<progress aria-label="steps"></progress></div>'
        )
    step, steps = progress.step, progress.num_steps
    bar = f'<progress aria-label="steps" max="{steps}" value="{step}"></progress>'
    return f'<div class="status" role="status">step {step} of {steps}{bar}</div>'


def show_beginning(beginning: Beginning) -> str:
    """Shows players for the first seconds of each candidate."""
    said = f"the first {beginning.length_in_s:.1f} s, while the rest is decoded"
    players = "".join(
        f'<audio controls="" src="{FILES}{escape(str(path), quote=True)}" aria-label="beginning {number}"></audio>'
        for number, path in enumerate(beginning.sounds, 1)
    )
    return _status(f"{said}{players}")


def show_end(text: str) -> str:
    """Shows how a request ended."""
    return _status(escape(text))


def _status(content: str) -> str:
    return f'<div class="status" role="status">{content}</div>'


def show_error(error: Exception) -> str:
    """Shows an error in its own words, which are the contract's."""
    return f'<div class="status error" role="alert">{escape(str(error))}</div>'


def show_history(history: Sequence[Generated]) -> str:
    """Shows the requests of a session, the last one first, with a player and a spectrogram for each candidate."""
    return "\n".join(_show(generated) for generated in reversed(history))


def _show(generated: Generated) -> str:
    said = escape(", ".join(f"{name} {value}" for name, value in generated.options.items()))
    figures = "\n".join(_figure(generated, rank, each) for rank, each in enumerate(generated.candidates))
    return (
        f'<section class="request"><h2>{escape(generated.prompt)}</h2><p>{generated.length_in_s:.2f} s, {said}</p>'
        f'<div class="candidates">{figures}</div></section>'
    )


def _figure(generated: Generated, rank: int, candidate: Candidate) -> str:
    name = f"candidate {rank + 1} of {len(generated.candidates)}"
    score = "" if candidate.score is None else f", score {candidate.score:.4f}"
    label = escape(f"{name}: {generated.prompt}", quote=True)
    sound, picture = (f"{FILES}{escape(str(path), quote=True)}" for path in (candidate.sound, candidate.picture))
    file = f"seed{generated.options.get('seed')}-{rank}.wav"
    return (
        f'<figure><img src="{picture}" alt="waveform and spectrogram, {label}"/>'
        f'<audio controls="" src="{sound}" aria-label="{label}"></audio>'
        f'<figcaption>{name}{score}, <a href="{sound}" download="{file}">download</a></figcaption></figure>'
    )
