"""`lateral_connection` with the weight kept in shared memory, in Gluon, for compute capability 9.0."""
