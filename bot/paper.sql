-- What the paper exchange keeps. Rows are documents: the struct as JSON beside the columns it is looked up by.
PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS row (
  kind TEXT, account TEXT, symbol TEXT, id INTEGER, name TEXT, ref INTEGER, is_open INTEGER,
  time_ms INTEGER, body BLOB, PRIMARY KEY (kind, account, id, symbol)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS row_time ON row (kind, account, time_ms, id);
DROP INDEX IF EXISTS row_name;
CREATE INDEX IF NOT EXISTS row_named ON row (kind, account, name, time_ms, id);
DROP INDEX IF EXISTS row_ref;
CREATE INDEX IF NOT EXISTS row_of ON row (kind, account, ref, time_ms, id);
CREATE INDEX IF NOT EXISTS row_open ON row (id) WHERE is_open = 1;
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, body BLOB);
