"""The filter `skeldir_vaulted`: a text as ansible-vault keeps it, under the password this run was given."""

from collections.abc import Callable

from ansible.errors import AnsibleFilterError
from ansible.parsing.vault import VaultLib, VaultSecretsContext

DOCUMENTATION = """
name: skeldir_vaulted
short_description: A text, encrypted as ansible-vault does it
description:
  - Encrypts with what C(--ask-vault-pass), C(--vault-password-file) or C(--vault-id) gave this run, so what
    is written is read again with the same options. C(ansible.builtin.vault) would need it in a variable.
options:
  _input:
    description: The text.
    type: str
    required: true
"""

EXAMPLES = """
- ansible.builtin.copy:
    content: "{{ 'password: ' ~ password | skeldir_vaulted }}"
    dest: vault.yml
    mode: "0600"
"""

RETURN = """
_value:
  description: What ansible-vault reads.
  type: str
"""


def skeldir_vaulted(text: str) -> str:
    """Return the text encrypted, which nobody can without a password."""
    given = VaultSecretsContext.current(optional=True)
    if given is None or not given.secrets:
        raise AnsibleFilterError(
            "no vault password was given to encrypt with; add --ask-vault-pass or --vault-password-file"
        )
    return VaultLib(given.secrets).encrypt(str(text)).decode()  # type: ignore[no-any-return]


class FilterModule:
    """What Ansible asks for filters."""

    def filters(self) -> dict[str, Callable[[str], str]]:
        """Return the one there is."""
        return {"skeldir_vaulted": skeldir_vaulted}
