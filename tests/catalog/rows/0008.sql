-- Unlike what a migration finds in the documents, a revision that removed one is there.
INSERT INTO revisions (memory_uid, revision, created_us, documents_added, documents_removed, last_number) VALUES
    ('m1', 1, 1020, 2, 0, 2),
    ('m1', 2, 1021, 2, 0, 4),
    ('m1', 3, 1022, 0, 1, 4),
    ('m1', 4, 1023, 1, 0, 5),
    ('m3', 1, 1024, 1, 0, 1);
