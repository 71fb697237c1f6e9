"""The scheduler: requests in flight and waiting, and the thread that runs their steps."""
