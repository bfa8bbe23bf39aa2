INSERT INTO audit (at_us, tenant_uid, actor, action, resource, sequence, outcome, digest) VALUES
    (1050, 't1', 'keys/k1', 'DeleteMemory', 'memories/carol', 1, 'BEGUN', CAST('chain-1' AS BYTES)),
    (1051, 't1', 'keys/k1', 'DeleteMemory', 'memories/carol', 2, 'OK', CAST('chain-2' AS BYTES));
