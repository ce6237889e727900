"""Settings: their schema, the ranges that they must lie in, and recipes."""
