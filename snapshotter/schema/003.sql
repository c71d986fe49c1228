-- Version 3: a checksum of each page of the file, so that a page that is not what was written is known for what it is.

-- Row N: the checksums of pages 256 N + 1 to 256 N + 256 (snapshotter/pagesums.py); row -1: whether they are complete.
CREATE TABLE page_sum (first INTEGER PRIMARY KEY, sums BLOB NOT NULL);
INSERT INTO page_sum VALUES (-1, CAST('none!' AS BLOB));
