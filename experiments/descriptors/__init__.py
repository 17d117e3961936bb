"""`lateral_connection` over tensor descriptors, in a persistent schedule."""
