"""What a watched run writes: the run log, trackers, webhooks and the flight recorder."""
