"""A certificate of the operator's own: what the role `tls` takes, and what it refuses in one sentence."""

import datetime
import json
import shutil
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.lab import ansible

pytestmark = pytest.mark.timeout(300)

HOST = "db1.example.net"
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
PLAYBOOK = """
- hosts: localhost
  connection: local
  gather_facts: false
  vars:
    tls_certificate: "{{ playbook_dir }}/{{ name }}/server.crt"
    tls_key: "{{ playbook_dir }}/{{ name }}/server.key"
    tls_authority_certificate: "{{ playbook_dir }}/ours.crt"
    skeldir_database_host: HOST
  tasks:
    - name: Judge each
      ansible.builtin.include_tasks: judge.yml
      loop: NAMES
      loop_control: {loop_var: name}
"""
JUDGE = """
- name: Judge it
  block:
    - ansible.builtin.import_role: {name: tls, tasks_from: own}
  rescue:
    - ansible.builtin.copy:
        content: "{{ ansible_failed_result.msg }}"
        dest: "{{ playbook_dir }}/{{ name }}/refused"
        mode: "0600"
"""


class Authority:
    """Signs certificates, and writes what it signed into a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self.subject, self.key, NOW - DAY, NOW + 9 * DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.certificate = self._write(f"{name}.crt", builder)

    def _builder(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        begins: datetime.datetime,
        ends: datetime.datetime,
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(self.subject, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
        )

    def _write(self, name: str, builder: x509.CertificateBuilder) -> Path:
        path = self.folder / name
        signed = builder.sign(self.key, hashes.SHA256())
        path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        return path

    def signed(
        self,
        case: str,
        name: str = HOST,
        begins: datetime.datetime = NOW - DAY,
        ends: datetime.datetime = NOW + DAY,
    ) -> Path:
        """A folder with a server's certificate for that name, and its key."""
        folder = self.folder / case
        folder.mkdir()
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(subject, key, begins, ends)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        self._write(f"{case}/server.crt", builder)
        (folder / "server.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return folder


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each certificate, with the file `refused` where it was."""
    folder = tmp_path_factory.mktemp("certificates")
    ours = Authority(folder, "ours")
    good = ours.signed("good")
    ours.signed("below", "*.example.net")
    ours.signed("ended", ends=NOW - DAY / 2)
    ours.signed("early", begins=NOW + DAY / 2)
    ours.signed("elsewhere", "db2.example.net")
    Authority(folder, "theirs").signed("strange")
    shutil.copy(good / "server.crt", ours.signed("locked") / "server.crt")
    (ours.signed("gone") / "server.key").unlink()
    cases = sorted(path.name for path in folder.iterdir() if path.is_dir())
    (folder / "judge.yml").write_text(JUDGE)
    playbook = folder / "playbook.yml"
    playbook.write_text(PLAYBOOK.replace("NAMES", json.dumps(cases)).replace("HOST", HOST))
    run = ansible("ansible-playbook", "--inventory=localhost,", playbook)
    assert run.status == 0, run.output
    return folder


@pytest.mark.parametrize("case", ["good", "below"])
def test_one_that_clients_take(judged: Path, case: str) -> None:
    assert not (judged / case / "refused").exists(), (judged / case / "refused").read_text()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("ended", "doesn't hold now"),
        ("early", "doesn't hold now"),
        ("elsewhere", f"lacks skeldir_database_host, {HOST}"),
        ("locked", "belongs to another key"),
        ("strange", "isn't vouched for"),
        ("gone", "has no file"),
    ],
)
def test_one_that_they_refuse(judged: Path, case: str, words: str) -> None:
    refused = (judged / case / "refused").read_text()
    assert words in refused
    assert str(judged / case) in refused
