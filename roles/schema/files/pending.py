"""What a release's migrations would do to the database, as JSON: run in its folder, with DATABASE_URL.

`unknown`: the database has them and the release doesn't know them; then nothing is pending. `pending` and
`contract`: not there yet; those of the branch `contract` take away what the release before uses, so they wait
until they are asked for. `targets`: what `alembic upgrade` is to be told for the pending ones alone.
"""

import json
import sys

from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import to_tuple
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError

from app.core.config import get_settings
from app.core.dsn import sqlalchemy_url

scripts = ScriptDirectory.from_config(Config("alembic.ini"))
known = {script.revision: script for script in scripts.walk_revisions()}
engine = create_engine(sqlalchemy_url(get_settings().database_url.get_secret_value()))
try:
    with engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_heads()
except DBAPIError as error:
    sys.exit(str(error.orig).strip().partition("\n")[0])

# A head implies what it stands on and what it depends on.
applied: set[str] = set()
ahead = [revision for revision in current if revision in known]
while ahead:
    script = known[ahead.pop()]
    applied.add(script.revision)
    ahead += [*to_tuple(script.down_revision, ()), *to_tuple(script.dependencies, ())]
# What a later release put on top says nothing of what is below.
unknown = set(current) - known.keys()
missing = set() if unknown else known.keys() - applied
# In a new database nobody uses anything yet.
contract = {revision for revision in missing if current and "contract" in known[revision].branch_labels}
labels = {min(known[revision].branch_labels) for revision in missing - contract}
print(
    json.dumps(
        {
            "current": sorted(current),
            "unknown": sorted(unknown),
            "pending": sorted(missing - contract),
            "contract": sorted(contract),
            "targets": [f"{label}@head" for label in sorted(labels)] if contract else ["heads"],
        }
    )
)
