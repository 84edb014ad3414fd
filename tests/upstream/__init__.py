"""kombu's and Celery's own integration suites, as released, on our broker and results: see `__main__`."""
