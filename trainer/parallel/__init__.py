"""Several processes: engines that hold a model whole or in shards, and shared clips."""
