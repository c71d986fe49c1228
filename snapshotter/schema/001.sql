-- The snapshot system file, version 1.

-- epoch, uuid, kind, io_threshold, time_threshold, created_ns, next_seq, acknowledged_seq, acknowledged_page
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;

-- Snapshots that retention keeps.
CREATE TABLE snapshot (
  seq INTEGER PRIMARY KEY,
  time_ns INTEGER NOT NULL,
  trigger TEXT NOT NULL,
  volume INTEGER NOT NULL,
  changes INTEGER NOT NULL,
  consistency TEXT NOT NULL,
  path BLOB
);

-- The journal: diffs and their pages; kept while unpublished, and as long as their snapshot.
CREATE TABLE diff (
  seq INTEGER PRIMARY KEY,
  parent INTEGER,
  time_ns INTEGER NOT NULL,
  trigger TEXT NOT NULL,
  volume INTEGER NOT NULL,
  consistency TEXT NOT NULL,
  path BLOB,
  changes INTEGER NOT NULL,
  pages INTEGER NOT NULL,
  page_limit INTEGER NOT NULL
);
CREATE TABLE page (
  seq INTEGER NOT NULL,
  page INTEGER NOT NULL,
  count INTEGER NOT NULL,
  deflated INTEGER NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (seq, page)
);

-- The metadata of the last snapshot, where the file system cannot give it back.
-- mode: with the type bits; blocks: bytes; clone: the snapshot that holds the file's content.
CREATE TABLE inode (
  ino INTEGER PRIMARY KEY,
  gen INTEGER NOT NULL,
  mode INTEGER NOT NULL,
  size INTEGER NOT NULL,
  blocks INTEGER NOT NULL,
  uid INTEGER NOT NULL,
  gid INTEGER NOT NULL,
  nlink INTEGER NOT NULL,
  mtime_ns INTEGER NOT NULL,
  ctime_ns INTEGER NOT NULL,
  btime_ns INTEGER,
  rdev INTEGER,
  xattrs BLOB,
  target BLOB,
  clone INTEGER
);
CREATE TABLE entry (
  parent INTEGER NOT NULL,
  name BLOB NOT NULL,
  ino INTEGER NOT NULL,
  PRIMARY KEY (parent, name)
) WITHOUT ROWID;
CREATE INDEX entry_of ON entry (ino);

-- To be looked at again by the next snapshot: looked at too soon after their last change, or while they changed.
CREATE TABLE again (ino INTEGER NOT NULL, gen INTEGER NOT NULL, name BLOB, PRIMARY KEY (ino, gen, name));

-- Clones that the head no longer uses: removed when the oldest kept snapshot is `until` or later.
CREATE TABLE spent_clone (
  until INTEGER NOT NULL,
  seq INTEGER NOT NULL,
  ino INTEGER NOT NULL,
  gen INTEGER NOT NULL,
  PRIMARY KEY (until, seq, ino, gen)
) WITHOUT ROWID;
