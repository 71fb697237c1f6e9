"""Several servers on this machine behind one address, as docker/replicas has them in containers."""
