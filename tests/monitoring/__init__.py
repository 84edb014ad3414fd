"""What the plane shows Prometheus, recorded."""
