-- A memory that was deleted, and a fork that shows two of its documents, one of which it had removed
-- itself; the third is on its way out of the fork.
INSERT INTO memories (uid, tenant_uid, memory_id, display_name, labels, packing_mode, window_turns, max_document_bytes, state, revision, last_number, deletion_epoch, document_count, text_bytes, created_us, updated_us, version, purged_us) VALUES
    ('m5', 't1', '', '', '{}', 'turn', 0, 4096, 'deleting', 1, 3, 1, 0, 0, 1060, 1061, 3, 1062);
INSERT INTO memories (uid, tenant_uid, memory_id, display_name, labels, packing_mode, window_turns, max_document_bytes, state, revision, last_number, deletion_epoch, document_count, text_bytes, created_us, updated_us, version, forked_from, forked_revision) VALUES
    ('m6', 't1', 'fork', '', '{}', 'turn', 0, 4096, 'active', 2, 3, 1, 2, 15, 1060, 1060, 2, 'm5', 1);

INSERT INTO documents (memory_uid, number, revision_added, revision_removed, created_us, text_bytes) VALUES
    ('m5', 1, 1, NULL, 1060, 7),
    ('m5', 2, 1, 0, 1060, 8),
    ('m5', 3, 1, NULL, 1060, 9),
    ('m6', 3, 1, 2, 1060, 9);

INSERT INTO lineages (memory_uid, first_number, owner_uid, last_number) VALUES ('m6', 1, 'm5', 3);
