"""The plane at a glance, in a terminal and as a page, from what Prometheus knows."""
