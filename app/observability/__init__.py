"""Correlation ids, JSON logs, metrics, health and the worker's HTTP server."""
