-- Version 2: consumers; what the journal weighs; how far diffs may have been seen by somebody.

-- Consumers that asked for pages or acknowledged some: snapshots from `seq` on are kept for them; `has`: by their own word they
-- have what is up to it (otherwise it was only promised to them); and when they last said anything.
CREATE TABLE consumer (
  name TEXT PRIMARY KEY,
  seq INTEGER NOT NULL,
  has INTEGER NOT NULL,
  time_ns INTEGER NOT NULL
) WITHOUT ROWID;

-- Bytes of a diff's pages as stored.
ALTER TABLE diff ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
UPDATE diff SET bytes = (SELECT coalesce(sum(length(body)), 0) FROM page WHERE page.seq = diff.seq);

-- offered: no diff with a greater number has been handed to a publisher; those may still be squashed.
INSERT INTO meta SELECT 'offered', value - 1 FROM meta WHERE key = 'next_seq';

-- Bytes of all diffs together.
INSERT INTO meta SELECT 'journal_bytes', coalesce(sum(bytes), 0) FROM diff;
CREATE TRIGGER diff_added AFTER INSERT ON diff BEGIN
  UPDATE meta SET value = value + NEW.bytes WHERE key = 'journal_bytes';
END;
CREATE TRIGGER diff_dropped AFTER DELETE ON diff BEGIN
  UPDATE meta SET value = value - OLD.bytes WHERE key = 'journal_bytes';
END;
CREATE TRIGGER diff_changed AFTER UPDATE OF bytes ON diff BEGIN
  UPDATE meta SET value = value + NEW.bytes - OLD.bytes WHERE key = 'journal_bytes';
END;
