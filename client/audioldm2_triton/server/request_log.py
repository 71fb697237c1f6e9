"""One line in the server's log for each request that a client sent, with its id."""

import logging
from typing import Final

from audioldm2_triton.contract import STREAM
from audioldm2_triton.server.stage_tensors import DECODER

_LAST: Final = (DECODER, STREAM)
"""Their answers are the client's; that of any other stage is on its way to the next one."""
_LONGEST_ID: Final = 100  # characters: a client may send any number

logger = logging.getLogger(__name__)


def log_outcome(stage: str, request_id: str, outcome: object) -> None:
    """Logs how a request ended in a stage: an error wherever it happened, an answer if it is the client's.

    Not for the calls of `audioldm2_stream` to the stages, which are parts of a request that it logs itself.
    """
    name = f"request {request_id[:_LONGEST_ID]!r}" if request_id else "a request without an id"
    if isinstance(outcome, BaseException):
        logger.warning("%s failed: %s: %s", name, type(outcome).__name__, outcome)
    elif stage.endswith(_LAST):
        logger.info("%s is done", name)
