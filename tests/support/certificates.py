"""A certificate for this machine."""

from pathlib import Path

import trustme


def make_certificate(directory: Path) -> Path:
    """Makes `certificate.pem`, for localhost and by an authority within, with its key in `key.pem` beside it."""
    authority = trustme.CA()
    own = authority.issue_cert("localhost")
    own.private_key_pem.write_to_path(directory / "key.pem")
    path = directory / "certificate.pem"
    for part in (*own.cert_chain_pems, authority.cert_pem):
        part.write_to_path(path, append=True)
    return path
