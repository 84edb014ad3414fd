"""What is shown of the plane: plain data, the same for `skeldir top`, its page and Grafana's dashboards.

A description tells a stranger what is normal and what to do when it isn't.
"""

import re
from dataclasses import dataclass
from typing import Literal

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Column:
    """One number of each row of a summary; `bounds` and `low` as a panel's."""

    title: str
    query: str
    unit: str = "short"
    bounds: Bounds | None = None
    low: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel.

    `queries` are pairs of PromQL and legend. A summary has `columns` in their place, and a row for each value of
    the label `by`. `bounds` are the values from which it is yellow and red (a `low`
    panel is bad below them). `runbook` is the alert whose page helps. `may_be_empty` is the reason why no data is
    a good sign; without it the check wants data.
    """

    title: str
    description: str
    queries: tuple[tuple[str, str], ...] = ()
    unit: str = "short"
    kind: Literal["graph", "stat", "table", "summary"] = "graph"
    width: int = 8
    bounds: Bounds | None = None
    low: bool = False
    stacked: bool = False
    runbook: str | None = None
    may_be_empty: str | None = None
    by: str = ""
    columns: tuple[Column, ...] = ()

    @property
    def expressions(self) -> tuple[str, ...]:
        """All its PromQL."""
        return (
            *(expression for expression, _ in self.queries),
            *(column.query for column in self.columns),
        )


@dataclass(frozen=True)
class Variable:
    """A variable of a dashboard, filled by a query of Grafana's Prometheus source."""

    name: str
    label: str
    query: str


@dataclass(frozen=True)
class Page:
    """One dashboard: rows of panels by title."""

    uid: str
    title: str
    description: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]
    variables: tuple[Variable, ...] = ()


def filled_in(expression: str, rate_interval: str, everything: str = ".*") -> str:
    """A query as it is sent: Grafana's intervals replaced, and every variable set to all."""
    expression = expression.replace("$__rate_interval", rate_interval).replace("$__range", "1h")
    return re.sub(r"\$\{?\w+\}?", everything, expression)


QUEUE = Variable("queue", "Queue", "label_values(celery_queue:success:target, queue)")
TASK = Variable("task", "Task", "label_values(celery_task_started_total, task_name)")
INSTANCE = Variable("instance", "Unit", 'label_values(up{job="celery-worker"}, instance)')


_ENDED = (
    "(sum by (queue) (rate(celery_task_success_total[$__rate_interval])) "
    "+ on (queue) sum by (queue) (rate(celery_task_failure_total[$__rate_interval])))"
)


def _quantiles(family: str, matchers: str, by: str, legend: str) -> tuple[tuple[str, str], ...]:
    rate = f"sum by ({by}, le) (rate({family}_bucket{{{matchers}}}[$__rate_interval]))"
    return tuple(
        (f"histogram_quantile({share}, {rate})", f"{legend} {name}")
        for share, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
    )


QUEUE_SUMMARY = Panel(
    "Queues",
    "Waiting: due and not taken. In: worked out from what ended and how the queue grew. Waits are those of the last "
    "five minutes. Normal: what comes in goes out. Of target: the oldest one's wait as a share of what the queue's entry "
    "in the sheet allows; below 100 %, above 500 % is a ticket, above 3000 % a page. Budget burnt: how fast failed runs "
    "of the last hour use up the queue's success objective; below 1, 14.4 for an hour is a page.",
    kind="summary",
    by="queue",
    width=24,
    runbook="CeleryQueueOldestAge",
    columns=(
        Column("waiting", 'sum by (queue) (celery_queue_messages{state="ready"})'),
        Column("delayed", 'sum by (queue) (celery_queue_messages{state="delayed"})'),
        Column("held", 'sum by (queue) (celery_queue_messages{state="held"})'),
        Column("oldest", "max by (queue) (celery_queue_oldest_ready_age_seconds)", "s"),
        Column(
            "of target",
            "max by (queue) (celery_queue_oldest_ready_age_seconds) / on (queue) celery_queue:wait_seconds:target",
            "percentunit",
            (5, 30),
        ),
        Column(
            "in /s",
            f"clamp_min({_ENDED} + on (queue) deriv(sum by (queue) (celery_queue_messages)[5m:15s]), 0)",
            "ops",
        ),
        Column("out /s", _ENDED, "ops"),
        Column(
            "wait p95",
            "histogram_quantile(0.95, sum by (queue, le) (rate(celery_task_queue_wait_seconds_bucket[5m])))",
            "s",
        ),
        Column(
            "budget burnt, 1 h",
            "celery_queue:task_failures:ratio_rate1h / on (queue) (1 - celery_queue:success:target)",
            bounds=(1, 14.4),
        ),
        Column("workers", "sum by (queue) (celery_worker_ready)", bounds=(1, 1), low=True),
    ),
)
UNIT_SUMMARY = Panel(
    "Units",
    "Up: Prometheus gets its metrics. Ready: it takes jobs. Running of possible: what its pool does. Normal: up and "
    "ready, and a loop that moved within seconds.",
    kind="summary",
    by="instance",
    width=24,
    runbook="CeleryWorkerDown",
    columns=(
        Column("up", 'max by (instance) (up{job="celery-worker"})', bounds=(1, 1), low=True),
        Column("ready", "max by (instance) (celery_worker_ready)", bounds=(1, 1), low=True),
        Column("draining", "max by (instance) (celery_worker_draining)", bounds=(1, 2)),
        Column("running", "sum by (instance) (celery_task_in_flight)"),
        Column("possible", "max by (instance) (celery_worker_pool_size)"),
        Column("in memory", "max by (instance) (celery_worker_prefetched)"),
        Column(
            "loop moved",
            "time() - min by (instance) (celery_worker_loop_last_tick_timestamp_seconds)",
            "s",
            (30, 60),
        ),
    ),
)
DEAD_LETTER_SUMMARY = Panel(
    "Dead letters",
    "Jobs that failed for good, by class. Normal: few open, none older than a day, none arriving. "
    "`skeldir dlq groups` says which.",
    kind="summary",
    by="failure_class",
    width=8,
    runbook="CeleryDlqArrivals",
    columns=(
        Column("open", "sum by (failure_class) (celery_dlq_open)", bounds=(1, 100)),
        Column(
            "new, last 10 min",
            "round(sum by (failure_class) (increase(celery_dlq_arrivals_total[10m])))",
            bounds=(1, 50),
        ),
        Column(
            "new, last hour",
            "round(sum by (failure_class) (increase(celery_dlq_arrivals_total[1h])))",
            bounds=(1, 100),
        ),
    ),
)
POSTGRES_SUMMARY = Panel(
    "Postgres",
    "As the exporter sees it. Held by the dead: messages whose worker is gone; 0, or for seconds after a crash. An old "
    "transaction keeps deleted rows in place, and the queue slows down.",
    kind="summary",
    by="instance",
    width=16,
    runbook="PostgresDown",
    columns=(
        Column("reached", "max by (instance) (skeldir_exporter_database_up)", bounds=(1, 1), low=True),
        Column("connections", "sum by (instance) (celery_postgres_connections)"),
        Column("of", "max by (instance) (celery_postgres_connections_limit)"),
        Column(
            "oldest transaction",
            "max by (instance) (celery_postgres_oldest_transaction_age_seconds)",
            "s",
            (900, 3600),
        ),
        Column("held by the dead", "sum by (instance) (celery_broker_held_by_dead)", bounds=(1, 1)),
        Column("dead rows", "sum by (instance) (celery_table_dead_tuples)", bounds=(1e5, 1e6)),
        Column("size", "max by (instance) (celery_postgres_database_size_bytes)", "bytes"),
    ),
)

ON_CALL = Page(
    uid="skeldir-oncall",
    title="Worker plane: on call",
    description="Start here when something rings. Top to bottom: is it there, is the work done, what failed.",
    rows=(
        (
            "Is it there?",
            (
                Panel(
                    "Pages",
                    "Alerts that wake somebody. Normal: 0. Otherwise open the table below; each row names its "
                    "runbook's file.",
                    (('count(ALERTS{alertstate="firing", severity="critical"}) or vector(0)', "pages"),),
                    kind="stat",
                    width=4,
                    bounds=(1, 1),
                ),
                Panel(
                    "Tickets",
                    "Alerts for working hours. Normal: 0 to a few.",
                    (('count(ALERTS{alertstate="firing", severity="warning"}) or vector(0)', "tickets"),),
                    kind="stat",
                    width=4,
                    bounds=(1, 10),
                ),
                Panel(
                    "Database",
                    "Share of workers that reach PostgreSQL. Normal: 100 %. At 0 nothing works; begin there.",
                    (("avg(celery_worker_database_connected)", "reached by"),),
                    unit="percentunit",
                    kind="stat",
                    width=4,
                    bounds=(1, 0.5),
                    low=True,
                    runbook="PostgresDown",
                ),
                Panel(
                    "Units ready",
                    "Units that take jobs. Normal: all of them, one a queue and host; fewer for a moment during a "
                    "deployment.",
                    (("sum(celery_worker_ready)", "ready"),),
                    kind="stat",
                    width=4,
                    bounds=(1, 1),
                    low=True,
                    runbook="CeleryPlaneDown",
                ),
                Panel(
                    "Queues without a worker",
                    "Queues of the sheet that no unit takes jobs from. Normal: 0.",
                    (
                        (
                            "count(sum by (queue) (celery_queue:metrics_port:info) "
                            "unless on (queue) (celery_worker_ready == 1)) or vector(0)",
                            "queues",
                        ),
                    ),
                    kind="stat",
                    width=4,
                    bounds=(1, 1),
                    runbook="CeleryQueueNoConsumer",
                ),
                Panel(
                    "Open dead letters",
                    "Jobs that failed for good and wait for a decision. Normal: few, and none older than a day.",
                    (("sum(celery_dlq_open)", "open"),),
                    kind="stat",
                    width=4,
                    bounds=(1, 100),
                    runbook="CeleryDlqArrivals",
                ),
                Panel(
                    "What fires",
                    "Every alert that fires now. The file runbooks/<alertname>.md, which its name leads to, says what to do.",
                    (('ALERTS{alertstate="firing", severity!="none"}', ""),),
                    kind="table",
                    width=24,
                    may_be_empty="that nothing fires is good",
                ),
            ),
        ),
        ("The plane now", (QUEUE_SUMMARY, UNIT_SUMMARY, DEAD_LETTER_SUMMARY, POSTGRES_SUMMARY)),
        (
            "Is the work done?",
            (
                Panel(
                    "Oldest waiting job against the target",
                    "Age of the oldest job that is due, as a multiple of its queue's target. Normal: below 1. Above "
                    "5 is a ticket, above 30 a page.",
                    (
                        (
                            "max by (queue) (celery_queue_oldest_ready_age_seconds) "
                            "/ on (queue) celery_queue:wait_seconds:target",
                            "{{queue}}",
                        ),
                    ),
                    bounds=(5, 30),
                    runbook="CeleryQueueOldestAge",
                ),
                Panel(
                    "Failure budget burnt, last hour",
                    "How fast failed runs use up the success objective: 1 is just sustainable, 14.4 for an hour is a "
                    "page. Normal: below 1.",
                    (
                        (
                            "celery_queue:task_failures:ratio_rate1h "
                            "/ on (queue) (1 - celery_queue:success:target)",
                            "{{queue}}",
                        ),
                    ),
                    bounds=(1, 14.4),
                    runbook="CelerySuccessBudgetBurn",
                ),
                Panel(
                    "Wait budget burnt, last hour",
                    "How fast jobs that started too late use up the 1 % that may. 1 is just sustainable, 14.4 for an "
                    "hour is a page.",
                    (("celery_queue:late_starts:ratio_rate1h / 0.01", "{{queue}}"),),
                    bounds=(1, 14.4),
                    runbook="CeleryWaitBudgetBurn",
                ),
                Panel(
                    "Waiting jobs",
                    "Jobs that are due and not taken, by queue. A hill is a burst; a slope that does not end means "
                    "too few workers.",
                    (('sum by (queue) (celery_queue_messages{state="ready"})', "{{queue}}"),),
                    stacked=True,
                ),
                Panel(
                    "Runs ended",
                    "Runs that ended in any way, a second, by queue. Normal: follows what is published. Zero with "
                    "waiting jobs is an outage.",
                    (
                        (
                            "sum by (queue) (rate(celery_task_success_total[$__rate_interval])) "
                            "+ sum by (queue) (rate(celery_task_failure_total[$__rate_interval]))",
                            "{{queue}}",
                        ),
                    ),
                    unit="ops",
                ),
                Panel(
                    "Oldest open dead letter",
                    "How long the oldest undecided failure has waited for somebody. A ticket after a day.",
                    (("max by (queue) (celery_dlq_oldest_open_age_seconds)", "{{queue}}"),),
                    unit="s",
                    bounds=(3600, 86400),
                    runbook="CeleryDlqOld",
                ),
            ),
        ),
        (
            "What runs by itself",
            (
                Panel(
                    "Schedulers",
                    "1 for the active one, 0 for those that stand by. Normal: one at 1; it changes when a host ends.",
                    (("skeldir_beat_active", "{{instance}}"),),
                    runbook="SkeldirBeatDown",
                ),
                Panel(
                    "Runs enqueued, last hour",
                    "By entry of app/schedule.yml. Normal: as many as its times say; a gap is when no scheduler was there.",
                    (("sum by (entry) (increase(skeldir_beat_enqueued_total[1h]))", "{{entry}}"),),
                ),
                Panel(
                    "Overdue",
                    "How long the next run of an entry should have been enqueued. Normal: 0. Above, the scheduler's log "
                    "says why it can't.",
                    (
                        (
                            "max by (entry) (clamp_min(time() - (skeldir_beat_next_due_timestamp_seconds > 0), 0))",
                            "{{entry}}",
                        ),
                    ),
                    unit="s",
                    bounds=(30, 120),
                    runbook="SkeldirBeatOverdue",
                ),
            ),
        ),
    ),
)

QUEUES = Page(
    uid="skeldir-queue",
    title="Worker plane: queue",
    description="One queue: what waits, how long, who works on it and how it ends.",
    variables=(QUEUE,),
    rows=(
        (
            "Demand",
            (
                Panel(
                    "Messages",
                    "Ready: due and not taken. Delayed: an ETA or a retry's wait. Held: taken by a worker. Normal: "
                    "held is at most what pool and prefetch allow, ready comes back to 0.",
                    (('sum by (state) (celery_queue_messages{queue=~"$queue"})', "{{state}}"),),
                    stacked=True,
                ),
                Panel(
                    "Oldest waiting job",
                    "Age of the oldest job that is due, and the queue's target. Normal: below the target.",
                    (
                        (
                            'max by (queue) (celery_queue_oldest_ready_age_seconds{queue=~"$queue"})',
                            "{{queue}}",
                        ),
                        ('celery_queue:wait_seconds:target{queue=~"$queue"}', "target of {{queue}}"),
                    ),
                    unit="s",
                    runbook="CeleryQueueOldestAge",
                ),
                Panel(
                    "Wait before the start",
                    "Time from publishing to the first run, of jobs without ETA. Normal: p99 below the target of the "
                    "sheet. Counted when a job starts, so an outage shows only afterwards.",
                    _quantiles("celery_task_queue_wait_seconds", 'queue=~"$queue"', "queue", "{{queue}}"),
                    unit="s",
                    runbook="CeleryWaitBudgetBurn",
                ),
            ),
        ),
        (
            "Work",
            (
                Panel(
                    "Runs by outcome",
                    "Runs a second that succeeded, failed, asked for a retry, or were revoked. Normal: nearly all "
                    "succeed.",
                    (
                        (
                            'sum(rate(celery_task_success_total{queue=~"$queue"}[$__rate_interval]))',
                            "success",
                        ),
                        (
                            'sum(rate(celery_task_failure_total{queue=~"$queue"}[$__rate_interval]))',
                            "failure",
                        ),
                        ('sum(rate(celery_task_retry_total{queue=~"$queue"}[$__rate_interval]))', "retry"),
                        (
                            'sum(rate(celery_task_revoked_total{queue=~"$queue"}[$__rate_interval]))',
                            "revoked",
                        ),
                    ),
                    unit="ops",
                    stacked=True,
                ),
                Panel(
                    "Busy processes",
                    "Runs going on, and how many its pools can run at once. At the top for long with jobs waiting: "
                    "raise concurrency, or add a host.",
                    (
                        ('sum by (queue) (celery_task_in_flight{queue=~"$queue"})', "running in {{queue}}"),
                        (
                            'sum by (queue) (celery_worker_pool_size{queue=~"$queue"})',
                            "possible in {{queue}}",
                        ),
                    ),
                ),
                Panel(
                    "Workers",
                    "Units that say they are ready, and holders that Postgres sees on the queue. Normal: equal, and "
                    "at least 1.",
                    (
                        ('sum by (queue) (celery_worker_ready{queue=~"$queue"})', "ready in {{queue}}"),
                        ('sum by (queue) (celery_queue_consumers{queue=~"$queue"})', "seen for {{queue}}"),
                    ),
                    bounds=(1, 1),
                    low=True,
                    runbook="CeleryQueueNoConsumer",
                ),
            ),
        ),
        (
            "Objectives",
            (
                Panel(
                    "Failed runs, share of the last hour",
                    "Share of runs that failed, beside what the success target allows. Normal: below the line.",
                    (
                        ('celery_queue:task_failures:ratio_rate1h{queue=~"$queue"}', "{{queue}}"),
                        ('1 - celery_queue:success:target{queue=~"$queue"}', "allowed in {{queue}}"),
                    ),
                    unit="percentunit",
                    width=12,
                    runbook="CelerySuccessBudgetBurn",
                ),
                Panel(
                    "Dead letters arriving, last 10 minutes",
                    "Jobs that failed for good, by class. Any is a ticket, more than 50 a page.",
                    (
                        (
                            'sum by (failure_class) (increase(celery_dlq_arrivals_total{queue=~"$queue"}[10m]))',
                            "{{failure_class}}",
                        ),
                    ),
                    width=12,
                    stacked=True,
                    bounds=(1, 50),
                    runbook="CeleryDlqArrivals",
                ),
            ),
        ),
    ),
)

TASKS = Page(
    uid="skeldir-task",
    title="Worker plane: task",
    description="One task: how often it runs, how long it takes, and how it fails.",
    variables=(TASK,),
    rows=(
        (
            "Runs",
            (
                Panel(
                    "Runs by outcome",
                    "A second. Normal: nearly all succeed. Retries as many as runs mean that what it calls is away.",
                    (
                        (
                            'sum(rate(celery_task_success_total{task_name=~"$task"}[$__rate_interval]))',
                            "success",
                        ),
                        (
                            'sum(rate(celery_task_failure_total{task_name=~"$task"}[$__rate_interval]))',
                            "failure",
                        ),
                        ('sum(rate(celery_task_retry_total{task_name=~"$task"}[$__rate_interval]))', "retry"),
                        (
                            'sum by (reason) (rate(celery_task_revoked_total{task_name=~"$task"}'
                            "[$__rate_interval]))",
                            "revoked: {{reason}}",
                        ),
                    ),
                    unit="ops",
                    stacked=True,
                    runbook="CeleryRetryStorm",
                ),
                Panel(
                    "Duration",
                    "How long its runs took, however they ended. Normal: the mean well below the queue's soft limit. "
                    "The buckets end at 10 s, so a quantile that reads 10 s may be any longer time; the mean is exact.",
                    (
                        *_quantiles(
                            "celery_task_duration_seconds", 'task_name=~"$task"', "task_name", "{{task_name}}"
                        ),
                        (
                            "sum by (task_name) "
                            '(rate(celery_task_duration_seconds_sum{task_name=~"$task"}[$__rate_interval])) '
                            "/ sum by (task_name) "
                            '(rate(celery_task_duration_seconds_count{task_name=~"$task"}[$__rate_interval]))',
                            "{{task_name}} mean",
                        ),
                    ),
                    unit="s",
                ),
                Panel(
                    "Wait before the start",
                    "What its jobs waited in the queue. High here and low elsewhere in the queue means bursts of it.",
                    _quantiles(
                        "celery_task_queue_wait_seconds", 'task_name=~"$task"', "task_name", "{{task_name}}"
                    ),
                    unit="s",
                ),
            ),
        ),
        (
            "Failures",
            (
                Panel(
                    "Failures by exception, last hour",
                    "By class of exception; `other` are those of no known kind. `skeldir dlq groups` shows their "
                    "messages.",
                    (
                        (
                            'sum by (exception) (increase(celery_task_failure_total{task_name=~"$task"}[1h])) > 0',
                            "{{exception}}",
                        ),
                    ),
                    stacked=True,
                    runbook="CelerySuccessBudgetBurn",
                ),
                Panel(
                    "Time limits, last hour",
                    "Soft: raised in the task, which could tidy up. Hard: its process was killed. Normal: 0.",
                    (
                        (
                            'sum by (kind) (increase(celery_task_timeout_total{task_name=~"$task"}[1h]))',
                            "{{kind}}",
                        ),
                    ),
                    bounds=(1, 5),
                    runbook="CeleryTaskTimeouts",
                ),
                Panel(
                    "Processes lost, last hour",
                    "Processes that ended under the task: out of memory, a crash, a kill. Normal: 0.",
                    (
                        (
                            "sum by (task_name) "
                            '(increase(celery_task_worker_lost_total{task_name=~"$task"}[1h]))',
                            "{{task_name}}",
                        ),
                    ),
                    bounds=(1, 3),
                    runbook="CeleryTaskWorkerLost",
                ),
                Panel(
                    "Running now",
                    "Runs of the task going on. A number that never moves is a hanging task.",
                    (('sum by (task_name) (celery_task_in_flight{task_name=~"$task"})', "{{task_name}}"),),
                    width=12,
                ),
                Panel(
                    "Its open dead letters",
                    "Jobs of the task that failed for good and wait for a decision.",
                    (
                        (
                            'sum by (failure_class) (celery_dlq_open{task_name=~"$task"})',
                            "{{failure_class}}",
                        ),
                    ),
                    width=12,
                    stacked=True,
                    runbook="CeleryDlqArrivals",
                ),
            ),
        ),
    ),
)

WORKERS = Page(
    uid="skeldir-worker",
    title="Worker plane: worker",
    description="One unit: does it live, does it take jobs, is it busy.",
    variables=(INSTANCE,),
    rows=(
        (
            "Life",
            (
                Panel(
                    "Answers",
                    "1 while Prometheus gets its metrics. Normal: 1, with a gap of seconds at a restart.",
                    (('up{job="celery-worker", instance=~"$instance"}', "{{instance}}"),),
                    bounds=(1, 1),
                    low=True,
                    runbook="CeleryWorkerDown",
                ),
                Panel(
                    "Takes jobs",
                    "Ready is 1 while jobs are taken and can be done; draining is 1 from when it was told to stop.",
                    (
                        ('celery_worker_ready{instance=~"$instance"}', "{{queue}} ready"),
                        ('celery_worker_draining{instance=~"$instance"}', "{{queue}} draining"),
                        (
                            'celery_worker_database_connected{instance=~"$instance"}',
                            "{{queue}} has the database",
                        ),
                    ),
                    runbook="CeleryQueueNoConsumer",
                ),
                Panel(
                    "Since the loop moved",
                    "Age of the consumer loop's last move. Normal: below 3 s. At 180 s systemd ends the unit.",
                    (
                        (
                            'time() - celery_worker_loop_last_tick_timestamp_seconds{instance=~"$instance"}',
                            "{{queue}} at {{instance}}",
                        ),
                    ),
                    unit="s",
                    bounds=(30, 60),
                    runbook="CeleryWorkerLoopStalled",
                ),
            ),
        ),
        (
            "Work",
            (
                Panel(
                    "Running and possible",
                    "Runs going on, and the pool's size. A pool of 0 has not started.",
                    (
                        ('sum by (instance) (celery_task_in_flight{instance=~"$instance"})', "running"),
                        ('sum by (instance) (celery_worker_pool_size{instance=~"$instance"})', "possible"),
                    ),
                ),
                Panel(
                    "Held in memory",
                    "Messages it holds that no process runs yet: at most prefetch times concurrency of the sheet.",
                    (
                        (
                            'sum by (instance) (celery_worker_prefetched{instance=~"$instance"})',
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    "Runs begun",
                    "A second, by task. Normal: what its queue is sent; nothing although jobs wait is a worker that takes none.",
                    (
                        (
                            'sum by (task_name) (rate(celery_task_started_total{instance=~"$instance"}'
                            "[$__rate_interval])) > 0",
                            "{{task_name}}",
                        ),
                    ),
                    unit="ops",
                    stacked=True,
                ),
                Panel(
                    "Dead letters it could not write, last hour",
                    "Normal: 0. Any is a page: failures stay in the queue until this is mended.",
                    (
                        (
                            "sum by (queue) "
                            '(increase(celery_worker_dlq_capture_errors_total{instance=~"$instance"}[1h]))',
                            "{{queue}}",
                        ),
                    ),
                    width=6,
                    bounds=(1, 1),
                    runbook="CeleryDlqCaptureErrors",
                ),
                Panel(
                    "Rescued, last hour",
                    "Messages it gave back from workers that died. Normal: 0. Each is run again by a living worker.",
                    (
                        (
                            "sum by (instance) "
                            '(increase(celery_worker_rescued_messages_total{instance=~"$instance"}[1h]))',
                            "{{instance}}",
                        ),
                    ),
                    width=6,
                    runbook="CeleryMessagesHeldByDead",
                ),
                Panel(
                    "What it runs",
                    "Release, Python and Celery of each unit. Normal: one release everywhere, two while deploying.",
                    (('celery_worker_build_info{instance=~"$instance"}', ""),),
                    kind="table",
                    width=12,
                ),
            ),
        ),
    ),
)

DEAD_LETTERS = Page(
    uid="skeldir-dead-letters",
    title="Worker plane: dead letters",
    description="What failed for good, since when, and what became of replays.",
    rows=(
        (
            "Open",
            (
                Panel(
                    "Open by class",
                    "permanent: the task raised. transient: its retries are used up. timeout: a time limit. poison: "
                    "it kills its process. unknown_task, invalid, expired: never ran.",
                    (("sum by (failure_class) (celery_dlq_open)", "{{failure_class}}"),),
                    stacked=True,
                    runbook="CeleryDlqArrivals",
                ),
                Panel(
                    "Oldest open",
                    "Since when the oldest undecided failure waits. A ticket after a day.",
                    (("max by (queue) (celery_dlq_oldest_open_age_seconds)", "{{queue}}"),),
                    unit="s",
                    bounds=(3600, 86400),
                    runbook="CeleryDlqOld",
                ),
                Panel(
                    "Open by task",
                    "Which task it is. `skeldir dlq groups` says the same with messages.",
                    (("topk(20, sum by (queue, task_name, failure_class) (celery_dlq_open) > 0)", ""),),
                    kind="table",
                ),
            ),
        ),
        (
            "Arriving and leaving",
            (
                Panel(
                    "Arrivals, last 10 minutes",
                    "Jobs that failed for good, by class. More than 50 in one queue is a page: look for one cause.",
                    (
                        (
                            "sum by (queue, failure_class) (increase(celery_dlq_arrivals_total[10m]))",
                            "{{queue}} {{failure_class}}",
                        ),
                    ),
                    stacked=True,
                    bounds=(1, 50),
                    runbook="CeleryDlqBurst",
                ),
                Panel(
                    "Replays, last hour",
                    "How replays ended. Failing ones say that the cause is still there: stop replaying.",
                    (("sum by (result) (increase(celery_dlq_replays_total[1h]))", "{{result}}"),),
                    stacked=True,
                ),
                Panel(
                    "Oldest replay under way",
                    "Since when a replayed job has neither succeeded nor failed. Normal: about the queue's wait.",
                    (("max(celery_dlq_in_progress_oldest_age_seconds)", "oldest"),),
                    unit="s",
                    bounds=(600, 3600),
                    runbook="CeleryDlqReplayStuck",
                ),
                Panel(
                    "Could not be written, last hour",
                    "Failures that a worker could not put away. Normal: 0.",
                    (("sum by (queue) (increase(celery_worker_dlq_capture_errors_total[1h]))", "{{queue}}"),),
                    width=24,
                    bounds=(1, 1),
                    runbook="CeleryDlqCaptureErrors",
                ),
            ),
        ),
    ),
)

POSTGRES = Page(
    uid="skeldir-postgres",
    title="Worker plane: Postgres for queues",
    description="What a queue in Postgres dies of: no connection, a held snapshot, dead rows, a full disk.",
    rows=(
        (
            "Is it there?",
            (
                Panel(
                    "Reached by the exporter",
                    "1 while the exporter reaches the database.",
                    (("skeldir_exporter_database_up", "{{instance}}"),),
                    kind="stat",
                    width=6,
                    bounds=(1, 1),
                    low=True,
                    runbook="PostgresDown",
                ),
                Panel(
                    "Holders alive",
                    "Workers whose session Postgres sees. Normal: one a unit.",
                    (("sum(celery_broker_holders_alive)", "alive"),),
                    kind="stat",
                    width=6,
                ),
                Panel(
                    "Held by the dead",
                    "Messages whose worker is gone. Normal: 0, or for seconds after a crash.",
                    (("sum(celery_broker_held_by_dead)", "messages"),),
                    kind="stat",
                    width=6,
                    bounds=(1, 1),
                    runbook="CeleryMessagesHeldByDead",
                ),
                Panel(
                    "Size of the database",
                    "All of it, indexes included.",
                    (("max(celery_postgres_database_size_bytes)", "size"),),
                    unit="bytes",
                    kind="stat",
                    width=6,
                ),
                Panel(
                    "Connections",
                    "By role, beside what the server allows and what the plane's own units may need at most. Normal: "
                    "below the budget.",
                    (
                        ("sum by (role) (celery_postgres_connections)", "{{role}}"),
                        ("max(celery_postgres_connections_limit)", "limit"),
                        ("max(celery_postgres_connection_budget)", "budget"),
                    ),
                    runbook="PostgresConnectionsHigh",
                ),
                Panel(
                    "Oldest transaction",
                    "While it is open, no row deleted since can be removed. Normal: seconds; a dump takes minutes.",
                    (("max(celery_postgres_oldest_transaction_age_seconds)", "oldest"),),
                    unit="s",
                    bounds=(900, 3600),
                    runbook="PostgresOldTransaction",
                ),
                Panel(
                    "Oldest snapshot",
                    "How many transactions back the oldest snapshot lies, also one held by a slot or a standby. A "
                    "ticket at five million.",
                    (("max(celery_postgres_oldest_xmin_age_transactions)", "transactions"),),
                    bounds=(1e6, 5e6),
                    runbook="PostgresXminHeld",
                ),
                Panel(
                    "Certificates",
                    "How long the server's certificate holds, and the ones that vouch for it. A run of site.yml renews "
                    "the server's in its last thirty days; a ticket at fourteen.",
                    (
                        (
                            "min by (certificate) (celery_postgres_certificate_not_after_timestamp_seconds > 0) - time()",
                            "{{certificate}}",
                        ),
                    ),
                    unit="s",
                    bounds=(14 * 86400, 2 * 86400),
                    low=True,
                    runbook="PostgresCertificateEnding",
                ),
            ),
        ),
        (
            "Tables",
            (
                Panel(
                    "Dead rows",
                    "Deleted rows that vacuum has not removed. Normal: a saw; a line that only rises is trouble.",
                    (("celery_table_dead_tuples", "{{table}}"),),
                    bounds=(1e5, 1e6),
                    runbook="PostgresVacuumBehind",
                ),
                Panel(
                    "Since the last autovacuum",
                    "By table. A busy queue's table is vacuumed every few minutes.",
                    (("time() - (celery_table_last_autovacuum_timestamp_seconds > 0)", "{{table}}"),),
                    unit="s",
                    runbook="PostgresVacuumBehind",
                ),
                Panel(
                    "Size",
                    "By table, with its indexes. A queue's table that stays big after a burst is bloated.",
                    (("celery_table_size_bytes", "{{table}}"),),
                    unit="bytes",
                ),
                Panel(
                    "Disk left",
                    "Share of each file system that is free. Postgres stops when it is full.",
                    (
                        (
                            "min by (instance, device) "
                            '(node_filesystem_avail_bytes{fstype!~"tmpfs|ramfs"} / node_filesystem_size_bytes)',
                            "{{instance}} {{device}}",
                        ),
                    ),
                    unit="percentunit",
                    bounds=(0.3, 0.08),
                    low=True,
                    runbook="HostDiskFilling",
                ),
                Panel(
                    "Exporter: its collectors",
                    "1 while a collector works. At 0 the numbers it feeds are old.",
                    (("skeldir_exporter_collector_success", "{{collector}}"),),
                    bounds=(1, 1),
                    low=True,
                    runbook="SkeldirExporterCollectorFailing",
                ),
                Panel(
                    "Exporter: what its queries take",
                    "Normal: milliseconds. Seconds mean a bloated table or a busy server.",
                    (("skeldir_exporter_collector_duration_seconds", "{{collector}}"),),
                    unit="s",
                    bounds=(1, 5),
                ),
            ),
        ),
    ),
)

PAGES = (ON_CALL, QUEUES, TASKS, WORKERS, DEAD_LETTERS, POSTGRES)
