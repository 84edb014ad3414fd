"""Unit tests need no database: the DSN they are given leads nowhere."""

import os

os.environ["DATABASE_URL"] = "postgresql+asyncpg://nobody:nothing@127.0.0.1:1/nowhere?channel_binding=require"
