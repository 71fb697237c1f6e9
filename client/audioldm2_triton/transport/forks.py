"""What a client does in a process that was forked from the one that made it: nothing, and say so.

The connections are the parent's: each process would read the other's answers, and what the child closes or cancels the
parent would lose. Neither gRPC nor gevent, which carries HTTP, goes on in a child once the parent has used it.
"""

import os


def was_forked(made_in: int) -> bool:
    """Whether this is another process than `made_in`."""
    return os.getpid() != made_in


def check_not_forked(made_in: int) -> None:
    """Raises `RuntimeError` in another process than `made_in`."""
    if was_forked(made_in):
        raise RuntimeError(
            "got a call in a forked process but expected one in the process that made the client: make a client in "
            "each process, and start processes by `spawn`"
        )
