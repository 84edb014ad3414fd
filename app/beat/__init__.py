"""The plane's scheduler, `skeldir beat`: jobs of `app/schedule.yml` at their times, each once.

Every host that may run it does; the one that holds an advisory lock is active, the others wait for it. A job
and the note that it was enqueued are one transaction, in the session that holds the lock, so neither the end
of a process nor two that both take themselves for active can lose or double a run.
"""
