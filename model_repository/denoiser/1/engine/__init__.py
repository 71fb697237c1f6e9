"""Who steps when: requests in flight and waiting, and the thread that steps."""
