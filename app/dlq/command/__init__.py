"""`skeldir dlq`: the operator's way to the dead letters, in tables for people and in JSON for machines."""

import typer

from app.dlq.command import archiving, deciding, look, replaying

dlq_cli = typer.Typer(
    help="Dead letters: what failed for good, and how it is brought back.", no_args_is_help=True
)
for name, command in {
    "list": look.list_,
    "groups": look.groups,
    "show": look.show,
    "replay": replaying.replay_,
    "ignore": deciding.ignore,
    "note": deciding.note,
    "assign": deciding.assign,
    "export": archiving.export_,
    "import": archiving.import_,
    "purge": archiving.purge,
    "stats": look.stats,
}.items():
    dlq_cli.command(name)(command)
