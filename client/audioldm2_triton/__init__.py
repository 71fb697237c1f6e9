"""AudioLDM 2 on Triton: the contract, the settings and the client."""
