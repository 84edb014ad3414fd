"""Any order of what can happen to messages, against the real statements: nothing is lost, no fence gives way.

The model is what a careful reader believes; each rule runs a statement of the broker and compares.
Variants of the database with one condition taken out of a statement show that the machine would notice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg2.extensions import connection

from tests.postgres import Database

LIMIT = 1
TAKE = (
    "SELECT id, delivery, dead FROM kombu_take("
    "%s, '{}', '{}', ARRAY[%s], '{0}', '{9}', '{0}', ARRAY[%s], %s, false, false)"
)


@dataclass
class Message:
    """What is believed of one message."""

    priority: int
    holder: int | None = None
    delivery: int = 0
    returned: int = 0
    blamed: bool = False
    gone: bool = False


@dataclass
class Model:
    """What is believed of all."""

    messages: dict[int, Message] = field(default_factory=dict)
    suspects: dict[int, int] = field(default_factory=dict)
    """What each holder would be killed by, if it died now."""
    deliveries: list[tuple[int, int, int]] = field(default_factory=list)
    """Every (holder, message, delivery) ever given: each may be named again, however late."""

    def waiting(self) -> list[int]:
        found = [i for i, m in self.messages.items() if m.holder is None and not m.gone]
        return sorted(found, key=lambda i: (-self.messages[i].priority, i))


def machine(connect: Callable[[], connection]) -> type[RuleBasedStateMachine]:
    """The state machine on one database."""

    class Broker(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()
            self.sessions: dict[int, connection] = {}
            self.next_holder = 1
            self.admin = connect()

        def ask(self, statement: str, *arguments: object) -> list[tuple[object, ...]]:
            with self.admin.cursor() as cursor:
                cursor.execute(statement, arguments)
                return cursor.fetchall() if cursor.description else []

        @initialize()
        def empty(self) -> None:
            self.ask("DELETE FROM kombu_message; DELETE FROM kombu_holder; DELETE FROM kombu_queue")
            self.queue = self.ask("SELECT kombu_declare('q', NULL, NULL)")[0][0]
            for _ in range(2):
                self.join()
                self.publish(0)

        @rule(priority=st.sampled_from([0, 0, 5]))
        def publish(self, priority: int) -> None:
            self.ask("CALL kombu_publish('q', %s, NULL, NULL, '{}', false)", priority)
            id_ = self.ask("SELECT max(id) FROM kombu_message")[0][0]
            self.model.messages[id_] = Message(priority)  # type: ignore[index]

        @rule()
        @precondition(lambda self: len(self.sessions) < 2)
        def join(self) -> None:
            session = connect()
            with session.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_lock_shared(1802331490, %s)", (self.next_holder,))
            self.ask("INSERT INTO kombu_holder (id, name) VALUES (%s, 'h')", self.next_holder)
            self.sessions[self.next_holder] = session
            self.next_holder += 1

        @rule(data=st.data(), want=st.integers(1, 4))
        @precondition(lambda self: self.sessions)
        def take(self, data: st.DataObject, want: int) -> None:
            holder = data.draw(st.sampled_from(sorted(self.sessions)))
            expected = self.model.waiting()[:want]
            with self.sessions[holder].cursor() as cursor:
                cursor.execute(TAKE, (holder, self.queue, LIMIT, want))
                taken = cursor.fetchall()
            assert sorted(row[0] for row in taken) == sorted(expected)
            for id_, delivery, dead in taken:
                message = self.model.messages[id_]
                message.holder, message.delivery = holder, message.delivery + 1
                assert delivery == message.delivery
                assert (dead == "poison") == (message.returned >= LIMIT and message.blamed)
                self.model.deliveries.append((holder, id_, delivery))

        def name(self, data: st.DataObject) -> tuple[int, int, int]:
            """A delivery to act on, often one whose message was delivered again since."""
            messages = self.model.messages
            late = [
                named
                for named in self.model.deliveries
                if messages[named[1]].holder and not messages[named[1]].gone and not self.fenced(named)
            ]
            own = [named for named in late if named[0] == messages[named[1]].holder]
            choices = [found for found in (own, late, self.model.deliveries) if found]
            return data.draw(st.sampled_from(data.draw(st.sampled_from(choices))))

        def fenced(self, named: tuple[int, int, int]) -> Message | None:
            message = self.model.messages[named[1]]
            is_current = not message.gone and (message.holder, message.delivery) == (named[0], named[2])
            return message if is_current else None

        @rule(data=st.data())
        @precondition(lambda self: self.model.deliveries)
        def acknowledge(self, data: st.DataObject) -> None:
            named = self.name(data)
            count = self.ask("SELECT kombu_ack(%s, ARRAY[%s]::bigint[], ARRAY[%s])", *named)[0][0]
            message = self.fenced(named)
            assert count == (message is not None)
            if message:
                message.gone = True

        @rule(data=st.data(), counted=st.booleans())
        @precondition(lambda self: self.model.deliveries)
        def give_back(self, data: st.DataObject, counted: bool) -> None:
            named = self.name(data)
            statement = "SELECT kombu_return(%s, ARRAY[%s]::bigint[], ARRAY[%s], ARRAY[%s])"
            count = self.ask(statement, *named, counted)[0][0]
            message = self.fenced(named)
            assert count == (message is not None)
            if message:
                message.holder = None
                message.returned += counted
                message.blamed |= counted

        @rule(data=st.data())
        @precondition(lambda self: self.model.deliveries)
        def bury(self, data: st.DataObject) -> None:
            holder, id_, delivery = named = self.name(data)
            gone = self.ask(
                "DELETE FROM kombu_message WHERE id = %s AND holder = %s AND delivery = %s RETURNING id",
                *(id_, holder, delivery),
            )
            message = self.fenced(named)
            assert bool(gone) == (message is not None)
            if message:
                message.gone = True

        @rule(data=st.data())
        @precondition(lambda self: self.sessions)
        def die(self, data: st.DataObject) -> None:
            holder = data.draw(st.sampled_from(sorted(self.sessions)))
            self.ask("SELECT pg_terminate_backend(%s, 5000)", self.sessions.pop(holder).info.backend_pid)

        @rule(data=st.data())
        @precondition(lambda self: self.next_holder > 1)
        def rescue(self, data: st.DataObject) -> None:
            holder = data.draw(st.integers(1, self.next_holder - 1))
            count = self.ask("SELECT kombu_rescue(%s, NULL)", holder)[0][0]
            assert (count is None) == (holder in self.sessions)
            if count is None:
                return
            held = [id_ for id_, m in self.model.messages.items() if m.holder == holder and not m.gone]
            suspect = self.model.suspects.pop(holder, None)
            for id_ in held:
                message = self.model.messages[id_]
                message.holder = None
                message.returned += suspect not in held or id_ == suspect
                message.blamed |= id_ == suspect

        @rule(data=st.data())
        @precondition(lambda self: self.sessions and self.model.deliveries)
        def put_on_trial(self, data: st.DataObject) -> None:
            holder, id_, _ = self.name(data)
            if holder in self.sessions:
                self.ask("UPDATE kombu_holder SET suspect = %s WHERE id = %s", id_, holder)
                self.model.suspects[holder] = id_

        @rule(data=st.data())
        @precondition(lambda self: self.sessions and self.model.deliveries)
        def say_again(self, data: st.DataObject) -> None:
            """A holder repeats what it holds and what it has done, as after a crash that forgot nothing."""
            holder = data.draw(st.sampled_from(sorted(self.sessions)))
            held = [
                (id_, message.delivery)
                for id_, message in self.model.messages.items()
                if message.holder == holder
            ]
            self.ask(
                "SELECT kombu_reassert(%s, '{}', '{}', %s::bigint[], %s::integer[])",
                holder,
                [id_ for id_, _ in held],
                [delivery for _, delivery in held],
            )

        @invariant()
        def agree(self) -> None:
            found = self.ask("SELECT id, holder, delivery, returned, blamed, visible FROM kombu_message")
            believed = [
                (id_, m.holder, m.delivery, m.returned, m.blamed, m.holder is None)
                for id_, m in self.model.messages.items()
                if not m.gone
            ]
            assert sorted(found) == sorted(believed)  # type: ignore[type-var]

        def teardown(self) -> None:
            for session in [self.admin, *self.sessions.values()]:
                session.close()

    return Broker


def run(database: Database, examples: int, *, derandomize: bool = True) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine(lambda: database.connect("app_user")),
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
            derandomize=derandomize,
            database=None,
        ),
    )


@contextmanager
def without(database: Database, function: str, condition: str) -> Iterator[None]:
    """One condition less in one function of this database."""
    rows = database.rows(f"SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname = '{function}'")
    definition = str(rows[0][0])
    assert condition in definition
    session = database.connect("app_owner")
    session.cursor().execute(definition.replace(condition, ""))
    session.close()
    yield


def test_nothing_is_lost_and_no_fence_gives_way(database: Database) -> None:
    run(database, 25)


@pytest.mark.parametrize(
    ("function", "condition"),
    [
        ("kombu_ack", "AND m.delivery = p_deliveries[array_position(p_ids, m.id)]"),
        ("kombu_ack", "AND m.holder + 0 = p_holder"),
        ("kombu_take", "AND r.visible "),
    ],
    ids=lambda value: value.split(" ")[-1][:12],
)
@pytest.mark.timeout(400)
def test_the_machine_notices_a_missing_condition(database: Database, function: str, condition: str) -> None:
    with without(database, function, condition), pytest.raises(AssertionError):
        run(database, 500, derandomize=False)  # ends with the first that notices, mostly within 50
