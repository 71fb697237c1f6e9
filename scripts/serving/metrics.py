"""Triton's `/metrics` page, as numbers."""

from serving.loopback import read_page


def read_metrics(port: int, host: str = "localhost", timeout: float = 10) -> dict[str, float]:
    """Returns every sample of the page by its name with labels, and summed over all labels by the name alone.

    Raises `OSError` if no server answers.
    """
    lines = read_page(port, "/metrics", timeout, host).decode().splitlines()
    metrics: dict[str, float] = {}
    for line in lines:
        if not line or line.startswith("#"):
            continue
        name, _, value = line.rpartition(" ")
        metrics[name] = float(value)
        plain = name.partition("{")[0]
        if plain != name:
            metrics[plain] = metrics.get(plain, 0.0) + float(value)
    return metrics
