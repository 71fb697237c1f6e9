"""A client whose network swallows everything: its rows are free again without a word from it."""

from contextlib import closing
from dataclasses import replace

from metrics_page import is_idle, read_metrics, wait_for_metrics
from plain_requests import Stream
from serving.local_server import LocalServer
from trials.proxy import proxy

# So long that it cannot end by itself meanwhile.
LONG = {"prompt": [b"a dog"], "num_inference_steps": [200], "audio_length_in_s": [60.0], "seed": [1]}


def test_a_half_open_stream_is_let_go(server: LocalServer) -> None:
    """By gRPC's keepalive: a ping after 10 s, and 10 s for its answer."""
    outcome = 'audioldm2_requests_total{engine="cpu",model="denoiser",outcome="cancelled"}'
    before = read_metrics(server).get(outcome, 0)
    with proxy(server.grpc_port) as between, closing(Stream(replace(server, grpc_port=between.port))) as stream:
        stream.send(LONG)
        stream.next()
        between.toxics.timeout = True
        page = wait_for_metrics(server, is_idle, "the rows to be free")
        between.toxics.timeout = False
        between.reset()
        assert page[outcome] == before + 1
