-- Two tenants; memories in every state; documents that are live, removed and set aside.
INSERT INTO tenants (uid, tenant_id, display_name, created_us) VALUES
    ('t1', 'acme', 'Acme; the first', 1000),
    ('t2', 'other', '', 1001);

INSERT INTO api_keys (key_id, tenant_uid, display_name, scope, operator, digest, created_us, expires_us, revoked_us) VALUES
    ('k1', 't1', 'operator', 'admin', TRUE, CAST('digest-1' AS BYTES), 1002, NULL, NULL),
    ('k2', 't1', '', 'read', FALSE, CAST('digest-2' AS BYTES), 1003, 9000000000000000, 2000),
    ('k3', 't2', 'Zoë', 'read_write', FALSE, CAST('digest-3' AS BYTES), 1004, NULL, NULL);

INSERT INTO models (model_id, display_name, identity, layout, max_document_tokens, max_question_tokens, max_answer_tokens, is_default, last_seen_us) VALUES
    ('fake', 'Fake', 'identity-1', '{"routed_layers": [1, 3]}', 2048, 512, 256, TRUE, 1005),
    ('second', 'Second', 'identity-2', '{"routed_layers": [2]}', 4096, 512, 256, FALSE, 1006);

INSERT INTO memories (uid, tenant_uid, memory_id, display_name, labels, packing_mode, window_turns, max_document_bytes, state, revision, last_number, deletion_epoch, document_count, text_bytes, created_us, updated_us, version) VALUES
    ('m1', 't1', 'alice', 'Alice', '{"team": "blue"}', 'window', 4, 8192, 'active', 4, 5, 1, 4, 100, 1010, 1015, 6),
    ('m2', 't1', 'imported', '', '{}', 'session', 0, 8192, 'importing', 0, 0, 0, 0, 0, 1011, 1011, 1),
    -- Its name is free again: another one has it.
    ('m3', 't2', 'bob', '', '{}', 'turn', 0, 4096, 'deleting', 1, 1, 1, 1, 7, 1012, 1013, 2),
    ('m4', 't2', 'bob', 'Bob', '{}', 'turn', 0, 4096, 'active', 0, 0, 0, 0, 0, 1014, 1014, 1);

INSERT INTO documents (memory_uid, number, revision_added, revision_removed, created_us, text_bytes) VALUES
    ('m1', 1, 1, NULL, 1020, 10),
    ('m1', 2, 1, 3, 1020, 11),
    ('m1', 3, 2, NULL, 1021, 20),
    ('m1', 4, 2, NULL, 1021, 30),
    ('m1', 5, 4, NULL, 1023, 40),
    ('m3', 1, 1, NULL, 1024, 7);

-- Under the default model one document waits and one is set aside; under the second everything waits.
INSERT INTO encodings (memory_uid, model_id, identity, encoded_number, pending_documents, pending_bytes, waiting_since_us, quarantined_documents, quarantined_bytes, tokens, bytes, failure) VALUES
    ('m1', 'fake', 'identity-1', 4, 1, 40, 1023, 1, 30, 12, 4096, ''),
    ('m1', 'second', 'identity-2', 0, 4, 100, 1020, 0, 0, 0, 0, 'MODEL_MISMATCH'),
    ('m4', 'fake', 'identity-1', 0, 0, 0, NULL, 0, 0, 0, 0, '');

INSERT INTO quarantined_documents (memory_uid, model_id, number, text_bytes, reason) VALUES
    ('m1', 'fake', 4, 30, 'DOCUMENT_TOO_LONG');

INSERT INTO requests (tenant_uid, request_id, method, fingerprint, reply, created_us) VALUES
    ('t1', 'r-1', 'AppendTurns', CAST('fingerprint' AS BYTES), CAST('reply' AS BYTES), 1030);

INSERT INTO usage (tenant_uid, queries, question_tokens, answer_tokens, encoded_tokens) VALUES
    ('t1', 3, 40, 50, 9000000000);

INSERT INTO audit (at_us, tenant_uid, actor, action, resource) VALUES
    (1040, 't1', 'keys/k1', 'CreateApiKey', 'tenants/acme/apiKeys/k2'),
    (1041, 'gone', 'memsvc init', 'CreateApiKey', '');
