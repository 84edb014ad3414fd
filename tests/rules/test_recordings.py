"""The recording is written and read, played, and of the plane as it is now."""

from pathlib import Path

from monitoring import recordings
from monitoring.recordings import Moment, Writer
from tests.postgres import ROOT


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "made.txt"
    writer = Writer(file, "of a test")
    first = {'a_total{x="1, 2"}': 1.0, "b": 2.5}
    writer.moment("one", 10.0, {("job", "host:1"): first, ("job", "host:2"): None})
    writer.moment("two", 20.0, {("job", "host:1"): {"b": 2.5, "c": 1.0}, ("job", "host:2"): {"b": 1.0}})
    one, two = recordings.read(file)
    where = 'instance="host:1",job="job"'
    assert one.series == {
        f"up{{{where}}}": 1,
        f'a_total{{x="1, 2",{where}}}': 1,
        f"b{{{where}}}": 2.5,
        'up{instance="host:2",job="job"}': 0,
    }
    assert set(two.series) == {
        f"up{{{where}}}",
        f"b{{{where}}}",
        f"c{{{where}}}",
        'up{instance="host:2",job="job"}',
        'b{instance="host:2",job="job"}',
    }
    assert file.read_text().count("b 2.5") == 1, "what did not change is not written again"


def test_a_moment_that_lasts_keeps_what_time_means() -> None:
    moment = Moment(
        "m",
        1000.0,
        {
            "x_last_tick_timestamp_seconds": 990.0,
            "celery_table_last_autovacuum_timestamp_seconds": 400.0,
            "y_age_seconds": 5.0,
            "idle_age_seconds": 0.0,
            "z": 3.0,
        },
    )
    assert dict(recordings.held(moment, 180, 60, 600)) == {
        "x_last_tick_timestamp_seconds": "590.000+60x2",  # ten seconds ago, all the time
        "celery_table_last_autovacuum_timestamp_seconds": "0.000x2",  # happened once
        "y_age_seconds": "5.000+60x2",
        "idle_age_seconds": "0.0x2",
        "z": "3.0x2",
    }


def test_the_recording_is_of_the_plane_as_it_is() -> None:
    # The healthy scrapes are compared with running processes; record anew when this fails:
    # `python -m tests.rules.record`
    seen = {
        (recordings.name_of(series), 'job="celery-worker"' in series)
        for moment in recordings.read()
        for series in moment.series
        if 'job="celery-worker"' in series or 'job="skeldir-exporter"' in series
    }
    for scrape, of_worker in (("worker", True), ("exporter", False)):
        text = (ROOT / f"tests/monitoring/scrapes/{scrape}-healthy.txt").read_text()
        healthy = {recordings.name_of(series) for series in recordings.samples(text)}
        assert {name for name, by_worker in seen if by_worker == of_worker} - {"up"} == healthy
