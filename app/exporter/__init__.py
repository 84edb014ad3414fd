"""The plane's numbers that no single worker knows, for Prometheus: `skeldir exporter`, one process a plane.

It asks the database as `app_ro` in the background and answers a scrape from what it found, so a scrape costs
nothing however many messages wait, and says how old each number is.
"""
