"""The filter `skeldir_scram_fits`: whether a password is the one PostgreSQL keeps the SCRAM verifier of."""

import base64
import hashlib
import hmac
import re
from collections.abc import Callable

DOCUMENTATION = """
name: skeldir_scram_fits
short_description: Whether a password is the one a SCRAM verifier was made of
description:
  - Compares it with what C(pg_authid.rolpassword) holds, without a connection for each role.
  - False also for a verifier of another kind, and for a password that is not ASCII, which PostgreSQL may have
    normalized first (RFC 4013); whoever then sets it anew changes nothing.
options:
  _input:
    description: The password.
    type: str
    required: true
  verifier:
    description: What the database keeps of it; empty when it keeps nothing.
    type: str
    required: true
"""

EXAMPLES = """
- ansible.builtin.assert:
    that: password | skeldir_scram_fits(found.rolpassword)
"""

RETURN = """
_value:
  description: Whether it fits.
  type: bool
"""

# https://www.postgresql.org/docs/current/catalog-pg-authid.html
_VERIFIER = re.compile(r"SCRAM-SHA-256\$(\d+):([\w+/=]+)\$([\w+/=]+):([\w+/=]+)", re.ASCII)


def skeldir_scram_fits(password: str, verifier: str) -> bool:
    """Return whether the password gives the verifier's stored key (RFC 5802, section 3)."""
    kept = _VERIFIER.fullmatch(verifier)
    if kept is None or not password.isascii():
        return False
    iterations, salt, stored_key = int(kept[1]), base64.b64decode(kept[2]), base64.b64decode(kept[3])
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    return hmac.compare_digest(hashlib.sha256(client_key).digest(), stored_key)


class FilterModule:
    """What Ansible asks for filters."""

    def filters(self) -> dict[str, Callable[[str, str], bool]]:
        """Return the one there is."""
        return {"skeldir_scram_fits": skeldir_scram_fits}
