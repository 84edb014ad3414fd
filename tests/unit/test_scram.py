"""The filter `skeldir_scram_fits`, with the example of RFC 7677 as PostgreSQL keeps it."""

import pytest

from roles.database.filter_plugins.skeldir_scram_fits import skeldir_scram_fits

PENCIL = (
    "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ=="
    "$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
)


@pytest.mark.parametrize(
    ("password", "verifier", "fits"),
    [
        ("pencil", PENCIL, True),
        ("Pencil", PENCIL, False),
        ("", PENCIL, False),
        ("pencil", PENCIL.replace("4096", "4097"), False),
        ("pencil", "md5ab3c2cf5a3f1c5d2f0c9e4b1b6a7d8e9", False),
        ("pencil", "", False),
        ("pencíl", PENCIL, False),
    ],
)
def test_a_password_fits_its_own_verifier_alone(password: str, verifier: str, fits: bool) -> None:
    assert skeldir_scram_fits(password, verifier) is fits
