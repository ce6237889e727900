"""Keep a run alive and visible: checkpoints, metrics, progress, signals, the watchdog."""
