"""The worker plane's application: broker, results, dead letters, tasks and what watches them."""
